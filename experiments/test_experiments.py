"""
The experiments: every row is a run, what is interrupted goes on, and verdicts and laws are right.

    python -m pytest -q experiments/test_experiments.py
"""
import argparse
import inspect
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import Executor, Future
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import quant
import train
from data.corpus import prepare, read_dataset
from data.tokenizer import make_tokenizer
from experiments import (bench, bits, curve, direct, fit, fusion, fuzz, ideas, memory, no_gpu,
                         pretrained, pretraining, ptq, runs, scaling)
from model import GPT

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ptq.documents


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
            '--sample_tokens=8', '--dtype=float32', '--device=cpu', '--base_width=64']


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    monkeypatch.chdir(ROOT)             # where config/ is


# ------------------------------------------------------------------------------------------------
# rows and runs

@pytest.mark.parametrize('how', ['baseline', 'adam4', 'ternary', 'kv4'])
def test_fit_counts_what_a_run_will_hold(small, how):
    config = train.parse([f'config/{how}.py', *small])
    found, kept, idx = fit.memory(config, 256), [], torch.zeros(4, 32, dtype=torch.long)
    model = GPT(config, 256)
    quant.rtn_(model, config.stored)
    held = quant.bytes_held(model, quant.Optimizer(model, config))
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = model(idx, idx)
    kept = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in kept)}
    loss.backward()
    gradients = sum(p.grad.nbytes for p in model.parameters())
    assert found == dict(weights=held['weights'], states=held['optimizer'], gradients=gradients,
                         activations=sum(n for at, n in kept.items() if at not in own))
    assert fit.memory(replace(config, update_in_backward=True), 256)['gradients'] == max(
        p.grad.nbytes for p in model.parameters())
    half = fit.memory(replace(config, dtype='bfloat16'), 256)['activations']
    assert half < 0.8 * found['activations']
    # gradients come while activations go, and the logits of a few tokens are not counted
    counted = sum(found.values())
    assert counted - gradients < fit.peak(replace(config, overwrite=True)) < 1.2 * counted


def test_fit_says_how_many_sequences_fill_a_memory(small, capsys):
    fit.main([*small, '--memory=0.01'])
    n = int(re.search(r'(\d+) sequences at a time', capsys.readouterr().out)[1])
    held = lambda n: sum(fit.memory(train.parse([*small, f'--batch_size={n}']), 256).values())
    assert held(n) <= 0.01 * 2 ** 30 < held(n + 1)


@pytest.mark.parametrize('main, args, says', [
    (fit.main, ['config/tiny.py', '--memory=0'], '--memory'),
    (fit.main, ['config/tiny.py', '--memory=inf'], '--memory'),
    (fit.main, ['config/tiny.py', '--memory=1e-3'], 'one sequence takes'),
    (curve.main, ['--out=curves', 'log.jsonl'], 'ends in .png'),
    (curve.main, ['--out=', 'log.jsonl'], 'ends in .png')])
def test_what_an_option_cannot_be_is_one_line(main, args, says):
    with pytest.raises(SystemExit, match=says) as e:
        main(args)
    assert '\n' not in str(e.value)


def test_seeds_that_chose_rates_do_not_report(capsys):
    parser = runs.parser_of('', [11])
    assert parser.parse_args(['--seeds', '12', '11', '12']).seeds == [12, 11]
    with pytest.raises(SystemExit):
        parser.parse_args(['--seeds', '11', '10'])
    assert 'seeds up to 10 choose rates' in capsys.readouterr().err


def test_a_curve_shows_what_rounding_does_to_layers(small, tmp_path):
    train.main(['config/w4a4.py', '--quantize_head=True', *small, f'--out_dir={tmp_path}/run'])
    with open(f'{tmp_path}/run/log.jsonl', 'a', encoding='utf-8') as f:
        f.write('{"iter": 7, "train_lo')                                # as if killed
    *_, last, ratios = curve.read(f'{tmp_path}/run/log.jsonl')
    assert 0 < last < 6 and {*ratios} == {'weights', 'activations'}
    assert len(ratios['weights']) == 9 and all(5 < dB < 40 for dB in ratios['weights'].values())
    pytest.importorskip('matplotlib')
    curve.draw([curve.read(f'{tmp_path}/run/log.jsonl')], tmp_path / 'curve.png')
    assert (tmp_path / 'curve.png').stat().st_size > 10_000


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
    for size in runs.SIZES.values():
        train.parse(size)
    for program, found in (pretraining, pretraining.rows()), (direct, direct.rows(direct.HOW)):
        names = [name for section in found.values() for name in section]
        assert len(set(names)) == len(names)
        claimed = {c[i].removesuffix(', as ternary') for c in program.CLAIMS for i in (2, 5)}
        assert claimed <= {*names, pretraining.ROUNDED}
        for section in found.values():
            for text in section.values():
                train.parse(runs.plain(runs.arguments(text)))
    todo = [*scaling.rows(held=False), *scaling.rows(held=True)]
    assert len({job.mark for job, _ in todo}) == len(todo)
    for job, point in todo:
        config = replace(train.Config(), **runs.keys(job.args))
        train.parse(job.args)
        if not point['of']:
            assert config.max_iters * config.batch_size * config.block_size == point['D'] < 14e6
            assert runs.weights(config) == point['N'] and config.n_embd // config.n_head % 2 == 0
    for model, plan in ptq.PLANS.items():
        jobs = ptq.jobs_of(model, 11).values()
        assert len({job.mark for job in jobs}) == len(jobs)
        best = dict.fromkeys((what[0][:4], what[1]) for what in ptq.jobs_of(model, 11))
        what = ptq.jobs_of(model, 11, {
            one: ((plan.scale_rates if one[1] == ptq.SCALES else plan.rates)[0], 1)
            for one in best})
        assert all((f'int3/{group}/mse', 'QAFT', (plan.rates[0], 1)) in what
                   for group in plan.groups)            # it reports on all grids


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
        train.main(['config/ternary.py', *small, '--max_iters=3', '--code_lr=1.',
                    f'--out_dir={tmp_path / "run"}'])
    assert getattr(place, what) is before
    flips = [line['flips'] for line in runs.read(tmp_path / 'run' / 'log.jsonl') if 'flips' in line]
    assert 0 < max(flips) < 1
    weights = torch.load(tmp_path / 'run' / 'ckpt.pt', weights_only=True)['model']
    assert all(p.abs().max() < 2 for k, p in weights.items() if not k.endswith('codes'))


def test_what_an_idea_keeps_of_a_step():
    """Of codes that are not at an end: less than a level, at most half of one, or nothing."""
    for idea, least, most in (('none', 0.6, 1), ('half', 0, 0.5), ('nothing', 0, 0),
                              ('emptied', 0.6, 1)):
        generator = torch.Generator().manual_seed(0)
        w = quant.quantize(torch.randn(8, 64, generator=generator), 'ternary/row')
        e, v = (quant.QTensor(torch.zeros(8, 64)) for _ in range(2))
        scales = [quant.QTensor(torch.zeros_like(w.scale)) for _ in range(2)]
        h = torch.tensor([0.7, 0, 0.9, 0.9, 1, 1, 1e-8, 1])
        for key in torch.arange(3, dtype=torch.int32):
            g = torch.randn(8, 64, generator=generator)
            ideas.direct_step(idea)(w, g, e, v, *scales, h, h, key)
        kept = e.codes.abs()
        assert least <= kept[quant.levels(w) == 0].max() <= most
        assert (kept == 1).any() == (idea in ('none', 'half'))          # at an end


def test_a_side_takes_the_rate_that_ends_lowest(tmp_path, monkeypatch):
    """Of as many tries as the others, but twice as many for BitNet with per-row scales."""
    monkeypatch.setattr(direct, 'RESULTS', tmp_path)
    for size in 'tiny', 'default':
        every = direct.tries(size)
        assert {side: len({job.mark for job in direct.every_try(size, [side])}) for side in every} \
            == {side: 8 if side == direct.ROWS else 4 for side in direct.SIDES}
        assert direct.chosen(size) == {side: texts[0] for side, texts in every.items()}
    assert 'beta1=0. learning_rate=0.00075' in direct.chosen('large')[direct.PLAIN]
    lines = [json.dumps({'name': 'old', 'seed': 1, 'mark': job.mark, 'sha256': '', 'val_loss': x})
             for side in direct.SIDES for job, x in zip(
                 direct.every_try('default', [side]), (3, None, 1, 2, 4, 4, 4, 4))]
    for n, best in (2, 0), (len(lines), 2):         # not before all have ended
        (tmp_path / 'direct-default-python.jsonl').write_text('\n'.join(lines[:n]) + '\n')
        assert direct.chosen('large') == {side: texts[best] for side, texts in every.items()}
    names = [job.name for job in direct.jobs_of('large', 'sympy', [14, 15])['hard']]
    assert names == 2 * [*direct.SIDES[:7], direct.HALF]


def test_without_an_idea_the_direct_step_is_that_of_quant():
    config = train.parse(['config/ternary.py', '--adam_v=uint8/row/root4', '--code_lr=1.5'])
    layers, rng = [], torch.Generator()
    for step in quant.direct_step, ideas.direct_step('none'):
        torch.manual_seed(0)
        layer = torch.nn.ModuleList([quant.Linear(64, 32)])
        quant.rtn_(layer, config.stored)
        optimizer = quant.Optimizer(layer, config)
        optimizer.steps['direct'] = step
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
        try:
            future.set_result(f(job))
        except RuntimeError as e:
            future.set_exception(e)
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


