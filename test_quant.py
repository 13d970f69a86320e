"""
The laws, in the order of quant.py, then of model.py and train.py: each test holds a claim beside its oracle.

    python -m pytest -q test_quant.py
"""
import copy
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import quant
import train
from data.corpus import prepare
from data.tokenizer import encoding, make_tokenizer, train_bpe
from model import GPT
from quant import (FLOATS, INTEGERS, AdamW, KVCache, Linear, QTensor, Spec, dequantize, fake_quant, health, held,
                   noise_key, pack, quantize, shares, spec, uniform, unpack)

ROOT = Path(__file__).parent
GRIDS = [*INTEGERS, *FLOATS]
CONFIGS = sorted(ROOT.glob('config/*.py'))
SIZES = {'gpt2', 'gpt2_medium', 'gpt2_xl', 'llama_1b'}
TERNARY = 'ternary/row/absmean/stochastic'


def normal(*shape, seed=0, **kwargs):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **kwargs)


def grid_of(s):
    """Every level of a grid, before the scale, found by decoding every code: the oracle of rounding."""
    if s.grid in ('fp8', 'fp8e5'):
        values = torch.arange(256).to(torch.uint8).view(FLOATS[s.grid][3]).float()
        return values[values.isfinite()].unique()
    if s.grid == 'fp4':
        half = torch.tensor([0, .5, 1, 1.5, 2, 3, 4, 6])
        return torch.cat((-half, half)).unique()
    low, high = INTEGERS[s.grid]
    c = torch.arange(low, high + 1).float()
    return c.sign() * c.abs() ** {'linear': 1, 'sqrt': 2, 'root4': 4}[s.map]


# ------------------------------------------------------------------------------------------------
# Spec

def test_spec_words_come_in_any_order():
    words = 'int8', 'row', 'stochastic', 'sqrt'
    assert {spec('/'.join(p)) for p in itertools.permutations(words)} == {
        Spec('int8', 'row', rounding='stochastic', map='sqrt')}
    assert spec('') is None and spec('uint8/256/root4').group == 256
    assert spec('nvfp4') == Spec('fp4', 16, format='nvfp4') and spec('mxfp4/stochastic').rounding == 'stochastic'


@pytest.mark.parametrize('text, says', [
    ('int9', "unknown word 'int9', did you mean 'int"), ('int8/rwo', "did you mean 'row'"), ('int8/row/row', 'second'),
    ('int8/row/tensor', "'tensor' says the group a second time"), ('int8/int4', 'second'), ('row', 'names no grid'),
    ('int8/0', "unknown word '0'"), ('int8//row', "unknown word ''"), ('ternary/asymmetric', 'zero point'),
    ('fp8/sqrt', 'no map'), ('int4/trits', 'only ternary'), ('int8/asymmetric/absmean', 'not absmean'),
    ('nvfp4/32', 'second'), ('nvfp4/absmean', 'absmax'), ('bf16/row', 'no scale'), ('int8/asymmetric/sqrt', 'linear'),
    ('int8/symmetric/asymmetric', 'second'), ('INT8', 'unknown')])
def test_bad_spec_names_the_word(text, says):
    with pytest.raises(ValueError, match=re.escape(says)) as e:
        spec(text)
    assert '\n' not in str(e.value)


# ------------------------------------------------------------------------------------------------
# noise

def test_noise_is_uniform_and_uncorrelated():
    n, keys = 2 ** 20, [noise_key(1337, step) for step in range(3)]
    us = [uniform(torch.empty(n), key).double() for key in keys]
    for u in us:
        assert 0 <= u.min() and u.max() < 1
        counts = torch.histc(u, 256, 0, 1)                              # chi2 with 255 degrees of freedom
        assert abs(((counts - n / 256) ** 2 / (n / 256)).sum() - 255) < 5 * math.sqrt(2 * 255)

    def correlation(a, b):
        return ((a - 0.5) * (b - 0.5)).mean().abs() * 12 * math.sqrt(n)  # in standard deviations
    for lag in (1, 2, 64, 256, 1000, 4096):                             # along rows and columns
        assert correlation(us[0], us[0].roll(lag)) < 5
    for a, b in itertools.combinations(us, 2):                          # from step to step
        assert correlation(a, b) < 5


def test_noise_depends_on_index_and_key_alone():
    u = uniform(torch.empty(64, 32), 7)
    assert torch.equal(u[48:], uniform(torch.empty(16, 32), 7, start=48 * 32))
    assert torch.equal(u, uniform(torch.empty(64, 32), torch.tensor(7, dtype=torch.int32)))
    assert torch.equal(u, torch.compile(uniform, backend='aot_eager')(torch.empty(64, 32), 7))
    assert len({noise_key(s, t, i) for s in range(20) for t in range(50) for i in range(20)}) > 19990


# ------------------------------------------------------------------------------------------------
# quantize and dequantize

MAPPED = [grid + m for grid in INTEGERS for m in ('', '/sqrt', '/root4')] + [g for g in FLOATS if g != 'bf16']


@pytest.mark.parametrize('text', MAPPED)
def test_nearest_is_the_nearest_level_by_brute_force(text):
    s = spec(text)
    y = normal(64, 64) * s.top / 2                                      # some of it is clipped
    y = y.abs() if s.grid[0] == 'u' else y
    y[0] = y[0] / 10
    root = {'linear': 1, 'sqrt': 1, 'root4': 0.25}[s.map]               # v is nearest by its fourth root
    grid = grid_of(s)
    bend = lambda t: t.double().sign() * t.double().abs() ** root
    distance = (bend(y)[..., None] - bend(grid)).abs()
    got = dequantize(quantize(y, s, scale=torch.ones(1, 1)))
    lifted = (got == 1) & (y > 0) & (s.map == 'root4')                  # a positive v never becomes zero
    slack = bend(grid).abs().amax() * 2 ** -20                          # float32 roots
    assert (((bend(y) - bend(got)).abs() <= distance.amin(-1) + slack) | lifted).all()
    assert ((bend(got)[..., None] - bend(grid)).abs().amin(-1) <= slack).all()


@pytest.mark.parametrize('text', ['ternary/row', 'int2/row', 'int4/16', 'int8/tensor', 'uint4/row/asymmetric', 'int8/row/sqrt',
                                  'uint4/row/root4', 'fp4/row', 'fp8/row', 'fp8e5/row', 'bf16'])
def test_stochastic_rounding_is_unbiased(text):
    x, n = normal(4, 32).abs() + 0.01, 1000
    x[:, 0] = 6.0       # a largest value that every grid holds: absmax clips nothing
    draws = torch.stack([fake_quant(x, text + '/stochastic', noise_key(i)) for i in range(n)]).double()
    mean, low, high = draws.mean(0), draws.amin(0), draws.amax(0)
    assert ((draws == low) | (draws == high)).all() and (low < high).float().mean() > 0.8
    step = torch.where(low < high, high - low, (high - low).amax())     # one of the two may be too rare
    assert ((low <= x + 0.02 * step) & (x - 0.02 * step <= high)).all() # only the two neighbours occur
    assert ((mean - x).abs() <= 5 * step / 2 / math.sqrt(n)).all()
    assert (mean - x).sum().abs() <= 5 * (step / 2).norm() / math.sqrt(n)
    nearest = fake_quant(x, text).double()                              # which would not pass this test
    assert not ((nearest - x).abs() <= 5 * step / 2 / math.sqrt(n)).all()


