"""
The experiments: every row is a run, what is interrupted goes on, and verdicts and laws are right.

    python -m pytest -q experiments/test_experiments.py
"""
import argparse
import json
import math
from concurrent.futures import Executor, Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import quant
import train
from data.corpus import prepare
from experiments import (bench, bits, direct, fuzz, ideas, memory, no_gpu, pretrained,
                         pretraining, ptq, runs, scaling)
from model import GPT

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    """A dataset of bytes made of this repository's own sources."""
    folder, text = tmp_path_factory.mktemp('data'), (ROOT / 'quant.py').read_text(encoding='utf-8')
    prepare(folder, 'test', [('train', text[1000:]), ('val', text[:1000])], 256)
    return folder


@pytest.fixture
def small(data):
    """Flags of a run that takes a second."""
    return [f'--dataset={data}', '--n_layer=2', '--n_head=2', '--n_embd=64', '--hidden=64',
            '--block_size=32', '--batch_size=4', '--max_iters=6', '--warmup_iters=2',
            '--eval_interval=3', '--log_interval=1', '--eval_tokens=256', '--final_tokens=512',
            '--sample_tokens=8', '--dtype=float32', '--device=cpu']


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    monkeypatch.chdir(ROOT)             # where config/ is


def log_of(folder):
    with open(folder / 'log.jsonl', encoding='utf-8') as f:
        return [json.loads(line) for line in f]


# ------------------------------------------------------------------------------------------------
# rows and runs

def test_every_row_of_an_experiment_is_a_run(monkeypatch):
    seen = set()

    def step(config):       # of each strategy one, of a tiny model, in place of the dry run
        strategy = tuple(getattr(config, key) for key in train.STRATEGY)
        if strategy not in seen:
            model = GPT(replace(config, n_layer=1, n_embd=64, n_head=2, hidden=64), 64)
            quant.rtn_(model, config.stored)
            idx = torch.zeros(1, 64, dtype=torch.long)
            model(idx, idx).backward()
            quant.Optimizer(model, config).step()
        seen.add(strategy)

    monkeypatch.setattr(train, 'dry_run', step)
    for size in direct.TRIES:                                           # every size has its rows
        for section in direct.rows(size).values():
            for text in section.values():
                train.parse([*runs.SIZES[size], *runs.plain(runs.arguments(text))])
    assert direct.TRIES.keys() == pretraining.RATES.keys() == runs.SIZES.keys()
    for program in pretraining, direct:
        names = [name for section in program.rows().values() for name in section]
        assert len(set(names)) == len(names)
        claimed = {c[i].removesuffix(', as ternary') for c in program.CLAIMS for i in (2, 5)}
        assert claimed <= set(names)
        for section in program.rows().values():
            for text in section.values():
                train.parse(runs.plain(runs.arguments(text)))
    for size in scaling.SWEEPS:
        jobs = [job for job, _ in scaling.jobs_of(size)]
        assert len({job.mark for job in jobs}) == len(jobs)
    for size in ptq.BASES:
        jobs = ptq.jobs_of(size).values()
        assert len({job.mark for job in jobs}) == len(jobs)


def test_a_mark_is_of_what_matters(monkeypatch):
    mark = lambda *args, seed=1: runs.Job('x', list(args), seed).mark
    assert mark('--n_layer=2') == mark('--n_layer=2', '--out_dir=out/y', '--compile=no')
    others = [mark(), mark(seed=2), mark('--n_layer=2'), mark('config/w8.py'), mark('--idea=sign'),
              mark('out/a/ckpt.pt'), mark('out/b/ckpt.pt')]
    assert len(set(others)) == len(others)


