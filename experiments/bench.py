"""
How fast it is, beside its peers and the limits of the machine: python -m experiments.bench

    --quick           under five minutes on two CPU cores: a smaller model, fewer samples
    --nanogpt=PATH    nanoGPT's model.py, for the rows that compare with it
    --rows=WORD       only rows with WORD in their name (this and --quick write files of their own)
    --minutes=N       start no further comparison after so many minutes

Prints a table and writes experiments/results/bench-<machine>.json, or, until it is through all
rows, bench-part-<machine>.json. All sides of a comparison take turns in one process; a ratio is of
medians, the other side's time over ours, so more is better; of bytes and counts ours over the
other's, so less is better. The limit is what the bytes or FLOPs of our side take at the rates
measured on this machine, and in brackets the ratio this would give.
Peers are optional, see experiments/requirements.txt; one that did not quantize makes its row fail.
"""
import argparse
import functools
import gc
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext, redirect_stdout
from datetime import date

import torch
import torch.nn as nn
from torch._dynamo.utils import counters
from torch.nn.utils import get_total_norm

import quant
from config import fail
from experiments.runs import RESULTS, ROOT, machine
from model import GPT
from quant import How, Linear, Optimizer, QTensor, bytes_held, quantize, rtn_, spec
from train import parse, pick_compile, pick_dtype, tell_system

CUDA = torch.cuda.is_available()
DEVICE = torch.device('cuda' if CUDA else 'cpu')
ROUNDS, SECONDS = 20, 20    # at least so many samples of each side, over so long (quick: 0 s)
FP8 = ['config/w8a8g8.py', '--weights=fp8/row', '--activations=fp8/row',
       '--gradients=fp8e5/row/stochastic']
SIZES = {'124M': ['config/gpt2.py', '--batch_size=16'],
         '350M': ['config/gpt2_medium.py', '--batch_size=8'],
         '1.5B': ['config/gpt2_xl.py', '--batch_size=4']}
options = argparse.Namespace(quick=False, nanogpt='', rows='', minutes=math.inf)


class Skip(Exception):
    """A side that cannot run here, and why."""


def seconds(f, n=1):
    """Seconds a call of f takes, over n calls."""
    wait = torch.cuda.synchronize if CUDA else int
    wait()
    began = time.perf_counter()
    for _ in range(n):
        f()
    wait()
    return (time.perf_counter() - began) / n


def take_turns(sides):
    """Samples of each side, in seconds a call, in the order CBA ABC CBA ..: drift hits all alike.
    A sample is as many calls as take 10 ms; a loaded machine has quieter moments to wait for."""
    samples = {name: [] for name in sides}
    calls = {name: math.ceil(0.01 / max(1e-5, seconds(f))) for name, f in sides.items()}
    began, i = time.time(), 0
    while sides and (i < ROUNDS or not options.quick and time.time() - began < SECONDS):
        i += 1
        for name in list(sides)[::-1 if i % 2 else 1]:
            samples[name].append(seconds(sides[name], calls[name]))
    return samples


@functools.cache
def rates():
    """What this machine does: bytes/s, read and written, of a copy and of an update in place, and
    FLOP/s of square matmuls; the best sample of each, as these are to be limits."""
    n, size = (8192, 2 ** 28) if CUDA else (2048, 2 ** 26)              # size: of float32
    (a, b), x = torch.ones(2, size, device=DEVICE), torch.ones(n, n, device=DEVICE)
    h, i = x.bfloat16(), x.to(torch.int8)
    sides = {'copy': lambda: b.copy_(a), 'in place': lambda: a.mul_(1.0), 'fp32': lambda: x @ x.T,
             'bf16': lambda: h @ h.T, 'int8': lambda: torch._int_mm(i, i.T)}
    if CUDA and torch.cuda.get_device_capability() >= (8, 9):
        e, one = x.to(torch.float8_e4m3fn), torch.ones((), device=DEVICE)
        sides['fp8'] = lambda: torch._scaled_mm(e, e.T, one, one, out_dtype=torch.bfloat16)
    for f in sides.values():
        f()
    return {name: (2 * n ** 3 if name[-1].isdigit() else 8 * size) / min(samples)
            for name, samples in take_turns(sides).items()}


