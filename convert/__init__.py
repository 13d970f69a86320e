"""
The door to other people's formats, gguf.py and hf.py: what comes in becomes a checkpoint of
train.py, what goes out is made of one. Here is what both share: names, rows, tokenizers.
"""
import os
import re
import signal
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, replace

import torch
from tiktoken_ext.openai_public import r50k_pat_str

from config import fail, load, save
from data.tokenizer import PATTERN
from model import GPT
from quant import GRIDS, Linear, QTensor, dequantize, quantize, rtn_
from train import Config

# how text is cut into words, by the name that this has in llama.cpp
PATTERNS = {
    'qwen2': PATTERN, 'llama-bpe': PATTERN.replace(r'|\p{N}|', r'|\p{N}{1,3}|'),
    'smollm': r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s{1,256}(?=\p{N})"
              r'|\s{1,256}(?!\S)|\s+', 'gpt-2': r50k_pat_str}
# GPT-2's way to write bytes: one that could not be seen is a character from 256 on
BYTES = {b: chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))}
BYTES |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in BYTES)}


def parts(config, key, n, names):
    """[(their name, its rows)] of our weight `key`, which has n rows; `names`, {ours: theirs}, has
    several where ours is one matrix: q, k, v, or gate and up."""
    block, name, kind = re.fullmatch(r'(?:h\.(\d+)\.)?(.+)\.(\w+)', key).groups()
    found, heads, kv = names[name].split(), config.n_head, config.n_kv_head or config.n_head
    hs, sizes = config.n_embd // heads, [n // len(found)] * len(found)
    rows = torch.arange(n).split([heads * hs, kv * hs, kv * hs] if len(found) == 3 else sizes)
    # rope turns neighbours of a head here, and its halves in transformers
    return [(f'{part.format(block)}.{kind}', r.view(-1, hs // 2, 2).mT.flatten()
             if part.endswith(('q_proj', 'k_proj')) else r) for part, r in zip(found, rows)]


def read_checkpoint(path):
    """(model, its tokenizer's dict) of a checkpoint of train.py."""
    checkpoint = load(path, Config)
    model = GPT(Config(**checkpoint['config']), len(checkpoint['model']['wte.weight'])).eval()
    rtn_(model, model.config.stored)
    model.load_state_dict(checkpoint['model'])
    return model, checkpoint['tokenizer']


@torch.no_grad()
def exported(model, names, n):
    """{their name: QTensor} of the weights, as a forward multiplies them: n rows of vocabulary,
    without padding, and in gpt2 all biases, be they zeros."""
    c, found = model.config, {}
    for name, m in model.named_modules():
        if not hasattr(m, 'weight') or name == 'lm_head' and c.tied and not m.how.weights:
            continue
        q = m.stored_weight() if isinstance(m, Linear) else QTensor(m.weight.data)
        if isinstance(m, Linear) and m.how.weights:
            q = quantize(dequantize(q), replace(m.how.weights, rounding='nearest'))
        rows, both = n if name in ('wte', 'lm_head') else len(q.codes), {'weight': q}
        if c.flavour == 'gpt2' and name not in ('wte', 'wpe', 'lm_head'):
            both['bias'] = QTensor(torch.zeros(rows) if m.bias is None else m.bias.data)
        for kind, q in both.items():
            by_row = [t is not None and t.dim() and len(t) == len(q.codes) for t in q[:4]]
            for theirs, i in parts(c, f'{name}.{kind}', rows, names):
                found[theirs] = QTensor(*(t[i] if b else t for t, b in zip(q, by_row)), q.spec)
    return found


def integers(q):
    """The Grid of weights that are integers times a scale, as all formats have them; or None."""
    s = q.spec
    fits = s and (s.map, s.sign, s.rotation) == ('linear', 'symmetric', '') and s.group != 'column'
    return GRIDS[s.grid] if fits and GRIDS[s.grid].bits and not GRIDS[s.grid].float else None


@torch.no_grad()
def imported(config, tokenizer, names, theirs):
    """The checkpoint of train.py with the weights `theirs`, {their name: tensor}. ValueError if
    they are not those of model.py, all and no other."""
    n = tokenizer['vocab_size']
    if config.n_layer > len(theirs):
        raise ValueError(f'it has {len(theirs)} weights for {config.n_layer} layers')
    weights = GPT(config, -(-n // 64) * 64).state_dict()                # padded as in train.py
    ends = ('wte.weight',) if config.tied else ('wte.weight', 'lm_head.weight')
    for key in weights.keys() - {'lm_head.weight'} | {*ends}:
        w = weights[key]
        for name, rows in parts(config, key, len(w), names):
            t = theirs.pop(name, torch.empty(0))[:n if key in ends else None].float()
            rows = rows[:len(t)] if key in ends else rows
            if not len(t) or t.shape != w[rows].shape:
                raise ValueError(f'its {name} is {list(t.shape)}, not {list(w[rows].shape)}')
            w[rows] = t
        if key in ends:
            # logits may lie far below 0, where padding with 0 would win. That of the mean row is
            # their mean, and e^mean is at most the mean of e^logit, so it gets next to nothing
            w[len(t):] = t.mean(0)
    if theirs:
        raise ValueError(f'it has {min(theirs)}, for which model.py has no place')
    return {'config': asdict(config), 'sha256': '', 'tokenizer': tokenizer, 'iter': 0, 'tokens': 0,
            'seconds': 0.0, 'losses': [], 'model': weights, 'optimizer': None}


def words_of(tokenizer):
    """(tokens by id, pairs to merge in order) of a tokenizer's dict, written as GPT-2 does."""
    ranks, special = tokenizer['ranks'], {i: w for w, i in tokenizer['special'].items()}
    words = dict(enumerate(''.join(BYTES[ord(c)] for c in token) for token in ranks)) | special
    text = {token: words[i] for i, token in enumerate(ranks) if i not in special}
    # tiktoken merges every pair that spells a token: so all such pairs, in the order of tokens
    pairs = ((token[:k], token[k:]) for token in text for k in range(1, len(token)))
    return [words[i] for i in sorted(words)], [
        (text[a], text[b]) for a, b in pairs if a in text and b in text]


def tokenizer_of(words, special, pattern, end):
    """The tokenizer's dict of byte-level BPE: words by id as GPT-2 writes them, {special: id}, of
    which the id `end` ends a document. Bytes that no word stands for, if any, become tokens after
    the others."""
    if special and end not in special.values():
        raise ValueError(f'its tokenizer does not say which of {", ".join(special)} ends a text')
    lacking = [c for c in BYTES.values() if c not in set(words)]
    words, n, byte = words + lacking, len(words), {c: chr(b) for b, c in BYTES.items()}
    while not lacking and words[n - 1] in special:      # at the end they are not among the ranks
        n -= 1
    if any(c not in byte for word in words if word not in special for c in word) or \
            not byte.keys().isdisjoint(special):
        raise ValueError("its tokenizer is not byte-level BPE in the style of GPT-2")
    ranks = [word.encode().decode('latin-1') if word in special else ''.join(map(byte.get, word))
             for word in words[:n + len(lacking)]]
    return {'tokenizer': 'gpt2' if pattern == r50k_pat_str else 'bpe', 'vocab_size': len(words),
            'pattern': pattern, 'ranks': ranks,
            'special': dict(sorted(special.items(), key=lambda item: (item[1] != end, item[1])))}


def main(argv, usage, types, write, read):
    """`write` a checkpoint in the other format, or `read` into one, whichever is given."""
    if sys.stdout:      # a console need not know every character of a path
        sys.stdout.reconfigure(errors='replace')
    flags = [arg.removeprefix('--type=') for arg in argv if arg.startswith('-')]
    paths = [arg for arg in argv if arg and arg[0] != '-']
    source, target = [*paths, '', ''][:2]
    target = target and os.path.normpath(target)
    out = source.endswith('.pt')
    if len(paths) != 2 or out == target.endswith('.pt') or len(flags) > out or {*flags} - {*types}:
        fail(f'python -m {usage}, with --type={" or ".join(types)} if you like; or back, to a .pt')
    if os.path.exists(target):
        fail(f'{target} exists: write to another, or remove it')
    signal.signal(signal.SIGTERM, signal.default_int_handler)       # what is half-written goes away
    try:
        found = read_checkpoint(source) if out else read(source)
        folder = os.path.dirname(os.path.abspath(target))
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            path = f'{unfinished}/new'
            write(*found, path, *flags) if out else save(path, found)
            os.replace(path, target)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except ImportError as e:
        fail(f'{e}; pip install -r convert/requirements.txt')
    except Exception as e:      # damaged files, no network, ..: it may raise anything at all
        fail(f'cannot convert {source}: {e}')
    lost = [key for key in ('activations', 'kv_cache') if out and getattr(found[0].config, key)]
    with suppress(OSError):     # nobody need listen
        print(f'wrote {target}', *(f'a reader may round {key} otherwise, or not' for key in lost),
              *[f'on data in its tokens: python train.py {target} --eval_only=True --dataset=..']
              * (not out), sep='; ')
