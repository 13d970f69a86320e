"""
Tiny Shakespeare, character by character: 1.1 MB, downloaded once, split 90/10 as in nanoGPT.

    python data/shakespeare_char/prepare.py

The text is ASCII, so a character is a byte and the vocabulary is simply the 256 bytes, of which 65
occur; losses per token compare with nanoGPT's. --tokenizer=gpt2 is nanoGPT's data/shakespeare.
"""
import http.client
import os
import sys
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.corpus import arguments, prepare, read_text, split_files

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'


def download(path):
    """Fetch input.txt, all of it or nothing."""
    try:
        with urllib.request.urlopen(URL, timeout=30) as response:
            text = response.read()
        path.with_suffix('.tmp').write_bytes(text)
        os.replace(path.with_suffix('.tmp'), path)
    except (OSError, http.client.HTTPException) as error:
        raise SystemExit(f'cannot download tiny shakespeare ({error}): save {URL} as {path}, '
                         'or use --dataset=python, which needs no download') from None


def main():
    args = arguments(__doc__, __file__, tokenizer='256').parse_args()
    path = Path(__file__).resolve().with_name('input.txt')
    if not path.exists():
        download(path)
    text = read_text(path)
    if not text:
        raise SystemExit(f'{path}: empty or not UTF-8; delete it and run this again')
    prepare(args.out, 'shakespeare_char', split_files([(path.name, text)]), args.tokenizer)


if __name__ == '__main__':
    main()