def free():
    torch._dynamo.reset()
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def why(e):
    text = ' '.join(str(e).split())[:300]
    return f'skipped: {text}' if isinstance(e, Skip) else f'failed: {type(e).__name__}: {text}'


def compare(comparison, rows):
    """Results of the rows, one dict each. A comparison returns builders of its sides, and limits
    in seconds. A builder returns what to call and time, or a number, which is the result. A side
    that fails before all are timed takes only its own rows along."""
    sides, values, wrong, samples, limits = {}, {}, {}, {}, {}
    try:
        builders, limits = comparison()
        for side in dict.fromkeys(side for row in rows for side in row[1:3] if side):
            built = None                                # a side that failed is not kept
            try:
                with redirect_stdout(sys.stderr):       # the table alone goes to stdout
                    built = builders[side]()
                    if callable(built):
                        for _ in range(3):
                            built()
                        sides[side] = built
                    else:
                        values[side] = built
            except (Exception, SystemExit) as e:        # SystemExit: the config is a bad one
                wrong[side] = f'{why(e)} ({side})'
        samples = take_turns(sides)
    except (Exception, SystemExit) as e:
        wrong = dict.fromkeys((side for row in rows for side in row[1:3]), why(e))
    values |= {side: statistics.median(times) for side, times in samples.items()}
    results = [empty(row, next((wrong[side] for side in row[1:3] if side in wrong), ''))
               for row in rows]
    for r in results:
        r['what'] = ' '.join(getattr(comparison, 'func', comparison).__doc__.split())
        if not r['verdict']:
            judge(r, values, samples, limits)
    return results


def empty(row, verdict):
    """The result of a row of which nothing was measured."""
    return {**dict(zip(('name', 'ours', 'other', 'bar', 'stretch'), row)), 'verdict': verdict}


def judge(r, values, samples, limits):
    """Put into a result what was measured, and the verdict on it."""
    a, b, timed = values[r['ours']], values.get(r['other']), r['ours'] in samples
    unit, r['ratio'] = 'seconds' if timed else 'amount', b / a if timed else a / b if b else a
    r |= {f'ours_{unit}': a, f'other_{unit}': b}
    if timed:
        r['samples'] = len(samples[r['ours']])          # of each side
    if r['ours'] in limits:
        r |= {'limit_seconds': limits[r['ours']], 'limit': b / limits[r['ours']]}
    met = [r[goal] is not None and (r['ratio'] >= r[goal] if timed else r['ratio'] <= r[goal])
           for goal in ('bar', 'stretch')]
    verdict = 'stretch' if met[1] else 'met' if met[0] else 'MISSED'
    r['verdict'] = 'information' if r['bar'] is None else verdict


def batch(config, vocab):
    tokens = torch.randint(vocab, (config.batch_size, config.block_size + 1), device=DEVICE)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def our_step(args, vocab=4096):
    """A step of ours, () -> loss, as train.py takes it with the config that it makes of args."""
    c = parse(args)
    torch.manual_seed(0)
    with torch.device(DEVICE):                          # drawing 1.5B numbers on a CPU takes long
        model = GPT(c, vocab)
    rtn_(model, c.stored)
    model.dtype = pick_dtype(c, DEVICE)
    compiled = pick_compile(c, DEVICE)
    if compiled:
        model.compile()
    optimizer, (x, y), t = Optimizer(model, c, compiled), batch(c, vocab), 0

    def use(name, p):
        p.grad.mul_((c.grad_clip / (torch.linalg.vector_norm(p.grad) + 1e-6)).clamp(max=1))
        optimizer.apply(name)
        p.grad = None

    for name, p in model.named_parameters() if c.update_in_backward else ():
        p.register_post_accumulate_grad_hook(functools.partial(use, name))

    def step():
        nonlocal t
        t += 1                                          # the rate differs from step to step
        model.set_noise(c.seed, t)
        if c.update_in_backward:
            optimizer.begin(1 / t)
            loss = model(x, y)
            loss.backward()
        else:
            model.zero_grad()
            loss = model(x, y)
            loss.backward()
            norm = get_total_norm([p.grad for p in model.parameters()]).item()
            optimizer.step(1 / t, min(1.0, c.grad_clip / (norm + 1e-6)))
        return loss.detach()

    step.model, step.optimizer = model, optimizer
    return step


