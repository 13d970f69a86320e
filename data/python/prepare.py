"""
The standard library of the Python that runs this: 8 MB of source code, no download.

    python data/python/prepare.py [--tokenizer=1024] [--out=data/python]

Versions of Python differ, and so do the losses on them: data/sympy is the same on every machine.
"""
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.corpus import arguments, prepare, read_files, split_files

# other people's code, tests, tables, and files that hold paths of the machine
SKIP = ('site-packages', 'dist-packages', '__pycache__', 'test', 'tests', 'encodings', 'idlelib',
        'lib2to3', 'tkinter', 'turtledemo', 'distutils', 'ensurepip', 'pydoc_data', 'config-*',
        'sitecustomize.py', 'usercustomize.py', '_sysconfigdata*')


def main():
    args = arguments(__doc__, __file__, tokenizer='1024').parse_args()
    stdlib = sysconfig.get_path('stdlib')
    files = read_files(stdlib, '*.py', SKIP)
    if len(files) < 100:
        raise SystemExit(f'{stdlib}: this Python comes without its source code; use another one, '
                         'or data/sympy/prepare.py')
    prepare(args.out, 'python', split_files(files), args.tokenizer)


if __name__ == '__main__':
    main()
