"""
Post-training quantization against quantization-aware fine-tuning (paper 3, 2410.14570).

    python -m experiments.ptq                   two sizes, 3 seeds, under 90 minutes on two cores
    python -m experiments.ptq --sizes small     one of them

A model of each size is trained in full precision, then brought to 8, 6, 4, 3 and 2 bits: rounded
to nearest (RTN), by GPTQ, and by fine-tuning with quantized weights (QAFT). The last two see the
same 128 sequences, of which a seed is a choice, and so does a control, fine-tuning in full
precision. Learning rates are chosen on one half of the validation data, losses are of the other.
P1 to P6 were written before anything ran. Writes experiments/results/ptq.jsonl (one line a run;
finished ones are skipped), ptq-analysis.json, ptq.md and three .png.
"""
import argparse
import json
import os
import statistics

import numpy as np
import torch

from experiments.runs import RESULTS, ROOT, SIZES, Job, arguments, load, run_all, run_one
from quant import dequantize, fake_quant, hessians, linears
from train import sequence_starts, to_batch

BITS = 8, 6, 4, 3, 2
RATES = '1e-5', '3e-5', '1e-4', '3e-4', '1e-3'
TAU = 0.05          # nats: the rise of the loss at the edge of the basin
BASES = {'small': 'learning_rate=1.5e-3 embedding_lr=6e-3 max_iters=4000 warmup_iters=100',
         'default': 'learning_rate=1.5e-3 embedding_lr=6e-3 max_iters=4000'}


def jobs_of(size):
    """{name: Job} of seed 1: the base, and all that is made of it."""
    shape = [*SIZES[size], '--eval_interval=1000']
    base = Job(f'{size} base', [*shape, *arguments(BASES[size])], 1)
    start = [*shape, f'--init_from={base.folder.relative_to(ROOT)}/ckpt.pt']
    jobs = {'base': base}
    for rate in RATES:
        tune = f'config/qaft.py batch_size=8 learning_rate={rate}'
        jobs['control', rate] = Job(f'{size} control {rate}',
                                    [*start, *arguments(f'{tune} weights=')], 1)
        for bits in BITS:
            jobs[bits, rate] = Job(f'{size} {bits}-bit QAFT {rate}',
                                   [*start, *arguments(f'{tune} weights=int{bits}/row')], 1)
    for bits in BITS:
        for how in ('rtn', 'gptq'):
            text = arguments(f'config/gptq.py ptq={how} master=int{bits}/row')
            jobs[bits, how] = Job(f'{size} {bits}-bit {how.upper()}', [*start, *text], 1)
    return jobs


# ------------------------------------------------------------------------------------------------
# looking at a model

def weights(run):
    """{name: value} of every parameter, block linears as the forward sees them."""
    found = {name: p.detach() for name, p in run.model.named_parameters()}
    for name, layer in linears(run.model).items():
        found[name] = fake_quant(dequantize(layer.stored()), layer.how.weights,
                                 parts=layer.how.parts)
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
        x, y = to_batch(data, starts[i:i + B], T, run.vocab_size, run.device)
        total += run.model(x, y).item() * len(x)
    return total / len(starts)


def measure(job):
    """run_one, and of its model: the loss on both halves, the distance from the base, and the
    errors of layers, |(Q - W) X|^2 and |W X|^2, X its inputs in the base on the sequences."""
    result, run = run_one(job), load(job)
    result |= {'choose': nll(run, 0), 'report': nll(run, 1)}
    base = jobs_of(job.name.split()[0])['base']
    if job == base:
        return result
    full, config = load(base), run.config
    starts = sequence_starts(config, len(run.train_data))
    batches = [to_batch(run.train_data, starts[i:i + 8], config.block_size, run.vocab_size,
                        run.device)[0] for i in range(0, len(starts), 8)]
    w, q, layers = weights(full), weights(run), linears(full.model)
    with torch.no_grad():
        found = hessians(layers.values(), lambda: [full.model(x) for x in batches])
    error = lambda d, H: (d @ H * d).sum().item()
    result['errors'] = {name: [error(q[name] - w[name], H), error(w[name], H)]
                        for name, H in zip(layers, found)}
    result['distance'] = distance(q, w)
    return result


def distance(a, b):
    """||a - b|| over all parameters."""
    return sum((a[name] - b[name]).square().sum().item() for name in a) ** 0.5


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


def norm(d):
    return sum(x.square().sum().item() for x in d.values()) ** 0.5