@pytest.mark.parametrize('grid', GRIDS)
@pytest.mark.parametrize('cols', [1, 15, 64])
def test_packing_loses_nothing(grid, cols):
    for s in [spec(grid)] + ([spec('ternary/trits')] if grid == 'ternary' else []):
        x = normal(5, cols) * 3
        values = quant._round(x, s, 0, 0)
        codes = pack(values, s)
        assert torch.equal(quant._levels(unpack(codes, s, cols), s), quant._levels(values, replace(s, grid='int8'))
                           if grid not in FLOATS else values)
        assert codes.nbytes == 5 * -(-cols // s.per_byte) * (2 if grid == 'bf16' else 1)


@pytest.mark.parametrize('text, bits', [
    ('ternary', 2), ('ternary/trits', 8 / 5), ('int2', 2), ('int3', 4), ('int4', 4), ('uint4/asymmetric', 4), ('int6', 8),
    ('int8', 8), ('fp4', 4), ('fp8', 8), ('bf16', 16), ('int8/128', 8.25), ('nvfp4', 4.5), ('mxfp4', 4.25)])
def test_bits_really_held(text, bits):
    q = quantize(normal(64, 1280), text)
    held = sum(t.untyped_storage().nbytes() for t in q[:4] if t is not None)
    assert 8 * held / (64 * 1280) == pytest.approx(bits, abs=0.001)


def test_float_grids_are_the_hardware_formats():
    x = torch.cat((normal(4096) * 10 ** normal(4096, seed=1), torch.tensor([0.0, -0.0, 448, 0.001953125, 2 ** -10])))
    clipped = x.clamp(-448, 448)
    assert torch.equal(quant._round(clipped, spec('fp8'), 0, 0), clipped.to(torch.float8_e4m3fn).float())
    assert torch.equal(quant._round(x, spec('fp8e5'), 0, 0), x.to(torch.float8_e5m2).float())
    assert torch.equal(fake_quant(x, 'bf16'), x.bfloat16().float())


def test_microscaling_formats():
    q = quantize(normal(8, 64) * torch.logspace(-3, 3, 8)[:, None], 'mxfp4')
    assert q.scale.shape == (8, 2, 1) and (q.scale.float().log2() % 1 == 0).all()
    q = quantize(normal(8, 64), 'nvfp4')
    assert q.scale.shape == (8, 4, 1) and q.scale.dtype == torch.float8_e4m3fn and q.scale.float().amax() == 448


def test_symmetric_and_asymmetric_formulas():
    x = normal(8, 32) + 2                                               # paper 1, in numpy
    a = x.numpy().astype(np.float64)
    s = np.abs(a).max(1, keepdims=True) / 7
    assert np.allclose(fake_quant(x, 'int4/row').numpy(), np.clip(np.round(a / s), -8, 7) * s, atol=1e-5)
    least, most = np.minimum(a.min(1, keepdims=True), 0), a.max(1, keepdims=True)
    s = (most - least) / 15
    z = np.round(least / s - -8)
    assert np.allclose(fake_quant(x, 'int4/row/asymmetric').numpy(), (np.clip(np.round(a / s - z), -8, 7) + z) * s, atol=1e-5)
    for grid in ('int4', 'uint4', 'int8', 'uint8'):                     # nothing is clipped, all codes are used
        q = quantize(x, grid + '/asymmetric')
        assert ((x - dequantize(q)).abs() <= q.scale * 0.5001).all()
        codes = unpack(q.codes, q.spec, 32).int()
        assert codes.max() - codes.min() >= 0.6 * (INTEGERS[grid][1] - INTEGERS[grid][0])


def test_scales_are_of_the_axes_they_say():
    x = normal(2, 3, 8)
    for text, axes in (('int8/tensor', (0, 1, 2)), ('int8/row', 2), ('int8/column', (0, 1))):
        assert torch.allclose(quantize(x, text).scale.flatten(), x.abs().amax(axes).flatten() / 127)
    assert torch.allclose(quantize(x, 'int8/4').scale.flatten(), x.abs().unflatten(-1, (2, 4)).amax(-1).flatten() / 127)
    assert torch.allclose(quantize(x, 'ternary/absmean').scale, x.abs().mean())
    with pytest.raises(ValueError, match='blocks of 3 do not divide a last axis of 8'):
        quantize(x, 'int8/3')


def test_zeros_small_numbers_and_nan():
    for text in ('int8/row', 'int4/asymmetric', 'fp8/row', 'nvfp4', 'mxfp4', 'ternary/absmean', 'uint8/root4/row'):
        assert torch.equal(fake_quant(torch.zeros(2, 32), text), torch.zeros(2, 32))
        x = normal(4, 32).abs() * 1e-6                                  # zeros beside small numbers
        x[1] = 0
        y = fake_quant(x, text)
        assert (y[1] == 0).all() and (y[0] > 0).any() and y.isfinite().all()
    tiny = normal(4, 64) * 1e-15
    assert (fake_quant(tiny, 'int8/row') - tiny).norm() < 0.01 * tiny.norm()       # no eps floor swallows a row
    assert fake_quant(torch.tensor([[1.0, math.nan], [1, 2]]), 'int8/row')[0].isnan().any()     # nothing is hidden


def test_absmax_of_ternary_is_idempotent_and_absmean_is_not():
    w = fake_quant(normal(32, 64), 'ternary/row/absmean')
    assert torch.allclose(fake_quant(w, 'ternary/row'), w)
    for _ in range(20):                                                 # the trap: a scale computed again and again
        w = fake_quant(w, 'ternary/tensor/absmean')
    assert w.abs().max() < 0.1 * fake_quant(normal(32, 64), 'ternary/tensor/absmean').abs().max()


def test_scales_are_computed_in_float32():
    x = normal(64, 256)
    error = lambda y: (y.float() - x.bfloat16().float()).square().mean().sqrt()
    low = x.bfloat16()
    s = low.abs().amax(-1, keepdim=True) / 127                          # all in bfloat16, as one should not
    assert error(fake_quant(low, 'int8/row').float()) < 0.98 * error((low / s).round() * s)


def test_v_is_never_rounded_to_zero():
    v = torch.logspace(-12, 0, 256)[None]
    assert (fake_quant(v, 'uint8/row/root4') > 0).all() and (fake_quant(v, 'uint4/row/root4') > 0).all()
    assert (fake_quant(v, 'uint8/row') == 0).any()                      # linear codes do that


# ------------------------------------------------------------------------------------------------
# Matmul and Linear

def grads(y, *inputs):
    return torch.autograd.grad(y.square().sum() / 2, inputs)            # g = y


@pytest.mark.parametrize('bias', [True, False])
def test_no_spec_is_nn_linear_bit_for_bit(bias):
    ours, theirs = Linear(64, 32, bias), torch.nn.Linear(64, 32, bias)
    theirs.load_state_dict(ours.state_dict())
    x = normal(2, 5, 64).requires_grad_()
    for a, b in zip(grads(ours(x), x, *ours.parameters()), grads(theirs(x), x, *theirs.parameters())):
        assert torch.equal(a, b)


@pytest.mark.parametrize('w, a', [('int8/row', ''), ('', 'int8/row'), ('ternary/tensor/absmean', 'int4/row'),
                                  ('nvfp4', 'mxfp4'), ('int4/asymmetric', 'fp8/column'), ('bf16', 'int8/row/stochastic')])
def test_matmul_is_the_detach_trick(w, a):
    layer, x = Linear(64, 32, weights=w, activations=a), normal(12, 64).requires_grad_()
    ste = lambda t, how, key: t + (fake_quant(t, how, key) - t).detach()
    oracle = F.linear(ste(x, a, 1), ste(layer.weight, w, 0))
    assert torch.allclose(layer(x), oracle, atol=1e-5)
    for ours, theirs in zip(grads(layer(x), x, layer.weight), grads(oracle, x, layer.weight)):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('backward', ['ste', 'full'])
@pytest.mark.parametrize('where', ['both', 'dx', 'dw'])
def test_three_meanings_of_the_backward(backward, where):
    """(full, dw) is paper 1's released code, (full, dx) is like SwitchBack, (ste, both) is the text."""
    layer = Linear(64, 32, True, 'int4/row', 'int4/row', 'int4/row', where, backward)
    x, g = normal(12, 64).requires_grad_(), normal(12, 32, seed=1)
    dx, dw, db = torch.autograd.grad(layer(x), (x, layer.weight, layer.bias), g)
    X, W, G = x.detach(), layer.weight.detach(), fake_quant(g, 'int4/row')
    if backward == 'ste':
        X, W = fake_quant(X, 'int4/row'), fake_quant(W, 'int4/row')
    assert torch.equal(dx, (G if where != 'dw' else g) @ W)
    assert torch.equal(dw, (G if where != 'dx' else g).T @ X)
    assert torch.equal(db, g.sum(0))


def test_q_k_v_are_scaled_separately():
    layer, x = Linear(16, 48, weights='int8/tensor', gradients='int8/tensor', parts=3), normal(8, 16).requires_grad_()
    with torch.no_grad():
        layer.weight[16:32] *= 100
    g = normal(8, 48)
    g[:, :16] *= 1e-3
    dx, dw = torch.autograd.grad(layer(x), (x, layer.weight), g)
    W = torch.cat([fake_quant(w, 'int8') for w in layer.weight.chunk(3)])
    G = torch.cat([fake_quant(part, 'int8') for part in g.chunk(3, -1)], -1)
    assert torch.allclose(dx, G @ W) and torch.allclose(dw, G.T @ x)
    assert (fake_quant(g, 'int8')[:, :16] == 0).float().mean() > 0.9    # with one scale, q would have vanished


def test_codes_are_what_is_saved_for_backward():
    def saved(layer):
        size = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: size.append(t.nbytes) or t, lambda t: t):
            layer(x)
        return sum(size)
    x = normal(1024, 256).requires_grad_()
    full, int8, ternary = (saved(Linear(256, 256, weights=w, activations=a))
                           for w, a in (('', ''), ('', 'int8/row'), ('ternary', 'int8/row')))
    assert full >= 4 * (x.numel() + 256 * 256)
    assert int8 - 4 * 256 * 256 <= x.numel() + 4 * 1024 + 16
    assert ternary <= x.numel() + 4 * 1024 + 256 * 256 / 4 + 16