def nanogpt_step(args, vocab=4096, compiled=True, int8=False):
    """A step of nanoGPT, the same shape; int8 swaps in torchao's layers, all in bfloat16."""
    if not options.nanogpt:
        raise Skip("needs nanoGPT's model.py: --nanogpt=PATH")
    where = importlib.util.spec_from_file_location('nanogpt', options.nanogpt)
    nanogpt = importlib.util.module_from_spec(where)
    sys.modules['nanogpt'] = nanogpt                    # its dataclass looks itself up there
    where.loader.exec_module(nanogpt)
    c = parse(args)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = nanogpt.GPT(nanogpt.GPTConfig(c.block_size, vocab, c.n_layer, c.n_head, c.n_embd,
                                              dropout=0.0, bias=c.bias))
    x, y = batch(c, vocab)
    if int8:
        model = torchao_int8(model.bfloat16(), x)
    betas = c.beta1, c.beta2
    optimizer = model.configure_optimizers(c.weight_decay, c.learning_rate, betas, DEVICE.type)
    run = torch.compile(model) if compiled else model

    def step():
        autocast = torch.autocast('cuda', torch.bfloat16) if CUDA and not int8 else nullcontext()
        with autocast:
            _, loss = run(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def torchao_int8(model, x):
    """Swap torchao's int8 training into the blocks. RuntimeError unless each of their linears runs
    three int8 matmuls a step and the output changes."""
    torchao = peer('torchao.quantization')
    config = peer('torchao.prototype.quantized_training').Int8MixedPrecisionTrainingConfig
    x, expected = x[:1, :32], 3 * 4 * len(model.transformer.h)
    before = model(x)[0].detach()
    torchao.quantize_(model.transformer.h, config(module_swap=True))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        after = model(x)[0]
        after.sum().backward()
    model.zero_grad()
    n = sum(e.name in ('aten::_int_mm', 'torchao::scaled_int8_mm') for e in profile.events())
    if n != expected or torch.equal(before, after):
        raise RuntimeError(f'the peer ran {n} int8 matmuls instead of {expected}')
    return model


def peer(name):
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise Skip(f'pip install {name.split(".")[0]} ({e})') from None


def flops_time(args, vocab, blocks, rest):
    """Seconds of the matmuls of a training step at the rates of two kinds: block linears, and head
    and causal attention. Six operations per weight and token; a gpt2's shape."""
    c = parse(args)
    tokens, linear = c.batch_size * c.block_size, 12 * c.n_layer * c.n_embd ** 2
    other = c.n_embd * vocab + c.n_layer * c.n_embd * c.block_size
    return 6 * tokens * (linear / rates()[blocks] + other / rates()[rest])


def stochastic_rounding():
    """Round 2^22 float32 numbers to int8 codes, stochastically, compiled: the noise from
    quant.uniform, or from torch.rand_like, which is compiled too or, faster on a CPU, eager."""
    x = torch.randn(2 ** 11, 2 ** 11, device=DEVICE) * 30
    key = torch.ones((), dtype=torch.int32, device=DEVICE)

    def rounded(x, u):
        return (x + u).floor().clamp(-128, 127).to(torch.int8)

    by_hash = torch.compile(lambda x, key: rounded(x, quant.uniform(x, key)))
    by_rand, only = torch.compile(lambda x: rounded(x, torch.rand_like(x))), torch.compile(rounded)
    return ({'hash': lambda: lambda: by_hash(x, key), 'rand_like': lambda: lambda: by_rand(x),
             'eager rand_like': lambda: lambda: only(x, torch.rand_like(x))},
            {'hash': 5 * x.numel() / rates()['copy']})


def linear_forward():
    """Forward of a linear 768 -> 3072 on 4096 tokens, W8A8: codes multiplied (codes), or what they
    stand for (float), in the dtype that train.py takes; both compiled."""
    x = torch.randn(4096, 768, device=DEVICE, dtype=pick_dtype(parse([]), DEVICE))

    def build(compute):
        layer = Linear(768, 3072, how=How('int8/row', 'int8/row', compute=compute))
        forward = torch.compile(layer.to(DEVICE))
        return torch.no_grad()(lambda: forward(x))

    fastest = max(rates()['bf16'], rates()['int8'])
    return ({compute: functools.partial(build, compute) for compute in ('codes', 'float')},
            {'codes': 2 * 4096 * 768 * 3072 / fastest})


def small_training():
    """Training steps of a gpt2 of width 384, context 256, vocabulary 4096, 4 layers, 8 sequences
    (quick: 2 and 4): W8A8 on codes, in the dtype that train.py takes; float32; bfloat16; nanoGPT
    in float32, eager and compiled. Ours run as train.py runs them, compiled."""
    gpt = ['--flavour=gpt2', '--n_head=6', '--n_embd=384',
           *(['--n_layer=2', '--batch_size=4'] if options.quick else ['--batch_size=8'])]
    fp32, fast = [*gpt, '--dtype=float32'], max(('bf16', 'int8'), key=rates().get)
    return ({'w8a8': lambda: our_step(['config/w8a8.py', *gpt]), 'fp32': lambda: our_step(fp32),
             'bf16': lambda: our_step([*gpt, '--dtype=bfloat16']),
             'nanoGPT': lambda: nanogpt_step(fp32, compiled=False),
             'nanoGPT compiled': lambda: nanogpt_step(fp32)},
            {'w8a8': flops_time(gpt, 4096, fast, 'bf16'),
             'fp32': flops_time(gpt, 4096, 'fp32', 'fp32')})


def optimizer_step(width, n_layer):
    """One optimizer step over the block weights of a gpt2, gradients in place, no clipping: 8-bit
    AdamW, torch's fused float32, torchao's and bitsandbytes' 8-bit, and packed ternary codes."""
    shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)] * n_layer
    limits = {}

    def give_gradients(parameters):
        for p in parameters:
            p.grad = torch.randn(p.shape, device=DEVICE) * 1e-3

    def ours(name, *args):
        config = parse(args)
        with torch.device(DEVICE):
            model = nn.ModuleList(Linear(n_in, n_out) for n_out, n_in in shapes)
        rtn_(model, config.stored)
        optimizer = Optimizer(model, config, compiled=True)
        give_gradients(model.parameters())
        size = bytes_held(model, optimizer)             # all is written, too, but the gradients
        moved = 2 * (size['weights'] + size['optimizer']) + size['gradients']
        limits[name] = moved / rates()['in place']
        return optimizer.step

    def theirs(make, *states):
        parameters = [nn.Parameter(torch.randn(s, device=DEVICE)) for s in shapes]
        give_gradients(parameters)
        optimizer = make(parameters)
        optimizer.step()
        for state in (optimizer.state[p][key] for p in parameters for key in states):
            if getattr(state, 'codes', state).dtype not in (torch.uint8, torch.int8):
                raise RuntimeError(f'the peer did not quantize its states {", ".join(states)}')
        return optimizer.step

    def bitsandbytes():
        make = peer('bitsandbytes').optim.AdamW8bit
        return theirs(functools.partial(make, min_8bit_size=256), 'state1', 'state2')

    return ({'8-bit': lambda: ours('8-bit', 'config/adam8.py'),
             'ternary': lambda: ours('ternary', 'config/ternary.py'),
             'fused': lambda: theirs(functools.partial(torch.optim.AdamW, fused=True)),
             'torchao': lambda: theirs(peer('torchao.optim').AdamW8bit, 'exp_avg', 'exp_avg_sq'),
             'bitsandbytes': bitsandbytes}, limits)