@pytest.mark.parametrize('way', ['ctrl-c', 'killed'])
def test_a_program_ends_with_its_workers_and_without_a_traceback(way, tmp_path):
    """Also with one that is starting. Python may add that it removes a semaphore."""
    (tmp_path / 'program.py').write_text('''import signal, sys, time
from pathlib import Path
from experiments import runs

def slow(job):
    time.sleep(job.seed)
    job.folder.mkdir(parents=True)
    return {'name': '', 'seed': job.seed, 'mark': job.mark, 'val_loss': 1.0, 'sha256': ''}

if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.default_int_handler)
    jobs = [runs.Job('', [], seed) for seed in (0, *range(60, 80))]
    runs.run_all(Path(sys.argv[1]), jobs, 2, run=slow, cost=lambda job: 1)
''')
    out = tmp_path / 'x.jsonl'
    process = subprocess.Popen([sys.executable, tmp_path / 'program.py', out], text=True,
                               env={**os.environ, 'PYTHONPATH': str(ROOT)}, cwd=ROOT,
                               stderr=subprocess.PIPE, start_new_session=True)
    while process.poll() is None and not out.exists():
        time.sleep(0.1)
    if way == 'killed':
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=40)[1]       # waits for all that can write there
    assert 'Traceback' not in said
    if way == 'ctrl-c':
        assert process.returncode == 1
        assert 'stopped' in said and 'the same command goes on from here\n' in said


def test_an_experiment_goes_on_where_it_stopped(small, elsewhere):
    path = elsewhere / 'results.jsonl'
    todo = [runs.Job('one', ['config/ternary.py', *small, '--idea=sign'], 1),
            runs.Job('two', [*small, '--learning_rate=1e18'], 1),
            runs.Job('stored in int8', ['config/direct8.py', *small], 1)]
    train.main([*runs.plain(todo[0].args), '--seed=1', f'--out_dir={todo[0].folder}'])
    log, seen = todo[0].folder / 'log.jsonl', []
    whole = runs.read(log)[-1]['val_loss']
    log.write_text(''.join(log.open().readlines()[:-1]))                # stopped before the end
    with pytest.raises(SystemExit, match='1 of 4 runs failed: bad: error: no dataset'):
        runs.run_all(path, [runs.Job('bad', [*small, '--dataset=nowhere'], 1), *todo], 1,
                     ['one', 'stored in int8'], run=direct.run_and_infer)
    with path.open('a') as f:
        f.write('{"name"')                                              # a disk was full
    one, two, three = runs.run_all(path, todo, 1)
    run = runs.load(todo[2], '--weights=ternary/row/absmean')
    assert three['loss_as_ternary'] == run.evaluate(512, run.val_data) != three['val_loss'] > 0
    moved = [line['flips'] for line in runs.read(log) if 'flips' in line]
    assert len(moved) > 1 and one['moved'] == statistics.mean(moved)
    assert one['val_loss'] == whole                                     # not trained once more
    assert one['val_loss'] > 0 and two['val_loss'] is None and 'is nan at' in two['failed']
    assert todo[0].folder.exists() and not todo[1].folder.exists()
    todo[1] = todo[1]._replace(name='renamed')
    again = runs.run_all(path, todo, 1, run=seen.append)
    assert again == [one, {**two, 'name': 'renamed'}, three] and not seen
    with path.open('a') as f:                                           # on another machine
        print(json.dumps({**one, 'mark': '', 'args': [], 'dtype': 'another'}), file=f)
    runs.run_all(path, todo, 1, run=seen.append)
    with pytest.raises(SystemExit, match='was computed in another, and here it would be'):
        runs.run_all(path, [*todo, runs.Job('four', ['config/small.py'], 1)], 1, run=seen.append)
    assert not seen
    with pytest.raises(SystemExit, match='1 of 1 runs failed: bad: error: no dataset'):
        runs.run_all(path, [runs.Job('bad', ['--dtype=float32', '--dataset=nowhere'], 1)], 1)
    with path.open('a') as f:
        print(json.dumps({**one, 'sha256': ''}), file=f)
    with pytest.raises(SystemExit, match='has results of several corpora'):
        runs.results_of(path, todo)


def test_a_run_in_two_dtypes_is_no_result(elsewhere, monkeypatch):
    job, seen = runs.Job('one', ['config/ternary.py', '--idea=sign'], 12), []
    job.folder.mkdir(parents=True)
    (job.folder / 'log.jsonl').write_text(''.join(
        json.dumps({'iter': n, 'versions': {'dtype': dtype}}) + '\n'
        for n, dtype in ((0, 'float32'), (400, 'bfloat16'))))
    monkeypatch.setattr(train, 'main', lambda args: seen.extend([*args, quant.direct_step]))
    with pytest.raises(RuntimeError, match='computed in bfloat16 and in float32: remove'):
        runs.run_one(job)
    assert '--seed=12' in seen and seen[-1] is ideas.PATCHES['sign'][2]     # its own