def test_absmax_gradients_are_mostly_zero():
    """Why quantized gradients hurt (paper 1): softmax minus one-hot has one large entry a row."""
    logits, y = normal(256, 1024) * 2, torch.arange(256)
    g = logits.softmax(-1) - F.one_hot(y, 1024)
    assert (fake_quant(g, 'int8/row') == 0).float().mean() > 0.9
    mean = sum(fake_quant(g, 'int8/row/stochastic', k) for k in range(200)) / 200       # stochastic keeps their sum
    assert (mean.sum(0) - g.sum(0)).norm() < 0.1 * (fake_quant(g, 'int8/row').sum(0) - g.sum(0)).norm()


@pytest.mark.parametrize('master', ['ternary/row/absmean', 'ternary/tensor/trits', 'int2/row', 'int4/16', 'int8/row', 'fp8/row', 'bf16'])
def test_a_low_bit_master_is_all_there_is(master):
    layer, x = Linear(64, 32), normal(8, 64).requires_grad_()
    before = layer.weight.detach().clone()
    layer.store_(master)
    w = fake_quant(before, master).requires_grad_()
    assert torch.allclose(layer(x), F.linear(x, w), atol=1e-6)
    dx, dw = grads(layer(x), x, layer.weight)                           # the ghost gets the gradient of the codes' w
    oracle = grads(F.linear(x, w), x, w)
    assert torch.allclose(dx, oracle[0], atol=1e-5) and torch.allclose(dw, oracle[1], atol=1e-5)
    assert layer.weight.untyped_storage().nbytes() == 4                 # and costs four bytes
    floats = [t for t in layer.state_dict().values() if t.dtype == torch.float32 and t.numel() >= w.numel()]
    assert not floats and 'weight' not in layer.state_dict()
    twin = Linear(64, 32)
    twin.store_(master)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), layer(x))


@pytest.mark.parametrize('master', ['int8/asymmetric', 'uint8', 'int8/sqrt', 'nvfp4'])
def test_a_master_needs_a_plain_grid(master):
    with pytest.raises(ValueError, match='symmetric, signed, linear'):
        Linear(64, 32).store_(master)


def test_bad_switches_are_errors():
    for kwargs in ({'gradients_in': 'dy'}, {'backward': 'exact'}):
        with pytest.raises(ValueError, match='use one of'):
            Linear(4, 4, **kwargs)


# ------------------------------------------------------------------------------------------------
# the optimizer

def pair(master='', shape=(64, 128), **kwargs):
    """A model of one Linear with a given gradient, and its optimizer."""
    model = torch.nn.Sequential(Linear(shape[1], shape[0]))
    model[0].weight.data = normal(*shape) * 0.02
    model[0].store_(master)
    optimizer = AdamW(model, **kwargs)

    def step(g, scale=1.0):
        model[0].weight.grad = g
        optimizer.step(scale)
        return dequantize(model[0].stored())
    return model[0], optimizer, step


def test_adamw_is_torch_adamw():
    kwargs = {'betas': (0.9, 0.99), 'eps': 1e-8, 'weight_decay': 0.1}
    layer, _, step = pair(learning_rate=1e-2, **kwargs)
    p = torch.nn.Parameter(layer.weight.detach().clone())
    reference = torch.optim.AdamW([p], lr=1e-2, **kwargs)
    for i in range(20):
        p.grad = normal(64, 128, seed=i) * 0.1
        step(p.grad.clone())
        reference.step()
    assert torch.allclose(layer.weight, p, atol=1e-6)


@pytest.mark.parametrize('m, v, error', [
    ('int8/128/sqrt', '', 0.05), ('', 'uint8/128/root4', 0.05), ('int8/128/sqrt', 'uint8/128/root4', 0.05),
    ('int4/128/sqrt', 'uint4/128/root4', 0.6), ('bf16/stochastic', 'bf16/stochastic', 0.02)])
