"""
What a run takes of memory, before it runs: python -m experiments.fit CONFIGS and flags of train.py

    python -m experiments.fit config/llama_1b.py config/ternary.py --batch_size=4 --memory=80

GiB of weights, optimizer states, gradients (with update_in_backward the largest alone), and of
what waits for the backward, beside the same model in full precision. Nothing is computed: it
counts the tensors of a model that has shapes and no data. Activations are those of eager code in
bfloat16 (--dtype=float32: in that), with attention as a GPU does it; compiled code keeps less.
With --memory, GiB of a device, it says how many sequences at a time would fill it.
"""
import json
import os
import sys
from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import train
from config import STRATEGY, fail
from data.corpus import folder_of
from model import GPT
from quant import Optimizer, rtn_

KINDS = 'weights', 'states', 'gradients', 'activations'
GIB = 2 ** 30


def size(tensors):
    """Bytes, each storage once."""
    storages = [t.untyped_storage() for t in tensors]
    return sum({s._cdata: s.nbytes() for s in storages}.values())


def memory(config, vocab_size):
    """{kind: bytes} of a run."""
    # float16 has the size of bfloat16, and there even a CPU's attention is that of a GPU
    kept, dtype = [], torch.float32 if config.dtype == 'float32' else torch.float16
    with FakeTensorMode():
        model = GPT(config, vocab_size)
        model.dtype = dtype
        rtn_(model, config.stored)
        optimizer = Optimizer(model, config)
        weights = [*model.parameters(), *model.buffers()]
        states = [t for ts in optimizer.tensors().values() for t in ts]
        gradients = [4 * p.numel() for p in model.parameters()]
        idx = torch.zeros(config.batch_size, config.block_size, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            model(idx, idx)
        own = {t.untyped_storage()._cdata for t in weights}
        kept = [t for t in kept if t.untyped_storage()._cdata not in own]
        some = max if config.update_in_backward else sum
        return dict(zip(KINDS, (size(weights), size(states), some(gradients), size(kept))))


def main(argv):
    limit = [float(a.removeprefix('--memory=')) for a in argv if a.startswith('--memory=')]
    config = train.parse([a for a in argv if not a.startswith('--memory=')])
    try:
        with open(f'{folder_of(config.dataset)}/meta.json', encoding='utf-8') as f:
            vocab_size, what = json.load(f)['vocab_size'], os.path.basename(config.dataset)
    except OSError:     # not prepared yet
        vocab_size, what = 50257, 'GPT-2'
    vocab_size = -(-vocab_size // 64) * 64
    plain = replace(config, **{key: getattr(train.Config, key) for key in STRATEGY})
    rows = {'this run': memory(config, vocab_size)}
    if plain != config:
        rows['full precision'] = memory(plain, vocab_size)
    print(f'{config.flavour} {config.n_layer}x{config.n_embd}, vocabulary of {what}, '
          f'{config.batch_size} x {config.block_size} tokens at a time; GiB')
    print(f'{"":14}', *(f'{kind:>11}' for kind in (*KINDS, 'sum')))
    for name, row in rows.items():
        print(f'{name:14}', *(f'{n / GIB:11.3f}' for n in (*row.values(), sum(row.values()))))
    if limit:
        row = rows['this run']
        room = limit[0] * GIB - sum(row.values()) + row['activations']
        most = int(room / (row['activations'] / config.batch_size))
        if most < 1:
            fail(f'not even one sequence fits into {limit[0]:g} GiB: use a shorter block_size, '
                 'fewer bits, or update_in_backward')
        print(f'{most} sequences at a time would fill {limit[0]:g} GiB: leave a tenth of it, and '
              'the logits, to the work')


if __name__ == '__main__':
    main(sys.argv[1:])