def compilations():
    """Recompilations after the third of eight training steps, and graph breaks, as dynamo counts
    them, all compiled: w8a8 + adam8, ternary; on a CPU without --quick baseline, everything."""
    @functools.cache
    def count():
        tried = [['config/adam8.py', 'config/w8a8.py'], ['config/ternary.py']]
        late, broken = [], []
        for args in tried if options.quick or CUDA else [*tried, [], ['config/everything.py']]:
            free()
            counters.clear()
            step = our_step([*args, '--n_layer=2', '--n_embd=128', '--compile=yes'])
            frames = [(step(), counters['frames']['total'])[1] for _ in range(8)]
            late.append(frames[-1] - frames[2])
            broken.append(sum(counters['graph_break'].values()))
        print(f'by strategy: recompilations {late}, graph breaks {broken}', file=sys.stderr)
        return sum(late), sum(broken)

    return {'recompilations': lambda: count()[0], 'graph breaks': lambda: count()[1]}, {}


def row_quantize():
    """Quantize (32768, 6400) bfloat16 to int8 codes and row scales, against a copy that moves as
    many bytes: the ratio is the share of copy bandwidth."""
    x = torch.randn(32768, 6400, device=DEVICE, dtype=torch.bfloat16)
    moved = 3 * x.numel() + 4 * len(x)                  # bytes: in, codes out, scales out
    a, b = torch.ones(2, moved // 8, device=DEVICE)
    run = torch.compile(lambda x: quantize(x, 'int8/row')[:2])
    return ({'quantize': lambda: lambda: run(x), 'copy': lambda: lambda: b.copy_(a)},
            {'quantize': moved / rates()['copy']})


def int8_matmul():
    """Codes (16384, 1600) times codes (6400, 1600) transposed, times row scales times column
    scales, to bfloat16: scales in the epilogue; a bfloat16 matmul; torch._int_mm, then scales."""
    n, d, m = 16384, 1600, 6400
    x, w = (torch.randint(-127, 128, (k, d), device=DEVICE).to(torch.int8) for k in (n, m))
    sx, sw = torch.rand(n, 1, device=DEVICE), torch.rand(m, 1, device=DEVICE)
    xb, wb = x.bfloat16(), w.bfloat16()
    scale = torch.compile(lambda y: (y * sx * sw.T).bfloat16())
    a, b = (QTensor(q, s, spec=spec('int8/row')) for q, s in ((x, sx), (w, sw)))
    fused = torch.compile(lambda: quant.matmul(a, b, True, torch.bfloat16),
                          options=quant.inductor(quant.MATMULS, CUDA))       # as GPT.compile does
    return ({'epilogue': lambda: fused, 'bf16': lambda: lambda: xb @ wb.T,
             'then scale': lambda: lambda: scale(torch._int_mm(x, w.T))},
            {'epilogue': 2 * n * d * m / rates()['int8']})


def training(size):
    """Training steps of a gpt2, context 1024, vocabulary 50304: a micro-batch of 16, 8 or 4
    sequences (124M, 350M, 1.5B) and an optimizer step; ours, and nanoGPT compiled. torchao's int8
    is swapped into nanoGPT, with all weights in bfloat16."""
    args, vocab = SIZES[size], 50304
    torch.set_float32_matmul_precision('high')          # as nanoGPT's train.py does
    return ({'bf16': lambda: our_step(args, vocab),
             'int8': lambda: our_step(['config/w8a8g8.py', *args], vocab),
             'fp8': lambda: our_step([*FP8, *args], vocab),
             'nanoGPT': lambda: nanogpt_step(args, vocab),
             'torchao': lambda: nanogpt_step(args, vocab, int8=True)},
            {kind: flops_time(args, vocab, kind, 'bf16') for kind in ('bf16', 'int8', 'fp8')
             if kind in rates()})


def peak_memory():
    """Peak bytes of a training step at 350M, context 1024, batch 8: direct ternary training with
    an update in the backward; w8a8 and adam8; AdamW in float32, activations in bfloat16."""
    def peak(*args):
        free()
        step = our_step([*args, *SIZES['350M']], 50304)
        for i in range(5):
            if i == 2:                                  # by now all is compiled
                torch.cuda.reset_peak_memory_stats()
            step()
        return torch.cuda.max_memory_allocated()

    in_backward = ['config/ternary.py', '--update_in_backward=True']
    return {'ternary': lambda: peak(*in_backward), 'bf16': peak,
            '8 bits': lambda: peak('config/adam8.py', 'config/w8a8.py')}, {}


TABLE = [  # comparison, device, rows: (name, our side, other side, bar, stretch)
    (stochastic_rounding, 'cpu', [
        ('CPU: stochastic rounding by hash, to rand_like', 'hash', 'rand_like', 4, 8),
        ('CPU: the same, to eager rand_like', 'hash', 'eager rand_like', None, None)]),
    (linear_forward, 'cpu', [
        ('CPU: quantized linear forward 4096x768x3072, to fake-quant', 'codes', 'float', 3, 4)]),
    (small_training, 'cpu', [
        ('CPU: W8A8 training step, to fp32', 'w8a8', 'fp32', 1.3, 1.8),
        ('CPU: W8A8 training step, to bf16', 'w8a8', 'bf16', 1.15, None),
        ('CPU: full precision, to nanoGPT', 'fp32', 'nanoGPT', 0.97, 1.05),
        ('CPU: full precision, both compiled', 'fp32', 'nanoGPT compiled', None, None)]),
    (functools.partial(optimizer_step, 512, 4), 'cpu', [
        ('CPU: 8-bit AdamW, to torchao', '8-bit', 'torchao', 15, 20),
        ('CPU: 8-bit AdamW, to bitsandbytes', '8-bit', 'bitsandbytes', 9, 10),
        ('CPU: 8-bit AdamW, to torch fused fp32', '8-bit', 'fused', 0.6, None),
        ('CPU: ternary packed update, to torch fused fp32', 'ternary', 'fused', 0.4, None)]),
    (compilations, 'any', [
        ('recompilations after step 3', 'recompilations', None, 0, None),
        ('graph breaks', 'graph breaks', None, 0, None)]),
    (row_quantize, 'cuda', [
        ('GPU: row quantize, share of copy bandwidth', 'quantize', 'copy', 0.8, 0.92)]),
    (int8_matmul, 'cuda', [
        ('GPU: int8 matmul, scaled, D = 1600, to bf16', 'epilogue', 'bf16', 1.4, 1.75),
        ('GPU: int8 matmul, scaled, D = 1600, to _int_mm', 'epilogue', 'then scale', 1.3, 1.7)]),
    (functools.partial(optimizer_step, 1600, 48), 'cuda', [
        ('GPU: 8-bit AdamW, 1.5B, to torch fused fp32', '8-bit', 'fused', 1.4, 1.65),
        ('GPU: 8-bit AdamW, 1.5B, to bitsandbytes', '8-bit', 'bitsandbytes', 1.2, 1.5),
        ('GPU: 8-bit AdamW, 1.5B, to torchao', '8-bit', 'torchao', 1.3, 2),
        ('GPU: ternary packed update, to torch fused fp32', 'ternary', 'fused', 2.5, 3.5)]),
    (functools.partial(training, '124M'), 'cuda', [
        ('GPU: bf16 training, 124M, to nanoGPT', 'bf16', 'nanoGPT', 1.05, 1.15),
        ('GPU: int8 training, 124M, to own bf16', 'int8', 'bf16', 1.0, 1.1),
        ('GPU: int8 training, 124M, to torchao', 'int8', 'torchao', 1.05, 1.12)]),
    (peak_memory, 'cuda', [
        ('GPU: peak training memory, 350M, ternary, to bf16', 'ternary', 'bf16', 0.7, 0.55),
        ('GPU: peak training memory, 350M, 8 bits, to bf16', '8 bits', 'bf16', None, None)]),
    (functools.partial(training, '350M'), 'cuda', [
        ('GPU: bf16 training, 350M, to nanoGPT', 'bf16', 'nanoGPT', 1.05, 1.15),
        ('GPU: int8 training, 350M, to own bf16', 'int8', 'bf16', 1.05, 1.2)]),
    (functools.partial(training, '1.5B'), 'cuda', [
        ('GPU: bf16 training, 1.5B, to nanoGPT', 'bf16', 'nanoGPT', 1.05, 1.15),
        ('GPU: int8 training, 1.5B, to own bf16', 'int8', 'bf16', 1.15, 1.3),
        ('GPU: fp8 training, 1.5B, to own bf16', 'fp8', 'bf16', 1.1, 1.25)]),
]


def header():
    """Where and when this is measured."""
    versions = {'python': platform.python_version(), 'cuda': torch.version.cuda}
    for name in ('torch', 'triton', 'torchao', 'bitsandbytes'):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    git, commit = ['git', '-C', ROOT, 'describe', '--always', '--dirty', '--exclude=*'], ''
    if shutil.which('git'):
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {'machine': machine(), 'gpu': torch.cuda.get_device_name() if CUDA else None,
            'threads': torch.get_num_threads(), 'date': str(date.today()), 'commit': commit,
            'versions': versions, 'quick': options.quick, 'rates': rates()}


def write(kind, content):
    """Write JSON to the results; the name of the file says on which machine."""
    name = re.sub('[^a-z0-9]+', '-', f"{kind} {content['gpu'] or content['machine']}".lower())
    path = RESULTS / f'{name}.json'
    path.write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')
    return path


def line(r):
    """A result as a row of the table."""
    def size(side):
        if f'{side}_seconds' in r:
            return f'{r[f"{side}_seconds"] * 1e3:.3g} ms'
        n = r.get(f'{side}_amount')
        return '' if n is None else f'{n / 2 ** 30:.2f} GiB' if n > 1e6 else str(n)

    goals = [f'{r[k]:.3g}' if r.get(k) is not None else '' for k in ('ratio', 'bar', 'stretch')]
    limit = f'{r["limit_seconds"] * 1e3:.3g} ms ({r["limit"]:.3g})' if 'limit' in r else ''
    cells = r['name'], size('ours'), size('other'), *goals, limit, r['verdict']
    return f'| {" | ".join(cells)} |'


def bench():
    names = [row[0] for _, _, rows in TABLE for row in rows]
    if not any(options.rows in name for name in names):
        fail(f"no row has '{options.rows}' in its name: use some of {'; '.join(names)}")
    began, results, head = time.time(), [], header()
    print({name: f'{rate / 1e9:.4g} G/s' for name, rate in rates().items()}, file=sys.stderr)
    print('| row | ours | other | ratio | bar | stretch | limit | verdict |\n|' + '---|' * 8)
    for comparison, device, rows in TABLE:
        rows = [row for row in rows if options.rows in row[0]]
        late = time.time() - began > 60 * options.minutes
        skip = ('needs a GPU' if device == 'cuda' and not CUDA else
                'for machines without a GPU' if device == 'cpu' and CUDA else
                f'{options.minutes:g} minutes are over' if late else '')
        new = [empty(row, f'skipped: {skip}') for row in rows] if skip or not rows else \
            compare(comparison, rows)
        for result in new:
            print(line(result), flush=True)
        results += new
        kind = ' quick' * options.quick + f' rows {options.rows}' * bool(options.rows)
        path = write(f'bench part{kind}',
                     {**head, 'seconds': round(time.time() - began), 'rows': results})
        free()
    if not any(r['verdict'].endswith('minutes are over') for r in results):
        path = path.replace(path.with_name(path.name.replace('-part', '', 1)))
    print(f'{path}: {time.time() - began:.0f} s', file=sys.stderr)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--quick', action='store_true')
    parser.add_argument('--nanogpt', metavar='PATH')
    parser.add_argument('--rows', metavar='WORD')
    parser.add_argument('--minutes', metavar='N', type=float)
    parser.parse_args(namespace=options)
    options.nanogpt = options.nanogpt and os.path.abspath(options.nanogpt)
    if options.nanogpt and not os.path.isfile(options.nanogpt):
        parser.error(f'there is no {options.nanogpt}')
    os.chdir(ROOT)                                      # where config/ is
    tell_system()                                       # for all sides, as in training
    torch._dynamo.config.recompile_limit = 64           # several models in one process
    bench()