def test_quantized_states_stay_close(m, v, error):
    size = normal(64, 128, seed=99).exp()                               # entries differ by sigma = 1 in a block
    gs, ends = [normal(64, 128, seed=i) * size for i in range(20)], []
    for kwargs in ({}, {'adam_m': m, 'adam_v': v}):
        layer, optimizer, step = pair(learning_rate=1e-2, **kwargs)
        start = layer.weight.detach().clone()
        for g in gs:
            end = step(g).clone()
        ends.append(end - start)
    assert (ends[1] - ends[0]).norm() < error * ends[0].norm()


def test_linear_v_explodes_and_the_fourth_root_does_not():
    def largest_step(v):
        layer, _, step = pair(learning_rate=1e-2, adam_v=v)
        size = 0
        for i in range(20):
            before = layer.weight.detach().clone()
            size = max(size, (step(normal(64, 128, seed=i) * torch.logspace(-4, 0, 128)) - before).abs().max())
        return size
    assert largest_step('') < 0.04 and largest_step('uint8/128/root4') < 0.08 and largest_step('uint4/128/root4') < 0.2
    assert largest_step('uint8/128') > 1                                # the claim of paper 1, and its cause


def test_factored_v_is_exact_for_rank_one():
    size = torch.logspace(-2, 0, 64)[:, None] * torch.logspace(-1, 1, 128)
    ends = []
    for v in ('', 'factored'):
        _, optimizer, step = pair(learning_rate=1e-2, adam_v=v)
        for i in range(10):
            end = step(size * normal(64, 128, seed=i).sign())           # g^2 = row x column
        ends.append(end.clone())
    assert torch.allclose(*ends, atol=1e-5)
    assert sum(t.numel() for t in optimizer.slots[0].v) == 64 + 128
    assert pair(adam_v='factored')[2](torch.zeros(64, 128)).isfinite().all()        # also of nothing


@pytest.mark.parametrize('master', [TERNARY, 'ternary/tensor/trits/stochastic', 'int8/row/stochastic', 'int4/16/stochastic',
                                    'fp8/row/stochastic', 'int2/column/stochastic', 'bf16/stochastic'])
@pytest.mark.parametrize('code_lr', [0.0, 0.1])
def test_masters_stay_on_their_grid_whatever_the_block(master, code_lr):
    if 'bf16' in master and code_lr:
        return                                                          # no codes to count in
    ends = []
    for block in (64, 7):
        layer, optimizer, step = pair(master, learning_rate=1e-3, code_lr=code_lr, adam_m='int8/row', adam_v='factored', seed=3)
        optimizer.slots[0].block = block
        start = layer.codes.clone()
        for i in range(5):
            w = step(normal(64, 128, seed=i)).clone()
        assert not torch.equal(layer.codes, start) and optimizer.flips() > 0
        if 'bf16' not in master:
            on_grid = quantize(w, replace(layer.master, rounding='nearest'), scale=layer.scale)
            assert torch.allclose(dequantize(on_grid), w, rtol=1e-6)
        ends.append(w)
    assert torch.equal(*ends)                                           # the noise goes by element, not by block


def test_a_code_moves_with_probability_lr_times_r():
    """q <- clip(SR(q - lr r), -1, 1) with r = sign g at the first step: E[q'] = clip(q - lr sign g)."""
    n, lr, g = 400, 0.2, normal(64, 128).sign()
    total = 0
    for seed in range(n):
        layer, _, step = pair(TERNARY, learning_rate=0.1, code_lr=lr, seed=seed)
        q = dequantize(layer.stored()) / layer.scale
        total = total + step(g) / layer.scale
    expected = (q - lr * g).clamp(-1, 1)
    assert ((total / n - expected).abs() <= 5 * math.sqrt(lr * (1 - lr) / n)).all()
    assert ((total / n - expected).mean().abs()) <= 5 * math.sqrt(lr * (1 - lr) / n / q.numel())


def test_as_published_the_mean_of_w_is_adamw():
    """Paper 2: W' = AdamW(W, g) in full precision, in passing; q = SR(clip(W' / s)), so E[W] = clip(W')."""
    n, g, total = 400, normal(64, 128), 0
    for seed in range(n):
        layer, _, step = pair('ternary/tensor/absmean/stochastic', learning_rate=5e-3, weight_decay=0.1, seed=seed)
        w, s = dequantize(layer.stored()), layer.scale.item()
        total = total + step(g)
    full = torch.nn.Parameter(w.clone())
    full.grad = g
    torch.optim.AdamW([full], lr=5e-3, weight_decay=0.1).step()
    assert layer.scale.item() == s                                      # computed again it would collapse
    assert ((total / n - full.clamp(-s, s)).abs() <= 5 * s * 0.5 / math.sqrt(n)).all()


def test_no_flips_below_the_threshold():
    rates = {}
    for tau in (0, 1, 3):
        layer, optimizer, step = pair(TERNARY, code_lr=0.01, threshold=tau, ramp=20.0, adam_v='factored', betas=(0.9, 0.999))
        flips = []
        for i in range(200):                                            # nothing but noise
            step(normal(64, 128, seed=i))
            flips.append(optimizer.flips())
        rates[tau] = sum(flips[50:])
    # E max(0, |r| - tau) of a normal r of the size of the noise: .798, .1667, .00076
    assert rates[1] / rates[0] == pytest.approx(0.1667 / 0.798, rel=0.15) and rates[3] < 0.003 * rates[0]


def test_scales_learn_downhill():
    layer, _, step = pair(TERNARY, code_lr=1e-6, scale_lr=0.1)
    s = layer.scale.clone()
    step(dequantize(layer.stored()))                                    # dL/d log s = sum g w > 0: s must shrink
    assert torch.allclose(layer.scale, s * math.exp(-0.1), rtol=1e-3)


def test_bytes_are_read_off_the_storages():
    model = lambda: torch.nn.Sequential(Linear(256, 512))
    for kwargs, master, most in (({}, '', 12), ({'adam_m': 'int8/row', 'adam_v': 'factored', 'code_lr': 0.2, 'scale_lr': 0.01}, TERNARY, 1.5),
                                 ({'adam_m': 'int4/128', 'adam_v': 'factored', 'code_lr': 0.2}, TERNARY, 0.9)):
        net = model()
        net[0].store_(master)
        optimizer = AdamW(net, **kwargs)
        net[0].weight.grad = normal(512, 256)
        optimizer.step()
        size = held(net, optimizer)
        assert size['linear']['weights'] + size['linear']['optimizer'] <= most
        assert size['linear']['gradients'] == 4 and size['gradients'] == 4 * 512 * 256
    assert size['weights'] == sum(t.untyped_storage().nbytes() for t in [*net.parameters(), *net.buffers()])


