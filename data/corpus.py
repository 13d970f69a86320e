"""
From text to a dataset: a folder of train.bin, val.bin (flat ids, see tokens_dtype) and meta.json.

meta.json holds the tokenizer (see tokenizer.py) and
  name             of the corpus
  train_tokens, val_tokens, train_bytes, val_bytes
                   ids in each .bin (end-of-text included), bytes of the text they stand for
  bytes_per_token  val_bytes / val_tokens: bits per byte = nats per token / ln 2 / bytes_per_token
  unigram_loss, xz_bpb
                   of val.bin, to hold losses against: the entropy of its unigrams, nats a token;
                   bits a byte by xz
  sha256           of tokenizer, train.bin and val.bin. Only losses under one sha256 compare.

meta.json is written last, and removed first when a dataset is made anew: where it exists, the
dataset is complete.
"""
import argparse
import hashlib
import json
import lzma
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from fnmatch import fnmatchcase
from functools import lru_cache
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
    folders with a name that fits a pattern in `skip` and, with a message, folders that are links
    and files that are not UTF-8. SystemExit if it may not read one.
    """
    def wanted(name):
        return not any(fnmatchcase(name, s) for s in skip)

    def stop(error):
        raise SystemExit(f'{error.filename}: {error.strerror}')

    files, foreign, links = [], [], []
    for folder, folders, names in os.walk(root, onerror=stop):
        folders[:] = filter(wanted, folders)  # in place: os.walk does not enter the others
        links += [path for path in (os.path.join(folder, f) for f in folders)
                  if os.path.islink(path)]
        for path in (Path(folder, name) for name in names):
            try:
                fits = (fnmatchcase(path.name, pattern) and wanted(path.name) and path.is_file()
                        and path.stat().st_size <= max_bytes)
            except OSError as error:
                stop(error)
            if fits:
                name, text = path.relative_to(root).as_posix(), read_text(path)
                if text is None:
                    foreign.append(name)
                elif text:
                    files.append((name, text))
    for found, why in (foreign, 'files left out, as they are not UTF-8'), (
            links, 'folders left out, as they are links'):
        if found:
            print(f'{root}: {why}: {len(found):,}, such as {min(found)}')
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
    same on every machine, and a new file moves no other. Where that is less than 3 % of the text
    or more than 30 %, as with few files, the last tenth of every file is val.
    """
    def is_val(path):
        return int(hashlib.sha256(os.fsencode(path)).hexdigest(), 16) % 10 == 0

    documents = [('val' if is_val(path) else 'train', text) for path, text in files]
    val = sum(len(text) for split, text in documents if split == 'val')
    both = sum(len(text) for _, text in files)
    if 0.03 * both <= val <= 0.3 * both:
        return documents
    cut = [(text, int(0.9 * len(text))) for _, text in files]
    return [('train', text[:n]) for text, n in cut] + [('val', text[n:]) for text, n in cut]


# -----------------------------------------------------------------------------
# documents -> dataset

TOKENIZER = 'tokenizer', 'vocab_size', 'pattern', 'ranks', 'special'    # its keys in meta.json
NUMBERS = 'train_tokens', 'val_tokens', 'train_bytes', 'val_bytes', 'bytes_per_token'
LOOKED_THROUGH = 5e7    # tokens, at the start of a run
FILES = 'train.bin', 'val.bin', 'meta.json'
YARDSTICKS = 'unigram_loss', 'xz_bpb'


def tokens_dtype(vocab_size):
    """Of the ids in a .bin, little-endian: uint16 where all of them fit, else uint32."""
    return np.dtype('<u2' if vocab_size <= 2**16 else '<u4')


