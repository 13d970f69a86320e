"""
Post-training quantization against quantization-aware fine-tuning (paper 3, 2410.14570).

    python -m experiments.ptq                   two sizes, 3 seeds, under 90 minutes on two cores
    python -m experiments.ptq --sizes small     one of them, printed only
    python -m experiments.ptq --sequences=1024  with eight times the data, in as many steps

A model of each size is trained in full precision, then brought to 8, 6, 4, 3 and 2 bits: rounded
to nearest (RTN), by GPTQ, and by fine-tuning with quantized weights (QAFT). The last two see the
same 128 sequences, of which a seed is a choice, and so does a control, fine-tuning in full
precision. Learning rates and steps are chosen on one half of the validation data, losses are of
the other. P1 to P6 were written before anything ran. Writes experiments/results/ptq.jsonl (one
line a run; finished ones are skipped), ptq-analysis.json, ptq.md and three .png, or ptq-1024-*.
"""
import argparse
import json
import math
import os
import shutil
import statistics
from contextlib import ExitStack

import numpy as np
import torch

from experiments.runs import RESULTS, ROOT, SIZES, Job, arguments, load, read, run_all, run_one
from quant import dequantize, fake_quant, hessian, linears

BITS = 8, 6, 4, 3, 2
GRID = 'int{}/row/mse'      # of all methods; absmax would leave two bits with three levels in use
TRIES = [(rate, steps) for steps in (40, 160)       # of 8 sequences: 2.5 and 10 epochs of 128
         for rate in ('1e-5', '3e-5', '1e-4', '3e-4', '1e-3')]
METHODS = 'RTN', 'GPTQ', 'QAFT'
TAU = 0.05                  # nats: the rise of the loss at the edge of the basin
BASES = {   # trained for long, as is best for full precision in experiments/direct.py
    'small': 'learning_rate=1.5e-3 embedding_lr=6e-3 beta2=.95 max_iters=4000 warmup_iters=100',
    'default': 'ramp=20 init_gain=.7 adam_v=rank1 max_iters=4000'}


def jobs_of(size, sequences=128):
    """{what: Job} of seed 1: the base, and all that is made of it, by bits and method or try."""
    shape = [*SIZES[size], '--eval_interval=100000', '--final_tokens=32768']
    base = Job(f'{size} base', [*shape, *arguments(BASES[size])], 1)
    start = [f'{base.folder.relative_to(ROOT)}/ckpt.pt', *shape]
    jobs = {'base': base}

    def add(what, name, text):
        jobs[what] = Job(f'{size} {name}', [*start, *arguments(text)], 1)

    for rate, steps in TRIES:
        tune = f'config/qaft.py adam_v= ramp=0 batch_size=8 learning_rate={rate} ' \
            f'max_iters={steps} warmup_iters={steps // 10} sequences={sequences}'
        how = f'{rate}, {steps} steps of {sequences}'
        add(('control', (rate, steps)), f'control {how}', f'{tune} weights=')
        for bits in BITS:
            add((bits, (rate, steps)), f'{bits}-bit QAFT {how}',
                f'{tune} weights={GRID.format(bits)}')
    for bits in BITS:
        grid = f'stored={GRID.format(bits)}'
        add((bits, 'RTN'), f'{bits}-bit RTN', f'config/gptq.py ptq=rtn {grid}')
        add((bits, 'GPTQ'), f'{bits}-bit GPTQ of {sequences}',
            f'config/gptq.py {grid} sequences={sequences}')
    return jobs


# ------------------------------------------------------------------------------------------------
# looking at a model

def weights(run):
    """{name: value} of every parameter, block linears as the forward sees them."""
    found = {name: p.detach() for name, p in run.model.named_parameters()}
    for name, layer in linears(run.model).items():
        found[name] = fake_quant(dequantize(layer.stored_weight()), layer.how.weights)
    return found