@pytest.mark.parametrize('kwargs', [{}, {'adam_m': 'int8/128/sqrt', 'adam_v': 'uint4/128/root4'}, {'adam_m': 'int4/row/asymmetric', 'adam_v': 'factored'}])
def test_the_optimizer_state_survives_a_checkpoint(kwargs, tmp_path):
    def fresh():
        return pair(TERNARY, code_lr=0.1, scale_lr=0.01, threshold=1.0, ramp=20.0, **kwargs)
    (a, oa, step_a), (b, ob, step_b) = fresh(), fresh()
    for i in range(3):
        step_a(normal(64, 128, seed=i))
    torch.save([a.state_dict(), oa.state_dict()], tmp_path / 'x')
    weights, state = torch.load(tmp_path / 'x', weights_only=True)
    b.load_state_dict(weights)
    ob.load_state_dict(state)
    assert torch.equal(step_a(normal(64, 128, seed=9)), step_b(normal(64, 128, seed=9)))
    assert all(torch.equal(s, t) for s, t in zip(oa.slots[0].tensors(), ob.slots[0].tensors()))
    with pytest.raises(ValueError, match='stored in another way'):
        pair(TERNARY, adam_m='int8/row')[1].load_state_dict(state)


# ------------------------------------------------------------------------------------------------
# the model

def config(*args, **kwargs):
    """A small Config: flags as on the command line, and fields."""
    small = {'n_layer': 2, 'n_head': 2, 'n_embd': 64, 'hidden': 128, 'block_size': 32}
    return replace(train.parse(list(args)), **{**small, **kwargs})


def gpt(*args, vocab=64, **kwargs):
    c = config(*args, **kwargs)
    torch.manual_seed(0)
    model = GPT(c, vocab)
    model.store_(c.master)
    return model


def tokens(*shape, seed=0, vocab=64):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize('flavour', ['gpt2', 'llama'])
def test_the_head_is_tied_and_stays_so(flavour):
    plain, quantized = (gpt(flavour=flavour, weights='int8/row', quantize_head=q) for q in (False, True))
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert count(plain) == count(quantized)
    assert quantized.lm_head.weight is quantized.wte.weight
    x = tokens(2, 8)
    assert not torch.equal(plain(x), quantized(x))
    quantized.lm_head.how = quant.Recipe()                              # a spec is an attribute
    assert torch.allclose(plain(x), quantized(x), atol=1e-6)


@pytest.mark.parametrize('flavour', ['gpt2', 'llama'])
@pytest.mark.parametrize('kv', ['', 'int8/row', 'int4/16', 'int4/row/asymmetric', 'fp8/row'])
def test_cached_generation_is_the_full_forward(flavour, kv):
    model, x = gpt(flavour=flavour, kv_cache=kv), tokens(2, 20)
    full, caches = model(x), [KVCache(kv) for _ in model.h]
    steps = [model(part, caches=caches) for part in (x[:, :7], x[:, 7:8], x[:, 8:15], x[:, 15:])]
    for end, logits in zip((7, 8, 15, 20), steps):
        assert torch.allclose(logits[:, -1], full[:, end - 1], atol=2e-5)
    if kv == 'int4/16':
        assert caches[0].k.codes.dtype == torch.uint8 and caches[0].k.codes.shape == (2, 2, 20, 16)


def test_generate_goes_on_beyond_the_block():
    out = gpt().generate(tokens(2, 3), 70, generator=torch.Generator().manual_seed(1))
    assert out.shape == (2, 73) and torch.equal(out[:, :3], tokens(2, 3))
    greedy = gpt().generate(tokens(1, 3), 5, top_k=1)
    model, x = gpt(), tokens(1, 3)
    for _ in range(5):
        x = torch.cat((x, model(x)[:, -1:].argmax(-1)), 1)
    assert torch.equal(greedy, x)
    for kv in ('int8/tensor', 'int8/column', 'nvfp4'):
        with pytest.raises(ValueError, match='cannot grow token by token'):
            KVCache(kv)


@pytest.mark.parametrize('flavour', ['gpt2', 'llama'])
def test_scales_per_token_cannot_see_the_future(flavour):
    def moved(activations):
        model, x = gpt(flavour=flavour, activations=activations, kv_cache='int8/row'), tokens(1, 16)
        y = x.clone()
        y[0, 10] = (y[0, 10] + 1) % 64
        return (model(x) - model(y))[0, :10].abs().max()
    assert moved('int8/row') == 0 and moved('int4/16') == 0
    assert all(moved(a) > 0 for a in ('int4/tensor', 'int4/column', 'nvfp4'))      # these do: a small leak


def test_rope_turns_by_relative_position():
    from model import rope
    q, k = normal(1, 1, 1, 8), normal(1, 1, 1, 8, seed=1)
    angle = lambda t: torch.outer(torch.tensor([float(t)]), 10000 ** (-torch.arange(0, 8, 2) / 8))
    turn = lambda x, t: rope(x, angle(t).cos(), angle(t).sin())
    score = lambda i, j: (turn(q, i) * turn(k, j)).sum()
    assert torch.allclose(score(5, 3), score(12, 10), atol=1e-5) and not torch.allclose(score(5, 3), score(5, 4))
    z = torch.view_as_complex(q.view(4, 2))                             # pairs (2i, 2i + 1) as complex numbers
    assert torch.allclose(torch.view_as_real(z * torch.polar(torch.ones(4), angle(7)[0])).flatten(), turn(q, 7).flatten(), atol=1e-6)


def test_gpt2_is_the_known_gpt2(tmp_path):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=60, n_positions=32, n_embd=64, n_layer=2, n_head=2)).eval()
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(config(flavour='gpt2', bias=True, hidden=0), 64, str(tmp_path))
    x = tokens(2, 16, vocab=60)
    assert torch.allclose(ours(x)[..., :60], theirs(x).logits, atol=1e-4)
    with pytest.raises(ValueError, match='bias = True'):
        GPT.from_pretrained(config(flavour='gpt2', hidden=0), 64, str(tmp_path))


@pytest.mark.parametrize('kwargs, says', [({'n_head': 3}, 'does not divide'), ({'flavour': 'bert'}, 'use gpt2 or llama'),
                                          ({'bias': True}, 'no bias'), ({'weights': 'int8/48'}, 'do not divide')])
def test_shapes_that_do_not_fit(kwargs, says):
    with pytest.raises(ValueError, match=says):
        gpt(**kwargs)(tokens(1, 4))


def test_health_sees_what_quantization_does():
    model = gpt(weights='ternary/tensor/absmean', activations='int8/row', master='int4/row')
    before = {k: t.clone() for k, t in model.state_dict().items()}
    report = health(model, tokens(2, 16))
    assert report.keys() == {f'h.{i}.{name}' for i in range(2) for name in ('attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj')}
    entry = report['h.0.attn.c_attn']
    assert 35 < entry['activations']['snr_db'] < 50 and entry['activations']['clipped'] == 0    # 6 dB a bit
    assert 0 < entry['weights']['snr_db'] < 10 and entry['weights']['zero'] > 0.2 and entry['weights']['clipped'] > 0.3
    assert sum(entry['levels'].values()) == pytest.approx(1)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.skipif(shutil.which('g++') is None, reason='inductor needs a C++ compiler')
def test_generated_code_rounds_alike():
    """Inductor, once: codes of the compiled kernel are those of eager, bit for bit, in either rounding."""
    x, scale = normal(64, 128), torch.full((64, 1), 0.3)
    for text in ('ternary/row/stochastic', 'int8/row'):
        kernel = torch.compile(lambda x: quantize(x, text, 5, scale).codes)
        assert torch.equal(kernel(x), quantize(x, text, 5, scale).codes)