def survey(size, jobs, best):
    """Curves along RTN, GPTQ, QAFT and random directions, R(w), and the plane at 3 bits."""
    land, steps = Landscape(jobs['base']), [i / 10 for i in range(16)]
    found = {'steps': steps, 'curves': {}}
    for bits in BITS:
        d = {'RTN': land.towards(jobs[bits, 'rtn']), 'GPTQ': land.towards(jobs[bits, 'gptq']),
             'QAFT': land.towards(jobs[bits, best[bits]])}
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

def verdict(parts):
    """PASS if all parts hold, FAIL if one does not by more than its noise, else UNRESOLVED.
    parts [(text, margin, noise)]: holds where margin > noise, does not where margin < -noise."""
    said = ['PASS' if margin > noise else 'FAIL' if margin < -noise else 'UNRESOLVED'
            for _, margin, noise in parts]
    word = 'FAIL' if 'FAIL' in said else 'UNRESOLVED' if 'UNRESOLVED' in said else 'PASS'
    return word, '; '.join(f'{text} {margin:+.4g}' + ('' if one == 'PASS' else f' ({one})')
                           for (text, margin, _), one in zip(parts, said))


def gap(a, b):
    """Mean of a - b over seeds, and three standard deviations of it; a method without seeds has
    one value."""
    n = max(len(a), len(b))
    d = [x - y for x, y in zip(a * n if len(a) == 1 else a, b * n if len(b) == 1 else b)]
    return statistics.mean(d), 3 * statistics.stdev(d) if n > 1 else 0.0