def prepare(out_dir, name, documents, which, limit=math.inf):
    """
    Write a dataset into `out_dir`, print a summary and return its meta. SystemExit if it cannot.

    `documents` is a list of ('train' or 'val', text); where the tokenizer, `which` of those of
    make_tokenizer, has nothing to learn from them, it may be any iterable and is never held in
    memory. Stops after the document that reaches `limit` tokens.
    """
    start = time.perf_counter()
    learns = str(which).isdecimal() and int(which) > 256
    train = (text for split, text in documents if split == 'train') if learns else ()
    try:
        tokenizer = make_tokenizer(which, ''.join(train))
        meta = write(Path(out_dir), name, tokenizer, documents, limit)
    except Exception as error:  # a full disk, a folder we may not write to, a stream that broke, ..
        raise SystemExit(f'{name}: {out_dir} is not written: {error!r}') from None
    print(f"{name}: {meta['train_bytes'] / 1e6:.2f} MB to train, {meta['val_bytes'] / 1e6:.2f} to "
          f"val; {meta['train_tokens']:,} and {meta['val_tokens']:,} tokens of "
          f"{meta['bytes_per_token']:.3f} bytes, vocabulary {meta['vocab_size']:,}\n"
          f"to hold losses against: unigrams {meta['unigram_loss']:.2f} nats/token, xz "
          f"{meta['xz_bpb']:.2f} bits/byte\n"
          f"wrote {out_dir} in {time.perf_counter() - start:.1f} s, sha256 {meta['sha256'][:16]}\n"
          'to train on it: python train.py config/ternary.py '
          f'--dataset={shlex.quote(dataset_name(out_dir))}')
    return meta


def folder_of(dataset):
    """The folder of a dataset, by its name in data/, or by its path."""
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), dataset)


def dataset_name(out_dir):
    """What train.py calls a dataset: by name where its folder lies in data/, else by path."""
    path = os.path.abspath(out_dir)
    named = os.path.realpath(os.path.dirname(path)) == os.path.dirname(os.path.realpath(__file__))
    return os.path.basename(path) if named else path


def write(out_dir, name, tokenizer, documents, limit):
    """Encode `documents` into `out_dir` and return the meta; all or nothing."""
    out_dir.mkdir(parents=True, exist_ok=True)
    check_own(out_dir)
    tokens, size = {'train': 0, 'val': 0}, {'train': 0, 'val': 0}
    digest = {'train': hashlib.sha256(), 'val': hashlib.sha256()}
    dtype, xz, squeezed = tokens_dtype(tokenizer['vocab_size']), lzma.LZMACompressor(), 0
    # in out_dir, so that to replace is to rename, which is atomic; goes away on any error
    with tempfile.TemporaryDirectory(prefix='.tmp-', dir=out_dir) as tmp:
        with open(f'{tmp}/train.bin', 'wb') as train, open(f'{tmp}/val.bin', 'wb') as val:
            for split, text, ids in encode(tokenizer, documents):
                tokens[split] += len(ids)
                ids = np.array(ids, dtype).tobytes()
                (train if split == 'train' else val).write(ids)
                digest[split].update(ids)
                size[split] += len(text.encode())
                if split == 'val':
                    squeezed += len(xz.compress(text.encode()))
                if sum(tokens.values()) >= limit:
                    break
        for split in tokens:
            if not size[split]:
                raise SystemExit(f'{name}: too little text, nothing is left for {split}.bin')
        numbers = *tokens.values(), *size.values(), size['val'] / tokens['val']
        p = np.bincount(np.fromfile(f'{tmp}/val.bin', dtype)) / tokens['val']
        marks = -(p * np.log(p + (p == 0))).sum(), 8 * (squeezed + len(xz.flush())) / size['val']
        meta = {'name': name, **dict(zip(NUMBERS, numbers)),
                **dict(zip(YARDSTICKS, map(float, marks))), **tokenizer,
                'sha256': sha256_of(tokenizer, digest['train'], digest['val'])}
        with open(f'{tmp}/meta.json', 'w', encoding='utf-8') as file:
            json.dump(meta, file, indent=1)
        (out_dir / 'meta.json').unlink(missing_ok=True)
        for file in FILES:
            os.replace(f'{tmp}/{file}', out_dir / file)
    return meta