@pytest.mark.parametrize('name', ['ternary', 'w8a8g8', 'bitnet', 'everything', 'adam4'])
def test_compiled_is_eager(name):
    """One graph, equal bits: what torch.compile captures is what is written (aot_eager: no code generation)."""
    ends = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, backend='aot_eager', fullgraph=True)):
        torch._dynamo.reset()
        model, x = gpt(f'config/{name}.py', n_embd=128, hidden=128), tokens(2, 32)
        model.set_noise(1, 2)
        c = model.config
        optimizer = AdamW(model, adam_m=c.adam_m, adam_v=c.adam_v, code_lr=c.code_lr, scale_lr=c.scale_lr)
        optimizer.update = wrap(quant.update)
        wrap(model)(x, x).backward()
        optimizer.step()
        ends.append([p.grad for p in model.parameters()] + list(model.state_dict().values()))
    assert all(torch.equal(a, b) for a, b in zip(*ends))


# ------------------------------------------------------------------------------------------------
# train.py: the command line

def run(*args, **env):
    """train.py in a process of its own, as a user runs it."""
    return subprocess.run([sys.executable, 'train.py', *args], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', **env})


def error(*args, when=train.main):
    """What train.py says when it refuses: one line, and a status that is not 0."""
    with pytest.raises(SystemExit) as e:
        when(list(args))
    assert isinstance(e.value.code, str) and e.value.code.startswith('error: ') and '\n' not in e.value.code
    return e.value.code


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    """A dataset of bytes made of this repository's own sources."""
    folder = tmp_path_factory.mktemp('data')
    text = ''.join((ROOT / name).read_text(encoding='utf-8') for name in ('quant.py', 'model.py', 'train.py'))
    prepare(folder, 'test', [('train', text[5000:]), ('val', text[:5000])], 256)
    return folder


@pytest.fixture
def small(data, tmp_path):
    """Flags of a run that takes a second."""
    return [f'--dataset={data}', f'--out_dir={tmp_path / "run"}', '--n_layer=2', '--n_head=2', '--n_embd=128', '--hidden=128',
            '--block_size=32', '--batch_size=4', '--grad_accum=1', '--max_iters=6', '--warmup_iters=2', '--eval_interval=3',
            '--log_interval=1', '--eval_tokens=256', '--sample_tokens=8', '--dtype=float32', '--device=cpu']


def log_of(folder):
    with open(Path(folder) / 'log.jsonl', encoding='utf-8') as f:
        return [json.loads(line) for line in f]


def checkpoint(folder):
    return torch.load(Path(folder) / 'ckpt.pt', weights_only=True)


def equal(a, b):
    """Equal checkpoints, bit for bit; how long they took aside."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a if k not in ('seconds', 'config'))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize('flag, says', [
    ('--learnng_rate=1', "unknown key 'learnng_rate', did you mean 'learning_rate'"), ('--xyzzy=1', "unknown key 'xyzzy'"),
    ('--n_layer=2.5', 'n_layer must be an int, not 2.5'), ('--n_layer=True', 'must be an int'), ('--bias=1', 'must be a bool'),
    ('--learning_rate=fast', 'must be a float'), ('--learning_rate=1/0', 'must be a float'), ('--batch_size=-1', 'greater than 0'),
    ('--beta2=1', r'must lie in [0, 1)'), ('--weights=int9', "weights: spec 'int9'"), ('--adam_v=int8/int8', 'adam_v: spec'),
    ('--dtype=float8', 'use auto'), ('--learning_rate', 'flags look like'), ('-x', 'flags look like'), ('nowhere.py', 'cannot read'),
    ('--code_lr=0.1', 'give master too'), ('--learning_rate=nan', 'must be a float'),
    ('--max_iters=__import__("os").getpid()', 'must be an int'), ('--max_iters=9**9**9', 'must be an int')])
def test_a_bad_flag_is_one_clear_line(flag, says):
    assert says in error(flag, when=train.parse)


@pytest.mark.parametrize('line, says', [
    ('learnng_rate = 1', "unknown key 'learnng_rate', did you mean 'learning_rate'"), ('n_layer = "2"', 'n_layer must be an int'),
    ('import os', 'key = value'), ('n_layer = open("x")', 'must be an int'), ('n_layer = = 2', 'not a config file'),
    ('n_layer += 1', 'key = value'), ('weights = 8', 'weights must be a str')])
def test_a_bad_config_file_names_file_and_line(line, says, tmp_path):
    path = tmp_path / 'bad.py'
    path.write_text('# a comment\n' + line + '\n', encoding='utf-8')
    line = error(str(path), when=train.parse)
    assert says in line and f'{path}:2' in line


def test_later_files_and_flags_win(tmp_path):
    (tmp_path / 'a.py').write_text('"""what it is"""\nlearning_rate = 2 * 3e-4\nn_layer = 2 ** 3\nweights = "int8/row"\n', encoding='utf-8')
    (tmp_path / 'b.py').write_text('n_layer = -1 + 5\ndropout = 0\n', encoding='utf-8')
    c = train.parse([str(tmp_path / 'a.py'), str(tmp_path / 'b.py'), '--seed=7', '--bias=FALSE', '--prompt=1 + 1', '--weights=int4'])
    assert (c.learning_rate, c.n_layer, c.dropout, c.seed, c.bias, c.prompt, c.weights) == (2 * 3e-4, 4, 0.0, 7, False, '1 + 1', 'int4')
    assert c.out_dir == 'out/a-b' and type(c.dropout) is float


def test_configs_are_short_and_name_every_strategy():
    names = {path.stem for path in CONFIGS}
    assert names >= SIZES | {'baseline', 'w8', 'w4', 'a8', 'a4', 'g8', 'w8a8', 'w8a8g8', 'adam8', 'adam4', 'kv4', 'bitnet', 'ternary',
                             'ternary_int8', 'direct8', 'direct4', 'dqt_paper', 'everything'}
    for path in CONFIGS:
        lines = path.read_text(encoding='utf-8').splitlines()
        assert lines[0].startswith('# ') and len([x for x in lines if not x.startswith('#')]) <= 14


def test_every_strategy_fits_every_size():
    strategies = [path for path in CONFIGS if path.stem not in SIZES]
    for size, strategy in itertools.product(sorted(SIZES), strategies):
        c = train.parse([f'config/{size}.py', str(strategy)])
        with torch.device('meta'):
            for n in (c.n_embd, 4 * c.n_embd):
                for how in (c.weights, c.activations, c.gradients, c.adam_m, '' if c.adam_v == 'factored' else c.adam_v):
                    quantize(torch.zeros(1, n), how)
            quantize(torch.zeros(1, c.n_embd // c.n_head), c.kv_cache)


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_every_config_trains_two_steps(path, small, tmp_path):
    train.main([str(path), *small, '--max_iters=2', '--compile=no', '--init_from=scratch'])
    first, *steps, _, last = log_of(tmp_path / 'run')
    assert len(first['sha256']) == 64 and first['config']['n_layer'] == 2 and first['versions']['torch'] == torch.__version__
    assert all(math.isfinite(s['train_loss']) and s['tokens_per_s'] > 0 for s in steps) and len(steps) == 2
    assert last['done'] and 4 < last['val_loss'] < 7 and last['bytes'].keys() >= {'weights', 'optimizer', 'gradients'}
    assert last['val_bpb'] == pytest.approx(last['val_loss'] / math.log(2))


# ------------------------------------------------------------------------------------------------
# train.py: what a run may and may not depend on

STRATEGIES = [['config/ternary.py'], ['config/everything.py'], ['config/w8a8g8.py', 'config/adam4.py', '--dropout=0.1', '--grad_accum=2']]


@pytest.mark.parametrize('strategy', STRATEGIES, ids=lambda s: s[0])
def test_resume_is_bit_for_bit(strategy, small, tmp_path):
    def go(name, *args):
        train.main([*strategy, *small, *args, f'--out_dir={tmp_path / name}'])
    go('whole')
    train.stopping.append(1)                                            # as Ctrl-C does
    with pytest.raises(SystemExit) as e:
        go('parts')
    assert e.value.code == 130 and checkpoint(tmp_path / 'parts')['iter'] == 1
    train.stopping.clear()
    go('parts', '--init_from=resume')
    assert equal(checkpoint(tmp_path / 'whole'), checkpoint(tmp_path / 'parts'))
    strip = lambda log: [{k: v for k, v in entry.items() if k in ('iter', 'train_loss', 'val_loss', 'flips')} for entry in log[1:]]
    assert strip(log_of(tmp_path / 'whole')) == strip(log_of(tmp_path / 'parts'))


def test_killed_while_saving_and_resumed(small, tmp_path):
    """kill -9 at odd moments; what is in out_dir is always a whole checkpoint, and goes on to the same end."""
    args = ['config/ternary.py', *small, '--eval_interval=1', '--max_iters=40']
    train.main([*args, f'--out_dir={tmp_path / "whole"}'])
    command = [sys.executable, 'train.py', *args, f'--out_dir={tmp_path / "killed"}']
    for resume in ([], ['--init_from=resume']):
        process = subprocess.Popen(command + resume, cwd=ROOT, stdout=subprocess.DEVNULL)
        path = tmp_path / 'killed' / 'ckpt.pt.tmp'
        while not (path.exists() and (tmp_path / 'killed' / 'ckpt.pt').exists()) and process.poll() is None:
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert 0 < checkpoint(tmp_path / 'killed')['iter'] <= 40
    train.main([*args, f'--out_dir={tmp_path / "killed"}', '--init_from=resume'])
    assert equal(checkpoint(tmp_path / 'whole'), checkpoint(tmp_path / 'killed'))


def test_ctrl_c_saves_and_says_how_to_go_on(small, tmp_path):
    process = subprocess.Popen([sys.executable, 'train.py', *small, '--max_iters=100000', '--eval_interval=100000'], cwd=ROOT,
                               stdout=subprocess.PIPE, text=True)
    while not (tmp_path / 'run' / 'log.jsonl').exists() or len(log_of(tmp_path / 'run')) < 3:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and '--init_from=resume' in out and checkpoint(tmp_path / 'run')['iter'] > 0


def test_evaluation_does_not_change_training(small, tmp_path):
    for interval in (1, 5):
        train.main([*small, 'config/everything.py', f'--eval_interval={interval}', '--dropout=0.1', f'--out_dir={tmp_path / str(interval)}'])
    a, b = (checkpoint(tmp_path / name) for name in ('1', '5'))
    assert equal(a, b)


def test_the_order_of_data_is_a_function_of_seed_and_step():
    c = config(batch_size=4, grad_accum=2)
    one = train.window_starts(c, 5, 10000, 2)
    assert np.array_equal(one, train.window_starts(replace(c, weights='int8', eval_interval=7), 5, 10000, 2))
    assert np.array_equal(one.ravel(), train.window_starts(replace(c, grad_accum=1, batch_size=8), 5, 10000, 2).ravel())
    assert not np.array_equal(one, train.window_starts(c, 6, 10000, 2))
    assert not np.array_equal(one, train.window_starts(replace(c, seed=1), 5, 10000, 2))
    assert one.min() >= 0 and one.max() < 10000 - c.block_size


@pytest.mark.parametrize('strategy', ['ternary', 'dqt_paper', 'w8a8'])
def test_two_processes_are_one_with_twice_the_batch(strategy, small, tmp_path):
    args = [f'config/{strategy}.py', *small, '--sample_tokens=0']
    train.main([*args, '--batch_size=8', f'--out_dir={tmp_path / "one"}'])
    script = tmp_path / 'ranks.py'      # train.py, but every rank leaves what it ends with
    script.write_text('import sys, torch, train\n'
                      'whole = train.Run.finish\n'
                      'train.Run.finish = lambda run: (whole(run), torch.save(run.raw.state_dict(), sys.argv[1] + str(run.rank)))\n'
                      'train.main(sys.argv[2:])\n', encoding='utf-8')
    result = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone', str(script),
         str(tmp_path / 'rank'), *args, f'--out_dir={tmp_path / "two"}'], cwd=ROOT, capture_output=True, text=True,
        timeout=120, env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)})
    assert result.returncode == 0, result.stderr[-2000:]
    assert equal(*(torch.load(tmp_path / f'rank{r}', weights_only=True) for r in (0, 1)))
    one, two = (log_of(tmp_path / name) for name in ('one', 'two'))
    assert [sorted(entry) for entry in one] == [sorted(entry) for entry in two]
    for a, b in zip(one[1:], two[1:]):
        assert a.get('train_loss', 0) == pytest.approx(b.get('train_loss', 0), abs=2e-3)
        assert a.get('val_loss', 0) == pytest.approx(b.get('val_loss', 0), abs=2e-3)


def test_a_loss_that_is_not_finite_stops_the_run(small, tmp_path):
    train.main([*small])
    good = checkpoint(tmp_path / 'run')
    state = copy.deepcopy(good)
    state['model']['h.0.mlp.c_fc.weight'][0, 0] = math.nan
    torch.save({**state, 'iter': 3}, tmp_path / 'run' / 'ckpt.pt')
    says = error(*small, '--init_from=resume')
    assert 'the loss is nan at step 3' in says and 'ckpt.pt is the last good checkpoint' in says
    assert checkpoint(tmp_path / 'run')['iter'] == 3                    # and has not been written over
    wild = [*small, '--learning_rate=1e18', '--grad_clip=0', f'--out_dir={tmp_path / "wild"}', '--overwrite=True']
    for steps in ('1', '2', '60'):                                      # nothing that is not finite is saved
        assert 'lower learning_rate or use more bits' in error(*wild, '--eval_interval=1', f'--max_iters={steps}')
        assert not (tmp_path / 'wild' / 'ckpt.pt').exists()


# ------------------------------------------------------------------------------------------------
# train.py: bad input, checkpoints, data

def test_a_run_is_never_overwritten_untold(small, tmp_path):
    train.main(small)
    before = (tmp_path / 'run' / 'ckpt.pt').read_bytes()
    assert 'holds a run' in error(*small)
    assert 'trained with n_layer = 2, not 3' in error(*small, '--n_layer=3', '--init_from=resume')
    assert 'trained with weights' in error(*small, '--weights=int8', '--init_from=resume')
    assert 'tokens a step' in error(*small, '--batch_size=8', '--init_from=resume')
    assert 'no dataset' in error(*small, '--overwrite=True', '--dataset=nowhere')
    assert (tmp_path / 'run' / 'ckpt.pt').read_bytes() == before
    train.main([*small, '--overwrite=True', '--max_iters=2'])
    assert checkpoint(tmp_path / 'run')['iter'] == 2 and [e.get('iter') for e in log_of(tmp_path / 'run')] == [None, 1, 2, 2, 2]


def test_start_from_a_checkpoint(small, tmp_path, capsys):
    train.main(small)
    path = tmp_path / 'run' / 'ckpt.pt'
    loss = log_of(tmp_path / 'run')[-1]['val_loss']
    capsys.readouterr()
    train.main([*small, '--eval_only=True', '--init_from=resume', '--prompt=def '])
    out = capsys.readouterr().out
    assert f'val loss {loss:.4f}' in out and 'def ' in out
    for i, args in enumerate((['--weights=int8/row'], ['config/ternary.py'], ['config/direct8.py'])):
        train.main([*args, *small, f'--init_from={path}', f'--out_dir={tmp_path / str(i)}', '--max_iters=1'])
    assert 'model of another shape' in error(*small, '--n_embd=64', f'--init_from={path}', f'--out_dir={tmp_path / "x"}')
    assert 'use --master=ternary' in error(*small, f'--init_from={tmp_path / "1" / "ckpt.pt"}', f'--out_dir={tmp_path / "y"}')
    assert 'no checkpoint' in error(*small, '--init_from=nowhere.pt', f'--out_dir={tmp_path / "z"}')
    foreign = io.BytesIO()
    torch.save({**checkpoint(tmp_path / 'run'), 'config': [1]}, foreign)
    for damage in (b'', b'not a checkpoint', path.read_bytes()[:5000], foreign.getvalue()):
        (tmp_path / 'bad.pt').write_bytes(damage)
        assert 'not a whole checkpoint' in error(*small, f'--init_from={tmp_path / "bad.pt"}', f'--out_dir={tmp_path / "z"}')


def test_a_checkpoint_is_as_small_as_what_it_stores(small, tmp_path):
    train.main(['config/ternary.py', *small, '--n_embd=256', '--hidden=512'])
    state = checkpoint(tmp_path / 'run')
    packed = sum(t.nbytes for k, t in state['model'].items() if k.startswith('h.') and k.endswith('codes'))
    assert packed == 2 * (4 * 256 * 256 + 3 * 256 * 512) / 4            # two bits a weight
    assert (tmp_path / 'run' / 'ckpt.pt').stat().st_size < 1.5 * (packed * 4 + 12 * 256 * 256) + 100_000


@pytest.mark.parametrize('change, says', [
    (lambda d: (d / 'meta.json').unlink(), 'no dataset'), (lambda d: (d / 'val.bin').unlink(), 'cannot read the dataset'),
    (lambda d: (d / 'train.bin').write_bytes(b'123'), 'truncated'), (lambda d: (d / 'meta.json').write_text('{'), 'cannot read'),
    (lambda d: (d / 'meta.json').write_text('[]'), 'cannot read'),
    (lambda d: (d / 'meta.json').write_text((d / 'meta.json').read_text().replace('"vocab_size": 256', '"vocab_size": 0')), 'vocab_size = 0'),
    (lambda d: (d / 'train.bin').write_bytes(b'\xff' * (d / 'train.bin').stat().st_size), 'beyond its vocabulary')])
def test_bad_data(change, says, small, data, tmp_path):
    for name in ('train.bin', 'val.bin', 'meta.json'):
        (tmp_path / name).write_bytes((data / name).read_bytes())
    change(tmp_path)
    assert says in error(*small, f'--dataset={tmp_path}')


def test_other_bad_input(small, tmp_path):
    assert 'not more than block_size' in error(*small, '--block_size=100000')
    assert "no dataset 'nowhere'" in error(*small, '--dataset=nowhere')
    assert 'run python data/openwebtext/prepare.py' in error(*small, '--dataset=openwebtext')
    for key in ('weights', 'activations', 'gradients', 'kv_cache', 'adam_m', 'adam_v'):
        assert 'blocks of 48 do not divide a last axis of' in error(*small, f'--{key}=int8/48')
    assert 'cannot grow token by token' in error(*small, '--kv_cache=int8/tensor')
    assert 'has no negatives' in error(*small, '--adam_m=uint8/row')
    assert 'eval_only needs weights' in error(*small, '--eval_only=True')

    assert 'cannot load gpt2' in error(*small, '--init_from=gpt2', '--flavour=gpt2')
    if not torch.cuda.is_available():
        assert "device 'cuda' is not there" in error(*small, '--device=cuda')
    assert not (tmp_path / 'run').exists()                              # nothing was begun


def test_bpe_and_bytes_give_the_text_back():
    text = (ROOT / 'quant.py').read_text(encoding='utf-8') + 'äöü €\r\n\t  <|endoftext|>'
    for vocab in (256, 400):
        tokenizer = make_tokenizer(vocab, text)
        enc = encoding(tokenizer)
        ids = enc.encode_ordinary(text)
        assert enc.decode(ids) == text and max(ids) < tokenizer['vocab_size'] == enc.n_vocab == vocab
        assert json.loads(json.dumps(tokenizer)) == tokenizer
    ranks = train_bpe(text, 400)
    assert ranks[:256] == [bytes([b]) for b in range(256)] and max(map(len, ranks)) <= 16
    assert ranks == train_bpe(text, 400) and len(set(ranks)) == 400
    pairs = [a + b for word in ('aab', 'aab', 'aac') for a, b in zip(word, word[1:])]
    assert train_bpe('aab aab aac', 257)[256].decode() == max(sorted(set(pairs)), key=pairs.count)


@pytest.mark.parametrize('vocab', ['255', '70000', 'abc'])
def test_a_vocabulary_that_does_not_fit(vocab, tmp_path):
    with pytest.raises(SystemExit, match='256'):
        prepare(tmp_path, 'x', [('train', 'abc'), ('val', 'abc')], vocab)
    assert not (tmp_path / 'meta.json').exists()


# ------------------------------------------------------------------------------------------------
# what the README says

def test_the_commands_of_the_readme(tmp_path):
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert 'train.py config/ternary.py' in text and 'pytest -q test_quant.py' in text
    for command in re.findall(r'train\.py ([^\n`|]*)', text):
        args = [a for a in command.split('#')[0].split('&&')[0].split() if a.startswith(('config/', '--'))]
        train.parse(args)                                               # every file and flag it names is there
    for path in re.findall(r'`((?:config|data|experiments)/[\w/]+\.py)`', text):
        assert (ROOT / path).exists()
    done = run('config/ternary.py', '--n_layer=1', '--max_iters=3', '--eval_tokens=512', '--sample_tokens=5', f'--out_dir={tmp_path / "x"}')
    assert done.returncode == 0 and 'bits/byte' in done.stdout, done.stderr
    bad = run('config/ternary.py', '--lerning_rate=1')
    assert bad.returncode == 1 and bad.stderr.count('\n') == 1 and 'learning_rate' in bad.stderr


def test_importing_does_nothing():
    done = subprocess.run([sys.executable, '-c', 'import train, model, quant; print("ok")'], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == 'ok\n' and done.stderr == ''