@pytest.mark.parametrize('name', ideas.PATCHES)
def test_an_idea_moves_ternary_codes_and_leaves_no_trace(name, small, tmp_path):
    place, what, _ = ideas.PATCHES[name]
    before = getattr(place, what)
    with ideas.trying(name):
        train.main(['config/ternary.py', *small, '--max_iters=3', f'--out_dir={tmp_path / "run"}'])
    assert getattr(place, what) is before
    assert 0 < sum(line.get('flips', 0) for line in log_of(tmp_path / 'run')) < 1
    weights = torch.load(tmp_path / 'run' / 'ckpt.pt', weights_only=True)['model']
    assert all(p.abs().max() < 2 for k, p in weights.items() if not k.endswith('codes'))


def test_without_an_idea_the_direct_step_is_that_of_quant():
    config = train.parse(['config/ternary.py', '--adam_v=uint8/row/root4'])
    layers, rng = [], torch.Generator()
    for step in quant.direct_step, ideas.direct_step('none'):
        torch.manual_seed(0)
        layer = torch.nn.ModuleList([quant.Linear(64, 32)])
        quant.rtn_(layer, config.stored)
        optimizer = quant.Optimizer(layer, config)
        optimizer.direct = step
        for i in range(3):
            layer[0].weight.grad = torch.randn(32, 64, generator=rng.manual_seed(i))
            optimizer.step()
        layers.append([layer[0].codes, layer[0].scale, *optimizer.tensors()['0.weight']])
    assert all(map(torch.equal, *layers))


class Here(Executor):
    """Instead of a pool of processes: one can look into it."""

    def __init__(self, *_):
        pass

    def submit(self, f, job):
        future = Future()
        future.set_result(f(job))
        return future


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """What the experiments write goes here, and they run in this process, without dry runs."""
    monkeypatch.setattr(train, 'dry_run', lambda config: None)
    for program in runs, ptq:
        monkeypatch.setattr(program, 'ROOT', tmp_path)
        monkeypatch.setattr(program, 'RESULTS', tmp_path)
    monkeypatch.setattr(runs, 'ProcessPoolExecutor', Here)
    return tmp_path


def test_an_experiment_goes_on_where_it_stopped(small, elsewhere):
    path = elsewhere / 'results.jsonl'
    todo = [runs.Job('one', ['config/ternary.py', *small, '--idea=sign'], 1),
            runs.Job('two', [*small, '--learning_rate=1e18'], 1),
            runs.Job('three', ['config/direct8.py', *small], 1)]
    train.main([*runs.plain(todo[0].args), '--seed=1', f'--out_dir={todo[0].folder}'])
    log, seen = todo[0].folder / 'log.jsonl', []
    whole = log_of(log.parent)[-1]['val_loss']
    log.write_text(''.join(log.open().readlines()[:-1]))                # stopped before the end
    one, two, three = runs.run_all(path, todo, 1, keep=('one',))
    assert three['loss_as_ternary'] != three['val_loss'] > 0            # barely trained
    assert one['val_loss'] == whole                                     # not trained once more
    assert one['val_loss'] > 0 and two['val_loss'] is None and 'is nan at' in two['failed']
    assert todo[0].folder.exists() and not todo[1].folder.exists()
    todo[1] = todo[1]._replace(name='renamed')
    again = runs.run_all(path, todo, 1, run=seen.append)
    assert again == [one, {**two, 'name': 'renamed'}, three] and not seen


def test_quantized_after_training_and_looked_at(small, elsewhere, monkeypatch):
    """The post-training experiment from its first run to its tables, of a tiny model."""
    shape = [a for a in small if 'iters' not in a and 'sample' not in a] + ['--n_layer=1']
    monkeypatch.setitem(ptq.SIZES, 'small', shape)
    monkeypatch.setitem(ptq.BASES, 'small', 'learning_rate=1e-2 max_iters=20 warmup_iters=2')
    monkeypatch.setattr(ptq, 'TRIES', [('1e-4', 4)])
    monkeypatch.setattr(ptq, 'BITS', (8, 4, 3, 2))
    monkeypatch.chdir(elsewhere)        # where the checkpoints are
    (elsewhere / 'config').symlink_to(ROOT / 'config')
    ptq.main(argparse.Namespace(sizes=['small'], sequences=8, jobs=1))
    results = runs.read(elsewhere / 'ptq.jsonl')
    assert len(results) == 1 + 1 + 4 + 4 + 4 + 2 * (1 + 4 + 4)  # base, tries, RTN, GPTQ, seeds
    assert all(r['report'] > 0 for r in results)
    base, *_ = results
    eight = [r for r in results if r['name'].startswith('small 8-bit RTN')]
    assert eight[0]['report'] == pytest.approx(base['report'], abs=0.01)
    found = json.loads((elsewhere / 'ptq-8-analysis.json').read_text(encoding='utf-8'))['small']
    assert found['changes']['2 RTN'][0]['error'] > found['changes']['2 GPTQ'][0]['error'] > \
        found['changes']['8 RTN'][0]['error'] > 0


