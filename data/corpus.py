"""
From text to a dataset: a folder of train.bin, val.bin (flat ids, see tokens_dtype) and meta.json.

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
import shlex
import sys
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
    """The text of the file `path`; None if it is not UTF-8."""
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError:
        return None
    except OSError as error:
        raise SystemExit(f'{path}: {error.strerror}') from None


def read_files(root, pattern='*', skip=(), max_bytes=math.inf):
    """
    The text files under folder `root` whose name fits `pattern`, as a sorted list of (path
    relative to root, text). Leaves out files that are empty or larger than `max_bytes`, files and
    folders with a name that fits a pattern in `skip` and, with a word, files that are not UTF-8.
    """
    def wanted(name):
        return not any(fnmatchcase(name, s) for s in skip)

    files, foreign = [], []
    for folder, folders, names in os.walk(root):
        folders[:] = filter(wanted, folders)  # in place: os.walk does not enter the others
        for path in (Path(folder, name) for name in names):
            if fnmatchcase(path.name, pattern) and wanted(path.name) and path.is_file():
                if path.stat().st_size <= max_bytes:
                    name, text = path.relative_to(root).as_posix(), read_text(path)
                    if text is None:
                        foreign.append(name)
                    elif text:
                        files.append((name, text))
    if foreign:
        print(f'{root}: files left out, as they are not UTF-8: {len(foreign):,}, such as '
              f'{min(foreign)}')
    return sorted(files)


def load_hub(path, **options):
    """A dataset of the Hugging Face hub, or SystemExit with what went wrong and a way out."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise SystemExit('this corpus needs the datasets library: pip install datasets') from None
    try:
        return load_dataset(path, **options)
    except Exception as error:  # of the hub, the network, the disk: its own words say most
        why = ' '.join(f'{type(error).__name__}: {error}'.split())
        raise SystemExit(f'cannot load {path}: {why[:500]}; --dataset=python needs no '
                         'download') from None


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


def tokens_dtype(vocab_size):
    """Of the ids in a .bin, little-endian: uint16 where all of them fit, else uint32."""
    return np.dtype('<u2' if vocab_size <= 2**16 else '<u4')


def prepare(out_dir, name, documents, vocab, limit=math.inf):
    """
    Write a dataset into `out_dir`, print a summary and return its meta. SystemExit if it cannot.

    `documents` is a list of ('train' or 'val', text); with a `vocab`, see make_tokenizer, that has
    nothing to learn from them, it may be any iterable and is never held in memory. Stops after the
    document that reaches `limit` tokens.
    """
    start = time.perf_counter()
    learns = str(vocab).isdecimal()
    train = (text for split, text in documents if split == 'train') if learns else ()
    tokenizer = make_tokenizer(vocab, ''.join(train))
    try:
        meta = write(Path(out_dir), name, tokenizer, documents, limit)
    except OSError as error:  # a full disk, a folder we may not write to, a connection that broke
        raise SystemExit(f'{name}: {out_dir} is not written: {error}') from None
    print(f"{name}: {meta['train_bytes'] / 1e6:.2f} MB to train, {meta['val_bytes'] / 1e6:.2f} to "
          f"val; {meta['train_tokens']:,} and {meta['val_tokens']:,} tokens of "
          f"{meta['bytes_per_token']:.3f} bytes, vocabulary {meta['vocab_size']:,}\n"
          f"wrote {out_dir} in {time.perf_counter() - start:.1f} s, sha256 {meta['sha256'][:16]}\n"
          'to train on it: python train.py config/ternary.py '
          f'--dataset={shlex.quote(dataset_name(out_dir))}')
    return meta


def dataset_name(out_dir):
    """What train.py calls a dataset: by name where its folder lies in data/, else by path."""
    path = os.path.abspath(out_dir)
    named = os.path.samefile(os.path.dirname(path), os.path.dirname(os.path.abspath(__file__)))
    return os.path.basename(path) if named else path


def write(out_dir, name, tokenizer, documents, limit):
    """Encode `documents` into `out_dir` and return the meta; all or nothing."""
    out_dir.mkdir(parents=True, exist_ok=True)
    tokens, size = {'train': 0, 'val': 0}, {'train': 0, 'val': 0}
    digest = {'train': hashlib.sha256(), 'val': hashlib.sha256()}
    dtype = tokens_dtype(tokenizer['vocab_size'])
    # in out_dir, so that to replace is to rename, which is atomic; goes away on any error
    with tempfile.TemporaryDirectory(prefix='.tmp-', dir=out_dir) as tmp:
        with open(f'{tmp}/train.bin', 'wb') as train, open(f'{tmp}/val.bin', 'wb') as val:
            for split, text, ids in encode(tokenizer, documents):
                tokens[split] += len(ids)
                ids = np.array(ids, dtype).tobytes()
                (train if split == 'train' else val).write(ids)
                digest[split].update(ids)
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
    enc, end = encoding(tokenizer), list(tokenizer['special'].values())[:1]
    documents = iter(documents)
    while chunk := list(islice(documents, batch)):
        ids = enc.encode_ordinary_batch([text for _, text in chunk], num_threads=os.cpu_count())
        for (split, text), doc in zip(chunk, ids):
            yield split, text, doc + end


# -----------------------------------------------------------------------------
# command line


def arguments(doc, script, vocab=None):
    """An argument parser explained by `doc`, with --out and, given its default, --vocab."""
    sys.stdout.reconfigure(errors='replace')  # a console need not know every character of a path
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    # one line instead of the usage and a line
    parser.error = lambda message: parser.exit(2, f'{script}: {message} (see --help)\n')
    parser.add_argument('--out', default=os.path.dirname(os.path.abspath(script)),
                        help='folder of the dataset (default: the one of this script)')
    if vocab:
        parser.add_argument('--vocab', default=vocab,
                            help='256: bytes; more: a BPE of that many tokens; gpt2; or the path '
                                 f'of a checkpoint, whose tokens to use (default: {vocab})')
    return parser
