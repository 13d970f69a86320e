"""What must hold on a GPU, against the CPU: python -m pytest -q -k gpu. Skipped without one."""
import copy
import json
from dataclasses import replace

import pytest
import torch

import train
from experiments.runs import ROOT
from model import GPT
from quant import (FORMATS, GRIDS, MAPS, MATMULS, How, Linear, Optimizer, QTensor, dequantize,
                   inductor, int_matmul, matmul, quantize, rtn_, uniform)
from test_quant import STRATEGIES, every

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
each = pytest.mark.parametrize
GROUPED = every([*GRIDS, *FORMATS], ['', 'tensor', 'row', 'column', '64'],
                ['', 'absmean', 'mse', 'asymmetric'], ['', 'stochastic'], ['', *MAPS])
TINY = ['--n_layer=2', '--n_embd=128', '--block_size=64', '--batch_size=4', '--n_head=2']
KEY = torch.tensor(12345, dtype=torch.int32)
has_fp8 = pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability()
                             < (8, 9), reason='needs a GPU that multiplies fp8')


def normal(*shape, seed=0):
    """Random numbers of the CPU, whose magnitudes differ from row to row."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return x * torch.rand(shape[0], 1, generator=generator).exp()


def gpu(q):
    """A QTensor, or tensor, on the GPU."""
    if isinstance(q, QTensor):
        return q._replace(**{k: t.cuda() for k, t in q._asdict().items()
                             if isinstance(t, torch.Tensor)})
    return q.cuda()


def same(ours, oracle, share=0.0):
    """Codes of two QTensors agree, but for a share of them that are ties; and so do the scales."""
    for i, (a, b) in enumerate(zip(ours[:4], oracle[:4])):
        if b is not None:
            a, b = a.cpu().float(), b.float()
            assert (a != b).float().mean() <= share if not i else \
                torch.allclose(a, b, 1e-5 if share else 0, 0)


def test_the_noise_of_a_gpu_is_that_of_a_cpu():
    x = torch.empty(512, 256)
    assert torch.equal(uniform(x.cuda(), KEY.cuda()).cpu(), uniform(x, KEY))
    assert torch.equal(torch.compile(uniform)(x.cuda(), KEY.cuda()).cpu(), uniform(x, KEY))


def test_codes_of_a_gpu_are_those_of_a_cpu():
    """Of all Specs, but for ties where a sum, whose order differs, decides: absmean, mse, rank1."""
    x, wrong = normal(64, 256), []
    for text in GROUPED:
        summed = {'absmean', 'mse', 'rank1'} & set(text.split('/'))
        q, oracle = quantize(x.cuda(), text, KEY.cuda()), quantize(x, text, KEY)
        try:
            same(q, oracle, 1e-3 if summed else 0)
            assert torch.allclose(dequantize(q).cpu(), dequantize(gpu(oracle)).cpu(), 1e-3, 0.1)
        except AssertionError:
            wrong.append(text)
    assert not wrong


@each('text', ['int8/row', 'int8/row/stochastic', 'fp8/row', 'int4/64/sqrt', 'uint8/64/root4',
               'ternary/row/absmean/stochastic', 'nvfp4', 'mxfp8', 'int4/32/hadamard'])
def test_compiled_codes_of_a_gpu_are_those_of_a_cpu(text):
    """But for ties: compiled code divides to within two units in the last place."""
    x = normal(256, 512)
    x = x.square() if 'uint' in text else x
    q = torch.compile(lambda x, key: quantize(x, text, key)[:4])(x.cuda(), KEY.cuda())
    same(QTensor(*q), quantize(x, text, KEY), 2e-3)


@each('shape', [(64, 96, 128), (1024, 2304, 768), (17, 32, 48), (8, 64, 64), (33, 50, 70)])
def test_integers_are_multiplied_exactly_on_a_gpu(shape):
    M, N, K = shape
    a, b = normal(M, K), normal(N, K, seed=1)
    for grid in ('int8', 'int4', 'ternary'):
        K4 = K // 4 * 4                         # bytes are filled
        p, q = (quantize(x[:, :K4], f'{grid}/row') for x in (a, b))
        for f in (matmul, *[torch.compile(matmul, options=inductor(MATMULS))]
                  * (grid == 'int8' and M > 17)):
            y = f(gpu(p), gpu(q), True, torch.float32).cpu()
            oracle = dequantize(p).double() @ dequantize(q).double().T
            assert torch.allclose(y.double(), oracle, 1e-5, 1e-6 * oracle.abs().max())
    p, q = (torch.randint(-128, 128, (64, 2 ** 18), dtype=torch.int8) for _ in 'ab')
    y = p.double() @ q.double().T
    assert torch.allclose(int_matmul(p.cuda(), q.cuda()).cpu().double(), y, 1e-6, 64)


@has_fp8
@each('grids', [('fp8', 'fp8'), ('fp8e5', 'fp8'), ('fp8', 'fp8e5')])
def test_fp8_is_multiplied_to_within_bfloat16_on_a_gpu(grids):
    a, b = (quantize(normal(*shape, seed=seed), f'{grid}/row')
            for seed, grid, shape in zip((0, 1), grids, ((256, 512), (384, 512))))
    oracle = dequantize(a).double() @ dequantize(b).double().T
    for f in (matmul, torch.compile(matmul)):
        y = f(gpu(a), gpu(b), True, torch.bfloat16).cpu().double()
        assert (y - oracle).norm() < 4e-3 * oracle.norm()


HOWS = {'w8a8': How('int8/row', 'int8/row', compute='codes'),
        'w8a8g8 fold': How('int8/row', 'int8/row', 'int8/row', backward='fold', compute='codes'),
        'w8a8g8': How('int8/row', 'int8/row', 'int8/row', backward='requantize', compute='codes'),
        'fp8 fold': How('fp8/row', 'fp8/row', 'fp8e5/row', backward='fold', compute='codes'),
        'fp8': How('fp8/row', 'fp8/row', 'fp8e5/row', backward='requantize', compute='codes'),
        'w4a4g4': How(*['int4/32/hadamard'] * 3, backward='requantize'),
        'nvfp4': How('nvfp4', 'nvfp4', 'nvfp4', backward='requantize')}


# seen on an H200 with torch 2.11; so train.py compiles no gradients in codes of fp8
zero = pytest.mark.xfail(reason='compiled, dx and dw of fp8 codes are 0', strict=True)


@each('name, compiled', [
    pytest.param(name, compiled, marks=[has_fp8] + [zero] * compiled if 'fp8' in name else ())
    for compiled in (False, True) for name in HOWS])
def test_the_three_matmuls_of_a_gpu_are_those_of_a_cpu(name, compiled):
    """y, dx and dw in bfloat16 against float32 on the CPU."""
    torch.manual_seed(0)
    how, x, g = HOWS[name], normal(512, 256), normal(512, 384, seed=1)
    layer = Linear(256, 384, how=replace(how, compute='float'))

    def three(layer, x, g, run=lambda f: f):
        x, layer.weight.grad = x.clone().requires_grad_(), None
        y = run(layer)(x)
        y.backward(g)
        return y.detach(), x.grad, layer.weight.grad

    oracle = three(layer, x, g)
    layer = copy.deepcopy(layer).cuda()
    layer.how = how
    run = torch.compile if compiled else lambda f: f
    for ours, right in zip(three(layer, x.cuda().bfloat16(), g.cuda().bfloat16(), run), oracle):
        error = (ours.cpu().float() - right).norm() / right.norm()
        assert error < (0.05 if '8' in name else 0.15), error


def two_steps(args, device, dtype, compiled=False):
    """Losses before and after each of two steps, and the share of codes that a third moved."""
    c = train.parse([*args, *TINY, '--device=cpu'])
    c.code_lr *= 10         # else no code would move so soon
    torch.manual_seed(0)
    model = GPT(c, 256).to(device)
    rtn_(model, c.stored)
    model.dtype = dtype
    if compiled:
        model.compile()
    optimizer, losses = Optimizer(model, c, compiled), []
    idx = torch.randint(256, (4, 65), generator=torch.Generator().manual_seed(0)).to(device)
    for step in range(3):
        model.set_noise(c.seed, step)
        model.zero_grad()
        loss = model(idx[:, :-1], idx[:, 1:])
        losses.append(loss.item())
        loss.backward()
        optimizer.step(0.1)
    return torch.tensor(losses), optimizer.flips()


@each('name', STRATEGIES)
def test_every_strategy_steps_on_a_gpu_as_on_a_cpu(name):
    if name in ('gptq', 'qaft', 'peqa'):
        pytest.skip('starts from a checkpoint')
    args = [f'{ROOT}/config/{name}.py']
    (cpu, flips), (ours, moved) = (two_steps(args, d, torch.float32) for d in ('cpu', 'cuda'))
    assert torch.allclose(ours, cpu, 3e-3, 0) and abs(moved - flips) < 2e-3
    ours, moved = two_steps(args, 'cuda', torch.bfloat16)
    assert torch.allclose(ours, cpu, 1e-2, 0) and abs(moved - flips) < 0.01


@each('names', ['baseline', 'w8a8g8 adam8', 'ternary', 'adam4', 'w4a4g4'])
def test_compiled_strategies_step_on_a_gpu_as_eager(names):
    args = [f'{ROOT}/config/{name}.py' for name in names.split()]
    (eager, flips), (ours, moved) = (two_steps(args, 'cuda', torch.bfloat16, compiled)
                                     for compiled in (False, True))
    assert torch.allclose(ours, eager, 1e-2, 0) and abs(moved - flips) < 0.01


def test_a_run_on_a_gpu_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch):
    run = [f'{ROOT}/config/ternary.py', *TINY, '--eval_tokens=1024', '--final_tokens=1024',
           '--warmup_iters=2', '--log_interval=1', '--sample_tokens=70', '--kv_cache=int8/row',
           '--max_iters=8', '--device=cuda']
    train.main([*run, f'--out_dir={tmp_path}/whole'])
    assert '--- sample ---' in capsys.readouterr().out
    with monkeypatch.context() as patch:
        forward_backward = train.Run.forward_backward

        def stopped(self):
            train.stopping.extend([15] * (self.step == 3))
            return forward_backward(self)

        patch.setattr(train.Run, 'forward_backward', stopped)
        with pytest.raises(SystemExit):
            train.main([*run, f'--out_dir={tmp_path}/half'])
    train.main([f'--out_dir={tmp_path}/half', '--init_from=resume', '--device=cuda'])
    whole, half = ([e['train_loss'] for e in map(json.loads, open(f'{tmp_path}/{name}/log.jsonl'))
                    if 'train_loss' in e] for name in ('whole', 'half'))
    assert len(whole) == 8 and half == pytest.approx(whole, rel=1e-3)   # sums of a GPU differ
