"""
The laws, in the order of quant.py, then of model.py and train.py: each test holds a claim beside
its oracle. Grids, maps and formats are found in quant.py: one more is tested too.

    python -m pytest -q test_quant.py
"""
import copy
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import timeit
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import quant
import train
from config import CHOICES, SPECS
from data.corpus import prepare
from model import GPT, Head, cross_entropy, rope
from quant import (FORMATS, GRIDS, MAPS, WORDS, How, KVCache, Linear, Optimizer, Spec, bytes_held,
                   dequantize, fake_quant, gptq, gptq_, health, levels, linears, noise_key,
                   quantize, rtn_, spec, stream, uniform)
from train import Config

ROOT = Path(__file__).parent
CONFIGS = sorted(ROOT.glob('config/[!_]*.py'))
SIZES = 'tiny', 'small', 'gpt2', 'gpt2_medium', 'gpt2_xl', 'llama_1b'
STRATEGIES = [path.stem for path in CONFIGS if path.stem not in SIZES]
TERNARY = 'ternary/row/absmean'
TORCHRUN = '-m', 'torch.distributed.run', '--standalone'
each = pytest.mark.parametrize

normal = lambda *shape, seed=0: torch.randn(shape, generator=torch.Generator().manual_seed(seed))
tokens = lambda *shape: torch.randint(64, shape, generator=torch.Generator().manual_seed(0))
grads = lambda y, *inputs: torch.autograd.grad(y.square().sum() / 2, inputs)        # dL/dy = y
close = lambda ours, oracle, error=1e-5: (ours - oracle).abs().max() <= error * oracle.abs().max()
state_of = lambda optimizer: sum(optimizer.state_dict()['state'].values(), [])
checkpoint = lambda folder: torch.load(folder / 'ckpt.pt', weights_only=True)
log_of = lambda folder: [*map(json.loads, (folder / 'log.jsonl').open(encoding='utf-8'))]


def every(*choices):
    """A text for each Spec that can be made of one word, or none (''), of each of the choices."""
    found = {}
    for words in itertools.product(*choices):
        with suppress(ValueError):          # not every word goes with every other
            found.setdefault(spec(text := '/'.join(filter(None, words))), text)
    return list(found.values())


def levels_of(s):
    """Every level of a grid, before the scale, float64, by definition: the oracle of rounding."""
    grid = GRIDS[s.grid]
    if not grid.float:
        return MAPS[s.map].level(torch.arange(grid.low, grid.high + 1.0)).double()
    mantissa, least = grid.float
    half = {m * 2.0 ** (e - mantissa) for m in range(2 ** (mantissa + 1))
            for e in range(least, math.frexp(grid.high)[1])}
    return torch.tensor(sorted({sign * x for x in half for sign in (-1, 1) if x <= grid.high}),
                        dtype=torch.float64)


CODED = every([name for name, grid in GRIDS.items() if grid.bits], ['', *MAPS])
SIGNED = [name for name, grid in GRIDS.items() if grid.low < 0]
MULTIPLIED = [name for name in SIGNED if not GRIDS[name].float
              or GRIDS[name].dtype == torch.float8_e4m3fn]
STORED = [f'{name}/row' if name != 'bf16' else name for name in SIGNED]
INT8, ONE = {'weights': 'int8/row', 'activations': 'int8/row'}, torch.ones(1, 1)


# ------------------------------------------------------------------------------------------------
# Spec and noise

def test_spec_words_come_in_any_order():
    words = 'int8', 'row', 'absmax', 'stochastic', 'sqrt'
    assert {spec('/'.join(p)) for p in itertools.permutations(words)} == {Spec(*words)}
    assert spec('') is None and spec('int8/9').group == 9 and spec('bf16/nearest') == Spec('bf16')
    for name, (grid, block) in FORMATS.items():
        assert spec(f'{name}/stochastic') == Spec(grid, block, rounding='stochastic', format=name)


@each('text, says', [('int9', "unknown word 'int9', did you mean 'int"), ('nvfp4/32', 'second'),
    ('int8/row/row', 'second'), ('int8/row/tensor', "'tensor' says the group a second time"),
    ('row', 'names no grid'), ('int8/0', "unknown word '0'"), ('int8//row', "unknown word ''"),
    ('int8/rwo', "did you mean 'row'"), *((text, f"'{text.split('/')[-1]}' does not go")
     for text in ('ternary/asymmetric', 'fp8/sqrt', 'int8/asymmetric/absmean', 'nvfp4/absmean',
                  'bf16/row', 'int8/asymmetric/sqrt', 'mxfp4/mse', 'uint8/hadamard', 'rank1/row',
                  'bf16/hadamard', 'fp8/absmean', 'int8/sqrt/absmean')), ('INT8', 'unknown')])
def test_bad_spec_names_the_word(text, says):
    with pytest.raises(ValueError, match=re.escape(says)) as e:
        spec(text)
    assert '\n' not in str(e.value)


def test_noise_is_uniform_and_independent_and_of_index_and_key_alone():
    """So are two keys, two streams, neighbours. Small u are even among multiples of 2^-31."""
    def even(bins, count):      # chi^2 / degrees of freedom, of which 5 deviations are allowed
        found, mean, n = torch.bincount(bins.long(), minlength=count), len(bins) / count, count - 1
        return ((found - mean).double() ** 2).sum() / mean / n < 1 + 5 * math.sqrt(2 / n)

    x, key = torch.empty(2 ** 22), torch.tensor(noise_key(1337, 5), dtype=torch.int32)
    us = [uniform(x, k) for k in (key, key + 1, stream(key, 0), stream(key, 1))]
    small = us[0][us[0] < 2.0 ** -8] * 2.0 ** 31
    assert abs(len(small) / 2 ** 14 - 1) < 5 / 2 ** 7 and even(small % 128, 128)
    us = [(u * 64).clamp(max=63).floor() for u in us]                   # u = 1 is possible
    pairs = [*itertools.combinations(us, 2), *((us[0], us[0].roll(lag)) for lag in (1, 64, 1000))]
    assert all(even(64 * a + b, 4096) for a, b in pairs)
    x, u = torch.empty(64, 32), uniform(torch.empty(64, 32), 7)
    assert torch.equal(u[:16], uniform(x[:16], 7)) and 0 <= u.min() and u.max() <= 1
    assert not u.ravel().sort()[0].equal(uniform(x, 6).ravel().sort()[0])   # in another order
    assert torch.equal(u, uniform(x.bfloat16(), torch.tensor(7, dtype=torch.int32)))
    assert len({noise_key(s, t, i) for s in range(9) for t in range(50) for i in range(20)}) > 8990
    with pytest.raises(ValueError, match='too many for stochastic'):
        uniform(torch.empty(2 ** 31, device='meta'), 7)


# ------------------------------------------------------------------------------------------------
# quantize and dequantize