def test_what_pretraining_looks_at(small, elsewhere, monkeypatch):
    """Every analysis, of a tiny model that is barely trained."""
    monkeypatch.setattr(pretraining, 'TOKENS', 512)
    names = pretraining.KEPT
    jobs = {name: [runs.Job(name, [*small, *runs.arguments(name)], seed) for seed in (1, 2)]
            for name in names}
    results = runs.run_all(elsewhere / 'x.jsonl', sum(jobs.values(), []), 1, names)
    found = pretraining.analyse(jobs, small)
    assert set(found['memory']) > {'float32', 'direct ternary'}
    assert found['memory']['direct ternary']['weights'] < found['memory']['float32']['weights']
    assert all(0.9 < c <= 1.001 for c in found['cosines']['W8A8'])
    assert found['layers'] == list(found['snr'])
    lines = pretraining.claims(results, found)
    assert sum('rounding after training' in line for line in lines) == 3


def test_a_verdict_needs_more_than_chance():
    pytest.importorskip('scipy')
    lines = lambda name, losses: [{'name': name, 'seed': i, 'val_loss': x}
                                  for i, x in enumerate(losses)]
    results = lines('base', [2.0, 3.0, 4.0]) + lines('better', [1.98, 2.97, 3.96]) + \
        lines('alike', [2.02, 3.0, 3.96]) + lines('broken', [2.0, None, 4.0])
    results += lines('once', [1.0])
    said = lambda *claim: runs.claim_lines(results, [('', '', *claim)])[2].split('**')[1]
    assert runs.compare(results, 'better', 'base') == pytest.approx((-1, 0))
    # of three values 4.303 standard errors to either side
    assert runs.compare(results, 'alike', 'base') == pytest.approx((0, 4.303 / 3 ** 0.5), rel=1e-3)
    assert said('better', '<=', 0, 'base') == 'PASS' and said('better', '>=', 0, 'base') == 'FAIL'
    assert said('alike', '<=', 0, 'base') == said('alike', '<=', 2, 'base') == 'UNRESOLVED'
    assert said('alike', '<=', 3, 'base') == 'PASS'
    assert said('broken', '<=', 5, 'base') == 'FAIL' and said('broken', '>=', 5, 'base') == 'PASS'
    assert said('once', '<=', 0, 'base') == 'UNRESOLVED'
    assert math.isnan(runs.compare(results, 'none', 'base')[0])
    assert runs.compare(results, 'base', 'broken')[0] == 0              # over the seeds that ended
    # Holm: of several claims the surest is held against .05 / n, the next against .05 / (n - 1)
    claim = [0.9, 1.0, 1.1, 1.0], '>=', 0.86                            # p = .042
    assert runs.chance([0.9, 1.0, 1.1, 1.0], 0.86) == pytest.approx(0.0416, abs=1e-3)
    assert runs.decide([claim]) == ['PASS'] and runs.decide([claim] * 2) == ['UNRESOLVED'] * 2
    assert runs.decide([claim, ([5, 5], '<=', 0)]) == ['PASS', 'FAIL']


# ------------------------------------------------------------------------------------------------
# speed and random configurations