def test_what_a_step_does_not_use_starts_nothing():
    done = subprocess.run([sys.executable, '-m', 'experiments.scaling', '--compute=1e14'],
                          capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and 'are for the step plan' in done.stderr


@pytest.fixture
def tiny(elsewhere, monkeypatch):
    """The experiment with trained models, of a tiny one and bytes of words in random order."""
    rng = random.Random(0)
    words = [''.join(rng.choices('abcdefghijklmnop', k=6)) for _ in range(200)]
    lists = [[' '.join(rng.choices(words, k=1000)) for _ in range(n)] for n in (6, 2, 1)]
    monkeypatch.setattr(ptq, 'documents', lambda model: lists)
    monkeypatch.setattr(ptq, 'make_tokenizer', lambda which, text: make_tokenizer(256))
    shape = ('n_layer=1 n_head=2 n_embd=64 hidden=64 block_size=32 batch_size=4 warmup_iters=2 '
             'log_interval=10 dtype=float32 device=cpu learning_rate=2e-3 max_iters=240')
    plan = ptq.PLANS['small']._replace(
        start=shape, windows=32, batch=4, groups=(32,), bits=(3, 2), rates=('1e-5', '1e-3'),
        epochs=(1,), methods=ptq.TUNED, scale_rates=('1e-4', '1e-2'), tokens=512)
    monkeypatch.setitem(ptq.PLANS, 'small', plan)
    monkeypatch.setattr(train, 'pick_dtype', lambda *_: torch.float32)  # that of the base, anywhere
    monkeypatch.chdir(elsewhere)        # where the checkpoints are
    (elsewhere / 'config').symlink_to(ROOT / 'config')
    return elsewhere


def test_text_to_fine_tune_on_was_never_read(tiny):
    ptq.make_text('small')
    old, val, _ = read_dataset(str(tiny / 'out' / 'ptq' / 'small-base'))
    new, same, _ = read_dataset(str(tiny / 'out' / 'ptq' / 'small-new'))
    seen = lambda ids: [ids[i:i + 32].tobytes() in old.tobytes() for i in range(0, len(ids), 32)]
    assert all(seen(old)) and not any(seen(new)) and (val == same).all()
    jobs = ptq.jobs_of('small', 11)
    read = {runs.keys(job.args)['dataset'].rpartition('-')[2]: what[1] == 'base'
            for what, job in jobs.items()}
    assert read == {'base': True, 'new': False}         # all that start from a base read new text
    # the real text: files, of which none is in two of the lists
    pytest.importorskip('sympy')
    lists = [*map(set, DOCUMENTS('small'))]
    assert all(lists) and not (lists[0] & lists[1] or lists[0] & lists[2] or lists[1] & lists[2])
    new, val = ({p for text in texts for p in text.split('\n\n')}
                for texts in pretrained.documents()['english'])
    assert new and val and not new & val


def test_rates_are_chosen_on_other_text_than_losses_are_of(monkeypatch):
    monkeypatch.setattr(ptq, 'part_losses', lambda run, data, starts: {*starts})
    run = SimpleNamespace(config=SimpleNamespace(block_size=4), val_data=range(1001))
    choose, report = (ptq.half(run, which, 10 ** 6) for which in (0, 1))
    assert not choose & report and choose | report == {*range(0, 1000, 4)}


def test_quantized_after_training_and_looked_at(tiny):
    """The post-training experiment from its first run to its tables, of a tiny model."""
    for module in ('scipy', 'matplotlib'):
        pytest.importorskip(module)
    options = argparse.Namespace(models=['small'], seeds=[11, 12], jobs=1)
    ptq.main(options)
    results = runs.read(tiny / 'ptq.jsonl')
    # the base, RTN and GPTQ on 2 grids, 2 tries of 4 methods and of the control; for each of 2
    # seeds the same without tries
    assert len(results) == 1 + 4 + 2 * (8 + 1) + 2 * (1 + 4 + 8 + 1)
    found = {(r['name'], r['seed']): r for r in results}
    base, three, two = (found[f'small {what}', 11] for what in (
        'base', 'int3/32/mse RTN', 'int2/32/mse RTN'))
    assert max(base['line'][4], three['line'][4]) < two['line'][4]
    assert two['error'] > three['error'] > 0 and \
        two['error'] > found['small int2/32/mse GPTQ', 11]['error'] > 0
    assert base['distance'] == 0 and two['line'][0] == pytest.approx(base['line'][4])
    assert {r['args'][0].rpartition('/')[2] for r in results if 'from GPTQ' in r['name']} == \
        {'floats.pt'}
    said = (tiny / 'ptq-small.md').read_text()
    assert (tiny / 'ptq-small.png').exists() and all(f'| P{i}: ' in said for i in range(9))
    ptq.main(options)                                                   # nothing is left to train
    assert len(runs.read(tiny / 'ptq.jsonl')) == len(results)


def test_the_control_is_subtracted_and_a_verdict_has_a_family():
    pytest.importorskip('scipy')
    line = lambda loss: {'report': [loss, loss + 0.1], 'seen': 2.0}
    three = lambda loss: [line(loss + noise) for noise in (-1e-5, 0, 1e-5)]
    found = {('', 'base'): [line(2.0)] * 3, ('', 'control'): [line(1.9)] * 3}
    for grid, gptq in (('int3/64/mse', 2.05), ('int2/64/mse', 2.2)):
        found |= {(grid, 'RTN'): [line(2.3)] * 3, (grid, 'GPTQ'): [line(gptq)] * 3,
                  (grid, 'QAFT'): three(1.98)}
    # over the base QAFT is ahead by .07, over the control behind by .03
    assert ptq.costs(found)['int3/64/mse', 'QAFT'] == pytest.approx([.08] * 3, abs=1e-4)
    P0 = next(iter(ptq.claims(found).values()))
    assert [values.mean() for _, values, *_ in P0] == pytest.approx([-.03, .12], abs=1e-4)
    assert runs.decide([([*values], sign, bound) for _, values, sign, bound in P0]) == \
        ['FAIL', 'PASS']
    # of a single seed the parts of the text are what varies
    alone = {what: lines[:1] for what, lines in found.items()}
    assert ptq.costs(alone)['int2/64/mse', 'GPTQ'] == pytest.approx([.2, .2])


def test_a_teacher_is_imitated_in_training_alone(monkeypatch):
    torch.manual_seed(0)
    config = train.Config(n_layer=1, n_head=2, n_embd=32, hidden=32, block_size=16)
    teacher, model = GPT(config, 64), GPT(config, 64)
    idx, targets = torch.randint(64, (2, 2, 16)).unbind()
    monkeypatch.setitem(ideas.PATCHES, 'teacher', (GPT, 'forward', ptq.taught(teacher)))
    with ideas.trying('teacher'):
        p, q = teacher(idx).softmax(-1), model(idx).log_softmax(-1)
        assert model(idx, targets).item() == pytest.approx(-(p * q).sum(-1).mean().item())
        train.dry_run(config)
        other = model.eval()(idx, targets).item()
    assert other == model(idx, targets).item() == pytest.approx(torch.nn.functional.cross_entropy(
        model(idx).flatten(0, 1), targets.flatten()).item(), rel=1e-5)


def test_what_pretraining_looks_at(small, elsewhere):
    """What is looked for in trained models, of tiny ones that are barely trained."""
    todo = [runs.Job(name, [*small, *runs.arguments(f'config/{name}.py')], seed)
            for name in (pretraining.BASE, 'w4', 'w8') for seed in (1, 2)]
    results = runs.run_all(elsewhere / 'x.jsonl', todo, 1, run=pretraining.run_and_look)
    base, w4, w8 = results[::2]
    assert base['rounded']['val_loss'] != base['val_loss']
    assert 0 < base['zeros']['layer'] < 50 < base['zeros']['logits'] <= 100
    assert base['sharpness'] != w4['sharpness'] and 'sharpness' not in w8
    pytest.importorskip('scipy')
    said = pretraining.look_lines(results)
    assert len(said) == 5 and '**FAIL**' in said[2] and all('[' in line for line in said[2:])


class Copier(torch.nn.Module):
    """Knows which token came after which in its sequence, and nothing else."""
    def forward(self, x, y):
        pairs = [[*zip(*rows)] for rows in zip(x.tolist(), y.tolist())]
        return torch.tensor([0.0 if pair in row[:i] else math.log(64)
                             for row in pairs for i, pair in enumerate(row)]).mean()


def test_copying_is_what_a_repeated_sequence_costs_less():
    run = SimpleNamespace(config=SimpleNamespace(block_size=16), model=Copier(),
                          meta={'vocab_size': 10 ** 6}, device='cpu')
    assert runs.copying(run) == pytest.approx(math.log(64))
    run.model.forward = lambda x, y: torch.tensor(4.0)
    assert runs.copying(run) == pytest.approx(0)


def test_a_verdict_needs_more_than_chance():
    pytest.importorskip('scipy')
    lines = lambda name, losses: [{'name': name, 'seed': i, 'val_loss': x}
                                  for i, x in enumerate(losses)]
    results = lines('base', [2.0, 3.0, 4.0]) + lines('better', [1.98, 2.97, 3.96]) + \
        lines('alike', [2.02, 3.0, 3.96]) + lines('broken', [2.0, None, 4.0])
    results += lines('once', [1.96])
    said = lambda *claim: runs.claim_lines(results, [('', '', *claim)])[3].split('**')[1]
    assert runs.compare(results, 'better', 'base') == pytest.approx((-1, 0))
    some = results[5:3:-1] + results[:3]                # two of its seeds, in another order
    assert runs.compare(some, 'better', 'base') == pytest.approx((-1, 0))
    # of three values 4.303 standard errors to either side
    assert runs.compare(results, 'alike', 'base') == pytest.approx((0, 4.303 / 3 ** 0.5), rel=1e-3)
    assert runs.compare(results, 'once', 'base') == pytest.approx((-2, math.nan), nan_ok=True)
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
    assert runs.decide([([0, 0], '>=', 0)]) == ['PASS']                 # nothing has changed
    assert runs.decide([([math.inf], '>=', 0)]) == ['UNRESOLVED']       # one seed decides nothing
    assert runs.decide([([math.inf, 1], '>=', 0)]) == ['PASS']


# ------------------------------------------------------------------------------------------------
# speed and random configurations

def test_a_step_of_the_benchmark_learns(small, monkeypatch):
    """Both ways to a step, with the update in the backward and without, lower the loss."""
    monkeypatch.setattr(bench, 'DEVICE', torch.device('cpu'))
    for more in [], ['--update_in_backward=True']:
        step = bench.our_step(['config/ternary.py', *small, *more], 256)
        losses = [step().item() for _ in range(5)]
        assert losses[-1] < losses[0] - 0.1


@pytest.mark.skipif(bool(no_gpu.lacking()), reason=no_gpu.lacking())
def test_what_a_gpu_would_run_does_not_grow():
    """Kernels, and bytes that they move a weight, of the updates and the int8 matmuls of a Linear
    768 -> 3072, at most as many as were measured; no graph breaks, one copy a step."""
    pins = {('adam8', 'update'): (1, 16.3), ('adam4', 'update'): (4, 19.9),
            ('ternary', 'update'): (4, 12.9), ('w8a8g8', 'linear forward'): (3, 75.5),
            ('w8a8g8', 'linear backward'): (8, 197.3)}
    strategies = {name: [f'config/{name}.py', '--n_layer=1'] for name, _ in pins}
    found = no_gpu.pretending('measure', strategies, True)
    for (name, graph), (kernels, moved) in pins.items():
        row, = (g for g in found[name]['graphs'] if g['graph'].startswith(graph))
        assert sum(row['kernels'].values()) <= kernels and not row['extern'], (name, graph)
        assert row['necessary'] < row['triton_bytes'] + row['template_bytes']
        assert row['triton_bytes'] + row['template_bytes'] < moved * 768 * 3072, (name, graph)
        assert found[name]['graph_breaks'] == 0 and found[name]['copies'] == 1


def test_random_configurations_are_refused_in_a_line_or_carried_through(capsys):
    failed = fuzz.main(configs=20, seed=1)
    assert not failed, capsys.readouterr().out


def test_the_fuzz_sees_what_is_wrong():
    for bad in (lambda argv: 1 / 0, lambda argv: sys.exit('Traceback'),
                lambda argv: sys.exit('error: ValueError: x')):
        with pytest.raises(fuzz.Failure):
            fuzz.call([], bad)
    assert fuzz.call([], lambda argv: sys.exit('error: no')) == 'error: no'
    a = {'model': {'w': torch.ones(2)}, 'iter': 1, 'seconds': 1.0, 'config': {}}
    assert fuzz.equal(a, {**a, 'seconds': 2.0}) and not fuzz.equal(a, {**a, 'iter': 2})
    assert not fuzz.equal(a, {**a, 'model': {'w': torch.zeros(2)}})


# ------------------------------------------------------------------------------------------------
# the scaling laws

def test_the_scaling_laws_give_the_numbers_of_the_paper():
    c, P = scaling.PUBLISHED, np.linspace(2, 16, 2801)
    assert [scaling.f(c, x, 4) for x in ('w', 'a', 'kv')] == pytest.approx(
        [0.696, 0.331, 0.828], abs=1e-3) and scaling.f(c, 'a', 3) < 0
    shares = lambda P: math.prod(max(0, scaling.f(c, x, P)) for x in ('w', 'a', 'kv'))
    best = max(P, key=lambda P: shares(P) / P)          # where compute is N D P
    assert best == pytest.approx(7.0, abs=0.05)
    assert [scaling.cost(scaling.law_after(c, bits), N, 26e9)
            for N, bits in ((30e6, 3), (30e6, 4), (220e6, 3))] == pytest.approx(
        [0.586, 0.108, 0.295], abs=1e-3)
    D = 177 * 30e6                                      # where more data begins to hurt
    after = [scaling.full_loss(c, 30e6, x) + scaling.cost(scaling.law_after(c, 3), 30e6, x)
             for x in (0.9 * D, D, 1.1 * D)]
    assert after[1] == min(after)


TRUE = {'A': 40, 'alpha': 0.35, 'B': 300, 'beta': 0.45, 'E': 0.6}
AFTER = {'C_T': 2e-2, 'gamma_D': 0.6, 'gamma_N': 0.2, 'gamma_post': 0.7}
SHARES = {'w2': 0.5, 'token3': 0.3, 'token4': 0.6, 'kv2': 0.4, 'direct ternary': 0.35,
          'direct 4-bit': 0.6}
AT, SLOPES = (4e5, 4e6), {'weights': (0.1, 0.05), 'activations': (-0.05, 0.1),
                          'cache': (-0.2, 0.05), 'direct': (0.3, 0.1)}


def made_up(form, noise=0.002, scale=1.0):
    """A law for each precision, of the form A or B, and the run_all of an experiment that obeys
    it but for noise."""
    rng = np.random.default_rng(0)
    if form == 'A':
        laws = {name: (math.log(TRUE['A'] * (f ** -TRUE['alpha'] - 1)), TRUE['alpha'], 0.0)
                for name, f in SHARES.items()}
        laws |= {name: scaling.law_after(AFTER, bits) for name, (_, bits) in scaling.AFTER.items()}
    else:       # with slopes that form A does not have
        slopes = {name: SLOPES.get(kind, (0.3 + 0.1 * scaling.BITS[name], 0.7))
                  for name, kind in scaling.KIND.items()}
        size = {name: (1 - f) / 3 for name, f in SHARES.items()}        # at N and D of AT
        size |= {name: 4.0 ** (2 - bits) for name, (_, bits) in scaling.AFTER.items()}
        laws = {name: (math.log(size[name] * AT[0] ** g / AT[1] ** h), g, h)
                for name, (g, h) in slopes.items()}

    def run_all(path, jobs, *_, **__):
        with open(path, 'a', encoding='utf-8') as file:
            for job in jobs:
                point, = (p for held in (False, True) for other, p in scaling.rows(held)
                          if other == job)
                assert (point['N'] < 2e6) or path.with_name('scaling-predictions.json').exists()
                N, D, of = point['N'], point['D'], point['of']
                loss = scaling.full_loss(TRUE, N, D) + noise * rng.normal()
                more = {} if of else {name: loss + scale * scaling.cost(laws[name], N, D)
                                      * math.exp(0.03 * rng.normal()) for name in scaling.AFTER}
                loss += scale * scaling.cost(laws[of], N, D) if of else 0
                file.write(json.dumps({
                    'name': job.name, 'seed': job.seed, 'mark': job.mark, 'sha256': '',
                    'val_loss': loss, 'loss_on_train': loss, **more}) + '\n')

    return laws, run_all


@pytest.mark.parametrize('form', 'AB')
def test_the_scaling_experiment_finds_the_laws_again(form, tmp_path, monkeypatch, capsys):
    """From the sweep to the plan, of made-up runs that obey one form or the other."""
    for module in ('scipy', 'matplotlib'):
        pytest.importorskip(module)
    laws, run_all = made_up(form)
    monkeypatch.setattr(scaling, 'RESULTS', tmp_path)
    monkeypatch.setattr(scaling, 'run_all', run_all)
    monkeypatch.setattr(scaling, 'folder_of', lambda name: tmp_path)
    (tmp_path / 'meta.json').write_text('')
    options = argparse.Namespace(jobs=1, compute=math.inf, memory=1e5, tokens=4e6)
    with pytest.raises(SystemExit, match='run the steps sweep and predict first'):
        scaling.plan(options)
    for step in 'sweep', 'predict', 'plot', 'plan':
        scaling.STEPS[step](options)
    found = scaling.read('-fit.json')
    for name, law in laws.items():
        assert found[form][name][1:] == pytest.approx(law[1:], abs=0.1), name
        for N, D in (AT, (2e6, 8e6)):
            assert scaling.cost(found[form][name], N, D) == pytest.approx(
                scaling.cost(law, N, D), rel=0.1), name
    for name, value in TRUE.items():
        low, high = found['interval'][name]
        assert low <= found['said'][name] <= high and 0.5 * low <= value <= 2 * high, name
    n, errors = found['score']['all']
    assert n > 10 * len(scaling.SIZES[scaling.HELD])    # of 12 precisions, nearly all are clear
    assert errors[form] < 10 and errors[form] < errors['copy']
    assert (errors['A'] > 20) == (form == 'B')
    said = (tmp_path / 'scaling.md').read_text(encoding='utf-8')
    assert ('kv2: slope of log delta in log N | **FAIL**' in said) == (form == 'B')
    assert said.count('**PASS**') > 12 and 'unresolved' not in said
    told = capsys.readouterr().out
    assert (tmp_path / 'scaling.png').exists() and ('by form B' in told or form == 'A')
    kind = next(scaling.KIND[name] for name in scaling.KIND if f'bytes of text, {name}\n' in told)
    assert f'was {found["score"][kind][1][form]:.0f} % with {kind} in few bits' in told
    told = scaling.read('-predictions.json')
    delta = {p['name']: p['delta'] for p in scaling.measured(held=False)[1]}
    assert all(x == delta[name.replace('d=208', 'd=144')] for name, x in told['copy'].items())
    monkeypatch.setattr(scaling, 'run_all', lambda *_, **__: None)
    (tmp_path / 'scaling-fit.json').unlink()
    scaling.predict(options)                            # again: what was predicted stays
    assert scaling.read('-predictions.json') == told and scaling.read('-fit.json') == found
    loss, N, D, name = scaling.plan(argparse.Namespace(
        compute=1e13, memory=math.inf, tokens=math.inf))
    assert name == 'full precision' and 6 * N * D == pytest.approx(1e13, rel=0.05)
    told = capsys.readouterr().out
    assert 'form' not in told and [line.endswith('beyond it') for line in told.splitlines()[-2:]] \
        == [not low <= x <= high for x, (low, high) in zip((N, D), found['range'].values())]
    assert all(loss < scaling.full_loss(found['base'], N * x, D / x) for x in (0.7, 1.4))


def test_what_a_law_does_not_say_is_an_error_of_all():
    told = {'A': {}, 'B': {'x': 1.5, 'u': 1.0, 'v': 0.9}, 'copy': {}}
    points = [{'name': name, 'of': 'w2', 'delta': 1.0} for name in 'xuv']
    points += [{'name': 'y', 'of': 'kv2', 'delta': 0.3}]
    n, errors = scaling.score(told, points, 0.1)['all']                 # medians
    assert n == 3 and errors == pytest.approx({'A': 100, 'B': 10, 'copy': 100})


def test_an_interval_of_the_bootstrap_is_of_95_percent(monkeypatch):
    monkeypatch.setattr(scaling, 'fit', lambda full, points, _: {'said': {
        'mean': np.mean([p['loss'] for p in full]), 'twins': len(points)}})
    full = [{'N': 1, 'D': 1, 'seed': i, 'loss': i} for i in range(100)]
    found = scaling.bootstrap(full, full, 0)            # of a mean: 1.96 standard errors
    assert np.diff(found['mean']) == pytest.approx(2 * 1.96 * np.std(range(100)) / 10, rel=0.15)
    assert found['twins'] == [100, 100]
    two = [{**p, 'D': seed, 'loss': p['loss'] + seed} for p in full[:2] for seed in (0, 1)]
    assert scaling.noise_of(two) == pytest.approx(0.5 ** 0.5)           # n - 1 degrees


def test_half_the_weights_would_do_as_well_if_f_is_a_half():
    full = [{**p, 'loss': scaling.full_loss(TRUE, p['N'], p['D'])}
            for _, p in scaling.rows(held=False) if not p['of']]
    few = [scaling.full_loss(TRUE, p['N'] / 2, p['D']) - p['loss'] for p in full]      # f = .5
    said = scaling.fit(full, [{**p, 'of': 'w2', 'delta': x} for p, x in zip(full, few)], 0)['said']
    assert [said['f of w2'], said['f of w2, of all runs']] == pytest.approx([0.5, 0.5])


def test_what_the_data_do_not_tell_is_unresolved(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, 'RESULTS', tmp_path)
    with pytest.raises(SystemExit, match='^unresolved'):
        scaling.predict(argparse.Namespace(jobs=1))
    _, run_all = made_up('B', scale=1e-4)               # below the noise
    jobs = [job for job, _ in scaling.rows(held=False)]
    run_all(scaling.path('.jsonl'), jobs[:-1])
    with pytest.raises(SystemExit, match='^unresolved'):
        scaling.predict(argparse.Namespace(jobs=1))     # one run is missing
    run_all(scaling.path('.jsonl'), jobs[-1:])
    full, points = scaling.measured(held=False)
    noise = scaling.noise_of(full)
    assert noise == pytest.approx(0.002, rel=0.5)
    found = scaling.fit(full, points, noise)
    assert found['base'] and found['A'] == found['B'] == {}
    assert scaling.fit([p for p in full if p['N'] < 2e5], points, noise) is None


def test_runs_in_full_precision_are_quantized_afterwards(small, elsewhere):
    job = runs.Job('', [*small, '--max_iters=80', '--learning_rate=1e-2'], 1)
    full, low = map(scaling.measure, (job, job._replace(args=[*job.args, '--weights=int4/row'])))
    assert len({full['val_loss'], *(full[name] for name in scaling.AFTER)}) == 7
    run = runs.load(job)
    quant.rtn_(run.model, 'int2/row')
    assert full['rtn 2'] == run.evaluate(run.config.final_tokens, run.val_data)
    assert not scaling.AFTER.keys() & low.keys()


def test_rows_of_a_real_model_are_quantized_copies(monkeypatch):
    """No row touches the base; `keep` leaves layers in int8; asymmetric rows have a zero point."""
    pytest.importorskip('scipy')
    torch.manual_seed(0)
    base = GPT(train.Config(n_layer=2, n_head=2, n_embd=64, hidden=64, block_size=32), 64)
    before = {name: t.clone() for name, t in base.state_dict().items()}
    windows = torch.randint(64, (4, 33), generator=torch.Generator().manual_seed(0))
    full = pretrained.window_losses(pretrained.copy.deepcopy(base), windows)
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


def test_rows_of_another_precision_are_not_thrown_away(tmp_path):
    path, kind = tmp_path / 'rows.jsonl', {'dtype': 'torch.float32', 'sha256': 'a'}
    assert pretrained.rows_of(path, kind) == {}
    path.write_text(json.dumps({'name': 'full precision', **kind}) + '\n')
    assert pretrained.rows_of(path, kind).keys() == {'full precision'}
    for other in {**kind, 'dtype': 'torch.bfloat16'}, {**kind, 'sha256': 'b'}:
        with pytest.raises(SystemExit, match='another text or precision: move it away'):
            pretrained.rows_of(path, other)


def test_rows_of_memory_and_bits_are_runs():
    found = memory.jobs([11], most=(2.25, 4.5))
    assert len(found) == 11 and len(bits.jobs([11, 12, 13])) == 45       # one does not fit in 2.25
    for job in (*found[::4], *bits.jobs([11])[::6]):
        train.parse(runs.plain(job.args))
    wide = {job.name: runs.keys(job.args)['n_embd'] for job in found}
    assert wide['direct ternary, 4.5 MB'] > wide['direct ternary, 2.25 MB'] == 96
    sizes = [memory.megabytes(memory.args_of(name, 64)) for name in memory.RECIPES]
    assert sizes == sorted(sizes, reverse=True)         # in the order of the table


def test_the_readme_computes_what_a_linear_does():
    lines = re.search(r'```python\n(xq, .*?)```', (ROOT / 'README.md').read_text('utf-8'), re.S)[1]
    how = dict(zip(('activations', 'weights', 'gradients'), ('int8/row', 'int4/row', 'int4/row')))
    x, w, g = (torch.randn(shape).requires_grad_() for shape in ((3, 8), (4, 8), (3, 4)))
    with torch.no_grad():
        exec(lines, space := {**vars(quant), **how, 'x': x, 'w': w, 'g': g})
    layer = quant.Linear(8, 4, how=quant.How(**how))
    layer.weight.data = w.data
    y = layer(x)
    y.backward(g)
    assert torch.equal(y, space['y']) and torch.equal(x.grad, space['dx'])
    assert torch.equal(layer.weight.grad, space['dw'])


def test_the_readme_makes_adamw_cautious():
    agree, new = re.findall('^((?:agree|new) = .*?)(?:  +#.*)?$', (ROOT / 'README.md').read_text(
        encoding='utf-8'), re.M)
    source, old = inspect.getsource(quant.adamw_step), new.partition(' * agree')[0]
    assert source.count(f'    {old}\n') == 1
    exec(source.replace(old, f'{agree}; {new}'), space := dict(vars(quant)))
    w, m, v = (quant.QTensor(torch.tensor(x)) for x in ([3., 3.], [1., -1.], [1., 1.]))
    h = torch.tensor(quant.Rates(0.1, 0.0, 0.9, 0.9, 1.0, 1.0, 0.0, 1.0))
    space['adamw_step'](w, torch.ones(2), m, v, h, 0)       # m is 1, and goes twice as far, and -.8
    assert torch.allclose(w.codes, torch.tensor([2.8, 3.0]))


def test_the_commands_of_the_readme(small, tmp_path):
    """What they name is there, and the first of them trains."""
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert 'train.py config/ternary.py' in text and 'python -m pytest -q' in text
    for command in re.findall(r'train\.py ([^\n`|]*)', text):
        words = command.split('#')[0].split('&&')[0].split()
        train.parse([w for w in words if w.startswith(('config/', '--')) and 'resume' not in w])
    for path in re.findall(r'`((?:config|data|experiments|convert)/[\w/]+\.py)`', text):
        assert (ROOT / path).exists()
    done = subprocess.run([sys.executable, 'train.py', 'config/ternary.py', *small,
                           f'--out_dir={tmp_path}'], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and 'bits/byte' in done.stdout, done.stderr


@pytest.mark.parametrize('name, package', [('python', 'torch'), ('sympy', 'sympy')])
def test_the_corpus_here_is_that_of_the_results(name, package):
    path = ROOT / 'data' / name / 'meta.json'
    if not path.exists():
        pytest.skip(f'python data/{name}/prepare.py')
    here = f"{package}=={version(package).split('+')[0]}"
    if here not in (ROOT / 'requirements.txt').read_text(encoding='utf-8').split():
        pytest.skip(f'a corpus of {here} is another')
    results = runs.read(runs.RESULTS / f'direct-default-{name}.jsonl')
    assert {json.loads(path.read_text(encoding='utf-8'))['sha256']} == {
        r['sha256'] for r in results}


@pytest.mark.parametrize('stem', [
    'bits', 'memory', 'pretraining', 'ptq', 'scaling', 'direct-tiny-python', 'direct-tiny-sympy',
    'direct-small-python', 'direct-small-sympy', 'direct-default-python', 'direct-default-sympy',
    'direct-large-python'])
def test_a_report_says_what_is_in_the_results(stem, tmp_path, monkeypatch):
    """It is made anew, without a run, of the lines that are there."""
    for module in ('scipy', 'matplotlib'):
        pytest.importorskip(module)
    for file in runs.RESULTS.glob('*.json*'):
        shutil.copy(file, tmp_path)
    name, *more = stem.split('-')
    program = sys.modules[f'experiments.{name}']
    monkeypatch.setattr(program, 'RESULTS', tmp_path)
    monkeypatch.setattr(program, 'run_all', lambda path, jobs, *_, **__:
                        runs.results_of(path, jobs))
    monkeypatch.setattr(ptq, 'make_text', lambda model: None)
    options = argparse.Namespace(
        jobs=1, models=[*ptq.PLANS], sections=[], seeds=range(14, 19) if more else range(11, 16),
        **dict(zip(('size', 'dataset'), more)))
    (program.plot if program is scaling else program.main)(options)
    said, kept = ((folder / f'{stem}.md').read_text('utf-8') for folder in (tmp_path, runs.RESULTS))
    assert said == kept and (tmp_path / f'{stem}.png').exists()


def test_the_page_says_what_was_measured_of_direct_training():
    pytest.importorskip('scipy')
    page, readme = (' '.join((ROOT / folder / 'README.md').read_text(encoding='utf-8').split())
                    for folder in ('experiments', '.'))
    found, small, tiny = ({corpus: runs.results_of(
        runs.RESULTS / f'direct-{size}-{corpus}.jsonl',
        sum(direct.jobs_of(size, corpus).values(), [])) for corpus in ('python', 'sympy')}
        for size in ('default', 'small', 'tiny'))
    by_seed, rows, large, tries, _, changes, told, _ = tables('Direct training')
    for name, *cells in by_seed:
        for results, cell in zip([*found.values(), *small.values()], cells, strict=True):
            assert cell == ', '.join(f'{loss:.3f}' for _, loss in sorted(
                runs.losses(results, name).items())), name
    tiny = [*tiny.values()]
    results = runs.results_of(runs.RESULTS / 'direct-large-python.jsonl',
                              direct.jobs_of('large', 'python', [14])['hard'])
    assert len(large) == len(results)
    for name, *cells in large:
        r, = (r for r in results if r['name'] == name)
        step = next(step for step, _, copied in r['evaluations'] if copied >= 0.5)
        size = r['bytes']['linear']
        assert cells == [f'{r["val_loss"]:.3f}', f'{r["loss_on_train"]:.3f}', f'{step:,}',
                         f'{size["weights"]:.2f} + {size["optimizer"]:.2f}'], name
    base, *others = (next(r for r in results if r['name'] == name)
                     for name in (direct.TERNARY, direct.ROWS, direct.ADAMW))
    assert 'by .22 and .26 nats at step 400, where none copies, and by .28 and .35 at step' in page
    for other, percent, *nats in zip(others, ('.7', '.6'), ('.22', '.26'), ('.28', '.35')):
        below = 1 - base['val_loss'] / other['val_loss']
        assert f'{100 * below:.1f}' == '0' + percent and f'{percent} % below that of' in page
        ours, its = ({step: more for step, *more in r['evaluations']} for r in (base, other))
        lead = {step: its[step][0] - ours[step][0] for step in ours}
        assert [f'{lead[step]:.2f}'[1:] for step in (400, 1200, 5000)] == [*nats, '.01']
        assert lead[1600] < lead[1200] / 2 and its[1600][1] > 0.5 > its[1200][1]
        assert ours[1200][1] > 0.5 > ours[400][1]
    assert 'it cannot be told from AdamW and BitNet (one seed each)' in readme
    for name, *cells in rows:
        for results, cell in zip([*found.values(), *small.values(), *tiny], cells, strict=True):
            assert bool(cell) == (len(runs.losses(results, name)) > 2), name
            if cell:
                mean, half = runs.compare(results, direct.TERNARY, name)
                assert cell == f'{mean:+.1f} % ({mean - half:+.1f} to {mean + half:+.1f})', name
    assert len(tries) == len(direct.SIDES)
    rate = lambda text: float(re.search(r'(?:learning_rate|code_lr)=(\S+)', text).group(1))
    for size, column, sides in (('tiny', 1, direct.SIDES), ('small', 2, direct.SIDES[:7]),
                                ('default', 3, direct.SIDES[:7])):
        path = runs.RESULTS / f'direct-{size}-python.jsonl'
        tried = runs.results_of(path, direct.every_try(size))
        for row, side in zip(tries, sides):
            texts = sorted(direct.tries(size)[side], key=rate)
            values = {text: runs.losses(tried, text)[1] for text in texts}
            said = {text: f'{loss:.3f}' for text, loss in values.items()}
            best = min(values, key=values.get)
            said[best] = f'**{said[best]}**'
            parts = [[loss for text, loss in said.items() if text.endswith(' beta1=0.') is without]
                     for without in (False, True)]
            assert row[0].split(';')[0] == side
            assert row[column] == '; without momentum '.join(map(', '.join, filter(None, parts)))
    beyond = {r['name']: r['val_loss'] for r in runs.read(runs.RESULTS / 'tries.jsonl')}[
        f'{direct.HOW[direct.ROWS]} learning_rate=0.024']
    assert f'twice that, tried later, ended at {beyond:.3f}' in page
    for name, cell in changes:
        mean, half = runs.compare(tiny[0], name, direct.TERNARY)
        assert len(runs.losses(tiny[0], name)) == 5
        assert cell == f'{mean:+.1f} % ({mean - half:+.1f} to {mean + half:+.1f})', name
    for says, name, sign in (
            ('per tensor costs {}, initial', 'one scale per tensor', 1),
            ('(`init_gain` 1.4) {}, and', 'scale gain 1.4', 1), ('of gradients cost {}', 'sign', 1),
            ('schedule ends {} lower', 'root', -1), ('in attention {}.', 'attention', 1),
            ('int4 ends {} lower', 'stored in int4', -1), ('int8 {} higher', 'stored in int8', 1),
            ('int8 costs {}.', direct.INT8, 1)):
        mean, half = runs.compare(tiny[0], name, direct.TERNARY)
        mean *= sign
        said = f'{mean:.1f} % ({mean - half:.1f} to {mean + half:.1f})'
        assert says.format(re.sub(r'\b0\.', '.', said)) in page, says
    md = (runs.RESULTS / 'direct-tiny-python.md').read_text(encoding='utf-8').splitlines()
    assert ['| ' + ' | '.join(row) + ' |' for row in told] == \
        [line for line in md if line.startswith('| 2 |')]
    for results in [*found.values(), tiny[0]]:
        mean, half = runs.compare(results, direct.TERNARY, direct.HALF)
        assert abs(mean) < half
    for results, also in zip(found.values(), (' on `python`', ' on `sympy`')):
        mean, half = runs.compare(results, direct.ROWS, direct.HALF)
        said = f'{mean:.1f} % ({mean - half:.1f} to {mean + half:.1f})'.replace('(0', '(')
        assert said + also in page, said
        for side in direct.PLAIN, direct.ADAMW:
            mean, half = runs.compare(results, direct.TERNARY, side)
            assert abs(mean) < half
    for results, muon, bitnet in (tiny[0], 'by {}', 'by {} on `python`'), (
            tiny[1], 'and {}', 'by {} on `sympy`'):
        for side, sign, says in (direct.MUON, 1, muon), (direct.BITMUON, -1, bitnet):
            mean, half = runs.compare(results, direct.TERNARY, side)
            mean *= sign
            interval = f'({mean - half:.1f} to {mean + half:.1f})'.replace('(0.', '(.')
            assert mean > half and says.format(f'{mean:.1f} % {interval}') in page
        assert max(runs.compare(results, direct.TERNARY, side)[0] for side in (
            direct.ROWS, direct.BITNET)) < runs.compare(results, direct.TERNARY, direct.BITMUON)[0]
    for corpus, a, b, sign, says in (
            ('python', direct.TERNARY, direct.BITNET, -1, 'It ends {} below BitNet with one scale'),
            ('sympy', direct.TERNARY, direct.BITNET, -1, 'on `python`, and {} on `sympy`, where'),
            ('python', direct.TERNARY, direct.BITMUON, -1, '): direct ternary ends {} below it'),
            ('sympy', direct.TERNARY, direct.BITMUON, -1, 'on `python` and {} on `sympy`. The'),
            ('python', direct.TERNARY, direct.MUON, 1, 'ends above it by {} on `python`'),
            ('sympy', direct.TERNARY, direct.MUON, 1, 'on `python` and by {} on `sympy`.'),
            ('python', direct.BITNET, direct.ROWS, 1, 'At 3.7M it ends {} higher on')):
        mean, half = runs.compare(found[corpus], a, b)
        mean *= sign
        assert mean > half
        said = f'{mean:.1f} % ({mean - half:.1f} to {mean + half:.1f})'
        assert re.sub(r'\b0\.', '.', says.format(said)) in page, says
    for results in found.values():
        mean = {side: statistics.mean(runs.losses(results, side).values())
                for side in (*direct.SIDES[:7], direct.HALF)}
        assert min(mean, key=mean.get) == direct.MUON
    little = [r['evaluations'][-1][2] for results in found.values() for r in results
              if r['name'] == direct.BITMUON]
    assert f'cost {min(little):.1f} to {max(little):.1f} nats'.replace('0.', '.') in page
    assert 'ends lowest on both corpora' in page and \
        'No difference from AdamW is resolved, and Muon ends lower.' in readme
    _, *others = sorted(runs.differences(found['sympy'], direct.TERNARY, direct.BITNET))
    assert f'{-others[-1]:.1f} to {-others[0]:.1f} %); by Holm' in page
    *others, _ = sorted(runs.differences(found['sympy'], direct.BITNET, direct.ROWS))
    said = f'and {others[0]:.1f} to {others[-1]:.1f} % on `sympy`, but for the run that does not'
    assert said.replace(' 0.', ' .') in page
    assert '`bitnet` still ends above this `baseline`, and Muon below' in readme
    lead = {step: [] for step in (800, 1600, 2000, 2400)}       # by evaluation windows
    for results in found.values():
        for i, (step, *_) in enumerate(results[0]['evaluations'][:-1]):
            at = [{**r, 'val_loss': r['evaluations'][i][1]} for r in results]
            lead.get(step, []).append(-runs.compare(at, direct.TERNARY, direct.ROWS)[0])
    says = ('{:.1f} and {:.1f} % at step 800', '{:.1f} and {:.1f} % at 1,600',
            '{:.1f} and {:.1f} % at 2,000', 'and {:.1f} and {:.1f} % at the end')
    assert all(text.format(*both) in page for text, both in zip(says, lead.values()))
    took = {side: [r['seconds'] for results in found.values() for r in results
                   if r['name'] == side] for side in direct.SIDES[:6]}
    slow, others = took.pop(direct.MUON), sum(took.values(), [])
    assert f'{min(slow):.0f} to {max(slow):,.0f} s against {min(others):.0f} to ' \
        f'{max(others):.0f} s' in page
    for side, sign, says in (direct.BITNET, 1, 'BitNet ends {} above'), (
            direct.MUON, -1, 'Muon {} below it'):
        mean, half = runs.compare(tiny[0], side, direct.HALF)
        mean *= sign
        assert mean > half
        assert says.format(f'{mean:.1f} % ({mean - half:.1f} to {mean + half:.1f})') in page, side
    mean, half = runs.compare(tiny[0], direct.ADAMW, direct.HALF)
    assert f'worse by {mean:.1f} % ({mean - half:.1f} to {mean + half:.1f})' in page
    passed = ['no worse than BitNet with one scale', 'no worse than BitNet with Muon']
    for corpus, more, passed in ('python', ' on average', passed), ('sympy', '', []):
        mean, half = runs.compare(small[corpus], direct.TERNARY, direct.ROWS)
        interval = f'({-mean - half:.1f} to {half - mean:.1f})'
        assert f'by {-mean:.1f} %{more} {interval} on `{corpus}`' in page
        assert all(x < 0 for side in (direct.ROWS, direct.BITNET, direct.BITMUON)
                   for x in runs.differences(small[corpus], direct.TERNARY, side))
        mean, half = runs.compare(small[corpus], direct.TERNARY, direct.PLAIN)
        assert abs(mean) < half
        verdicts = [line for line in runs.claim_lines(small[corpus], direct.CLAIMS) if '**' in line]
        assert [line.split(' | ')[1] for line in verdicts if '**PASS**' in line] == passed
        assert sum('**UNRES' in line for line in verdicts) == 7 - len(passed)
    for corpus, side, says in (('python', direct.BITNET, 'with one scale by {}'),
                               ('sympy', direct.BITNET, 'on `python` and by {}'),
                               ('python', direct.BITMUON, 'with Muon by {}'),
                               ('sympy', direct.BITMUON, 'on `python` and by {}')):
        mean, half = runs.compare(small[corpus], direct.TERNARY, side)
        said = f'{-mean:.1f} % ({-mean - half:.1f} to {half - mean:.1f})'
        assert f'{says.format(said)} on `{corpus}`' in page
    copied = {name: [r['evaluations'][-1][2] for results in small.values() for r in results
                     if r['name'] == name]
              for name in (direct.TERNARY, direct.PLAIN, direct.ADAMW, direct.MUON, direct.ROWS,
                           direct.BITNET, direct.BITMUON, direct.HALF)}
    assert [sum(x >= 0.5 for x in xs) for xs in copied.values()] == [10, 9, 7, 6, 5, 3, 2, 1]
    assert min(copied[direct.TERNARY]) >= 1
    for side, sign, says in (
            (direct.ROWS, -1, 'ends {:.1f} % lower on average, in the other five {:.1f} %'),
            (direct.MUON, 1, 'ends {:.1f} % above Muon on average in the six pairs')):
        pairs = [sign * x for results in small.values()
                 for x in runs.differences(results, direct.TERNARY, side)]
        both = [statistics.mean(x for x, c in zip(pairs, copied[side]) if (c >= 0.5) is so)
                for so in (True, False)]
        assert says.format(*both) in page
    assert f'and {-both[1]:.1f} % below it in the other four' in page
    for side, says in (direct.ADAMW, 'is {} and {} (`python`, `sympy`) with'), (
            direct.PLAIN, 'and {} and {} without,'), (direct.HALF, 'still {} and {}.'):
        spread = (statistics.stdev(runs.losses(results, side).values())
                  for results in small.values())
        assert says.format(*(f'{sd:.3f}'[1:] for sd in spread)) in page
    for results in found.values():
        mean, half = runs.compare(results, direct.TERNARY, direct.ROWS)
        said = f'{-mean:.1f} % ({-mean - half:.1f} to {half - mean:.1f})'
        assert said in readme, said


def tables(section, folder='experiments'):
    """Tables of a section of a README.md: lists of rows, which are lists of cells."""
    page = (ROOT / folder / 'README.md').read_text(encoding='utf-8')
    text = page.split(f'## {section}\n')[1].split('\n## ')[0]
    return [[[cell.strip() for cell in line.split('|')[1:-1]] for line in table.splitlines()[2:]]
            for table in re.findall(r'(?:^\|.*\n)+', text, re.M)]


def test_the_pages_say_what_was_measured_of_strategies():
    pytest.importorskip('scipy')
    jobs = pretraining.jobs_of(pretraining.SEEDS)
    results = runs.results_of(runs.RESULTS / 'pretraining.jsonl', jobs)
    if len(results) < len(jobs):
        pytest.skip('not all of the runs are there: python -m experiments.pretraining')

    def said(name):
        mean, half = runs.compare(results, name, pretraining.BASE)
        return f'{mean:+.2f} ± {half:.2f}'

    base = statistics.mean(runs.losses(results, pretraining.BASE).values())
    rows = {row[0]: row[-1] for row in tables('Strategies', '.')[0]}
    assert rows.pop('`baseline`') == f'{base:.3f} nats' and len(rows) == 17
    for first, cell in rows.items():
        names = re.findall(r'`(?:baseline --optimizer=)?(\w+)(?: --init_gain=0)?`', first)
        assert cell == ('see below' if 'gptq' in names else ', '.join(map(said, names))), names
    told, *rest = tables('Quantized pre-training')
    rows = [row for table in rest for row in table]
    page = (ROOT / 'experiments' / 'README.md').read_text(encoding='utf-8')
    assert page.count(' | loss, % |\n|---|---|\n') == len(rest)
    assert {name for name, *_ in rows} == {r['name'] for r in results} - {pretraining.BASE}
    assert all(cell == said(name) for name, cell in rows)

    def cost(name, base=pretraining.BASE, sign=1):
        mean, half = runs.compare(results, name, base)
        mean *= sign
        return re.sub(r'\b0\.', '.', f'{mean:.1f} % ({mean - half:.1f} to {mean + half:.1f})')

    page = ' '.join(page.split())
    kept = cost('nvfp4, but the last layer', 'nvfp4')[:-1].replace(' (', ', ')
    for says in (
            f"alone no cost is seen: {cost('w8')}, {cost('a8')} and {cost('g8')}; nor in Adam's",
            f"`root4`, {cost('adam8')}. In four bits Adam's states cost {cost('adam4')}, and keys "
            f"and values {cost('kv4')}.", f"more in activations, {cost('a4')}, than in weights "
            f"with one scale a row, {cost('w4')}.", 'are better with a zero point, by '
            f"{cost('activations=int4/row/asymmetric', 'a4', -1)}, or rotated: `w4a4`, whose "
            f"weights have four bits, too, ends {cost('w4a4', 'a4', -1)} below `a4`.",
            f"with one scale for a tensor cost {cost('weights=int4/tensor')}. With all matmuls in "
            f"`nvfp4`, the cost is {cost('nvfp4')}, and to keep the last layer in full precision "
            f"changes nothing that is seen ({kept}); in `mxfp8` it is {cost('mxfp8')}.",
            f"A forward in `mxfp4` costs {cost('mxfp4 forward')}.",
            f"Muon ends {cost('muon', sign=-1)} below AdamW", 'with int8 the loss is '
            f"{cost('muon, m in int8', 'muon')} higher, with `mxfp8` "
            f"{cost('muon, m in mxfp8', 'muon')}.", 'below this baseline, by '
            f"{cost('ternary', sign=-1)}, {cost('direct4', sign=-1)} and "
            f"{cost('everything', sign=-1)}, and `direct8` cannot be told from it."):
        assert says in page, says
    mean, half = runs.compare(results, 'direct8', 'baseline')
    assert abs(mean) < half
    results += [{**r, **r['rounded'], 'name': pretraining.ROUNDED} for r in results
                if 'rounded' in r]
    lines = [line.split(' | ') for line in runs.claim_lines(results, pretraining.CLAIMS)
             if '**' in line]
    assert [row[1:] for row in told] == [[c[1], c[3], c[4].removesuffix(' |')] for c in lines]


def test_the_numbers_of_the_readme():
    """Those that no other test holds: its first run, bytes of the strategies, what was found."""
    pytest.importorskip('scipy')
    readme = ' '.join((ROOT / 'README.md').read_text(encoding='utf-8').split())
    for first, *_, cell, _ in tables('Strategies', '.')[0]:
        for how, said in zip(re.findall('`(.*?)`', first), itertools.cycle(cell.split(', '))):
            if how in ('gptq', 'qaft', 'peqa'):         # they begin with a trained model
                continue
            name, *flags = how.split()
            c = train.parse([f'config/{name}.py', *flags])
            quant.rtn_(model := GPT(c, 1024), c.stored)
            size = quant.bytes_held(model, quant.Optimizer(model, c))['linear']
            assert f"{size['weights']:.1f} + {size['optimizer']:.1f}" == (said or '4.0 + 8.0'), how
    last = runs.read(runs.RESULTS / 'ternary.jsonl')[-1]
    w, g, states = last['bytes']['linear'].values()
    for said in (f"val loss {last['val_loss']:.4f} nats/token, {last['val_bpb']:.4f} bits/byte; on "
                 f"train.bin {last['loss_on_train']:.4f} (",
                 f'weights {w:.2f}, gradients {g:.2f}, optimizer {states:.2f}, weights + optimizer '
                 f'{w + states:.2f}',
                 'codes: ' + ', '.join(f'{k} {v:.2f}' for k, v in last['levels'].items())):
        assert said in readme
    results = runs.read(runs.RESULTS / 'pretraining.jsonl')
    mean, half = zip(*(runs.compare(results, name, pretraining.BASE)
                       for name in ('w8a8', 'w8a8g8', 'a4')))
    assert f'| {mean[0]:.1f} and {mean[1]:.1f} % more loss'.replace('0.', '.') in readme
    low, high = mean[1] - half[1], mean[1] + half[1]
    said = f'{mean[1]:.1f} % ({low:.1f} to {high:.1f}); four-bit'
    assert re.sub(r'\b0\.', '.', said) in readme
    assert f'add {mean[2]:.1f} % ({mean[2] - half[2]:.1f} to {mean[2] + half[2]:.1f})' in readme
    results = runs.read(runs.RESULTS / 'bits.jsonl')
    four, one = (runs.compare(results, f'{code}, e of none', f'{code}, e of 8 bits')[0]
                 for code in ('ternary', 'int8'))
    assert f'{four:.0f} % higher with ternary codes and {one:.1f} % with int8' in readme
    ours, theirs = (runs.read(runs.RESULTS / f'gpu-124m-{name}.jsonl')[-1]['val_loss']
                    for name in ('ternary', 'bf16'))
    assert f'ended {100 * (ours / theirs - 1):.0f} % above bfloat16' in readme
    told = json.loads((runs.RESULTS / 'scaling-fit.json').read_text(encoding='utf-8'))
    assert f"smaller model's costs by {told['score']['all'][1]['copy']:.0f} %" in readme


def test_the_page_has_the_table_of_bits():
    """Verdicts, and loss by seed, as in the results; and bits, of what was held."""
    pytest.importorskip('scipy')
    results = runs.read(runs.RESULTS / 'bits.jsonl')
    claims, rows = tables('Where a weight keeps what it has learned')
    assert ['| ' + ' | '.join(row) + ' |' for row in claims] == \
        runs.claim_lines(results, bits.CLAIMS)[3:]
    assert len(rows) == 15 and len(results) == 45
    for code, e, held, losses in rows:
        found = [r for r in results if r['name'] == f'{code}, e of {e}']
        assert held == '{:.2f} + {:.2f}'.format(*bits.bits(results, code, e))
        assert losses == ', '.join(f"{r['val_loss']:.3f}" for r in found)
    # older lines have a share for each line of the log
    moved_of = lambda r: [r['moved']] if 'moved' in r else [share for _, share, _ in r['curve']]
    moved = [100 * statistics.mean(share for r in results if r['name'] == f'{code}, e of 8 bits'
                                   for share in moved_of(r)) for code in bits.CODES]
    page = ' '.join((ROOT / 'experiments' / 'README.md').read_text(encoding='utf-8').split())
    assert 'a step moves {:.1f} % of ternary codes and {:.1f} % of int4 codes, after many ' \
        'gradients that agree, but {:.0f} % of int8 codes'.format(*moved).replace('0.', '.') in page


def test_the_pages_say_what_was_measured_of_memory():
    """Losses by seed; and direct ternary is below all but int4, as README says."""
    results, found = runs.results_of(runs.RESULTS / 'memory.jsonl', memory.jobs((11, 12))), {}
    for recipe, *cells in tables('The best use of some memory')[0]:
        for most, cell in zip(memory.MEGABYTES, cells, strict=True):
            losses = found[recipe, most] = runs.losses(results, f'{recipe}, {most} MB').values()
            assert cell == ', '.join(f'{loss:.3f}' for loss in losses)
    assert len(found) == 18 and sum(map(len, found.values())) == len(results) == 34
    for recipe in memory.RECIPES.keys() - {'direct ternary', 'direct int4'}:
        assert all(ours < its for most in memory.MEGABYTES for ours, its in zip(
            found['direct ternary', most], found[recipe, most]))
    mean = lambda recipe, most: statistics.mean(found[recipe, most])
    above = mean('float32 AdamW', 9) - mean('direct ternary', 2.25)
    page = (ROOT / 'experiments' / 'README.md').read_text(encoding='utf-8')
    assert f'AdamW {above:.2f} higher'.replace('0.', '.') in ' '.join(page.split())
    assert abs(mean('BitNet without momentum', 9) - mean('direct ternary', 2.25)) < 0.03


def test_rates_of_memory_are_the_best_of_those_tried(monkeypatch):
    """At the smallest size of each recipe; higher and lower ones were tried, too."""
    tries, above = runs.read(runs.RESULTS / 'tries.jsonl'), []
    same = lambda a, b: a == b or not isinstance(b, str) and a == pytest.approx(b, rel=1e-3)
    for recipe, (text, power) in memory.RECIPES.items():
        found, some = {}, [(runs.keys(r['args']), r['val_loss']) for r in tries
                           if r['name'].startswith(f'memory {recipe},')]
        width = min(keys['n_embd'] for keys, _ in some)
        for p in 0, 0.5, 1, 1.5:
            monkeypatch.setitem(memory.RECIPES, recipe, (text, p))
            wanted = runs.keys(memory.args_of(recipe, width))
            for keys, loss in some:     # codes ignore the learning_rate, and tries do not give it
                if all(same(keys.get(key, x), x) for key, x in wanted.items()):
                    found[p] = loss
        assert min(found, key=found.get) == power and min(found) < power < max(found)
        above += [found[1.5] - found[1]] if power == 1 else []
    page = ' '.join((ROOT / 'experiments' / 'README.md').read_text(encoding='utf-8').split())
    assert f'1.5 was tried, too, and ended {min(above):.1f} to {max(above):.1f} nats higher' in \
        page.replace(' .', ' 0.')


def test_the_page_has_the_costs_and_claims_of_quantizing_a_trained_model():
    lines = (runs.RESULTS / 'ptq.md').read_text(encoding='utf-8').splitlines()
    page = ' '.join((ROOT / 'experiments' / 'README.md').read_text(encoding='utf-8').split())
    costs, told, its, verdicts, parts = tables('Quantizing a trained model')
    assert [*map(len, (costs, told, its, verdicts, parts))] == [23, 8, 11, 5, 4]
    assert all('| ' + ' | '.join(row) + ' |' in lines for row in costs + its)
    small = next(i for i, line in enumerate(lines) if line.startswith('## smollm2'))
    for rows, part in (told, lines[:small]), (verdicts, lines[small:]):
        assert all(any(line.startswith('| ' + ' | '.join(row) + ' |') for line in part)
                   for row in rows)
    seen = next(r['tokens'] for r in runs.read(runs.RESULTS / 'ptq.jsonl')
                if r['name'] == 'small int2/64/mse QAFT 3e-4 1')
    assert f'the same {seen // 1000}k tokens' in page
    loss = {r['name'].removeprefix('smollm2 '): statistics.mean(r['report'])
            for r in runs.read(runs.RESULTS / 'ptq.jsonl') if r['name'].startswith('smollm2')}
    tried = ['GPTQ', *(f'{ptq.SCALES} {rate} 1' for rate in (
        '0. learning_rate=1e-3', '1e-2', '1e-2 learning_rate=1e-3'))]
    for how, (_, *cells) in zip(tried, parts):
        assert cells == [f"{loss[f'int{n}/64/mse {how}'] - loss['base']:+.3f}" for n in (3, 2)]
    windows = {r['name'].removeprefix('smollm2 int2/64/mse '): r['report'] for r in runs.read(
        runs.RESULTS / 'ptq.jsonl') if r['name'].startswith('smollm2')}
    rise = {name: np.subtract(xs, windows['smollm2 base']) for name, xs in windows.items()}
    gptq, tuned = rise['GPTQ'], rise[f'{ptq.SCALES} 1e-2 1']
    *others, worst = sorted(gptq)
    assert f'it loses {worst:.1f}, the others {others[0]:.1f} to {others[-1]:.1f}.' in page
    at = gptq.argmax()
    for says, name in (('mend that ({:.1f})', 'QAFT from GPTQ 1e-3 1'),
                       ('and norms ({:.1f})', f'{ptq.SCALES} 0. learning_rate=1e-3 1')):
        assert says.format(rise[name][at]) in page
    assert f'tuned scales do ({tuned.max():.2f} at most)'.replace('0.', '.') in page
    gain = gptq - tuned + rise['smollm2 control 3e-4 1']
    assert gain.min() > 0 and f'in two bits, {gain.mean():.2f} on average' in page
    base, two = ({r['seed']: statistics.mean(r['report']) for r in runs.read(
        runs.RESULTS / 'ptq.jsonl') if r['name'] == f'small {name}'}
        for name in ('base', 'int2/64/mse RTN'))
    cost = sorted((base[seed] < 2.5, two[seed] - base[seed]) for seed in range(11, 16))
    two, some = ([f'{x:.2f}'.lstrip('0') for copies, x in cost if copies == way] for way in (0, 1))
    assert f'costs these two less ({two[0]} and {two[1]}, against {some[0]} to {some[-1]})' in page
    gptq, qaft = (float((row[3] or row[2]).split()[0]) for row in its[7:9])
    readme = ' '.join((ROOT / 'README.md').read_text(encoding='utf-8').split())
    assert gptq < qaft and 'from its own weights cost SmolLM2 more than GPTQ does' in readme


def test_the_page_has_the_scores_and_claims_of_the_laws():
    lines = (runs.RESULTS / 'scaling.md').read_text(encoding='utf-8').splitlines()
    score, told = tables('Scaling laws')
    assert len(score) == 6 and len(told) == 15
    assert all('| ' + ' | '.join(row) + ' |' in lines for row in score + told)
    readme = ' '.join((ROOT / 'README.md').read_text(encoding='utf-8').split())
    a, b = (round(float(cell.split(' %')[0])) for cell in score[0][2:4])
    assert re.search(rf'to {b} % \(median\). The form of \[Kumar et al.\]\(.*?\) erred by {a} %',
                     readme)
    page = ' '.join((ROOT / 'experiments' / 'README.md').read_text(encoding='utf-8').split())
    found = json.loads((runs.RESULTS / 'scaling-fit.json').read_text(encoding='utf-8'))
    deltas = [float(at.split()[-1]) for line in lines
              if line.startswith('| 2070016 |') and 'loss' not in line
              for at in line.split('|')[3].split(',')]
    near = sum(delta < 4 * found['noise'] for delta in deltas)
    assert f'scored: {near} of {len(deltas)} deltas' in page
    assert f', over {len(deltas) - near} deltas' in page
    for more, says in ('', 'are worth {} N of full precision ({} to {})'), (
            ', of all runs', 'all its 25 runs gives {} ({} to {})'):
        name = f'f of direct ternary{more}'
        numbers = [found['said'][name], *found['interval'][name]]
        assert says.format(*(f'{x:.2f}'.lstrip('0') for x in numbers)) in page


def test_the_page_has_the_memory_that_was_counted_and_measured():
    found = json.loads((runs.RESULTS / 'fit.json').read_text(encoding='utf-8'))['rows']
    for (size, strategy, *cells), row in zip(tables('What a run takes of memory')[0], found,
                                             strict=True):
        assert (size == '41M') == ('--n_embd=640' in row['args'])
        assert f'config/{strategy}.py' in row['args']
        assert cells == [f"{row['counted'] / 2 ** 30:.3f}", f"{row['peak'] / 2 ** 30:.3f}",
                         f"{100 * (row['peak'] / row['counted'] - 1):+.1f} %"]


def test_the_page_says_how_far_runs_part():
    page = ' '.join((ROOT / 'experiments' / 'README.md').read_text(encoding='utf-8').split())
    found = [r for r in runs.read(runs.RESULTS / 'tries.jsonl') if r['seed'] == 11]
    for commit in 'c18327a', '3bcfb2f':
        loss = {r['name']: f'{r["val_loss"]:.3f}' for r in found if r.get('commit') == commit}
        *some, last = (loss[name] for name in ('baseline', 'w8', 'a8', 'w8a8', 'g8', 'adam8'))
        assert f'end at {", ".join(some)} and {last}' in page


def test_the_page_says_what_was_measured_of_a_real_model():
    results = {r['name']: r for r in runs.read(runs.RESULTS / 'pretrained.jsonl')}
    for name, bits, *cells in tables('A real language model')[0]:
        grid, how = name.split(',')[0], name.replace("llama.cpp's ", '').split(',')[0]
        more = ', mlp.c_proj in int8/row' * ('c_proj' in name)
        names = [*(f'{way} {grid}{mse}{more}' for way in ('rtn', 'gptq') for mse in ('', '/mse')),
                 f'gptq {grid}/mse, columns in order'] if how == grid else [f'llama.cpp {how}']
        for cell, key in zip(cells, names):
            r = results[key] if cell else {}
            rises = [f'{r[text]["rise"]:.3f}' for text in ('english', 'python') if cell]
            assert cell == ', '.join(rises) and (not cell or bits == f'{r["bits"]:.2f}'), name
    assert results['full precision']['differs_from_transformers'] < 1.2e-4      # as the page says
    page = ' '.join((ROOT / 'experiments' / 'README.md').read_text(encoding='utf-8').split())
    ratios = [results[f'{name}, columns in order'][text]['rise'] / results[name][text]['rise']
              for name in results if f'{name}, columns in order' in results
              for text in ('english', 'python')]
    assert f'GPTQ loses {min(ratios):.1f} to {max(ratios):.1f} times as much' in page


@pytest.mark.parametrize('section, place, file, columns', [
    ('Speed and memory', 0, 'bench-amd-epyc-2-cores-avx512.json', slice(1, 7)),
    ('On a GPU', 0, 'bench-rows-gpu-nvidia-h200.json', slice(1, 5)),
    ('What a GPU would run', 0, 'fusion.json', slice(2, 5))])
def test_the_page_says_what_was_measured_of_speed(section, place, file, columns):
    """All that a row says is in one row of the file, in seconds there and ms here; rows come in the
    order of the file."""
    content = json.loads((runs.RESULTS / file).read_text(encoding='utf-8'))
    rows = [row[1:] if isinstance(row, list) else row.values()
            for row in content.get('rows') or content['bars']]
    rows = [[x for x in row if isinstance(x, (int, float))] for row in rows]
    last = 0
    for cells in tables(section)[place]:
        for part in zip(*(cell.split('; ') for cell in cells[columns])):
            said = re.findall(r'(?<![a-z\d])-?\d+(?:\.\d+)?', re.sub(r'\(.*\)', '', ' '.join(part)))
            said = [(float(x), len(x.partition('.')[2])) for x in said]
            found = [i for i, row in enumerate(rows) if i >= last and all(
                any(round(scale * x, n) == value for x in row for scale in (1, 1000))
                for value, n in said)]
            assert said and found, cells
            last = found[0]


def test_the_page_says_what_llama_cpp_made_of_an_export():
    found = json.loads((runs.RESULTS / 'llamacpp.json').read_text(encoding='utf-8'))
    here, far = found['bits_per_byte'], []
    for row, kind in zip(tables('Outside this repository')[0], ('codes', 'F16')):
        there = found[kind]
        kl = re.sub('e-0', 'e-', f'{there["kl"]:.1e}')
        assert row[1:] == [f'{there["megabytes"]:.2f} MB', kl, f'{there["bits_per_byte"]:.4f}',
                           f'{here:.4f}']
        assert there['texts'] == there['tokenized_alike'] == there['decoded'] == 20
        far.append(abs(there['bits_per_byte'] / here - 1))
    assert max(far) < 4e-4                                              # as the page says


def test_the_page_says_what_was_measured_of_cost():
    text = (ROOT / 'experiments' / 'README.md').read_text(encoding='utf-8')
    text = text.split('## Cost by width and context')[1].split('\n## ')[0]
    content = json.loads((runs.RESULTS / 'cost-amd-epyc-2-cores-avx512.json').read_text('utf-8'))
    assert content['commit'] in text
    times = {}
    for point in content['points']:
        at = times.setdefault(point['strategy'], {})
        at[point['axis'], point['value']] = point['seconds_a_token']
    base, ratios = times.pop('bfloat16'), {}
    for name, at in times.items():
        ratios[name] = [seconds / base[where] for where, seconds in at.items()]
    for name, says in (('w8a8 + adam8', '({:.2f} to {:.2f} of it)'), (
            'ternary', '{:.2f} to {:.2f} of the time'), ('float32', '{:.1f} to {:.1f} times')):
        assert says.format(min(ratios[name]), max(ratios[name])) in text
    wide = 'width', 1024
    faster = [100 - 100 * times[name][wide] / base[wide] for name in ('w8a8 + adam8', 'ternary')]
    assert 'they are {:.0f} and {:.0f} % faster'.format(*faster) in text


def test_the_bars_of_a_gpu_are_read_off_its_kernels():
    found = json.loads((runs.RESULTS / 'fusion.json').read_text(encoding='utf-8'))
    assert [[*bar] for bar in fusion.bars(found['strategies'])] == found['bars']