def predictions(size, table, survey):
    """{P: [(text, margin, noise)]}; table {(bits, method) or 'base': [result a seed]}."""
    loss = {key: [r['report'] for r in results] for key, results in table.items()}
    curves = {int(bits): c for bits, c in survey['curves'].items()}
    found = {f'P{i}': [] for i in range(1, 7)}
    for bits in (2, 3):
        for a, b in (('GPTQ', 'QAFT'), ('RTN', 'GPTQ')):
            mean, noise = gap(loss[bits, a], loss[bits, b])
            found['P1'].append((f'{bits} bits, {a} - {b}', mean, max(noise, 0.005)))
    for method in METHODS:
        mean, _ = gap(loss[8, method], loss['base'])
        found['P1'].append((f'8 bits, .005 - |{method} - full|', 0.005 - abs(mean), 0.0))
    gains = {bits: gap(loss[bits, 'GPTQ'], loss[bits, 'QAFT']) for bits in BITS}
    for more, fewer in zip(BITS, BITS[1:]):
        noise = (gains[more][1] ** 2 + gains[fewer][1] ** 2) ** 0.5
        # not to increase is not to be above by more than the noise
        margin = gains[fewer][0] - gains[more][0] + noise
        found['P2'].append((f'GPTQ - QAFT at {fewer} - at {more} bits, + noise', margin, 0.0))
    share = lambda r: sum(e for e, _ in r['errors'].values()) / \
        sum(n for _, n in r['errors'].values())
    rtn, gptq = ([r['errors'] for b in BITS for r in table[b, m]] for m in ('RTN', 'GPTQ'))
    rtn = [r for r in rtn for _ in range(len(gptq) // len(rtn))]
    better = statistics.mean(g[n][0] < r[n][0] for r, g in zip(rtn, gptq) for n in r)
    found['P3'].append(('share of layers where the error of GPTQ is less than of RTN, - .9',
                        better - 0.9, 0.0))
    for bits in (3, 2):
        more = [share(q) - share(g) for q, g in zip(table[bits, 'QAFT'], table[bits, 'GPTQ'])]
        found['P3'].append((f'{bits} bits, layer error of QAFT - GPTQ', min(more), 0.0))
        found['P3'].append((f'{bits} bits, loss of GPTQ - QAFT',
                            *gap(loss[bits, 'GPTQ'], loss[bits, 'QAFT'])))
    far = {key: [r['distance'] for r in results] for key, results in table.items()
           if key != 'base'}
    for bits in BITS:
        found['P4'].append((f'{bits} bits, r of GPTQ / RTN - 1',
                            min(far[bits, 'GPTQ']) / far[bits, 'RTN'][0] - 1, -1e-9))
    for bits in (3, 2):
        found['P4'].append((f'{bits} bits, r of QAFT / GPTQ - 1',
                            min(far[bits, 'QAFT']) / max(far[bits, 'GPTQ']) - 1, 0.0))
    radius = statistics.mean(survey['radius'])
    ratio = {bits: curves[bits]['RTN']['norm'] / radius for bits in BITS}
    for bits in BITS:
        if bits != 4:
            margin = 1 - ratio[bits] if bits > 4 else ratio[bits] - 1
            found['P5'].append((f'{bits} bits, {"1 - r / R" if bits > 4 else "r / R - 1"}', margin,
                                0.0))
    rises = [loss[bits, 'RTN'][0] for bits in BITS]
    found['P5'].append(('rank correlation of r / R with the loss of RTN, - .9',
                        ranks(list(ratio.values()), rises) - 0.9, 0.0))
    one = survey['steps'].index(1.0)
    for bits in (4, 3, 2):
        slope = {name: c['rise'][one] / c['norm'] for name, c in curves[bits].items()}
        random = [slope.pop(name) for name in list(slope) if 'random' in name]
        slope['random'] = statistics.mean(random)
        for a, b in (('QAFT', 'GPTQ'), ('GPTQ', 'RTN'), ('RTN', 'random')):
            noise = 3 * statistics.stdev(random) if b == 'random' else 0.0
            found['P6'].append((f'{bits} bits, slope of {b} - {a}', slope[b] - slope[a], noise))
    return found


def ranks(a, b):
    """Spearman's rank correlation."""
    order = [np.argsort(np.argsort(x)) for x in (a, b)]
    return float(np.corrcoef(*order)[0, 1])


# ------------------------------------------------------------------------------------------------
# what comes out

METHODS = 'RTN', 'GPTQ', 'QAFT'
COLORS = {'RTN': 'C0', 'GPTQ': 'C1', 'QAFT': 'C2', 'random': '0.6'}


def draw(tables, surveys, stem):
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot
    fig, axes = pyplot.subplots(1, 1 + len(tables), figsize=(5.5 * (1 + len(tables)), 4.6),
                                layout='constrained')
    for axis, (size, table) in zip(axes, tables.items()):
        full = table['base'][0]['report']
        for method in METHODS:
            values = [[r['report'] - full for r in table[bits, method]] for bits in BITS]
            error = [statistics.stdev(v) if len(v) > 1 else 0 for v in values]
            axis.errorbar(BITS, list(map(statistics.mean, values)), error, fmt='o-', capsize=3,
                          color=COLORS[method], label=method)
        control = [r['report'] - full for r in table['control']]
        axis.axhline(statistics.mean(control), color='0.4', ls='--', lw=1,
                     label='fine-tuned in full precision')
        axis.set_yscale('symlog', linthresh=0.01)
        axis.set(title=f'{size} model, {full:.3f} nats in full precision', xlabel='bits a weight',
                 ylabel='rise of the loss, nats/token', xticks=BITS)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    for marker, (size, table) in zip('os', tables.items()):
        full = table['base'][0]['report']
        for method in METHODS:
            for bits in BITS:
                r = table[bits, method][0]
                error, norm = map(sum, zip(*r['errors'].values()))
                axes[-1].plot(error / norm, max(r['report'] - full, 1e-4), marker,
                              color=COLORS[method])
                axes[-1].annotate(str(bits), (error / norm, max(r['report'] - full, 1e-4)),
                                  xytext=(4, 3), textcoords='offset points', fontsize=7)
    axes[-1].set(xscale='log', yscale='log', xlabel='local error, |(Q - W) X|^2 / |W X|^2',
                 title='A small local error is not a small loss', ylabel='rise of the loss')
    axes[-1].grid(alpha=0.3)
    fig.savefig(stem.with_suffix('.png'), dpi=120)

    fig, axes = pyplot.subplots(len(surveys), len(BITS), figsize=(16, 3.4 * len(surveys)),
                                squeeze=False, layout='constrained')
    for row, (size, survey) in zip(axes, surveys.items()):
        for axis, bits in zip(row, BITS):
            for name, curve in survey['curves'][str(bits)].items():
                kind = name.split()[0]
                axis.plot([a * curve['norm'] for a in survey['steps']], curve['rise'],
                          color=COLORS[kind], label=None if name[-1] in '12' else kind)
                axis.plot(curve['norm'], curve['rise'][10], 'o', color=COLORS[kind], ms=4)
            axis.axvline(statistics.mean(survey['radius']), color='0.4', ls=':')
            axis.axhline(TAU, color='0.4', ls=':')
            axis.set(title=f'{size}, {bits} bits', xlabel='distance from the trained weights',
                     ylim=(-0.05, max(0.2, 1.3 * survey['curves'][str(bits)]['RTN']['rise'][10])))
            axis.set_xlim(0, 1.6 * survey['curves'][str(bits)]['RTN']['norm'])
        row[0].set_ylabel('rise of the loss, nats/token')
        row[0].legend(fontsize=8)
    fig.savefig(stem.with_name('ptq-landscape.png'), dpi=110)

    fig, axes = pyplot.subplots(1, len(surveys), figsize=(6 * len(surveys), 5), squeeze=False,
                                layout='constrained')
    for axis, (size, survey) in zip(axes[0], surveys.items()):
        plane = survey['plane']
        x, y = ([g * unit for g in plane['grid']] for unit in plane['units'])
        rise = np.array(plane['rise']).clip(1e-3)
        found = axis.contourf(x, y, rise, levels=[0.001, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10],
                              norm='log', extend='both', cmap='viridis_r')
        for name, at in (('full precision', (0, 0)), ('GPTQ', plane['GPTQ']),
                         ('QAFT', plane['QAFT'])):
            axis.plot(*at, 'ko', ms=4)
            axis.annotate(name, at, xytext=(5, 5), textcoords='offset points')
        axis.set(title=f'{size}: plane through the weights, 3 bits', aspect='equal',
                 xlabel='distance towards GPTQ', ylabel='distance at right angles')
        fig.colorbar(found, ax=axis, label='rise of the loss, nats/token', format='%g')
    fig.savefig(stem.with_name('ptq-plane.png'), dpi=110)


def table_lines(table):
    full = table['base'][0]['report']
    lines = ['| bits | RTN | GPTQ | QAFT | its learning rate |', '|---|---|---|---|---|']
    for bits in BITS:
        cells = []
        for method in METHODS:
            rise = [r['report'] - full for r in table[bits, method]]
            spread = f' ± {statistics.stdev(rise):.4f}' if len(rise) > 1 else ''
            cells.append(f'{statistics.mean(rise):+.4f}{spread}')
        rate = table[bits, 'QAFT'][0]['name'].split()[-1]
        lines.append(f'| {bits} | {" | ".join(cells)} | {rate} |')
    control = [r['report'] - full for r in table['control']]
    return [*lines, f'| full precision, fine-tuned |  |  | {statistics.mean(control):+.4f} ± '
            f'{statistics.stdev(control):.4f} | {table["control"][0]["name"].split()[-1]} |']


def main(options):
    stem, tables, surveys, lines = RESULTS / 'ptq', {}, {}, []
    path, saved = stem.with_suffix('.jsonl'), stem.with_name('ptq-analysis.json')
    jobs = {size: jobs_of(size) for size in options.sizes}
    run = lambda jobs: run_all(path, jobs, options.jobs, [job.name for job in jobs], measure)
    run([jobs[size]['base'] for size in jobs])
    tuning = run([job for size in jobs for job in jobs[size].values()])
    choose = {r['name']: r['choose'] for r in tuning}
    best = {size: {key: min(RATES, key=lambda rate: choose[jobs[size][key, rate].name])
                   for key in (*BITS, 'control')} for size in jobs}
    chosen = {(size, key): jobs[size][key, rate] for size in jobs
              for key, rate in best[size].items()}
    chosen |= {(size, bits, how): jobs[size][bits, how] for size in jobs
               for bits in BITS for how in ('rtn', 'gptq')}
    seeds = {key: [job] if key[-1] == 'rtn' else [job._replace(seed=s) for s in (1, 2, 3)]
             for key, job in chosen.items()}
    results = run([job for group in seeds.values() for job in group])
    found = {(r['name'], r['seed']): r for r in tuning + results}
    if saved.exists():
        surveys = json.loads(saved.read_text(encoding='utf-8'))
    for size in jobs:
        of = lambda *key: [found[job] for job in ((j.name, j.seed) for j in seeds[size, *key])]
        tables[size] = {'base': [found[f'{size} base', 1]], 'control': of('control')}
        for bits in BITS:
            tables[size] |= {(bits, 'QAFT'): of(bits), (bits, 'RTN'): of(bits, 'rtn'),
                             (bits, 'GPTQ'): of(bits, 'gptq')}
        if size not in surveys:
            surveys[size] = survey(size, jobs[size], best[size])
            saved.write_text(json.dumps(surveys), encoding='utf-8')
    surveys = json.loads(saved.read_text(encoding='utf-8'))
    lines = ['| | model | | margins: above 0 as predicted |', '|---|---|---|---|']
    for size in jobs:
        for name, parts in predictions(size, tables[size], surveys[size]).items():
            said, numbers = verdict(parts)
            lines.append(f'| {name} | {size} | **{said}** | {numbers} |')
    for size in jobs:
        lines += ['', f'**{size}**: rise of the loss over {tables[size]["base"][0]["report"]:.4f} '
                  'nats/token', '', *table_lines(tables[size])]
    stem.with_suffix('.md').write_text('\n'.join(lines) + '\n', encoding='utf-8')
    print('\n'.join(lines))
    draw(tables, {size: surveys[size] for size in jobs}, stem)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--sizes', nargs='+', choices=BASES, default=list(BASES))
    parser.add_argument('--jobs', type=int, default=2, help='runs at a time, sharing the cores')
    os.chdir(ROOT)                                      # where config/ is
    main(parser.parse_args())
