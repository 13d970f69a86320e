"""
What a run takes of memory, before it runs: python -m experiments.fit CONFIGS and flags of train.py

    python -m experiments.fit config/llama_1b.py config/ternary.py --memory=80
    python -m experiments.fit --check       count some runs, and measure them: results/fit.json

It prints GiB of weights, optimizer states, gradients (with update_in_backward the largest alone),
and of what waits for the backward, beside the same model in full precision. Nothing is computed:
it counts the tensors of a model that has shapes and no data. Activations are those of eager code
in bfloat16, or with --dtype=float32 in that, with attention as a GPU does it; compiled code keeps
less.
Gradients come while activations go, so a peak can be lower than the sum; logits come on top. The
peaks of eight runs on a CPU were 11 % below the sum to 2 % above it (results/fit.json). With
--memory, GiB of a device, it says how many sequences at a time would fill it. It is about one
process: what --shard deals out to others is not taken off.
"""
import argparse
import gc
import io
import json
import math
import os
import sys
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from datetime import date
from itertools import accumulate
from tempfile import TemporaryDirectory

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import train
from config import STRATEGY, fail, load
from data.corpus import build, folder_of, read_dataset
from experiments.runs import RESULTS, SIZES, machine
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


def vocabulary(config):
    """How many tokens, in multiples of 64. A known corpus that must be downloaded first has those
    of GPT-2."""
    build(config.dataset)
    root = folder_of(config.dataset)
    if config.checkpoint:
        n = load(config.checkpoint, train.Config)['tokenizer']['vocab_size']
    elif config.dataset in ('fineweb', 'openwebtext') and not os.path.exists(f'{root}/meta.json'):
        n = 50257
    else:
        n = read_dataset(root)[2]['vocab_size']
    return -(-n // 64) * 64


def peak(config):
    """The most bytes that all tensors hold at once, from an empty model through two steps that are
    run, not compiled, on a CPU."""
    gc.collect()        # what is freed later was not allocated here
    with TemporaryDirectory() as folder, redirect_stdout(io.StringIO()), torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        run = train.Run(replace(config, out_dir=folder), 0, 1)
        run.model.train()
        for _ in range(2):
            run.advance()
        run.log.close()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == '[memory]']
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def check():
    """Write results/fit.json: what is counted of a run, and the peak that is measured."""
    rows = []
    for name in 'default', 'large':
        for strategy in 'baseline', 'adam8', 'w8a8', 'ternary':
            args = [*SIZES[name], f'config/{strategy}.py', '--batch_size=8', '--dtype=float32',
                    '--device=cpu', '--compile=no', '--overwrite=True']
            config = train.parse(args)
            counted, most = sum(memory(config, vocabulary(config)).values()), peak(config)
            rows.append({'args': args, 'counted': counted, 'peak': most})
            print(f'{name:8} {strategy:9} counted {counted / GIB:.3f} GiB, peak '
                  f'{most / GIB:.3f}: {100 * (most / counted - 1):+.1f} %')
    found = {'machine': machine(), 'torch': torch.__version__, 'date': str(date.today())}
    (RESULTS / 'fit.json').write_text(json.dumps({**found, 'rows': rows}, indent=1) + '\n')


def gib(text):
    with suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"'{text}' is no number of GiB above 0")


def main(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument('--memory', type=gib, metavar='GiB')
    parser.add_argument('--check', action='store_true')
    options, argv = parser.parse_known_args(argv)
    if options.check and not argv and not options.memory:
        return check()
    if options.check:
        fail('--check takes nothing else: it counts and measures runs of its own')
    try:
        config = train.parse(argv)
        if config.eval_only or config.ptq:
            fail('this counts what training takes: leave out eval_only and ptq')
        vocab_size = vocabulary(config)
    except ValueError as e:
        fail(e)
    plain = replace(config, **{key: getattr(train.Config, key) for key in STRATEGY})
    rows = {'this run': memory(config, vocab_size)}
    if plain != config:
        rows['full precision'] = memory(plain, vocab_size)
    print(f'{config.flavour} {config.n_layer}x{config.n_embd}, {vocab_size} tokens in the '
          f'vocabulary, {config.batch_size} x {config.block_size} at a time; GiB')
    print(f'{"":14}', *(f'{kind:>11}' for kind in (*KINDS, 'sum')))
    for name, row in rows.items():
        print(f'{name:14}', *(f'{n / GIB:11.3f}' for n in (*row.values(), sum(row.values()))))
    if options.memory:
        # of what waits for the backward, a part does not grow with the batch
        one, two = (sum(memory(replace(config, batch_size=n), vocab_size).values())
                    for n in (1, 2))
        if one > options.memory * GIB:
            fail(f'one sequence takes {one / GIB:.1f} GiB: use a shorter block_size, fewer bits, '
                 'or update_in_backward')
        most = 1 + int((options.memory * GIB - one) / (two - one))
        print(f'{most} sequences at a time would fill {options.memory:g} GiB, but for what comes '
              'and goes in a step: on a GPU, leave some GiB to the logits')


if __name__ == '__main__':
    main(sys.argv[1:])
