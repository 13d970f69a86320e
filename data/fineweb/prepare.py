"""
FineWeb-Edu (arxiv.org/abs/2406.17557), as much of its 10-billion-token sample as you ask for,
tokens of GPT-2. Streams: nothing but the dataset is kept on disk. Needs `pip install datasets`.

    python data/fineweb/prepare.py [--tokens=1e9]
"""
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.corpus import arguments, load_hub, prepare

VAL = 200  # one document in this many; nanoGPT's one in 2,000 is too few when --tokens is small


def documents():
    """The sample as ('train' or 'val', text); loaded when first asked for."""
    dataset = load_hub('HuggingFaceFW/fineweb-edu', name='sample-10BT', split='train',
                       streaming=True)
    for i, document in enumerate(tqdm(dataset, unit=' documents', disable=None)):
        yield 'train' if i % VAL else 'val', document['text']


def main():
    parser = arguments(__doc__, __file__)
    parser.add_argument('--tokens', type=float, default=1e9, help='stop here (default: 1e9)')
    args = parser.parse_args()
    prepare(args.out, 'fineweb', documents(), 'gpt2', limit=args.tokens)


if __name__ == '__main__':
    main()