def test_a_step_of_the_benchmark_is_one_of_train_py(small, monkeypatch):
    """Both ways to a step, with the update in the backward and without, lower the loss."""
    monkeypatch.setattr(bench, 'DEVICE', torch.device('cpu'))
    for more in [], ['--update_in_backward=True']:
        step = bench.our_step(['config/ternary.py', *small, *more], 256)
        before = [p.detach().clone() for p in step.model.parameters()]
        for _ in range(2):
            step()
        assert any(not torch.equal(a, b) for a, b in zip(before, step.model.parameters()))


@pytest.mark.skipif(bool(no_gpu.lacking()), reason=no_gpu.lacking())
def test_what_a_gpu_would_run_does_not_grow():
    """Kernels, and bytes that they move a weight, of the updates and the int8 matmuls of a Linear
    768 -> 3072, at most as many as were measured; no graph breaks, one copy a step."""
    pins = {('adam8', 'update'): (1, 16.3), ('adam4', 'update'): (4, 19.9),
            ('ternary', 'update'): (4, 12.9), ('w8a8g8', 'linear forward'): (3, 75.5),
            ('w8a8g8', 'linear backward'): (8, 197.3)}
    strategies = {name: [f'config/{name}.py', '--n_layer=1'] for name, _ in pins}
    found = no_gpu.pretending('measure', strategies, {}, True)
    for (name, graph), (kernels, moved) in pins.items():
        row, = (g for g in found[name]['graphs'] if g['graph'].startswith(graph))
        assert sum(row['kernels'].values()) <= kernels and not row['extern'], (name, graph)
        assert row['necessary'] < row['triton_bytes'] + row['template_bytes']
        assert row['triton_bytes'] + row['template_bytes'] < moved * 768 * 3072, (name, graph)
        assert found[name]['graph_breaks'] == 0 and found[name]['copies'] == 1


def test_random_configurations_are_refused_in_a_line_or_carried_through(capsys):
    failed = fuzz.main(configs=20, seed=1)
    assert not failed, capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# the scaling laws

def test_the_scaling_laws_give_the_numbers_of_the_paper():
    c = scaling.PUBLISHED
    assert scaling.best_precision(c) == pytest.approx(7.0, abs=0.05)
    assert [scaling.f(c, x, 4) for x in ('w', 'a', 'kv')] == pytest.approx(
        [0.696, 0.331, 0.828], abs=1e-3) and scaling.f(c, 'a', 3) < 0
    assert [scaling.delta(c, N, 26e9, bits) for N, bits in ((30e6, 3), (30e6, 4), (220e6, 3))] == \
        pytest.approx([0.586, 0.108, 0.295], abs=1e-3)
    assert [scaling.critical_data(c, 30e6, bits) / 30e6 for bits in (3, 4)] == pytest.approx(
        [177, 959], abs=1)
    D = scaling.critical_data(c, 30e6, 3)       # where more data begins to hurt
    after = [float(scaling.trained(c, 30e6, x) + scaling.delta(c, 30e6, x, 3))
             for x in (0.9 * D, D, 1.1 * D)]
    assert after[1] == min(after)
    full, low = (float(scaling.trained(c, 1e8, 1e10, w=np.array(bits))) for bits in (np.inf, 4.0))
    assert scaling.equivalent(c, 1e8, low, full) == pytest.approx(scaling.f(c, 'w', 4))


def made_up(c, noise, sizes=(25e3, 55e3, 98e3, 221e3)):
    """Points of a sweep that obeys the laws but for noise."""
    rng, points = np.random.default_rng(0), []
    for N in sizes:
        for D, w in [(2.0 ** i, None) for i in (19, 20, 21, 22)] + \
                [(2.0 ** 20, bits) for bits in (2, 3, 4, 6)]:
            kinds = {'w': w} if w else {}
            full = float(scaling.trained(c, N, D)) + noise * rng.normal()
            cost = scaling.trained(c, N, D, w=np.array(w or np.inf)) - scaling.trained(c, N, D)
            loss = full + float(cost) + noise * rng.normal() * len(kinds)
            p = {'run': str(len(points)), 'seed': 1, 'N': N, 'D': D, **kinds}
            points.append({**p, 'loss': loss, 'full': full})
            points += [{**p, 'post': bits, 'full': loss, 'loss': loss + float(scaling.delta(
                c, N, D, bits, np.array(w or np.inf))) + noise / 4 * rng.normal()}
                for bits in scaling.POST]
    return points


