"""
OpenWebText, the open copy of GPT-2's training data: 8 million documents, 9 billion GPT-2 tokens,
17 GB as train.bin. nanoGPT's validation split: 4,434,897 tokens. Needs `pip install datasets` and
54 GB of disk.

    python data/openwebtext/prepare.py
"""
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.corpus import arguments, load_hub, prepare

DOCUMENTS = 8_013_769


def documents():
    """nanoGPT's split of the corpus, as ('train' or 'val', text); loaded when first asked for."""
    # the hub's conversion: datasets >= 4 does not run the script that the corpus itself comes with
    dataset = load_hub('Skylion007/openwebtext', revision='refs/convert/parquet', split='train')
    if len(dataset) != DOCUMENTS:  # the hub converts no more than the start of some corpora
        raise SystemExit(f'the copy of openwebtext on the hub has {len(dataset):,} documents, not '
                         f'{DOCUMENTS:,}: losses would not compare; use data/fineweb')
    parts = dataset.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    for split, part in (('val', parts['test']), ('train', parts['train'])):
        for document in tqdm(part, desc=split, unit=' documents', disable=None):
            yield split, document['text']


def main():
    args = arguments(__doc__, __file__).parse_args()
    prepare(args.out, 'openwebtext', documents(), 'gpt2')


if __name__ == '__main__':
    main()
