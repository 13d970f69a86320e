"""
The source code of the installed sympy, which comes with torch: 16 MB, no download. All machines
with sympy 1.14.0 get the same bytes.

    python data/sympy/prepare.py [--tokenizer=1024] [--out=data/sympy]
"""
import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.corpus import arguments, prepare, read_files, split_files


def main():
    args = arguments(__doc__, __file__, tokenizer='1024').parse_args()
    spec = importlib.util.find_spec('sympy')
    if not spec:
        raise SystemExit('sympy is not installed: pip install sympy==1.14.0')
    # max_bytes leaves one file out, a benchmark with systems of hundreds of equations
    folder = spec.submodule_search_locations[0]
    files = read_files(folder, '*.py', skip=('tests', '__pycache__'), max_bytes=400_000)
    prepare(args.out, 'sympy', split_files(files), args.tokenizer)


if __name__ == '__main__':
    main()
