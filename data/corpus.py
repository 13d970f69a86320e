"""
From text to a dataset: a folder of train.bin, val.bin (flat uint16, little-endian) and meta.json.

meta.json holds the tokenizer (see tokenizer.py) and
  name             of the corpus
  train_tokens, val_tokens, train_bytes, val_bytes
                   ids in each .bin (end-of-text included), bytes of the text they stand for
  bytes_per_token  val_bytes / val_tokens: bits per byte = nats per token / ln 2 / bytes_per_token
  sha256           of tokenizer, train.bin and val.bin. Only losses under one sha256 compare.

meta.json is written last, and removed first when a dataset is made anew: where it exists, the
dataset is complete.
"""
import argparse
import hashlib
import json
import math
import os
import tempfile
import time
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path

import numpy as np

from data.tokenizer import encoding, make_tokenizer

# -----------------------------------------------------------------------------
# files -> documents


def read_text(path):
    """The text of the file `path`; '' if it is not UTF-8."""
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError:
        return ''
    except OSError as error:
        raise SystemExit(f'{path}: {error.strerror}') from None


def read_files(root, pattern='*', skip=(), max_bytes=math.inf):
    """
    The text files under folder `root` whose name fits `pattern`, as a sorted list of (path
    relative to root, text). Leaves out files that are empty, not UTF-8 or larger than `max_bytes`,
    and files and folders with a name that fits a pattern in `skip`.
    """
    def wanted(name):
        return not any(fnmatchcase(name, s) for s in skip)

    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = filter(wanted, folders)  # in place: os.walk does not enter the others
        for path in (Path(folder, name) for name in names):
            if fnmatchcase(path.name, pattern) and wanted(path.name) and path.is_file():
                if path.stat().st_size <= max_bytes and (text := read_text(path)):
                    files.append((path.relative_to(root).as_posix(), text))
    return sorted(files)


def load_hub(path, **options):
    """A dataset of the Hugging Face hub, or SystemExit with the way out."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise SystemExit('this corpus needs the datasets library: pip install datasets') from None
    try:
        return load_dataset(path, **options)
    except (OSError, RuntimeError, ValueError) as error:
        raise SystemExit(f"cannot load {path} ({' '.join(str(error).split())}): needs a network; "
                         '--dataset=python needs no download') from None


def split_files(files):
    """
    [(path, text)] -> [('train' or 'val', text)], one file in ten to val by a hash of its path: the
    same on every machine, and a new file moves no other. Where that leaves one of the two empty,
    as with a single file, the last tenth of every file is val.
    """
    def is_val(path):
        return int(hashlib.sha256(os.fsencode(path)).hexdigest(), 16) % 10 == 0

    documents = [('val' if is_val(path) else 'train', text) for path, text in files]
    if len({split for split, _ in documents}) == 2:
        return documents
    cut = [(text, int(0.9 * len(text))) for _, text in files]
    return [('train', text[:n]) for text, n in cut] + [('val', text[n:]) for text, n in cut]


# -----------------------------------------------------------------------------
# documents -> dataset


def prepare(out_dir, name, documents, vocab, limit=math.inf):
    """
    Write a dataset into `out_dir`, print a summary and return its meta. SystemExit if it cannot.

    `documents` is a list of ('train' or 'val', text); with vocab='gpt2', which has nothing to
    learn from them, it may be any iterable and is never held in memory. `vocab` as in
    make_tokenizer. Stops after the document that reaches `limit` tokens.
    """
    start = time.perf_counter()
    learn = () if vocab == 'gpt2' else (text for split, text in documents if split == 'train')
    tokenizer = make_tokenizer(vocab, ''.join(learn))
    try:
        meta = write(Path(out_dir), name, tokenizer, documents, limit)
    except OSError as error:  # a full disk, a folder we may not write to, a connection that broke
        raise SystemExit(f'{name}: {out_dir} is not written: {error}') from None
    print(f"{name}: {meta['train_bytes'] / 1e6:.2f} MB to train, {meta['val_bytes'] / 1e6:.2f} to "
          f"val; {meta['train_tokens']:,} and {meta['val_tokens']:,} tokens of "
          f"{meta['bytes_per_token']:.3f} bytes, vocabulary {meta['vocab_size']:,}\n"
          f"wrote {out_dir} in {time.perf_counter() - start:.1f} s, sha256 {meta['sha256'][:16]}")
    return meta


def write(out_dir, name, tokenizer, documents, limit):
    """Encode `documents` into `out_dir` and return the meta; all or nothing."""
    out_dir.mkdir(parents=True, exist_ok=True)
    tokens, size = {'train': 0, 'val': 0}, {'train': 0, 'val': 0}
    digest = {'train': hashlib.sha256(), 'val': hashlib.sha256()}
    # in out_dir, so that to replace is to rename, which is atomic; goes away on any error
    with tempfile.TemporaryDirectory(prefix='.tmp-', dir=out_dir) as tmp:
        with open(f'{tmp}/train.bin', 'wb') as train, open(f'{tmp}/val.bin', 'wb') as val:
            for split, text, ids in encode(tokenizer, documents):
                ids = np.array(ids, dtype='<u2').tobytes()
                (train if split == 'train' else val).write(ids)
                digest[split].update(ids)
                tokens[split] += len(ids) // 2
                size[split] += len(text.encode())
                if sum(tokens.values()) >= limit:
                    break
        for split in tokens:
            if not size[split]:
                raise SystemExit(f'{name}: too little text, nothing is left for {split}.bin')
        sha256 = hashlib.sha256(json.dumps(tokenizer, sort_keys=True).encode())
        sha256.update(digest['train'].digest() + digest['val'].digest())
        meta = {'name': name, 'train_tokens': tokens['train'], 'val_tokens': tokens['val'],
                'train_bytes': size['train'], 'val_bytes': size['val'],
                'bytes_per_token': size['val'] / tokens['val'],
                'sha256': sha256.hexdigest(), **tokenizer}
        with open(f'{tmp}/meta.json', 'w', encoding='utf-8') as file:
            json.dump(meta, file, indent=1)
        (out_dir / 'meta.json').unlink(missing_ok=True)
        for file in ('train.bin', 'val.bin', 'meta.json'):
            os.replace(f'{tmp}/{file}', out_dir / file)
    return meta


def encode(tokenizer, documents, batch=1024):
    """Yield (split, text, ids) of every document, each ended by EOT where there is one."""
    enc, end = encoding(tokenizer), list(tokenizer['special'].values())
    documents = iter(documents)
    while chunk := list(islice(documents, batch)):
        ids = enc.encode_ordinary_batch([text for _, text in chunk], num_threads=os.cpu_count())
        for (split, text), doc in zip(chunk, ids):
            yield split, text, doc + end


# -----------------------------------------------------------------------------
# command line


def arguments(doc, script, vocab=None):
    """An argument parser explained by `doc`, with --out and, given its default, --vocab."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    # one line instead of the usage and a line
    parser.error = lambda message: parser.exit(2, f'{script}: {message} (see --help)\n')
    parser.add_argument('--out', default=os.path.dirname(os.path.abspath(script)),
                        help='folder of the dataset (default: the one of this script)')
    if vocab:
        parser.add_argument('--vocab', default=vocab,
                            help='256: bytes; more: a BPE of that many tokens; or gpt2 '
                                 f'(default: {vocab})')
    return parser
