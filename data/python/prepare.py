"""
The Python source of the installed torch 2.13.0: 40 MB, no download. The same bytes with every
Python and wheel, for CPU, CUDA or Mac: of their 2,285 files only version.py differs, which is left
out, and on Windows line ends, which are made alike.

    python data/python/prepare.py [--tokenizer=1024] [--out=data/python]
"""
import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.corpus import arguments, prepare, read_files, split_files

# tests, others' code, tables that a program wrote, and what differs
SKIP = ('testing', 'test', 'tests', '__pycache__', '_vendor', '*generated*', '_triton_ops_meta.py',
        'version.py')


def main():
    args = arguments(__doc__, __file__, tokenizer='1024').parse_args()
    folder, = importlib.util.find_spec('torch').submodule_search_locations
    files = [(path, text.replace('\r\n', '\n')) for path, text in read_files(folder, '*.py', SKIP)]
    prepare(args.out, 'python', split_files(files), args.tokenizer)


if __name__ == '__main__':
    main()