def test_the_fit_finds_the_constants_again():
    pytest.importorskip('scipy')
    true = {'A': 40, 'alpha': .35, 'B': 300, 'beta': .45, 'E': .6, 'gamma_w': 1.2, 'n_w': .2,
            'C_T': .02, 'gamma_D': .4, 'gamma_N': .35, 'gamma_post': .8, 'C_w': .5}
    points = made_up(true, 0.002)
    found = scaling.fit(points, 0.002)
    fits = [scaling.merged(f) for f in scaling.bootstrap(points, 0.002, found, 30)]
    for name, value in scaling.merged(found).items():
        low, high = min(f[name] for f in fits), max(f[name] for f in fits)
        assert low <= true[name] <= high and abs(value / true[name] - 1) < 0.5, name
    assert found['a'] is None                                               # no data on it
    N, D = np.array(5e5), np.array(2.0 ** 21)                               # not fitted
    for kinds in ({}, {'w': np.array(3.0)}):
        guess = scaling.trained(scaling.merged(found), N, D, **kinds)
        assert guess == pytest.approx(scaling.trained(true, N, D, **kinds), rel=0.01)
    L, N, D, P = scaling.plan(true, compute=1e13)
    assert 6 / 16 * N * D * P == pytest.approx(1e13)
    assert all(L <= scaling.trained(true, N * x, D / x, w=np.array(P)) for x in (0.8, 1.25))


def test_what_the_data_do_not_tell_is_unresolved():
    pytest.importorskip('scipy')
    flat = {'A': 40, 'alpha': .35, 'B': 300, 'beta': .45, 'E': .6, 'gamma_w': .05, 'n_w': 0,
            'C_T': 1e-9, 'gamma_D': .4, 'gamma_N': .35, 'gamma_post': .8, 'C_w': .5}
    found = scaling.fit(made_up(flat, 0.002), 0.002)
    assert found['base'] and found['w'] is None and found['post'] is None
    assert scaling.fit(made_up(flat, 0.002, sizes=(25e3, 55e3)), 0.002)['base'] is None


