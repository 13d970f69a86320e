"""
Your own text: files, or folders with everything below them that is UTF-8, but for hidden files,
__pycache__, *.bin and meta.json.

    python data/text/prepare.py FILE_OR_FOLDER ... --out=data/mine [--tokenizer=1024]
    python train.py --dataset=mine

A file is a document. One in ten goes to val; of a few files, the last tenth of each.
"""
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.corpus import arguments, named, prepare, read_files, read_text, split_files

SKIP = ('.*', '__pycache__', '*.bin', 'meta.json')  # hidden, built, and what we write


def main():
    parser = arguments(__doc__, __file__, tokenizer='1024')
    parser.add_argument('paths', nargs='+', type=named, metavar='FILE_OR_FOLDER')
    args = parser.parse_args()
    files = []
    for path in map(Path, args.paths):
        whole = os.path.isdir(path)
        found = read_files(path, '*', SKIP) if whole else [(path.name, read_text(path))]
        if not any(text for _, text in found):
            raise SystemExit(f'{path}: no UTF-8 text here')
        files += found
    prepare(args.out, Path(args.out).resolve().name, split_files(files), args.tokenizer)


if __name__ == '__main__':
    main()