@torch.no_grad()
def nll(run, half, most=2 ** 16):
    """Loss of up to `most` tokens of a half of val.bin: 0 is to choose by, 1 to report."""
    T, B, data = run.config.block_size, 8, run.val_data
    n = (len(data) - 1) // T // 2
    starts = (half * n + np.linspace(0, n - 1, min(n, most // T)).astype(int)) * T
    run.model.eval()
    total = 0.0
    for i in range(0, len(starts), B):
        x, y = run.batch(data, starts[i:i + B])
        total += run.model(x, y).item() * len(x)
    return total / len(starts)


def measure(job):
    """run_one, and the loss on both halves, infinite if training failed."""
    result = run_one(job)
    if result['val_loss'] is None:
        return {**result, 'choose': math.inf, 'report': math.inf}
    run = load(job)
    return {**result, 'choose': nll(run, 0), 'report': nll(run, 1)}


@torch.no_grad()
def changes(base, group):
    """What was done to the weights of the base, for each seed of a group of jobs: {'distance':
    ||w_v - w|| over all parameters, 'layers': {name: |(Q - W) X|^2 / |W X|^2}, 'error': the same
    of all layers together}, X the inputs in the base on the sequences of that seed."""
    full, found = load(base), []
    w, layers = weights(full), linears(full.model)
    for job in group:
        run = load(job)
        q, idx = weights(run), run.sequences()
        H = hessians(layers, lambda: full.model(idx, idx))
        size = lambda d, h: (d @ h * d).sum().item()
        errors = {name: (size(q[name] - w[name], h), size(w[name], h)) for name, h in H.items()}
        error, whole = map(sum, zip(*errors.values()))
        found.append({'distance': norm({name: q[name] - w[name] for name in q}),
                      'layers': {name: e / n for name, (e, n) in errors.items()},
                      'error': error / whole})
    return found


def hessians(layers, run):
    """{name: H} of many layers, of the inputs that they see in run()."""
    found = {}
    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(
                lambda m, args, name=name: found.update({name: hessian(args[0], m.how)})))
        run()
    return found


def norm(d):
    return sum(x.square().sum().item() for x in d.values()) ** 0.5


# ------------------------------------------------------------------------------------------------
# the landscape around the base

class Landscape:
    """NLL(w + sum of a_i d_i) on 2^14 tokens of the half that is reported."""

    def __init__(self, base):
        self.run, self.most = load(base), 2 ** 14
        self.w = {name: p.clone() for name, p in weights(self.run).items()}
        self.rest = nll(self.run, 1, self.most)

    @torch.no_grad()
    def rise(self, *steps):
        """NLL(w + sum of a d) - NLL(w) for steps (a, d)."""
        for name, p in self.run.model.named_parameters():
            p.copy_(self.w[name] + sum(a * d[name] for a, d in steps))
        return nll(self.run, 1, self.most) - self.rest

    def towards(self, job):
        """d = w_v - w of the model of a job."""
        q = weights(load(job))
        return {name: q[name] - self.w[name] for name in q}

    def random(self, like, draw):
        """A normal d, of each matrix as long as `like`."""
        generator = torch.Generator().manual_seed(draw)
        noise = {name: torch.randn(d.shape, generator=generator) for name, d in like.items()}
        return {name: n * like[name].norm() / n.norm() for name, n in noise.items()}

    def radius(self, d):
        """R = a ||d||, the largest a with rise(a d) <= TAU, by bisection."""
        low, high = 0.0, 1.0
        while self.rise((high, d)) <= TAU:
            low, high = high, 2 * high
        for _ in range(8):
            middle = (low + high) / 2
            low, high = (middle, high) if self.rise((middle, d)) <= TAU else (low, middle)
        return low * norm(d)


def survey(seeds):
    """Everything that is looked at in trained models: what was done to the weights, curves along
    RTN, GPTQ, QAFT and random directions, R(w), and the plane at 3 bits; seeds {what: [Job]}."""
    base = seeds['base'][0]
    land, steps = Landscape(base), [i / 5 for i in range(8)]
    found = {'steps': steps, 'curves': {}, 'changes': {
        f'{what[0]} {what[1]}': changes(base, group) for what, group in seeds.items()
        if what[0] in BITS}}
    for bits in BITS:
        d = {method: land.towards(seeds[bits, method][0]) for method in METHODS}
        d |= {f'random {i}': land.random(d['RTN'], i) for i in range(3)}
        found['curves'][str(bits)] = {
            name: {'norm': norm(v), 'rise': [land.rise((a, v)) for a in steps]}
            for name, v in d.items()}
        if bits == 4:       # RTN's errors are alike at all bits but for their size
            found['radius'] = [land.radius(d[f'random {i}']) for i in range(3)]
        if bits == 3:
            u, v = d['GPTQ'], d['QAFT']
            dot = sum((u[name] * v[name]).sum().item() for name in u) / norm(u) ** 2
            v = {name: v[name] - dot * u[name] for name in v}           # at right angles to u
            grid = [i / 5 for i in range(-2, 8)]
            found['plane'] = {'grid': grid, 'GPTQ': [norm(u), 0.0], 'units': [norm(u), norm(v)],
                              'QAFT': [dot * norm(u), norm(v)],
                              'rise': [[land.rise((x, u), (y, v)) for x in grid] for y in grid]}
    return found


# ------------------------------------------------------------------------------------------------
# P1 to P6, as written before the run

def holds(value, noise=1e-9):
    """Is a value above zero, by more than its noise?"""
    return 'PASS' if value > noise else 'FAIL' if value < -noise else 'UNRESOLVED'


def at_least(value, bar):
    return 'PASS' if value >= bar - 1e-9 else 'FAIL'


def gap(a, b):
    """Mean of a - b over seeds, and three standard deviations of it; RTN has one value for all."""
    n = max(len(a), len(b))
    d = [x - y for x, y in zip(a * n if len(a) == 1 else a, b * n if len(b) == 1 else b)]
    return statistics.mean(d), 3 * statistics.stdev(d) if n > 1 else 0.0


def predictions(loss, survey):
    """{P: [(text, value, verdict)]}; loss {(bits, method) or 'base' or 'control': [a seed]}."""
    found = {f'P{i}': [] for i in range(1, 7)}
    say = lambda P, text, value, said: found[P].append((text, value, said))
    of = lambda bits, method, field: [c[field] for c in survey['changes'][f'{bits} {method}']]
    for bits in (2, 3):
        for a, b in (('GPTQ', 'QAFT'), ('RTN', 'GPTQ')):
            mean, noise = gap(loss[bits, a], loss[bits, b])
            say('P1', f'{bits} bits, loss of {a} - {b}', mean,
                'PASS' if mean > max(noise, 0.005) else 'FAIL' if mean + noise < 0.005 else
                'UNRESOLVED')
    for method in METHODS:
        mean, noise = gap(loss[8, method], loss['base'])
        say('P1', f'8 bits, loss of {method} - full, within .005', mean,
            holds(0.005 - abs(mean), noise))
    gains = {bits: gap(loss[bits, 'GPTQ'], loss[bits, 'QAFT']) for bits in BITS}
    for more, fewer in zip(BITS, BITS[1:]):
        noise = math.hypot(gains[more][1], gains[fewer][1])
        rise = gains[fewer][0] - gains[more][0]
        say('P2', f'GPTQ - QAFT at {fewer} - at {more} bits', rise,
            'UNRESOLVED' if abs(rise) <= noise else holds(rise))
    pairs = [(g[n], r[n]) for bits in BITS for g, r in
             zip(of(bits, 'GPTQ', 'layers'), of(bits, 'RTN', 'layers')) for n in g]
    better = statistics.mean(g < r for g, r in pairs)
    say('P3', 'share of layers where GPTQ has less error than RTN', better, at_least(better, 0.9))
    for bits in (3, 2):
        mean, noise = gap(of(bits, 'QAFT', 'error'), of(bits, 'GPTQ', 'error'))
        say('P3', f'{bits} bits, layer error of QAFT - GPTQ', mean, holds(mean, noise))
    for bits in BITS:
        mean, noise = gap(of(bits, 'GPTQ', 'distance'), of(bits, 'RTN', 'distance'))
        say('P4', f'{bits} bits, r of GPTQ - RTN', mean, at_least(mean, 0))
    for bits in (3, 2):
        mean, noise = gap(of(bits, 'QAFT', 'distance'), of(bits, 'GPTQ', 'distance'))
        say('P4', f'{bits} bits, r of QAFT - GPTQ', mean, holds(mean, noise))
        mean, noise = gap(loss[bits, 'GPTQ'], loss[bits, 'QAFT'])
        for P in ('P3', 'P4'):
            say(P, f'{bits} bits, loss of GPTQ - QAFT', mean, holds(mean, noise))
    radius = statistics.mean(survey['radius'])
    ratio = {bits: of(bits, 'RTN', 'distance')[0] / radius for bits in BITS}
    for bits in BITS:
        if bits != 4:
            say('P5', f'{bits} bits, r / R of RTN, {"<" if bits > 4 else ">"} 1', ratio[bits],
                holds((1 - ratio[bits]) * (1 if bits > 4 else -1)))
    rank = ranks(list(ratio.values()), [loss[bits, 'RTN'][0] for bits in BITS])
    say('P5', 'rank correlation of r / R with the loss of RTN', rank, at_least(rank, 0.9))
    found['P6'] = slopes(loss, survey)
    return found


def slopes(loss, survey):
    """Parts of P6: the rise of the loss a unit of distance, of each method and at random."""
    found, distances = [], lambda bits, method: [
        change['distance'] for change in survey['changes'][f'{bits} {method}']]
    one, base = survey['steps'].index(1.0), loss['base'][0]
    for bits in (4, 3, 2):      # our choice: with more, differences drown in fine-tuning's noise
        slope = {m: [(x - base) / r for x, r in zip(loss[bits, m], distances(bits, m))]
                 for m in METHODS}
        slope['random'] = [c['rise'][one] / c['norm'] for name, c in
                           survey['curves'][str(bits)].items() if 'random' in name]
        for a, b in (('QAFT', 'GPTQ'), ('GPTQ', 'RTN'), ('RTN', 'random')):
            mean, noise = gap(slope[b], slope[a])
            found.append((f'{bits} bits, slope of {b} - {a}', mean, holds(mean, noise)))
    return found


def ranks(a, b):
    """Spearman's rank correlation."""
    order = [np.argsort(np.argsort(x)) for x in (a, b)]
    return float(np.corrcoef(*order)[0, 1])


def claim_line(name, size, parts):
    """One line of a table: PASS if all parts do, FAIL if one does, else UNRESOLVED."""
    said = {one for *_, one in parts}
    word = 'FAIL' if 'FAIL' in said else 'UNRESOLVED' if 'UNRESOLVED' in said else 'PASS'
    numbers = '; '.join(f'{text}: {value:+.3g}' + ('' if one == 'PASS' else f' ({one})')
                        for text, value, one in parts)
    return f'| {name} | {size} | **{word}** | {numbers} |'


# ------------------------------------------------------------------------------------------------
# what comes out

COLORS = {'RTN': 'C0', 'GPTQ': 'C1', 'QAFT': 'C2', 'random': '0.6'}


def draw(losses, surveys, stem):
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot
    draw_losses(losses, surveys, stem.with_suffix('.png'), pyplot)
    draw_landscape(surveys, stem.with_name(f'{stem.name}-landscape.png'), pyplot)
    draw_plane(surveys, stem.with_name(f'{stem.name}-plane.png'), pyplot)


def draw_losses(losses, surveys, path, pyplot):
    """The rise of the loss against bits, a panel a size, and against the local error."""
    fig, axes = pyplot.subplots(1, 1 + len(losses), figsize=(5.5 * (1 + len(losses)), 4.6),
                                layout='constrained')
    for axis, marker, (size, loss) in zip(axes, 'os', losses.items()):
        full = loss['base'][0]
        for method in METHODS:
            rises = {bits: [x - full for x in loss[bits, method]] for bits in BITS}
            error = [statistics.stdev(r) if len(r) > 1 else 0 for r in rises.values()]
            axis.errorbar(BITS, [statistics.mean(r) for r in rises.values()], error, fmt='o-',
                          capsize=3, color=COLORS[method], label=method)
            for bits in BITS:
                changed = surveys[size]['changes'][f'{bits} {method}'][0]
                at = changed['error'], max(rises[bits][0], 1e-4)
                axes[-1].plot(*at, marker, color=COLORS[method])
                axes[-1].annotate(str(bits), at, xytext=(4, 3), textcoords='offset points',
                                  fontsize=7)
        axis.axhline(statistics.mean(loss['control']) - full, color='0.4', ls='--', lw=1,
                     label='fine-tuned in full precision')
        axis.set_yscale('symlog', linthresh=0.01)
        axis.set_yticks(*zip(*((y, f'{y:g}') for y in (0, .01, .03, .1, .3, 1))))
        axis.minorticks_off()
        axis.set(title=f'{size} model, {full:.3f} nats in full precision', xticks=BITS,
                 ylim=(-0.003, 1.2), xlabel='bits per weight',
                 ylabel='rise of the loss, nats/token')
        axis.legend(fontsize=8)
    axes[-1].set(xscale='log', yscale='log', xlabel='local error, |(Q - W) X|^2 / |W X|^2',
                 title='Local error and loss; numbers are bits',
                 ylabel='rise of the loss, nats/token')
    for axis in axes:
        axis.grid(alpha=0.3)
    fig.savefig(path, dpi=120)


def draw_landscape(surveys, path, pyplot):
    """The rise of the loss along the way to each quantized model, a panel for size and bits."""
    fig, axes = pyplot.subplots(len(surveys), len(BITS), figsize=(16, 3.4 * len(surveys)),
                                squeeze=False, layout='constrained')
    for row, (size, survey) in zip(axes, surveys.items()):
        for axis, bits in zip(row, BITS):
            curves = survey['curves'][str(bits)]
            for name, curve in curves.items():
                kind = name.split()[0]
                axis.plot([a * curve['norm'] for a in survey['steps']], curve['rise'],
                          color=COLORS[kind], label=None if name[-1] in '12' else kind)
                at = survey['steps'].index(1.0)
                axis.plot(curve['norm'], curve['rise'][at], 'o', color=COLORS[kind], ms=4)
            axis.axvline(statistics.mean(survey['radius']), color='0.4', ls=':')
            axis.axhline(TAU, color='0.4', ls=':')
            ends = [c['rise'][survey['steps'].index(1.0)] for c in curves.values()]
            axis.set(title=f'{size}, {bits} bits', xlabel='distance from the trained weights',
                     ylim=(-0.1 * max(0.1, *ends), max(0.1, 1.3 * max(ends))),
                     xlim=(0, 1.4 * max(c['norm'] for c in curves.values())))
        row[0].set_ylabel('rise of the loss, nats/token')
        row[0].legend(fontsize=8)
    fig.savefig(path, dpi=110)


def draw_plane(surveys, path, pyplot):
    """The rise of the loss in the plane through full precision, GPTQ and QAFT."""
    fig, axes = pyplot.subplots(1, len(surveys), figsize=(6 * len(surveys), 5), squeeze=False,
                                layout='constrained')
    for axis, (size, survey) in zip(axes[0], surveys.items()):
        plane = survey['plane']
        x, y = ([g * unit for g in plane['grid']] for unit in plane['units'])
        levels = [-0.02, 0, 0.02, 0.05, 0.1, 0.2, 0.5]
        found = axis.contourf(x, y, plane['rise'], levels=levels, extend='both', cmap='viridis_r',
                              norm='symlog')
        for name, at in (('full precision', (0, 0)), ('GPTQ', plane['GPTQ']),
                         ('QAFT', plane['QAFT'])):
            axis.plot(*at, 'ko', ms=4)
            axis.annotate(name, at, xytext=(5, 5), textcoords='offset points')
        axis.set(title=f'{size}: plane through the weights, 3 bits', aspect='equal',
                 xlabel='distance towards GPTQ', ylabel='distance at right angles')
        fig.colorbar(found, ax=axis, label='rise of the loss, nats/token', format='%g')
    fig.savefig(path, dpi=110)


def table_lines(loss, tries):
    cell = lambda rises: f'{statistics.mean(rises):+.4f}' + \
        (f' ± {statistics.stdev(rises):.4f}' if len(rises) > 1 else '')
    rise = lambda what: cell([x - loss['base'][0] for x in loss[what]])
    row = lambda name, cells, best: f'| {name} | {" | ".join(cells)} | {best[0]}, {best[1]} |'
    return ['| bits | RTN | GPTQ | QAFT | its rate, steps |', '|---|---|---|---|---|',
            *(row(bits, [rise((bits, m)) for m in METHODS], tries[bits]) for bits in BITS),
            row('full precision, fine-tuned', ['', '', rise('control')], tries['control'])]


def train_size(size, options):
    """Everything of one size that trains: ({what: [Job, one per seed]}, {bits: try of QAFT})."""
    path, jobs = RESULTS / 'ptq.jsonl', jobs_of(size, options.sequences)
    keep = [job.name for job in jobs.values()]
    base, todo = jobs['base'], list(jobs.values())
    done = {r['mark'] for r in read(path)}
    if base.mark in done and not (base.folder / 'ckpt.pt').exists() and \
            not all(job.mark in done for job in todo):
        raise SystemExit(f'the checkpoint of {base.name} is gone: remove the lines of this size '
                         f'from {path.name} to make all of it again')
    run_all(path, [base], 1, keep, measure)
    choose = {r['name']: r['choose'] for r in run_all(path, todo, options.jobs, keep, measure)}
    tries = {what: min(TRIES, key=lambda how: choose[jobs[what, how].name])
             for what in (*BITS, 'control')}
    for what, how in (key for key in jobs if key != 'base'):            # those that lost
        if how in TRIES and how != tries[what]:
            shutil.rmtree(jobs[what, how].folder, ignore_errors=True)
    three = lambda job: [job._replace(seed=seed) for seed in (1, 2, 3)]
    seeds = {'base': [base], 'control': three(jobs['control', tries['control']])}
    for bits in BITS:
        seeds |= {(bits, 'RTN'): [jobs[bits, 'RTN']], (bits, 'GPTQ'): three(jobs[bits, 'GPTQ']),
                  (bits, 'QAFT'): three(jobs[bits, tries[bits]])}
    run_all(path, [job for group in seeds.values() for job in group], options.jobs, keep, measure)
    return seeds, tries


def main(options):
    stem = RESULTS / ('ptq' if options.sequences == 128 else f'ptq-{options.sequences}')
    saved, losses, surveys = stem.with_name(f'{stem.name}-analysis.json'), {}, {}
    if saved.exists():
        surveys = json.loads(saved.read_text(encoding='utf-8'))
    claims, tables = ['| | model | | |', '|---|---|---|---|'], []
    for size in options.sizes:
        seeds, tries = train_size(size, options)
        report = {r['mark']: r['report'] for r in read(RESULTS / 'ptq.jsonl')}
        marks = sorted(job.mark for group in seeds.values() for job in group)
        if surveys.get(size, {}).get('marks') != marks:
            surveys[size] = {'marks': marks, **survey(seeds)}
            saved.write_text(json.dumps(surveys), encoding='utf-8')
        loss = losses[size] = {what: [report[job.mark] for job in group]
                               for what, group in seeds.items()}
        claims += [claim_line(name, size, parts) for name, parts in
                   predictions(loss, surveys[size]).items()]
        tables += ['', f'**{size}**: rise of the loss over {loss["base"][0]:.4f} nats/token', '',
                   *table_lines(loss, tries)]
        rise, _ = gap(loss[3, 'GPTQ'], loss['base'])
        enough = 'Trained' if rise > 0.01 else 'Not trained'
        tables += ['', f'{enough} long enough: GPTQ in 3 bits costs {rise:.4f} nats, .01 is the '
                   'least that tells.']
    lines = claims + tables
    print('\n'.join(lines))
    if options.sizes == list(BASES):
        stem.with_suffix('.md').write_text('\n'.join(lines) + '\n', encoding='utf-8')
        draw(losses, surveys, stem)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--sizes', nargs='+', choices=BASES, default=list(BASES))
    parser.add_argument('--sequences', type=int, default=128, help='to calibrate or fine-tune on')
    parser.add_argument('--jobs', type=int, default=2, help='runs at a time, sharing the cores')
    os.chdir(ROOT)                                      # where config/ is
    main(parser.parse_args())