def check_own(folder):
    """SystemExit if `folder` has files that a dataset would replace, and that are of no dataset."""
    try:
        known = 'train_tokens' in json.loads((folder / 'meta.json').read_bytes())
    except (OSError, ValueError):
        known = False
    if found := [file for file in FILES if not known and (folder / file).exists()]:
        raise SystemExit(f'{folder / found[0]} is of no dataset that we know: remove it, or give '
                         'another --out')


def sha256_of(tokenizer, train, val):
    """The sha256 of a dataset, from its tokenizer and the hashes of both .bin."""
    found = hashlib.sha256(json.dumps({key: tokenizer[key] for key in TOKENIZER},
                                      sort_keys=True).encode())
    found.update(train.digest() + val.digest())
    return found.hexdigest()


def encode(tokenizer, documents, batch=1024):
    """Yield (split, text, ids) of every document, each ended by EOT where there is one."""
    enc, end = encoding(tokenizer), list(tokenizer['special'].values())[:1]
    documents = iter(documents)
    while chunk := list(islice(documents, batch)):
        ids = enc.encode_ordinary_batch([text for _, text in chunk], num_threads=os.cpu_count())
        for (split, text), doc in zip(chunk, ids):
            yield split, text, doc + end


# -----------------------------------------------------------------------------
# dataset -> ids


def build(dataset):
    """Make a corpus of data/ that needs no download, unless it is there."""
    root = folder_of(dataset)
    if dataset in ('python', 'sympy') and not os.path.exists(f'{root}/meta.json'):
        subprocess.run([sys.executable, f'{root}/prepare.py'])