@each('text', CODED)
def test_nearest_is_the_nearest_level_by_brute_force(text):
    s, all_levels = spec(text), levels_of(spec(text))
    bend = MAPS[s.map if not MAPS[s.map].nearest else 'linear'].code  # of v the nearest root
    y = normal(max(2, 2 ** 14 // len(all_levels)), 64) * s.top / 2      # some of it is clipped
    y = y.abs() if GRIDS[s.grid].low >= 0 else y
    y[0] = y[0] / s.top                                                 # and some is small
    got, y = dequantize(quantize(y, s, scale=ONE)).double(), y.double()
    far = lambda a, b: (bend(a) - bend(b)).abs()
    least = far(y[..., None], all_levels).amin(-1) + 2 ** -20 * bend(y).abs()   # float32 roots
    lifted = (got == 1) & (y > 0) & (s.map == 'root4')                  # v > 0 is never zero
    assert ((far(y, got) <= least) | lifted).all() and torch.isin(got, all_levels).all()


@each('text', CODED)
def test_stochastic_rounding_is_unbiased(text):
    """Between neighbours a and b only these two occur, b with probability (y - a) / (b - a)."""
    s, n, all_levels = spec(f'{text}/stochastic'), 2000, levels_of(spec(text))
    i = ((all_levels[:-1] != 0) | (s.map != 'root4')).nonzero().flatten()   # which never is 0
    i = i[torch.linspace(0, len(i) - 1, 256 * bool(len(i))).long()]     # of bf16 some < 2^-119
    a, b = all_levels[i], all_levels[i + 1]
    y = (a + (b - a) * torch.linspace(0.05, 0.95, len(i))[torch.randperm(len(i))]).float()
    p = (y - a) / (b - a)
    draws = dequantize(quantize(y.repeat(n, 1), s, 5, scale=ONE)).double()
    assert ((draws == a) | (draws == b)).all()
    bias, sigma = (draws == b).double().mean(0) - p, (p * (1 - p) / n).sqrt()
    assert (bias.abs() <= 5 * sigma).all() and bias.sum().abs() <= 5 * sigma.norm()


@each('text', CODED)
def test_packing_loses_nothing(text):
    s, y, bits = spec(text), levels_of(spec(text)).float(), GRIDS[spec(text).grid].bits
    n = 8 // math.gcd(8, bits)                  # codes that fill bytes: 2 of 4 bits, 4 of 6
    y = torch.stack([F.pad(y, (0, n + -len(y) % n), value=y[0]).roll(i) for i in range(5)])
    q = quantize(y, s, scale=ONE)
    assert torch.equal(dequantize(q), y) and torch.equal(levels(q), y)
    assert 8 * q.codes.untyped_storage().nbytes() == bits * y.numel()


@each('name', [name for name, grid in GRIDS.items() if grid.dtype.is_floating_point])
def test_float_grids_are_the_hardware_formats(name):
    grid, x = GRIDS[name], normal(4096) * 10 ** (3 * normal(4096, seed=1))
    x = torch.cat((x, torch.tensor([0.0, -0.0, 448, 2 ** -9, 2 ** -10, 1e-40, 1e30])))[None]
    oracle = x.clamp(grid.low, grid.high).to(grid.dtype).float()
    assert torch.equal(dequantize(quantize(x, name, scale=ONE)), oracle)
    assert torch.finfo(grid.dtype).max == grid.high == -grid.low


def test_scales_take_few_bits_as_microscaling_formats_say():
    """mxfp4: the power of two at or below max / 4. mxfp8: at or above max / 448: clips nothing."""
    for text, bits in (('int8/128', 8.25), ('int4/row/asymmetric', 4 + 64 / 1280), ('nvfp4', 4.5),
                       ('mxfp4', 4.25), ('mxfp8', 8.25), ('rank1', 32 / 64 + 32 / 1280)):
        size = sum(t.nbytes for t in quantize(normal(64, 1280), text)[:4] if t is not None)
        assert 8 * size / (64 * 1280) == pytest.approx(bits, abs=0.001), text
    x = torch.outer(torch.tensor([1.0, 6, 7, 8, 448]), 2.0 ** torch.tensor([-60, -1, 0, 5]))
    x = torch.cat((x, *(x.nextafter(torch.tensor(way)) for way in (0, 1e30)))).flatten()
    for name, power in (('mxfp4', (x.double() / 4).log2().floor()),
                        ('mxfp8', (x.double() / 448).log2().ceil())):
        scale = quantize(F.pad(x[:, None], (3, 28)), name).scale
        assert scale.dtype == torch.uint8 and scale.shape == (len(x), 1, 1)
        assert (scale.view(torch.float8_e8m0fnu).float().flatten() == 2.0 ** power).all()
    scale = quantize(normal(8, 64), 'nvfp4').scale
    assert scale.dtype == torch.float8_e4m3fn and scale.float().amax() == 448


def test_symmetric_and_asymmetric_formulas():
    x = normal(8, 32) + torch.tensor([2.5, -2.5] * 4)[:, None]          # some rows have one sign
    a = x.double()                                                      # paper 1, in float64
    s = a.abs().amax(1, keepdim=True) / 7
    assert close(fake_quant(x, 'int4/row'), (a / s).round().clamp(-8, 7) * s)
    least, most = a.amin(1, keepdim=True).clamp(max=0), a.amax(1, keepdim=True).clamp(min=0)
    for text in every(GRIDS, ['asymmetric']):
        _, low, high, *_ = GRIDS[spec(text).grid]
        s = (most - least) / (high - low)
        z = (least / s - low).round()
        oracle = ((a / s - z).round().clamp(low, high) + z) * s
        assert close(fake_quant(x, f'{text}/row'), oracle)


def test_scales_are_of_the_axes_they_say_and_float32():
    x, y = normal(2, 3, 8), normal(32)
    for group, most in (('tensor', x.abs().amax()), ('row', x.abs().amax(2)), ('column', x.abs()
                        .amax((0, 1))), ('4', x.abs().unflatten(-1, (2, 4)).amax(-1))):
        assert torch.allclose(quantize(x, f'int8/{group}').scale.flatten(), most.flatten() / 127)
    for how in ('int8', 'int8/row', 'int8/4', 'nvfp4/hadamard'):        # an axis alone is a row
        assert torch.equal(fake_quant(y, how), fake_quant(y[None], how)[0])
    x = normal(64, 256).bfloat16()                  # no step is in x's own dtype, but the last
    assert torch.equal(fake_quant(x, 'int8/row'), fake_quant(x.float(), 'int8/row').bfloat16())


def test_absmean_is_mean_over_the_root_of_the_highest_code():
    x = normal(64, 256)
    for name, grid in GRIDS.items():
        for text in (texts := every([name], ['absmean'])):
            assert torch.allclose(quantize(x, text).scale, x.abs().mean() / grid.high ** 0.5)
        assert bool(texts) == (not grid.float and grid.bits > 0)
    y = torch.tensor([[-1.9, -0.4, 0.3, 1.0, 1.0, -1.0, 1.0, 1.4]])     # mean|y| = 1: from -2 to 1
    assert fake_quant(y, 'int2/row/absmean').tolist() == [[-2, 0, 0, 1, 1, -1, 1, 1]]


@each('name', [*GRIDS, *FORMATS])
def test_zero_small_numbers_and_nan_stay_so(name):
    x = F.pad(torch.full((1, 1), 1e-43), (0, 31))
    rest = [['', *words[1:]] for field, words in WORDS.items() if field not in ('grid', 'group')]
    for text in every([name], ['', 'row', '16'], *rest, ['', 'hadamard']):
        for y in (fake_quant(x, text, 1), fake_quant(x.flip(1), text, 1)):
            assert y.isfinite().all() and y.abs().max() < 1e-36, text
        assert not fake_quant(0 * x, text, 1).any()
    x, small = normal(4, 32), 2.0 ** -60                                # no eps swallows them
    assert torch.equal(fake_quant(small * x, name), small * fake_quant(x, name))
    bad = x.where(torch.arange(32) != 3, math.nan)          # in the first of two blocks
    assert fake_quant(bad, name).isnan().any()
    if name not in (*FORMATS, 'bf16', 'rank1'):             # the other, which may share its bytes
        hat, good = (dequantize(quantize(t, f'{name}/16'))[:, 16:] for t in (bad, x))
        assert torch.equal(hat, good)


@each('text', every(GRIDS, ['root4']))
def test_v_is_never_rounded_to_zero(text):
    for most in (1.0, 1e30):                    # where the quotient underflows, too
        v = torch.tensor([[0.0, 1e-45, 1e-38, 1e-12, 1e-6, most, 0, 0]])
        assert ((fake_quant(v, f'{text}/row') > 0) == (v > 0)).all()


@each('n, block', [(256, 128), (96, 32), (64, 64), (7, 1)])
def test_the_rotation_is_orthogonal_and_spreads_outliers(n, block):
    parity = torch.tensor([[(i & j).bit_count() % 2 for j in range(block)] for i in range(block)])
    oracle = torch.block_diag(*[(1 - 2.0 * parity) / block ** 0.5] * (n // block))
    x = normal(8, n)
    assert torch.allclose(quant.rotate(x), x @ oracle, atol=1e-5)
    x[:, 3] *= 50
    error = lambda how: (fake_quant(x, how) - x)[:, 4:].norm()          # of all that is no outlier
    assert block < 64 or error('int4/row/hadamard') < 0.8 * error('int4/row')


@each('text', ['int4/row', 'int3/32', 'ternary/row', 'int4/tensor', 'fp4/16', 'int4/column',
               'uint8/row/root4', 'nvfp4', 'int2/row/hadamard'])
def test_mse_is_the_best_of_eight_scales(text):
    x, s = normal(64, 64) * normal(64, 64, seed=1).exp(), spec(text)
    x = x.abs() if text[0] == 'u' else x
    ours = (fake_quant(x, f'{text}/mse') - x).square().sum().item()
    assert ours <= (fake_quant(x, text) - x).square().sum() * (1 + 1e-6)
    if not s.format and s.group != 'tensor':                            # group by group
        scale = quantize(x, s).scale
        tries = [dequantize(quantize(x, s, scale=scale * i / 10)) for i in range(3, 11)]
        groups = [quant.grouped(t - x, s).square().sum(s.axis) for t in tries]
        assert ours == pytest.approx(torch.stack(groups).amin(0).sum().item(), rel=1e-4)


# ------------------------------------------------------------------------------------------------
# Matmul and Linear

@each('w, a', [
    ('int8/row', ''), ('', 'int8/row'), ('ternary/tensor/absmean', 'int4/row'), ('nvfp4', 'mxfp4'),
    ('int4/asymmetric', 'fp8/column'), ('bf16', 'int8/row/stochastic'), ('', ''),
    ('rank1', 'mxfp8'), ('int4/row/stochastic', 'int4/row/stochastic')])
def test_matmul_is_the_detach_trick(w, a):
    """Without a Spec, that is nn.Linear, bit for bit."""
    compute = 'codes' if quant.together(spec(w), spec(a)) else 'float'
    layer = Linear(64, 32, True, How(w, a, compute=compute))
    layer.bias.data, x = normal(32), normal(2, 5, 64).requires_grad_()
    ste = lambda t, how, n: t + (fake_quant(t, how, stream(layer.key, n)) - t).detach()
    y, oracle = layer(x), F.linear(ste(x, a, 1), ste(layer.weight, w, 0), layer.bias)
    ours, oracles = ((y, *grads(y, x, *layer.parameters())) for y in (y, oracle))
    error = 1e-4 * bool(w or a)
    assert all(torch.allclose(*pair, error, error / 10) for pair in zip(ours, oracles))


@each('backward', ['ste', 'full'])
@each('where', ['both', 'dx', 'dw'])
def test_three_meanings_of_the_backward(backward, where):
    """(full, dw) is paper 1's released code, (full, dx) like SwitchBack, (ste, both) its text."""
    how = How('int4/row', 'int4/row', 'int4/row/stochastic', where, backward)
    layer = Linear(64, 32, True, how)
    x, g = normal(12, 64).requires_grad_(), normal(12, 32, seed=1)
    dx, dw, db = torch.autograd.grad(layer(x), (x, layer.weight, layer.bias), g)
    X, W, G = x.detach(), layer.weight.detach(), fake_quant(g, how.gradients, stream(layer.key, 2))
    if backward == 'ste':
        X, W = fake_quant(X, 'int4/row'), fake_quant(W, 'int4/row')
    assert torch.equal(dx, (G if where != 'dw' else g) @ W) and torch.equal(db, g.sum(0))
    assert torch.equal(dw, (G if where != 'dx' else g).T @ X)


@each('w, a, bytes', [('', '', 4 * 1024 * 256 + 4 * 256 * 256), ('ternary', 'int8/row', 1024 * 260
                      + 256 * 256 / 4), ('', 'int8/row', 1024 * 260 + 4 * 256 * 256)])
def test_codes_are_what_is_saved_for_backward(w, a, bytes):
    saved, keep = [], lambda t: saved.append(t.nbytes) or t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        Linear(256, 256, how=How(w, a))(normal(1024, 256).requires_grad_())
    assert bytes <= sum(saved) <= bytes + 16


def ways(w, a, g='', n=40, n_in=64, n_out=48):
    """A function that gives y, dx and dw of one layer in the ways asked for; w; dL/dy."""
    x, weight = normal(n, n_in).requires_grad_(), normal(n_out, n_in, seed=1)
    weight, gy = weight * torch.logspace(-1, 1, n_out)[:, None], normal(n, n_out, seed=2)
    def way(**how):
        layer = Linear(n_in, n_out, how=How(w, a, g, **how))
        layer.weight.data = weight
        return (y := layer(x)), *torch.autograd.grad(y, (x, layer.weight), gy)
    return way, weight, gy


@each('n, n_in, n_out', [(40, 64, 48), (1, 24, 8), (17, 40, 72)])
@each('w, a', [*((f'{x}/row', f'{x}/row') for x in MULTIPLIED), ('fp8/tensor', 'fp8e5/row'),
               ('ternary/tensor/absmean', 'int8/row/stochastic'), ('int4/row', 'int4/tensor'),
               ('int4/row/hadamard/mse', 'int8/row/hadamard')])
def test_multiplying_codes_is_multiplying_what_they_stand_for(w, a, n, n_in, n_out):
    way, error = ways(w, a, '', n, n_in, n_out)[0], 2 ** -8 if 'fp' in w else 1e-5   # out as bf16
    ours, floats = way(compute='codes')[0], way(compute='float')[0]
    assert close(ours, floats, error) and (n == 1 or not ours.equal(floats))


def test_integer_matmuls_are_exact_and_fast(monkeypatch):
    a, b = torch.randint(-128, 128, (2, 1024, 256), dtype=torch.int8)
    best = lambda f: min(timeit.repeat(f, number=1, repeat=9))
    assert best(lambda: quant.int_matmul(a, b)) < 4 * best(lambda: a.float() @ b.float().T)
    a, b = (torch.randint(-128, 128, (5, 140000), dtype=torch.int8) for _ in 'ab')
    a[0], b[0] = -128, -128                                             # 2^31 and more: overflows
    for n, fast in itertools.product((140000, 1000), (True, False)):
        monkeypatch.setattr(quant, 'INT_MM_CPU', fast)
        x, y, error = a[:, :n], b[:, :n], 1e-6 * (n > 1000)
        oracle = (x.long() @ y.long().T).double()
        assert torch.allclose(quant.int_matmul(x, y).double(), oracle, rtol=error, atol=0)


@each('w, a, g', [
    ('int8/row', 'int8/row', 'int8/row/stochastic'), ('fp8/row', 'fp8/row', 'fp8e5/row'),
    ('ternary/tensor/absmean', 'int8/row', 'int8/row'), ('int4/row', 'int4/row', 'int8/row')])
def test_the_backward_on_codes(w, a, g):
    """fold: dx = Q(g s_w) codes(w), dw = Q(g s_x)^T codes(x); requantize: dx = Q(g) Q(w^T)^T .."""
    (way, W, G), error = ways(w, a, g), 2 ** -7 if 'fp8' in w else 1e-5
    for backward in ('fold', 'requantize'):
        both = way(backward=backward, compute='codes'), way(backward=backward), ways(w, a)[0]()
        for ours, oracle, full in zip(*both):
            assert close(ours, oracle, error) and (oracle - full).norm() < 0.06 * full.norm()
        for n, where in (1, 'dw'), (2, 'dx'):                           # the other has g as it is
            assert way(backward=backward, gradients_in=where)[n].equal(both[2][n])
    for q, grad, n, key in ((quantize(W, w), G, 1, 2), (quantize(normal(40, 64), a), G.T, 2, 3)):
        s, key = q.scale.expand(len(q.codes), 1), stream(torch.zeros((), dtype=torch.int32), key)
        oracle = fake_quant(grad * s.T, g, key) @ (dequantize(q) / s)
        assert close(way(backward='fold')[n], oracle)


@each('how', ['int4/row', 'nvfp4/hadamard', 'int4/8/hadamard/mse', *FORMATS])
def test_all_three_matmuls_in_any_format(how):
    """y = x^ w^T, dx = R(g) Q(w^T)^T, dw = R(g^T) Q(x^T)^T: groups along the sum; two noises R."""
    Q, by_chance = lambda t: fake_quant(t, how), f'{how}/stochastic'
    R = lambda t, n: fake_quant(t, by_chance, stream(torch.zeros((), dtype=torch.int32), n))
    way, W, g = ways(how, how, by_chance, n=32, n_out=96)
    (y, dx, dw), x = way(backward='requantize'), normal(32, 64)
    assert close(y, Q(x) @ Q(W).T) and close(dx, R(g, 2) @ Q(Q(W).T).T)
    assert close(dw, R(g.T, 3) @ Q(Q(x).T).T)


@each('how, says', [
    *(({'compute': 'codes', **how}, "'codes' needs codes: give weights") for how in (
        {'weights': 'int8/row'}, *(dict.fromkeys(INT8, x) for x in GRIDS if x not in MULTIPLIED),
        {}, *({**INT8, 'weights': w} for w in ('int8/16', 'fp8/row', 'int8/row/hadamard')))),
    *(({'backward': 'fold', 'gradients': 'int8/row', **how}, "'fold' multiplies codes: give")
      for how in ({}, {**INT8, 'gradients': 'int8/tensor'}, {**INT8, 'gradients':
                  'int8/row/hadamard'}, dict.fromkeys(INT8, 'int8/row/hadamard'))),
    ({'gradients_in': 'dy', 'gradients': 'int8'}, 'use .*both'), ({'weights': 'int9'}, 'word'),
    ({'backward': 'exact'}, 'use .*full'), ({'compute': 'int8'}, 'use .*codes'),
    *(({**INT8, **how}, 'about quantized gradients') for how in (
        {'gradients_in': 'dx'}, {'backward': 'fold'}, {'backward': 'requantize'}))])
def test_ways_that_do_not_fit_or_do_nothing(how, says):
    with pytest.raises(ValueError, match=says):
        grads(Linear(32, 32, how=How(**how))(x := normal(4, 32).requires_grad_()), x)


@each('stored', [*STORED, 'ternary/tensor/absmean', 'int4/16', 'int2/column'])
def test_stored_codes_are_all_there_is(stored):
    """The ghost, of four bytes, gets the gradient of their w; a cast and back changes nothing."""
    layer, twin, x = Linear(64, 32), Linear(64, 32), normal(8, 64).requires_grad_()
    w = fake_quant(layer.weight.detach(), stored).requires_grad_()
    rtn_(torch.nn.Sequential(layer, twin), stored)
    a, b = layer(x), F.linear(x, w)
    for ours, oracle in zip((a, *grads(a, x, layer.weight)), (b, *grads(b, x, w))):
        assert torch.allclose(ours, oracle, atol=1e-5)
    state = copy.deepcopy(layer.double().float().state_dict())
    assert layer.weight.untyped_storage().nbytes() == 4 and state.keys() <= {'codes', 'scale'}
    twin.load_state_dict(state)
    assert torch.equal(twin(x), layer(x)) and torch.equal(layer(x), a)
    layer.store_('int4/row/stochastic')                     # to other bits, and to nearest
    assert torch.equal(w4 := dequantize(layer.stored_weight()), fake_quant(w, 'int4/row'))
    layer.how = How('ternary/row')                                      # and of these, another
    assert torch.allclose(layer(x), F.linear(x, fake_quant(w4, 'ternary/row')), atol=1e-5)


@each('stored', [*(text for text in STORED if text != 'bf16'), 'int4/16', 'ternary/tensor/absmean',
                 'ternary/column', TERNARY])
def test_zeros_that_are_stored_get_a_scale_like_their_neighbours(stored):
    """The mean, or what keeps variances, as their codes will move. A nan is no zero: it stays."""
    (some, none, bad), s = (Linear(64, 32) for _ in range(3)), spec(stored)
    bad.weight.data[1, 2], some.weight.data[9] = math.nan, 1e-38        # the latter is no zero
    some.weight.data[3] = some.weight.data[:, 5] = none.weight.data[:] = 0
    dead = quant.grouped(some.weight.detach() == 0, s).all(s.axis, keepdim=True)
    own = quantize(some.weight.detach(), s).scale
    rtn_(torch.nn.Sequential(some, none, bad), stored)
    oracle = torch.where(dead, own[~dead].mean(), own)
    assert torch.allclose(some.scale, oracle, atol=0) and dead.any() == (s.group != 'tensor')
    assert torch.allclose(none.scale, torch.tensor(64 ** -0.5 / s.top))
    assert dequantize(bad.stored_weight())[1, 2].isnan()
    none.weight.grad = normal(32, 64)
    Optimizer(torch.nn.Sequential(none), Config(code_lr=1.01)).step()
    assert 0.01 < dequantize(none.stored_weight()).abs().max() < 1.1 * 64 ** -0.5


# ------------------------------------------------------------------------------------------------
# the optimizer

def pair(stored='', shape=(64, 128), **keys):
    """A Linear, its optimizer, and a step of it from a given gradient to the weight after it."""
    layer = Linear(*shape[::-1])
    layer.weight.data = normal(*shape) * 0.02
    layer.store_(stored)
    optimizer = Optimizer(torch.nn.Sequential(layer), Config(**{'weight_decay': 0.0, **keys}))
    def step(g, clip=1.0):
        layer.weight.grad = g
        optimizer.step(clip=clip)
        return dequantize(layer.stored_weight()).clone()
    return layer, optimizer, step


@each('beta1', [0.9, 0.0])
def test_adamw_is_torch_adamw(beta1):
    """Without momentum no m is held."""
    layer, adam, step = pair(learning_rate=1e-2, beta1=beta1, beta2=0.99, weight_decay=0.1, eps=0.1)
    p = torch.nn.Parameter(layer.weight.detach().clone())
    reference = torch.optim.AdamW([p], lr=1e-2, betas=(beta1, 0.99), eps=0.1, weight_decay=0.1)
    for i in range(20):
        p.grad = 0.5 * normal(64, 128, seed=i)
        step(2 * p.grad, clip=0.5)
        reference.step()
    assert torch.allclose(layer.weight, p, atol=1e-6)
    assert len(state_of(adam)) == 1 + (beta1 > 0)


@each('m, v, sigma, error', [
    ('int8/128/sqrt', 'uint8/128/root4', 1, .05), ('int4/128/sqrt', 'uint4/128/root4', 1, .6),
    ('int3/4/sqrt', 'uint8/4/root4', 1, .6), ('nvfp4', '', 1, .6), ('mxfp8', '', 1, .1),
    (*['bf16/stochastic'] * 2, 1, .01), ('', 'uint8/128/root4', 2, .2), ('', 'uint8/128', 2, None)])
def test_quantized_states_stay_close_but_linear_v_explodes(m, v, sigma, error):
    size = (sigma * normal(64, 128, seed=99)).exp()                 # of gradients in a block
    (_, _, a), (_, _, b) = pair(learning_rate=1e-2), pair(learning_rate=1e-2, adam_m=m, adam_v=v)
    for i in range(20):
        full, ours = (step(normal(64, 128, seed=i) * size) for step in (a, b))
        assert i or ours.equal(full)            # what is rounded is kept, and steps from then on
    share = (ours - full).norm() / (full - normal(64, 128) * 0.02).norm()
    assert share < error if error else share > 10       # paper 1, and its cause: v is 0


def test_w_and_its_states_have_noise_of_their_own(monkeypatch):
    """At each step, and with each seed."""
    how, seen = 'int8/row/stochastic', []
    steps = [pair(w, adam_m=how, adam_v=how, seed=seed, code_lr=rate)[2]
             for w, seed, rate in ((how, 1, 0.0), (how, 2, 0.0), ('int8/row', 3, 0.1))]
    monkeypatch.setattr(quant, 'uniform', lambda x, key: seen.append(int(key)) or uniform(x, key))
    [step(normal(64, 128, seed=i)) for step in steps for i in range(3)]
    assert len({*seen}) == len(seen) == 3 * (3 + 3 + 2)             # w, m and v; and e and v


@each('m, keys', [*((m, {'adam_v': 'rank1'}) for m in [*every(GRIDS, ['', 'row']), *FORMATS]),
                  ('', {'optimizer': 'muon'})])
def test_many_steps_without_gradients_stay_finite(m, keys):
    _, optimizer, step = pair(adam_m=m, shape=(16, 32), **keys)
    for i in range(1000 if 'fp' in m or not m else 100):
        w = step(normal(16, 32, seed=i).relu() * (i < 3))               # of some never any
    assert w.isfinite().all() and all(t.float().isfinite().all() for t in state_of(optimizer))


def test_rank1_is_exact_for_rank_one():
    size = torch.logspace(-2, 0, 64)[:, None] * torch.logspace(-1, 1, 128)
    (_, _, a), (_, optimizer, b) = (pair(learning_rate=1e-2, adam_v=v) for v in ('', 'rank1'))
    for i in range(10):
        ends = [step(size * normal(64, 128, seed=i).sign()) for step in (a, b)]   # g^2 = size^2
    assert torch.allclose(*ends, atol=1e-5) and torch.allclose(fake_quant(size, 'rank1'), size)
    g, first = normal(64, 128), pair(learning_rate=1e-2, adam_v='rank1')[2]  # by what is stored
    assert close(0.02 * g - first(g), 1e-2 * g / fake_quant(g * g, 'rank1').sqrt(), 1e-3)


def test_the_mean_of_a_step_by_chance_is_the_step():
    """Paper 2: E[q'] = clip(W' / s), W' = AdamW(W, g)."""
    n, g = 2 ** 14, normal(1, 128)
    layer, optimizer, step = pair('ternary/tensor/absmean/stochastic', (n, 128),
                                  learning_rate=5e-3, weight_decay=0.1)
    layer.codes[:] = layer.codes[0]                                     # n times the same row
    q, s = levels(layer.stored_weight()), layer.scale.clone()
    w = torch.nn.Parameter(q[0] * s[0])
    w.grad = g[0]
    torch.optim.AdamW([w], lr=5e-3, weight_decay=0.1).step()
    new = step(g.expand(n, 128)) / s
    bias = new.mean(0) - (w.detach() / s[0]).clamp(-1, 1)
    assert torch.equal(layer.scale, s) and (bias.abs() <= 5 * 0.5 / math.sqrt(n)).all()
    assert bias.mean().abs() <= 5 * 0.5 / math.sqrt(n * 128)
    assert optimizer.flips() == pytest.approx((new != q).float().mean().item())


@each('stored, lr', [(TERNARY, 0.3), ('ternary/tensor', 1.5), ('int8/32', 0.02), *(
    (text, 0.8 / spec(text).top) for text in ('int2/column', *STORED) if text[:3] == 'int')])
def test_a_code_moves_when_its_gradients_add_up_to_a_level(stored, lr):
    """Sum lr Qp g / sqrt(vhat) since it last moved, and the rest of it stays; one at the end of
    its grid gathers no more than a level."""
    layer, optimizer, step = pair(stored, code_lr=lr, beta2=0.5, scale_lr=0.0)
    q, e, v, (_, low, high, *_) = levels(layer.stored_weight()), 0, 0, GRIDS[spec(stored).grid]
    for t in range(1, 20):
        g = normal(64, 128, seed=t)
        v = v / 2 + g * g / 2
        e = e + lr * high * g / (v / (1 - 0.5 ** t)).sqrt()
        new = (q - e.trunc()).clamp(low, high)
        moved, q, e = (new != q).float().mean(), new, (e - (q - new)).clamp(-1, 1)
        step(t * g, clip=1 / t)
        ours = levels(layer.stored_weight()) == q, (state_of(optimizer)[0] - e).abs() < 1e-3
        assert all(same.float().mean() > 0.999 for same in ours)        # a sum may be just a level
    assert 0.01 < moved == pytest.approx(optimizer.flips(), abs=1e-3)


@each('mean, lr, e, rate', [*((0, lr, 'int8', (lr / (1 + 0.583 * lr)) ** 2) for lr in (0.2, 0.1)),
                            (0.5, 0.02, 'int4', 0.02 * 0.5 / 1.25 ** 0.5)])
def test_noise_moves_a_code_once_in_1_over_lr_squared_steps(mean, lr, e, rate):
    """The time in which sums of noise reach a level, (1 + .583 lr)^2 / lr^2; what is steady, 1 /
    (lr mean r), also where a step adds an eighth of a code to e, since that is stochastic."""
    _, optimizer, step = pair('int8/row', code_lr=lr / 127, adam_m=f'{e}/row/stochastic')
    flips = 0
    for i in range(600):
        step(normal(64, 128, seed=i) + mean)
        flips += optimizer.flips() * (i >= 100) / 500
    assert flips == pytest.approx(rate, rel=0.1)


@each('kind', ['adamw', 'muon'])
def test_embeddings_and_norms_have_adamw_and_a_rate_of_their_own(kind):
    model = gpt(optimizer=kind, learning_rate=1e-3, embedding_lr=0.5, weight_decay=0.1, code_lr=0.8,
                base_width=16)
    before, optimizer = copy.deepcopy(model.state_dict()), Optimizer(model, model.config)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert len({*map(int, optimizer.keys.values())}) == len(optimizer.keys)
    for name, p in model.named_parameters():
        step, block, state = before[name] - p, name in linears(model), optimizer.state[name]
        assert len(state) == 2 - (block and kind == 'muon')
        oracle = (1e-3 / 4 if block else 0.5) * (1 + 0.1 * (p.dim() > 1) * before[name])
        assert len(state) == 1 or close(step, oracle, 1e-3)
    for base_width, narrow in ((16, 1 / 4), (1000, 1)):     # n_embd = 64: above it, and below
        model.config.base_width, model.config.embedding_lr = base_width, 0     # learning_rate
        optimizer.begin(schedule=0.25)
        rates, decays, *_ = zip(*(optimizer.rates[k].tolist() for k in (
            'direct', 'scales', kind, 'matrix', 'vector')))
        oracle = [0.2 * narrow ** 0.5, 0.0025, 0.25e-3 * narrow, 0.25e-3, 0.25e-3]
        assert rates == pytest.approx(oracle)
        assert decays == pytest.approx([0, 0, 0.1 * oracle[2], 0.1 * oracle[3], 0])


@each('size', [1.0, 1e-22])
@each('stored, code_lr', [(TERNARY, 1.5), *((stored, 0.0) for stored in (
    TERNARY, 'int2/64/mse', 'int8/tensor', 'int4/column', 'fp8/row'))])
def test_scales_learn_downhill(stored, code_lr, size):
    """By at most lr of log s, also where gradients are so small that their square is zero; with
    optimizer = 'scales' they alone do, and have the only states."""
    layer, optimizer, step = pair(stored, scale_lr=0.1, code_lr=code_lr, optimizer='scales')
    q, s = levels(layer.stored_weight()), layer.scale.clone()
    step(size * (normal(64, 128, seed=1) + q))                          # dL/d log s = sum g w > 0
    assert optimizer.flips() >= 0.1 or size < 1 or not code_lr
    assert code_lr or levels(layer.stored_weight()).equal(q) and len(state_of(optimizer)) == 2
    down, new = (s / layer.scale).log(), layer.scale.clone()
    assert (down.abs() <= 0.1001).all() and (size < 1 or (down > 0.0999).all())
    step(torch.zeros(64, 128))          # m goes on: .1 * .9 / 1.9 * sqrt(1.999 / .999) = .0670
    assert size < 1 or close((new / layer.scale).log(), torch.tensor(0.0670), 1e-2)
    layer, _, step = pair(stored, scale_lr=0.1, optimizer='scales')     # by dL/dlog s, not dL/ds:
    _, _ = step(q), step(-0.9 * q)              # .1 + .1 (.09 - .09 e^-.1) / .19 / .912 = .1049
    assert close((s / layer.scale).log(), torch.tensor(0.1049), 2e-3)
    a, b = (pair(stored, optimizer='scales')[2] for _ in 'ab')
    assert a(q).equal(b(q)) and a(-q).equal(b(-2 * q, clip=0.5))
    _, frozen, step = pair(stored, scale_lr=0.0, optimizer='scales')    # a rate of zero: no state
    assert step(q).equal(step(-q)) and not state_of(frozen)


@each('shape, m', [((64, 128), ''), ((128, 64), 'int8/row')])
def test_muon_makes_the_singular_values_of_a_step_about_1(shape, m):
    """By .2 sqrt(max(out, in)) U p(S) V^T: p, an odd polynomial taken five times, is near 1."""
    layer, optimizer, step = pair('', shape, optimizer='muon', learning_rate=1.0, weight_decay=0.1,
                                  adam_m=m)
    w, held, size = layer.weight.detach().clone(), 0, 0.2 * max(shape) ** 0.5
    for t, g in enumerate((normal(*shape), normal(*shape, seed=1)), 1):
        held = fake_quant(0.9 * held + 0.1 * g, m)
        U, p, Vt = torch.linalg.svd((0.9 * held + 0.1 * g).double(), full_matrices=False)
        p = p / p.norm()
        for _ in range(5):
            p = 3.4445 * p - 4.775 * p ** 3 + 2.0315 * p ** 5
        old, w = w, step(t * g, clip=1 / t)
        ours = (0.9 * old - w) / size                                   # 1 - lr decay = .9
        assert (ours - U * p @ Vt).abs().max() < (1e-2 if m else 1e-4)  # m is rounded after it
        assert 0.6 < p.min() and p.max() < 1.3
    assert len(state_of(optimizer)) == 1 + bool(m)                      # codes and scales, no v


@each('stored', ['', TERNARY, 'int8/row', 'int4/16/stochastic', 'int2/column/stochastic',
                 *(f'{text}/stochastic' for text in STORED)])
def test_the_optimizer_steps_the_weight_that_the_model_reads(stored):
    """Each layer its own; after a cast there and back, another optimizer, or loading."""
    config = Config(code_lr=1.5 * ('stochastic' not in stored), learning_rate=0.1, adam_m='int8')
    net, read = torch.nn.Sequential(Linear(64, 64), Linear(64, 32)), lambda: [
        dequantize(layer.stored_weight()).clone() for layer in net]
    net[0].store_(stored)
    first, second = Optimizer(net, config), Optimizer(net, config)
    saved = copy.deepcopy(net.state_dict()), copy.deepcopy(first.state_dict())
    for i, optimizer in enumerate((first, second, first, first, first, second)):
        if i == 3:
            net.load_state_dict(saved[0])
            first.load_state_dict(saved[1])
        if i == 4:
            net.double().float()
        before = read()
        net.zero_grad()
        net(normal(8, 64)).square().sum().backward()
        optimizer.step()
        assert not any(map(torch.equal, before, read()))
        moved = (before[0] != read()[0]).double().mean().item()
        assert 'stoch' not in stored or optimizer.flips() == pytest.approx(moved)
    places = [t.data_ptr() for o in (first, second) for t in state_of(o)]
    assert len(set(places)) == len(places)
    with pytest.raises(ValueError, match='stored in another way'):
        Optimizer(net, replace(config, adam_m='')).load_state_dict(saved[1])


@each('most, stored, keys', [(12, '', {}), (0.9, TERNARY, {'adam_m': 'int4/128', 'adam_v':
      'rank1'}), (1.5, TERNARY, {'adam_m': 'int8/row', 'adam_v': 'rank1', 'code_lr': 0.2})])
def test_bytes_are_read_off_the_storages(most, stored, keys):
    layer, optimizer, _ = pair(stored, (512, 256), **keys)
    layer.weight.grad, net = normal(512, 256), optimizer.model
    size, weights = bytes_held(net, optimizer), [*net.parameters(), *net.buffers()]
    assert size['linear']['weights'] + size['linear']['optimizer'] <= most
    assert size['linear']['gradients'] == 4 and size['gradients'] == 4 * 512 * 256
    for key, tensors in (('weights', weights), ('optimizer', state_of(optimizer))):
        assert size[key] == sum(t.untyped_storage().nbytes() for t in tensors)


# ------------------------------------------------------------------------------------------------
# post-training quantization

def correlated(n, tokens=512):
    """H = 2 mean x x^T of inputs whose channels depend on each other and differ in size."""
    x = normal(tokens, n, seed=3) @ normal(n, n, seed=4) * torch.logspace(-1, 1, n)
    return 2 * x.T @ x / tokens


@each('act_order', [False, True])
@each('how', ['int4/row', 'int3/24', 'int2/row/absmean', 'ternary/row/absmean'])
def test_gptq_is_its_definition_column_by_column(how, act_order):
    """In float64, by inverting H anew for the columns that are left."""
    W, H, s = normal(24, 144), correlated(144), spec(how)   # more than one block of columns
    H[::2] = H[:, ::2] = 0                                  # and half of them without data
    q, nearest = gptq(W, H, how, 0.01, act_order), quantize(W, how)
    left, codes = W.double(), torch.zeros(W.shape)
    scale = nearest.scale.expand_as(quant.grouped(W, s)).reshape(W.shape).double()
    damped = H.double() + 0.01 * H.diagonal()[1::2].double().mean() * torch.eye(144)
    order = (H.diagonal() * act_order).argsort(descending=True, stable=True)
    for k, i in enumerate(order):
        inverse = torch.linalg.inv(damped[order[k:]][:, order[k:]])
        codes[:, i] = (left[:, i] / scale[:, i]).round().clamp(*GRIDS[s.grid][1:3])
        error = (left[:, i] - scale[:, i] * codes[:, i]) / inverse[0, 0]
        left[:, order[k:]] -= torch.outer(error, inverse[0])
    assert torch.equal(q.scale, nearest.scale) and levels(q).equal(codes)
    E, e = W - dequantize(q), W - dequantize(nearest)
    assert (E @ H * E).sum() < (e @ H * e).sum() and e.norm() < E.norm()


@each('how', ['int4/row/mse', 'int3/24/mse'])
def test_gptq_chooses_scales_for_what_the_layer_sees(how):
    W, H, s = normal(24, 144), correlated(144), spec(how)
    rounded = lambda scale: dequantize(quantize(W, s, scale=scale))
    error = lambda scale: quant.grouped(H.diagonal() * (W - rounded(scale)) ** 2, s).sum(-1, True)
    found, top = gptq(W, H, how).scale, quantize(W, replace(s, scale='absmax')).scale
    assert all((error(found) <= error(share * top) * 1.00001).all() for share in (.3, .5, .8, 1))
    assert not torch.equal(found, quantize(W, how).scale)


@each('how', ['int8/row', 'int4/row', 'int3/32', 'ternary/row', 'fp8/row'])
def test_gptq_rounds_channels_without_data_to_nearest(how):
    W, H, dead = normal(16, 160), correlated(160), torch.tensor([0, 7, 39])
    W[2, 64:96] = 0
    H[dead] = H[:, dead] = 0
    q, nearest = gptq(W, H, how), quantize(W, how)
    same = levels(q) == levels(nearest)
    assert same[:, dead].all() and not same.all() and torch.equal(q.scale, nearest.scale)
    assert 'row' in how or not levels(q)[2, 64:96].any()
    for bad in (correlated(160, tokens=8), torch.full((160, 160), math.nan), -torch.eye(160) + 1):
        with pytest.raises(ValueError, match='more sequences, or more damping'):
            gptq(W, bad, how, damping=0)


@each('flavour', ['gpt2', 'llama'])
def test_gptq_goes_through_the_model_layer_by_layer(flavour):
    keys = dict(flavour=flavour, activations='int8/row', kv_cache='mxfp8', n_kv_head=1, dropout=.5)
    model, twin, idx, seen = gpt(**keys), gpt(**keys).eval(), tokens(32, 32), []
    gptq_(model, 'int3/row', idx)
    for name, layer in linears(twin).items():       # x comes through those before, quantized
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        twin(idx)
        x = fake_quant(seen[-1].flatten(0, -2), layer.how.activations)
        oracle = gptq(layer.weight, 2 / len(x) * (x.T @ x), 'int3/row')
        assert all(map(torch.equal, linears(model)[name].stored_weight()[:2], oracle[:2]))
        layer.store_('int3/row', oracle)
    rtn_(some := gpt(keep='h.0|mlp.c_proj$', gradients='int4/row'), 'int3/row')
    low = [(bool(m.stored), m.how != How()) for m in linears(some).values()]
    assert low == [(False, False)] * 4 + [(True, True)] * 3 + [(False, False)]
    for bad, data, says in ((model, idx, 'quantized already'), (gpt(), idx[:0], 'needs data'),
                            (gpt(weights='int4/row'), idx, 'quantized already')):
        with pytest.raises(ValueError, match=says):
            gptq_(bad, 'int4/row', data)


# ------------------------------------------------------------------------------------------------
# the model

def gpt(**keys):
    small = {'n_layer': 2, 'n_head': 2, 'n_embd': 64, 'hidden': 128, 'block_size': 32}
    torch.manual_seed(0)
    model = GPT(Config(**{**small, **keys}), 64)
    rtn_(model, model.config.stored)
    return model


def test_the_head_is_tied_and_stays_so_or_untied():
    plain, quantized, untied = (gpt(weights='int8/row', quantize_head=q, tied=t)
                                for q, t in ((False, True), (True, True), (False, False)))
    x = tokens(2, 8)
    assert not torch.equal(plain(x), quantized(x))
    quantized.lm_head.how = How()                                       # a Spec is an attribute
    untied.load_state_dict(plain.state_dict())
    assert torch.allclose(plain(x), quantized(x), atol=1e-6) and torch.equal(untied(x), plain(x))
    assert quantized.lm_head.weight is quantized.wte.weight
    some = gpt(keep='h.0', weights='ternary', quantize_head=True)
    assert some.lm_head.how == some.h[1].mlp.c_fc.how != some.h[0].mlp.c_fc.how == How()
    (plain(x, x) + untied(x, x)).backward()
    total = untied.wte.weight.grad + untied.lm_head.weight.grad
    assert torch.allclose(plain.wte.weight.grad, total, atol=1e-6)


def test_dropout_is_in_embedding_attention_and_residuals_and_for_training_alone():
    model, x = gpt(dropout=0.5, n_layer=3), tokens(2, 16)
    (one, two, three), (y, angles) = model.h, model.embed(x)
    two.attn.c_proj.weight.data[:] = three.mlp.c_proj.weight.data[:] = 0     # one branch is left
    three.attn.dropout = 0.0                                            # of its attention
    twice = lambda: [torch.equal(f(), f()) for f in (
        lambda: model.embed(x)[0], lambda: one.attn(y, angles, None),
        lambda: one.attn(y.bfloat16(), angles, None),                   # other matmuls on a CPU
        lambda: two(y, angles, None), lambda: three(y, angles, None))]
    assert twice() == [False] * 5
    model.eval()
    assert twice() == [True] * 5


@each('flavour', ['gpt2', 'llama'])
def test_layers_get_the_dtype_and_norms_compute_in_float32(flavour):
    model, seen = gpt(flavour=flavour), []
    model.dtype = torch.bfloat16
    for layer in linears(model).values():
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    assert model(tokens(2, 8)).dtype == torch.float32 and {*seen} == {torch.bfloat16}
    y, angle = normal(1, 2, 8, 32).bfloat16(), normal(8, 16)
    assert rope(y, angle.cos(), angle.sin()).equal(
        rope(y.float(), angle.cos(), angle.sin()).bfloat16())
    x = (normal(4, 64) + 1).bfloat16()
    model.ln_f.weight.data += 0.01 * normal(64)
    assert torch.equal(model.ln_f(x), model.ln_f(x.float()).bfloat16())


def test_weights_begin_as_the_config_says():
    """init_gain / sqrt(inputs), or as GPT-2: .02, at the ends of residual branches / sqrt(2 L)."""
    for gain, stds in (0.5, (0.5 / 8, 0.5 / 8, 0.5 / 16)), (0.0, (0.02, 0.01, 0.01)):
        model = gpt(init_gain=gain, hidden=256)
        layers = model.h[1].attn.c_attn, model.h[1].attn.c_proj, model.h[0].mlp.c_proj
        found = [layer.weight.std().item() for layer in layers]
        assert found == pytest.approx(stds, rel=0.05)


@each('flavour', ['gpt2', 'llama'])
@each('heads', [4, 2, 1])
def test_attention_and_norms(flavour, heads):
    """Shared heads are k and v repeated; rope turns pairs (2i, 2i + 1) like complex numbers."""
    model = gpt(flavour=flavour, n_head=4, n_kv_head=heads, norm_eps=0.5)
    attn, ln_f, x = model.h[0].attn, model.ln_f, normal(2, 20, 64) * 0.5 + 1
    pairs = attn.c_attn(x).view(2, 20, 4 + 2 * heads, 8, 2).transpose(1, 2)
    q, k, v = pairs.split([4, heads, heads], 1)
    if flavour == 'llama':
        angle = torch.outer(torch.arange(20.0), 10000 ** (-torch.arange(0, 16, 2) / 16))
        turn = torch.polar(torch.ones(20, 8), angle)                    # by position and pair
        q, k = (torch.view_as_real(torch.view_as_complex(t.contiguous()) * turn) for t in (q, k))
    q, k, v = (t.flatten(-2).repeat_interleave(4 // t.shape[1], 1) for t in (q, k, v))
    oracle = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    oracle, angles = attn.c_proj(oracle), model.embed(tokens(2, 20))[1]
    assert close(attn(x, angles, None), oracle)
    assert close(attn(x.bfloat16(), angles, None), oracle, 0.02)        # other matmuls on a CPU
    mlp, (a, b) = model.h[0].mlp, model.h[0].mlp.c_fc(x).tensor_split([128], -1)
    oracle = F.silu(a) * b if flavour == 'llama' else F.gelu(a, approximate='tanh')
    assert close(mlp(x), mlp.c_proj(oracle))
    y, x = ln_f(x), x - x.mean(-1, keepdim=True) * (flavour == 'gpt2')
    assert torch.allclose(y, x / (x.square().mean(-1, keepdim=True) + 0.5).sqrt(), atol=1e-6)


@each('flavour, heads', [('gpt2', 0), ('llama', 0), ('llama', 1)])
@each('kv', ['', 'int8/row', 'int4/16', 'int4/row/asymmetric', 'mxfp8', 'int4/row/hadamard/mse'])
def test_cached_generation_is_the_full_forward(flavour, heads, kv):
    model, x = gpt(flavour=flavour, kv_cache=kv, n_kv_head=heads), tokens(2, 20)
    full, caches = model(x), [KVCache(kv) for _ in model.h]
    for a, b in itertools.pairwise((0, 7, 8, 15, 20)):
        logits = model(x[:, a:b], caches=caches)
        assert torch.allclose(logits[:, -1], full[:, b - 1], atol=2e-5)
    assert kv != 'int4/16' or caches[0].kv.codes.shape == (2, 2, heads or 2, 20, 16)    # packed
    a, b = (torch.autograd.grad(m(x).square().sum(), m.h[0].attn.c_attn.weight)[0][64:]
            for m in (model, gpt(flavour=flavour, n_kv_head=heads)))    # as if it were not rounded
    assert (a - b).norm() <= 0.25 * b.norm()
    k, v = normal(2, 1, 2, 9, 32).bfloat16()        # to float32, as in training, and then rounded
    assert torch.equal(KVCache(kv).append(k, v)[0], fake_quant(k.float(), kv).bfloat16())


def test_generate_goes_on_beyond_the_block():
    """Once it is full, by its last half."""
    model, x, y = gpt(), tokens(2, 40), tokens(1, 30)
    assert [t.shape for t in model.generate(x, 70, top_k=0)] == [(2, 1)] * 70
    ours = model.generate(y, 5, top_k=1), model.generate(y, 5, temperature=0)
    for n, token, cold in zip((30, 31, 32, 16, 17), *ours):
        y = torch.cat((y, model(y[:, -n:])[:, -1:].argmax(-1)), 1)
        assert torch.equal(token, y[:, -1:]) and torch.equal(cold, token)
    with pytest.raises(ValueError, match='33 tokens do not fit into block_size = 32'):
        model(tokens(1, 33))


def test_generate_draws_from_the_likeliest_by_their_probability():
    model, x, n = gpt(tied=False), tokens(1, 9), 2 ** 12
    model.lm_head.weight.data = normal(64, 64) / 8
    draw = lambda: next(model.generate(x.expand(n, -1), 1, 0.5, 4,
                                       torch.Generator().manual_seed(0)))[:, 0]
    top, ids = (model(x)[0, -1] / 0.5).topk(4)
    shares = draw().bincount(minlength=64) / n
    assert torch.allclose(shares[ids], top.softmax(-1), atol=0.04) and shares[ids].sum() == 1
    assert torch.equal(draw(), draw())
    model.lm_head.weight.data[:] = 0                                    # of ties, no more than 4
    assert len({*draw().tolist()}) == 4
    assert len({*next(model.generate(x.expand(n, -1), 1, 0.0))[:, 0].tolist()}) == 1


def test_scales_per_token_cannot_see_the_future():
    x, y = tokens(1, 16), tokens(1, 16)
    y[0, 10] = (y[0, 10] + 1) % 64
    for how in ('int8/row', 'int4/16', 'int4/tensor', 'int4/column', 'nvfp4'):
        model = gpt(activations=how, kv_cache='int8/row')
        assert torch.equal(model(x)[0, :10], model(y)[0, :10]) == (how in ('int8/row', 'int4/16'))


@each('n, vocab', [(14, 11), (512, 4096), (600, 4096), (2 * 257, 4096)])
@each('how', [How(), How('int8/row', 'int8/row', compute='codes'),
              How('int4/row', 'int4/row', 'int8/row', backward='full')])
def test_the_loss_in_chunks_is_cross_entropy(n, vocab, how):
    """Value and gradients; a chunk has at most 2^20 logits, and noise of its own."""
    head, x, seen = Head(16, vocab, how), normal(2, n // 2, 16).requires_grad_(), []
    head.weight.data *= 50
    targets = torch.randint(vocab, (2, n // 2), generator=torch.Generator().manual_seed(0))
    head.chunk = lambda x, w, *rest: seen.append((len(x), int(rest[-2]), rest[-1])) or \
        cross_entropy(x, w, *rest)
    loss, oracle = head.loss(x, targets), F.cross_entropy(head(x).flatten(0, 1), targets.flatten())
    sizes, noise, _ = zip(*seen)
    assert len(seen) == math.ceil(n * vocab / 2 ** 20) == len({*noise})
    assert max(sizes) * vocab <= 2 ** 20 and not any(size % 128 for size in sizes[:-1])
    ours, oracles = ((y, *torch.autograd.grad(3 * y, (x, head.weight))) for y in (loss, oracle))
    assert all((a - b).norm() < 1e-5 * b.norm() for a, b in zip(ours, oracles))
    y = x.bfloat16()                                            # sums and dw are in float32
    low, logits = head.loss(y, targets), head(y).float().flatten(0, 1)
    oracle = F.cross_entropy(logits, targets.flatten())
    dw, = torch.autograd.grad(low, head.weight)
    assert close(low, oracle, 1e-5) and (len(sizes) == 1 or not dw.equal(dw.bfloat16().float()))
    with torch.no_grad():                                               # no gradients are made
        assert torch.equal(head.loss(x, targets), loss) and seen[-1][2] is None


def test_health_sees_what_quantization_does():
    model = gpt(weights='ternary/absmean', activations='int8/row', stored='int4/row', dropout=0.5)
    before, report = copy.deepcopy(model.state_dict()), health(model, tokens(2, 16))
    assert report.keys() == {name.removesuffix('.weight') for name in linears(model)}
    assert all(0 < s['weights'] < 10 and 35 < s['activations'] < 50 for s in report.values())
    codes = torch.cat([levels(m.stored_weight()).ravel() for m in linears(model).values()])
    assert quant.level_shares(model) == pytest.approx({
        str(x): (codes == x).double().mean().item() for x in range(-7, 8)})
    assert equal(model.state_dict(), before) and report == health(model.eval(), tokens(2, 16))
    assert quant.snr(torch.tensor([4.0, 1.0]), 'ternary') == pytest.approx(12.304, abs=1e-3)
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.skipif(not shutil.which('g++'), reason='inductor needs a C++ compiler')
@each('how', ['int8/32', 'mxfp8'])
def test_generated_code_is_eager(how):
    """Inductor 2.13 fails if it divides by blocks of g both by row and by column, and on e8m0."""
    x, scale, results = normal(64, 128), torch.full((64, 1), 0.3), []
    codes = lambda x: quantize(x, TERNARY, 5, scale).codes
    assert torch.equal(torch.compile(codes)(x), codes(x))
    layer = Linear(64, 64, how=How(*[how] * 3, backward='requantize'))
    for f in (torch.compile(layer), layer):
        x = normal(128, 64).bfloat16().requires_grad_()
        y = f(x)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), (x, layer.weight))))
    torch.testing.assert_close(*results)


@each('args', [['config/everything.py', '--adam_v=rank1'], [
    'config/bitnet.py', '--optimizer=muon', '--adam_m=int4/64/sqrt']], ids=str)
def test_compiled_is_eager(args, small, monkeypatch):
    """Whole graphs, equal bits; no new code after the third step, nor for an evaluation."""
    from torch._dynamo.testing import CompileCounterWithBackend
    backend, compile = CompileCounterWithBackend('aot_eager'), torch.compile    # generates no code
    monkeypatch.setattr(torch, 'compile', lambda f=None, dynamic=False, **options: compile(
        f, backend=backend, fullgraph=True, dynamic=dynamic))
    torch._dynamo.reset()
    args, ends = [*args, *small, '--n_layer=1', '--n_kv_head=1', '--overwrite=True'], []
    for how in ('no', 'yes'):
        run = train.Run(train.parse([*args, f'--compile={how}']), 0, 1)
        for step in range(5):
            if step == 3:
                run.evaluate(256, run.val_data)
                count = backend.frame_count
            run.advance()
        ends.append([*run.model.state_dict().values(), *state_of(run.optimizer)])
    run.evaluate(256, run.val_data)
    assert all(map(torch.equal, *ends)) and backend.frame_count == count > 3


# ------------------------------------------------------------------------------------------------
# train.py: the command line

SMALL = """--n_layer=2 --n_head=2 --n_embd=64 --hidden=64 --block_size=32 --batch_size=4
    --grad_accum=1 --max_iters=6 --warmup_iters=2 --eval_interval=3 --log_interval=1
    --eval_tokens=160 --final_tokens=1024 --sample_tokens=8 --dtype=float32 --device=cpu""".split()


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    monkeypatch.chdir(ROOT)             # where config/ is


def error(*args):
    """What train.py says when it refuses: one short line, and a status that is not 0."""
    with pytest.raises(SystemExit) as e:
        train.main([*map(str, args)])
    says = e.value.code
    assert says.startswith('error: ') and '\n' not in says and len(says) < 400
    return says


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    """A dataset of bytes made of quant.py."""
    folder, text = tmp_path_factory.mktemp('data'), (ROOT / 'quant.py').read_text(encoding='utf-8')
    prepare(folder, 'test', [('train', text[5000:]), ('val', text[:5000])], 256)
    return folder


@pytest.fixture
def small(data, tmp_path):
    """Flags of a run that takes a second."""
    return [*SMALL, f'--dataset={data}', f'--out_dir={tmp_path}/run']


@pytest.fixture(scope='session')
def full(data, tmp_path_factory):
    """The folder of a run in full precision."""
    folder = tmp_path_factory.mktemp('full')
    train.main([*SMALL, f'--dataset={data}', f'--out_dir={folder}', '--compile=no',
                '--max_iters=60', '--eval_interval=60', '--learning_rate=3e-3'])
    return folder


def equal(a, b):
    """Equal checkpoints, bit for bit; how long they took aside."""
    if isinstance(a, dict):
        a, b = ({k: v for k, v in x.items() if k not in ('seconds', 'config')} for x in (a, b))
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@each('flags, says', [
    *(('--n_layer=' + bad, 'n_layer must be an int, not ' + bad) for bad in (
        '2.5', 'True', '9**9**9', '__import__("os").getpid()')),
    *(('--eps=' + bad, 'eps must be a float') for bad in ('fast', '1/0', 'nan')),
    ('--n_layer=2**63', 'n_layer = '), ('--bias=1', 'must be a bool'), ('-x', 'look like'),
    ('--batch_size=-1', 'batch_size = -1'), *((f'--{x}', 'eps must' if x[0] == 'e' else 'beta2 = ')
    for x in ('beta2=1-2**-25', 'beta2=0', 'eps=1e-40')),
    ('--weights=int9', "weights: spec 'int9'"), ('nowhere.py', 'cannot read'),
    ('--seed=-1', 'seed = -1'), ('no.pt', 'no checkpoint'), ('--min_lr=2', 'min_lr = 2'),
    ('--checkpoint=x.pt', 'unknown key'), ('--gradients_in=dx', 'give gradients'),
    *((f'--device={x}', 'use --device=auto') for x in ('cuda:9', 'fpga')), ('--ptq=rtn', 'stored'),
    *((f'--{key}=x', f"{key} = 'x': use ") for key in CHOICES), ('--compute=codes', 'weights'),
    # what does not fit together
    ('--n_head=3', 'n_head = 3'), ('--n_head=4 --n_kv_head=3', 'n_kv_head = 3'),
    ('--flavour=bert', 'gpt2 or llama'), ('--adam_v=int8/row/hadamard', 'must stay positive'),
    *((f'--{key}=int8/48', 'blocks of 48 do not divide a last axis of') for key in SPECS),
    ('--kv_cache=int8/tensor', 'grow token by token'), ('--adam_m=uint8/row', 'no negatives'),
    ('--kv_cache=int8/row/stochastic', 'nearest'), ('--kv_cache=int2/row --n_embd=12', 'of int2'),
    ('--gradients=nvfp4 --backward=requantize --block_size=25 --batch_size=1', 'blocks of 16 do'),
    ('config/ternary.py --optimizer=muon', 'no stored'), ('--code_lr=.1 --stored=bf16', 'whole'),
    *((f'--optimizer=scales {x}', 'of codes that stay') for x in ('', '--stored=bf16')),
    *((f'--stored=int8/stochastic --{x}', 'no stoch') for x in ('code_lr=.1', 'optimizer=scales')),
    *((f'--code_lr=.1 --stored=int8 --adam_m=int8/{w}', 'level') for w in ('mse', 'asymmetric')),
    ('--beta1=0 --adam_m=int8/row', 'no m'), ('--gradients=int8 --backward=full', 'give one'),
    ('--update_in_backward=True --grad_accum=2', 'grad_accum = 1'), ('--bias=True', 'no bias'),
    ('config/ternary.py --quantize_head=True', 'head is not in'),
    ('--stored=int8 --keep=h', 'matches no layer'), ('--stored=int8 --keep=(', 'no regular'),
    *((f'--stored={bad}', 'symmetric, signed, linear') for bad in (
        'int8/asymmetric', 'uint8/asymmetric', 'int8/sqrt', *FORMATS, 'int4/row/hadamard')),
    # keys that do nothing
    *(('--' + flag, 'does nothing without ' + key) for flag, key in (
        ('code_lr=0.1', 'stored'), ('scale_lr=0.1', 'code_lr or optimizer=scales'),
        ('flavour=gpt2 --rope_theta=5.', 'flavour=llama'), ('quantize_head=True', 'weights or'),
        ('act_order=False', 'ptq=gptq'), ('optimizer=muon --adam_v=rank1', 'optimizer=adamw'),
        ('optimizer=scales --stored=int8 --adam_m=int8/row', 'optimizer=adamw or'),
        ('damping=.1', 'ptq=gptq'), ('backward=fold', 'weights or'),
        ('sample_tokens=0 --prompt=x', 'sample_tokens'), ('keep=h.0', 'weights or'))),
    # what is not there
    *((args, 'needs a checkpoint') for args in (
        'config/qaft.py', 'config/gptq.py --sequences=8', '--eval_only=True',
        '--init_from=checkpoint')), ('--block_size=9999 --batch_size=1', 'lower block_size'),
    ('--dataset=nowhere', 'no dataset'), ('--dataset=openwebtext', 'openwebtext/prepare.py'),
    # what does not go with a checkpoint
    ('{ckpt} --n_embd=32', 'another shape'), ('{ckpt} --n_head=1', 'n_head (2, not 1)'),
    ('{ckpt} config/qaft.py --sequences=1000000', 'ask for fewer'),
    *(('{ckpt} config/gptq.py --sequences=' + flags, says) for flags, says in (
        ('0', 'needs data'), ('1000000', 'ask for fewer'), ('8 config/peqa.py', 'trains nothing'),
        ('1 --damping=0 --optimizer=muon', 'more damping'), ('8 --stored=bf16', 'not bf16'),
        ('8 --weights=int4/row', 'quantizes weights once'), ('8 --stored=int4/48', 'of 48 do'),
        ('8 --stored=nvfp4', 'symmetric, signed'))), ('{ckpt} {ckpt}', 'two checkpoints')])
def test_a_bad_flag_is_one_clear_line(flags, says, small, full, tmp_path):
    args, first = flags.format(ckpt=full / 'ckpt.pt').split(), '{' in flags     # a checkpoint
    assert says in error(*args[:first], *small, *args[first:]) and not (tmp_path / 'run').exists()


def test_the_readme_adds_a_grid_of_one_bit(small, monkeypatch):
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    for field, words, word in (('grid', GRIDS, 'binary'), ('map', MAPS, 'odd')):
        entry = re.search(f"^'{word}': (.*), *#", text, re.M)[1]
        monkeypatch.setitem(words, word, eval(entry, vars(quant)))
        monkeypatch.setitem(WORDS, field, [*WORDS[field], word])
    train.main([*small, '--weights=binary/row/odd/mse'])


# ------------------------------------------------------------------------------------------------
# train.py: what a run is, and what it may and may not depend on; checkpoints and datasets

@each('name', STRATEGIES)
def test_every_strategy_trains_two_steps(name, small, full, tmp_path, capsys):
    start = [f'{full}/ckpt.pt'] * (name in ('qaft', 'gptq', 'peqa'))
    more = ['--sequences=8', *['--stored=int3/32'] * (name == 'peqa')] if start else []
    train.main([*start, f'config/{name}.py', *small, '--max_iters=2', '--compile=no', *more])
    (first, *steps, last), folder = log_of(tmp_path / 'run'), tmp_path / 'run'
    assert first['config']['n_layer'] == 2 and first['versions']['torch'] == torch.__version__
    for i, s in enumerate(steps[:2], 1):
        assert (s['iter'], s['tokens']) == (i, i * 4 * 32) and math.isfinite(s['train_loss'])
        assert s['tokens_per_s'] > 0 and s['schedule'] > 0 and s['peak_memory'] > 1e7
    assert len(steps) == 3 * (name != 'gptq') and last['done']
    assert 1 < last['val_loss'] < 7 > last['loss_on_train'] != last['val_loss']
    assert last['val_bpb'] == pytest.approx(last['val_loss'] / math.log(2))
    top, *_, tail = re.split(r'\n(?=.*\n)', capsys.readouterr().out, maxsplit=1)
    said = [first['config'][key] for key in ('weights', 'stored', 'adam_v')]
    assert all(word in top for word in said + ['full precision'] * (name == 'baseline'))
    words = f'{folder}/ckpt.pt', f'{folder}/log.jsonl', 'sample:', 'plot:'
    assert all(word in tail[-700:] for word in words)
    assert (f'--out_dir={folder} --init_from=resume' in tail[-700:]) == (name != 'gptq')


@each('strategy', [
    ['config/ternary.py'], ['config/everything.py'], ['--optimizer=muon', '--adam_m=int8/row'],
    ['config/w8a8g8.py', 'config/adam4.py', '--dropout=0.1', '--grad_accum=2']], ids=str)
def test_resume_is_bit_for_bit_and_needs_no_flags(strategy, small, tmp_path):
    """Nor does it matter how often it is evaluated."""
    whole, parts, small = tmp_path / 'whole', tmp_path / 'parts', [*small, '--log_interval=4']
    train.main([*strategy, *small, f'--out_dir={whole}'])
    train.stopping.append(1)                                            # as Ctrl-C does
    with pytest.raises(SystemExit, match='130'):
        train.main([*strategy, *small, f'--out_dir={parts}', '--eval_interval=1'])
    train.main(resume := [f'--out_dir={parts}', '--init_from=resume'])
    losses = lambda folder: [s['train_loss'] for s in log_of(folder) if 'train_loss' in s]
    assert equal(checkpoint(whole), checkpoint(parts)) and losses(whole) == losses(parts)
    train.main([*resume, '--max_iters=8'])                              # it may grow
    starts = [(s['iter'], s['config']['max_iters']) for s in log_of(parts) if 'config' in s]
    assert starts == [(0, 6), (1, 6), (6, 8)] and 'step 8,' in error(*resume, '--max_iters=7')


@each('number', [signal.SIGTERM, signal.SIGINT])
@each('steps, methods', [(100, ('advance', 'save')), (1, ('report', 'save'))])
def test_a_signal_ends_a_saved_run(steps, methods, number, small, tmp_path, monkeypatch, capfd):
    """A second SIGTERM, even while it saves, changes nothing; a second Ctrl-C ends at once."""
    before = signal.getsignal(number)
    for name in methods[:1 + (number == signal.SIGTERM)]:
        def signalled(self, *args, method=getattr(train.Run, name)):
            os.kill(os.getpid(), number)
            return method(self, *args)
        monkeypatch.setattr(train.Run, name, signalled)
    with pytest.raises(SystemExit, match='130'):
        train.main([*small, f'--max_iters={steps}'])
    out, err = capfd.readouterr()
    assert '--init_from=resume' in out and 'Ctrl-C again' in err
    assert checkpoint(tmp_path / 'run')['iter'] == 1 and signal.getsignal(number) == before
    with pytest.raises(KeyboardInterrupt), train.finishing_steps():     # it ends compilers, too
        os.kill(os.getpid(), number) or torch.ones(2) @ torch.ones(3)
    assert 'this step is not saved (' in capfd.readouterr().err


@each('strategy', ['ternary', 'adam4', 'dqt_paper'])
def test_update_in_backward_is_the_same_training(strategy, small, tmp_path, monkeypatch):
    """Bit for bit. No gradient is left, and all of ternary never takes two bytes a weight."""
    peaks, update = [], train.Run.update
    monkeypatch.setattr(train.Run, 'update', lambda run, *args: peaks.append(sum(bytes_held(
        run.model, run.optimizer)['linear'].values())) or update(run, *args))
    args = [f'config/{strategy}.py', *small, '--grad_clip=0', '--n_layer=4', '--n_embd=128',
            '--hidden=384', '--max_iters=3', f'--code_lr={strategy == "ternary":d}']     # 1 or 0
    for name, flag in (('a', False), ('b', True)):
        train.main([*args, f'--update_in_backward={flag}', f'--out_dir={tmp_path / name}'])
    ends, logs = zip(*((checkpoint(tmp_path / name), log_of(tmp_path / name)) for name in 'ab'))
    assert all(equal(*(end[part] for end in ends)) for part in ('model', 'optimizer'))
    assert [log[-1]['bytes']['linear']['gradients'] for log in logs] == [4, 0]
    assert peaks and (strategy != 'ternary' or max(peaks) < 2)


def test_rates_rise_and_then_fall_as_a_cosine():
    config = Config(warmup_iters=3, max_iters=15, min_lr=0.2)
    rates = [train.schedule(config, step) for step in (0, 2, 3, 6, 9, 15, 99)]
    assert rates == pytest.approx([0.25, 0.75, 1, 0.6 + 0.4 * 0.5 ** 0.5, 0.6, 0.2, 0.2])


@each('rate', [0, 1e-3])
def test_gradients_are_clipped_by_the_norm_of_those_that_are_used(rate, small):
    """Those of the blocks are not, where their rate is zero."""
    run = train.Run(train.parse([*small, '--grad_clip=1e-3', f'--learning_rate={rate}']), 0, 1)
    run.advance()
    used = [p.grad for n, p in run.model.named_parameters() if rate or n not in linears(run.model)]
    norm = torch.cat([*map(torch.ravel, used)]).norm().item()
    assert run.optimizer.rates['matrix'][0].item() == pytest.approx(6e-3 / 3)   # a warm-up of 2
    assert run.optimizer.rates['matrix'][-1].item() == pytest.approx(1e-3 / norm, rel=1e-2)
    run = train.Run(train.parse([*small, '--grad_clip=1e-3', f'--learning_rate={rate}',
                                 '--overwrite=True', '--update_in_backward=True']), 0, 1)
    run.advance()                                                       # each by its own: m = .1 g
    for m, _ in run.optimizer.state.values():
        assert m.codes.norm().item() == pytest.approx(1e-4, rel=1e-2)


def test_two_processes_are_one_with_twice_the_batch(small, tmp_path):
    """Sharded, each holds half the states, and the bits are the same. Any number can resume."""
    (tmp_path / 'ranks.py').write_text("""import json, sys, torch, train
finish = train.Run.finish       # every rank leaves what it ends with
train.Run.finish = lambda run: (finish(run), torch.save(
    run.model.state_dict(), f'{run.config.out_dir}/rank{run.rank}'))
train.dist.init_process_group('gloo')
train.dist.init_process_group = train.dist.destroy_process_group = lambda *_: None
*runs, last = json.loads(sys.argv[1])
[train.main(args) for args in runs]
train.stopping.extend([15] * train.dist.get_rank())     # of one process alone
train.main(last)""")
    at, flags = f'--out_dir={tmp_path}/', [*small, '--sample_tokens=0', '--compile=no']
    ternary = ['config/ternary.py', *flags, '--grad_accum=2']
    adam8 = ['config/adam8.py', *flags, '--update_in_backward=True']
    resume = ['--init_from=resume', '--max_iters=8']
    train.main([*ternary, '--grad_accum=1', '--batch_size=16', at + 'one'])
    runs = [[*ternary, at + 'bf16', '--reduce_dtype=bfloat16'],
            [at + 'one', *resume, '--batch_size=4', '--grad_accum=2', '--shard=True']]
    for shard, strategy in itertools.product((True, False), (ternary, adam8)):
        runs += [[*strategy, folder := f'{at}{strategy[0][7:-3]}{shard}', f'--shard={not shard}'],
                 [folder, *resume, f'--shard={shard}']]
    done = run(*TORCHRUN, '--nproc_per_node=2', str(tmp_path / 'ranks.py'),
               json.dumps([*runs, [*flags, at + 'stopped']]), PYTHONPATH=str(ROOT))
    assert 'exitcode  : 130' in done.stderr, done.stderr[-2000:]
    assert checkpoint(tmp_path / 'stopped')['iter'] == 1                # both stop after a step
    for name in 'ternary', 'adam8':
        folders = [tmp_path / f'{name}{b}' for b in (False, True)]
        whole, half = (log_of(folder)[-1]['bytes']['optimizer'] for folder in folders)
        assert 0.45 < half / whole < 0.55 and equal(*map(checkpoint, folders))
        assert equal(*(torch.load(folders[1] / f'rank{r}', weights_only=True) for r in (0, 1)))
    train.main([at + 'ternaryTrue', resume[0], '--batch_size=8', '--max_iters=9'])
    one, two, bf16 = (log_of(tmp_path / name) for name in ('one', 'ternaryFalse', 'bf16'))
    a, b = ([line.get('train_loss', 0) for line in log[:9]] for log in (bf16, two))
    assert a != b and a == pytest.approx(b, abs=2e-2)
    # sums are rounded in another order, and after two steps a code moves in one run alone
    assert [[s['world'] for s in log if 'world' in s] for log in (one, two)] == [[1, 2], [2, 2]]
    for i, (a, b) in enumerate(zip(one, two)):
        assert a.keys() == b.keys()
        for key in {'train_loss', 'val_loss', 'tokens', 'flips'} & a.keys():
            assert a[key] == pytest.approx(b[key], abs=1e-4 if i < 3 else 1e-2)


def test_a_loss_that_is_not_finite_stops_the_run(small, full, tmp_path):
    state, path = checkpoint(full), tmp_path / 'run' / 'ckpt.pt'
    state['model']['h.0.mlp.c_fc.weight'][0, 0] = math.nan
    path.parent.mkdir()
    torch.save({**state, 'iter': 3}, path)
    says = error(f'--out_dir={path.parent}', '--init_from=resume')
    assert 'the loss is nan at step 3' in says and 'ckpt.pt is the last good checkpoint' in says
    wild = '--overwrite=True', '--learning_rate=1e18', '--grad_clip=0', '--eval_interval=1'
    for steps in ('1', '2', '60'):                                      # nothing like it is saved
        says = error(*small, *wild, f'--max_iters={steps}')
        assert 'lower learning_rate or use more bits' in says and not path.exists()


def test_a_run_is_never_overwritten_unasked(small, tmp_path):
    train.main(small)
    path, resume = tmp_path / 'run' / 'ckpt.pt', [*small, '--init_from=resume']
    before, old = path.read_bytes(), checkpoint(path.parent)
    with train.locked(f'{tmp_path}/run'):
        assert all('in progress' in error(*args) for args in (resume, [*small, '--overwrite=True']))
    for args, says in ((small, 'holds a run'), ([*resume, '--n_layer=3'], 'n_layer = 2, not 3'),
                       ([*resume, '--weights=int8'], 'trained with weights'),
                       ([*resume, '--weights=int9'], "weights: spec 'int9'"),
                       ([*resume, '--batch_size=8'], 'tokens per step'),
                       ([*small, '--overwrite=True', '--dataset=nowhere'], 'no dataset')):
        assert says in error(*args) and path.read_bytes() == before
    (path.parent / 'ckpt.pt.tmp').symlink_to('/dev/full')               # a disk without room
    assert 'could not save' in error(*resume, '--max_iters=7') and path.read_bytes() == before
    assert not (path.parent / 'ckpt.pt.tmp').is_symlink()               # and no link is followed
    torch.save({**old, 'model': {}}, path)
    assert f'{path} is a model of another shape' in error(*resume)
    for other in ({key: old[key] for key in old.keys() - {'format'}}, old | {'format': 1},
                  old | {'config': old['config'] | {'x': 1}}):
        torch.save(other, path)
        assert 'by another version' in error(*resume)
    torch.save(old | {'config': {k: v for k, v in old['config'].items() if k != 'samples'}}, path)
    train.main([*resume, '--max_iters=7'])                              # a newer key: its default
    train.main([*small, '--overwrite=True', '--max_iters=2'])
    assert [entry.get('iter') for entry in log_of(path.parent)] == [0, 1, 2, 2, 2]


@each('args', [['config/bitnet.py'], ['config/everything.py', '--tied=False'],
               ['config/kv4.py', '--block_size=64', '--n_kv_head=1', '--norm_eps=.1']], ids=str)
def test_a_checkpoint_alone_is_the_model(args, small, tmp_path, capsys):
    train.main([*small, *args])
    loss, run, _ = log_of(tmp_path / 'run')[-1]['val_loss'], f'{tmp_path}/run', capsys.readouterr()
    for given in ([f'{run}/ckpt.pt'], [f'--out_dir={run}', '--init_from=resume']):
        train.main([*given, '--eval_only=True', '--prompt=def '])
        out = capsys.readouterr().out
        assert f'val loss {loss:.4f}' in out and 'def ' in out


@each('how, bits', [('rtn', 2), ('gptq', 3), ('gptq', 4), ('rtn', 6), ('gptq', 8)])
def test_a_packed_checkpoint_is_the_quantized_model(how, bits, small, full, tmp_path):
    path, before, loss = full / 'ckpt.pt', (full / 'ckpt.pt').read_bytes(), log_of(full)[-1]
    train.main([str(path), 'config/gptq.py', *small, f'--ptq={how}', f'--stored=int{bits}/row',
                '--sequences=8'])
    done, packed = log_of(tmp_path / 'run')[-1], tmp_path / 'run' / 'ckpt.pt'
    assert done['bytes']['linear']['weights'] == pytest.approx(bits / 8 + 4 / 64, rel=1e-6)
    most = 2 * 7 * 64 * 64 * (bits / 8 + 4 / 64) + 4 * 256 * 64 + 16_000    # embedding, names
    assert packed.stat().st_size < most and path.read_bytes() == before
    assert abs(done['val_loss'] - loss['val_loss']) < (0.01 if bits > 2 else 0.2)
    run = train.Run(train.parse([str(packed), '--eval_only=True']), 0, 1)
    assert run.evaluate(1024, run.val_data) == done['val_loss'] and not run.config.sequences
    assert 'no optimizer state' in error(f'--out_dir={packed.parent}', '--init_from=resume')


# ------------------------------------------------------------------------------------------------
# train.py: as a process of its own

def run(*args, **env):
    return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True,
                          timeout=120, env={**os.environ, 'OMP_NUM_THREADS': '1', **env})


def test_importing_does_nothing_and_a_typo_is_one_line():
    for path in (*ROOT.glob('*.py'), *ROOT.glob('[cd]*/*.py')):         # python -O drops asserts
        assert 'test' in path.name or not re.search('^ *assert ', path.read_text('utf-8'), re.M)
    done = run('-c', 'import train, model, quant; print("ok"); train.main(["--lerning_rate=1"])')
    assert done.stdout == 'ok\n' and done.returncode == 1
    assert done.stderr.count('\n') == 1 and 'learning_rate' in done.stderr