def test_the_steps_of_the_scaling_experiment(tmp_path, monkeypatch, capsys):
    for module in ('scipy', 'matplotlib'):
        pytest.importorskip(module)
    true = {'A': 40, 'alpha': .35, 'B': 300, 'beta': .45, 'E': .6, 'gamma_w': 1.2, 'n_w': .2,
            'gamma_a': 1.3, 'n_a': .8, 'gamma_token': 1.1, 'n_token': .3, 'gamma_kv': 1.2,
            'n_kv': .4, 'C_T': .02, 'gamma_D': .4, 'gamma_N': .35, 'gamma_post': .8, 'C_w': .5}
    rng, known = np.random.default_rng(0), scaling.rows('cpu')

    def law(job):
        """What a run would give that obeys the laws but for noise."""
        point = known[job.name][0]
        kinds = {x: np.array(float(point[x])) for x in scaling.KINDS if x in point}
        N, D, w = point['N'], point['D'], kinds.get('w', np.array(np.inf))
        loss = scaling.trained(true, N, D, **kinds) + 0.002 * rng.normal()
        low = [bits for bits in scaling.POST if bits < w]
        if kinds.keys() - {'w'} or 'direct' in point:
            low = []
        after = {str(bits): loss + scaling.delta(true, N, D, bits, w)
                 * math.exp(0.03 * rng.normal()) for bits in low}
        return {'name': job.name, 'seed': job.seed, 'mark': job.mark, 'sha256': '',
                'val_loss': float(loss), 'rtn': after, 'gptq': after}

    def run_all(path, jobs, *_, **__):
        with open(path, 'a', encoding='utf-8') as f:
            f.writelines(json.dumps(law(job)) + '\n' for job in jobs)

    monkeypatch.setattr(scaling, 'RESULTS', tmp_path)
    monkeypatch.setattr(scaling, 'run_all', run_all)
    monkeypatch.setitem(scaling.SWEEPS['cpu'], 'data', str(tmp_path))
    (tmp_path / 'meta.json').write_text('')
    (tmp_path / 'train.bin').write_bytes(bytes(2 * 6 * 2 ** 20))
    options = argparse.Namespace(size='cpu', jobs=1, compute=1e13, memory=None, tokens=None)
    with pytest.raises(SystemExit, match='run the steps sweep and fit first'):
        scaling.predict(options)
    for step in scaling.STEPS.values():
        step(options)
    said = (tmp_path / 'scaling-cpu.md').read_text(encoding='utf-8')
    assert 'FAIL' not in said and said.count('PASS') > 12
    told = json.loads((tmp_path / 'scaling-cpu-predictions.json').read_text())['losses']
    assert len(told) == 4 + 4 + 9 + 4 * 6 + 0 + 1 + 2 + 4                   # runs, then quantized
    assert (tmp_path / 'scaling-cpu.png').exists()
    found = scaling.read_fit(options)
    said = scaling.say_plan(found, options)
    assert said[0] == 'given: compute of 1e+13 operations of 16 bits'
    assert [line.split()[2] for line in said[2:6]] == [
        'nats/byte,', 'weights,', 'bytes', 'bits,'], said[2:6]


def test_rows_of_a_real_model_are_quantized_copies(monkeypatch):
    """No row touches the base; `keep` leaves layers in int8; asymmetric rows have a zero point."""
    torch.manual_seed(0)
    base = GPT(train.Config(n_layer=2, n_head=2, n_embd=64, hidden=64, block_size=32), 64)
    before = {name: t.clone() for name, t in base.state_dict().items()}
    windows = torch.randint(64, (4, 33), generator=torch.Generator().manual_seed(0))
    full = pretrained.losses(pretrained.copy.deepcopy(base), windows)
    monkeypatch.setattr(pretrained, 'rounded', lambda w, kind: (w.round(2), w.nbytes // 8))
    data, results = dict.fromkeys(pretrained.TEXTS, (windows[:, :-1], windows)), []
    for name, row in pretrained.rows().items():
        results.append(pretrained.measure(name, row, base, data, dict.fromkeys(data, full)))
        assert 2 < results[-1]['bits'] < 9 and results[-1]['english'] == results[-1]['python']
    found = {r['name']: r['bits'] for r in results}
    assert found['rtn int4/64'] == 4.5 and found['rtn int4/64/asymmetric'] == 5
    assert found['gptq int4/64/mse, mlp.c_proj in int8/row'] > 4.5
    assert all(torch.equal(t, before[name]) for name, t in base.state_dict().items())
    first = {'name': 'full precision', **{text: {'loss': 1.0} for text in data}}
    told = pretrained.table([first, *results])
    assert all(f'| {name} |' in told for name in pretrained.rows())


def test_rows_of_memory_and_bits_are_runs():
    found = memory.jobs([11], most=(2, 4))
    assert len(found) == 10 and len(bits.jobs([11, 12, 13])) == 60          # two do not fit in 2
    for job in (*found[::4], *bits.jobs([11])[::6]):
        train.parse(job.args)
    wide = {job.name: runs.keys(job.args)['n_embd'] for job in found}
    assert wide['direct ternary, 4 MB'] > wide['direct ternary, 2 MB'] == 64
    sizes = [memory.megabytes(memory.keys_of(name, 64)) for name in memory.RECIPES]
    assert sizes == sorted(sizes, reverse=True)         # in the order of the table