def load_data(config):
    """
    The dataset of a run, as read_dataset has it. Raises ValueError also for one that has too few
    windows of block_size tokens.
    """
    name, T = config.dataset, config.block_size
    train, val, meta = read_dataset(folder_of(name))
    windows = [(len(ids) - 1) // T for ids in (train, val)]
    if min(windows) < 1 or windows[0] < config.sequences:
        raise ValueError(f'{name} has {windows} windows of {T} tokens in train.bin and val.bin: '
                         'ask for fewer sequences, or lower block_size')
    return train, val, meta


def read_dataset(root):
    """
    The dataset in folder `root`: (train, val, meta), the ids of both .bin mapped from the files,
    and meta.json. Raises ValueError for one that is missing, damaged, or not of one piece.
    """
    name, script = dataset_name(root), f'{root}/prepare.py'
    if not os.path.exists(f'{root}/meta.json'):
        raise ValueError(f"no dataset '{name}': there is no {root}/meta.json" + (
            f'; run python {os.path.relpath(script)}' + ' FILE_OR_FOLDER ..' * (name == 'text')
            if os.path.exists(script) else ''))
    try:
        with open(f'{root}/meta.json', encoding='utf-8') as file:
            meta = json.load(file)
        check_meta(meta)
        train, val = (read_ids(f'{root}/{split}.bin', meta[f'{split}_tokens'], meta['vocab_size'])
                      for split in ('train', 'val'))
        # what is too large to look through is checked batch by batch, and for its size
        if len(train) + len(val) < LOOKED_THROUGH and meta['sha256'] != sha256_of(
                meta, hashlib.sha256(train), hashlib.sha256(val)):
            raise ValueError('its sha256 is of other tokens, or of another tokenizer')
    except Exception as error:  # a damaged file raises anything at all
        raise ValueError(f'cannot read the dataset {name}: {error!r}; run its prepare.py '
                         'again') from None
    return train, val, meta


def check_meta(meta):
    """Raises an exception unless the numbers make sense and the tokenizer works."""
    for key in (*NUMBERS, 'vocab_size'):
        if type(meta[key]) not in (int, float) or not 0 < meta[key] < 2**63:
            raise ValueError(f'{key} = {meta[key]!r} in meta.json')
    if not all(type(meta[key]) is float for key in YARDSTICKS):
        raise ValueError(f'{YARDSTICKS} in meta.json')
    # tiktoken does not survive every damaged tokenizer: look before it does
    n, ranks = len(meta['ranks']), set(meta['ranks'])
    ids = sorted({*range(n), *meta['special'].values()})
    ratio = meta['val_bytes'] / meta['val_tokens'] / meta['bytes_per_token']
    if len(ranks) < n or ids != [*range(meta['vocab_size'])] or abs(ratio - 1) > 1e-6 or \
            not ranks >= {chr(byte) for byte in range(256)} or not meta['pattern'] or \
            not meta['sha256'].isalnum():
        raise ValueError('the tokenizer, bytes_per_token or sha256 in meta.json is damaged')
    encoding(meta).encode_ordinary(__doc__)


def read_ids(path, tokens, vocab_size):
    """The ids in a .bin, mapped. Raises ValueError if it does not hold so many."""
    dtype = tokens_dtype(vocab_size)
    if os.path.getsize(path) != tokens * dtype.itemsize:
        raise ValueError(f'{path} is truncated, or of another vocabulary')
    ids = np.memmap(path, dtype, mode='r').view(np.ndarray)
    if tokens < LOOKED_THROUGH and ids.max() >= vocab_size:
        raise ValueError(f'{path} has id {ids.max()}, beyond its vocabulary of {vocab_size}')
    return ids


# what is read in which order is a function of (seed, step) alone


@lru_cache(2)  # a batch may end in the next epoch
def epoch_order(seed, epoch, windows, sequences):
    """The windows of an epoch in its order; if `sequences` > 0, so many, the same in each."""
    few = np.random.default_rng(seed).permutation(windows)[:sequences or windows]
    return np.random.default_rng((seed, epoch + 1)).permutation(few)


def window_starts(config, step, n_tokens, world):
    """Where the windows of a step begin, for micro-steps and ranks: (grad_accum, world, batch).

    A function of (seed, step), whatever the product of the three is made of. Windows do not
    overlap, and every epoch has each once."""
    shape = config.grad_accum, world, config.batch_size
    # n windows a step, which may end an epoch, or see several
    windows, n = (n_tokens - 1) // config.block_size, math.prod(shape)
    epochs, at = np.divmod(step * n + np.arange(n), config.sequences or windows)
    order = [epoch_order(config.seed, e, windows, config.sequences)[at[epochs == e]]
             for e in range(epochs[0], epochs[-1] + 1)]
    return np.concatenate(order).reshape(shape) * config.block_size


def sequence_starts(config, n_tokens):
    """Where the windows of `sequences` begin, each once."""
    windows = (n_tokens - 1) // config.block_size
    return epoch_order(config.seed, 0, windows, config.sequences) * config.block_size


# -----------------------------------------------------------------------------
# command line


def named(path):
    """`path`, unless it is empty: that would be the current folder."""
    if not path:
        raise argparse.ArgumentTypeError('it is empty')
    return path


def arguments(doc, script, tokenizer=None):
    """An argument parser explained by `doc`, with --out and, given its default, --tokenizer."""
    for number in (signal.SIGINT, signal.SIGTERM):      # what is half-written goes away
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    if sys.stdout:  # a console need not know every character of a path
        sys.stdout.reconfigure(errors='replace')
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    # one line instead of the usage and a line
    parser.error = lambda message: parser.exit(2, f'{script}: {message} (see --help)\n')
    parser.add_argument('--out', type=named, default=os.path.dirname(os.path.abspath(script)),
                        help='folder of the dataset (default: the one of this script)')
    if tokenizer:
        parser.add_argument('--tokenizer', default=tokenizer,
                            help='256: bytes; more: a BPE of that many tokens; gpt2; or a '
                                 f'checkpoint (.pt), whose tokens to use (default: {tokenizer})')
    return parser
