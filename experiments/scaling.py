"""
Precision-aware scaling laws (paper 4, Kumar et al., 2411.04330): sweep, fit, predict, plot.

    python -m experiments.scaling                       all four, under 70 minutes on two cores
    python -m experiments.scaling fit plot              single steps, on what is there
    python -m experiments.scaling plan --compute=1e15   the best N, D and bits by the fit
    python -m experiments.scaling plan --memory=1e5 --tokens=1e7
    python -m experiments.scaling --size=gpu            a larger sweep

N is the number of weights of the block linears, D of tokens (bytes here) trained on, P of bits:

    L(N, D, P) = A N_eff^-alpha + B D^-beta + E + delta
    N_eff = N prod over x of f_x(P_x),  f_x(P) = 1 - exp(-P / gamma_x + n_x)
    delta = C_T D^gamma_D N_eff^-gamma_N exp(-P_post / gamma_post) (1 - exp(-C_w (P_w - P_post)))

x is what training quantizes: weights (w, one scale per row), activations (a: one per tensor, as in
the paper; token: one per token) and keys and values (kv), in the forward, as in the paper. delta
is what quantizing to P_post bits after training adds, 0 if training was in as few. Direct training
of packed weights, which the paper has not, is reported as an equivalent N_eff.

`sweep` trains and quantizes all sizes but the largest, `fit` fits them, `predict` writes what that
says of the largest size and only then trains it. Writes experiments/results/scaling-<size>.jsonl
(one line a run; finished ones are skipped), -fit.json, -predictions.json, .md and .png.
"""
import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from dataclasses import replace

import numpy as np

from experiments.runs import (RESULTS, ROOT, Job, arguments, decide, load, results_of, run_all,
                              run_one)
from quant import fake_quant, gptq_, linears, rtn_
from train import parse

SWEEPS = {  # widths of two layers to fit; the one held out; D in 2^20; that of quantized runs;
            # bars in percent: of the loss, of training's excess, of delta
    'cpu': {'widths': (32, 48, 64, 96), 'held': 144, 'at': 1.5, 'D': (0.75, 1.5, 3, 6),
            'shape': 'block_size=128 batch_size=32', 'data': 'out/python_bytes',
            'bars': (2, 35, 25)},
    'gpu': {'widths': (96, 128, 192, 256), 'held': 512, 'at': 24, 'D': (12, 24, 48, 96),
            'shape': 'block_size=256 batch_size=128', 'data': 'out/text_bytes',
            'bars': (1, 20, 25)}}
POST = 2, 3, 4, 5, 6, 8
KINDS = {'w': 'weights=int{}/row', 'a': 'activations=int{}/tensor',
         'token': 'activations=int{}/row', 'kv': 'kv_cache=int{}/row'}
NAMES = {'w': 'weights', 'a': 'activations (a scale per tensor)',
         'token': 'activations (a scale per token)', 'kv': 'keys and values'}
TOGETHER = 'w', 'token', 'kv'         # what has the same bits where compute goes with bits
DIRECT = {'ternary': 'config/ternary.py', 'direct 4-bit': 'config/direct4.py',
          'direct 8-bit': 'config/direct8.py'}


# ------------------------------------------------------------------------------------------------
# the laws

PUBLISHED = {   # of paper 4: N in parameters, D in tokens
    'A': 4299, 'alpha': 0.4965, 'B': 18060, 'beta': 0.4965, 'E': 2.7648,
    'gamma_w': 2.6745, 'n_w': 0.3037, 'gamma_a': 2.2102, 'n_a': 1.4072,
    'gamma_kv': 0.9578, 'n_kv': 2.4185,
    'C_T': 0.0598, 'gamma_D': 0.5068, 'gamma_N': 0.3439, 'gamma_post': 0.5907, 'b': 1.1277}


def f(c, x, bits):
    """f_x(P) = 1 - exp(-P / gamma_x + n_x); below 0 the law has no loss: training diverges."""
    return 1 - np.exp(-np.asarray(bits, float) / c[f'gamma_{x}'] + c[f'n_{x}'])


def n_eff(c, N, **bits):
    """N prod f_x(P_x), of the kinds that are given and fitted; inf bits are full precision."""
    for x, P in bits.items():
        if np.isfinite(P).any():
            N = N * np.clip(f(c, x, P), 1e-6, None)
    return N


def trained(c, N, D, **bits):
    """A N_eff^-alpha + B D^-beta + E, nats per token."""
    return c['A'] * n_eff(c, N, **bits) ** -c['alpha'] + c['B'] * D ** -c['beta'] + c['E']


def delta(c, N, D, post, w=np.inf):
    """What quantizing to `post` bits after training adds; of weights that were trained in w bits,
    less, and nothing if w <= post."""
    spared = 1 if np.isinf(w).all() else 1 - np.exp(-c['C_w'] * np.clip(w - post, 0, None))
    n = n_eff(c, N, w=w)
    return c['C_T'] * D ** c['gamma_D'] * n ** -c['gamma_N'] * \
        np.exp(-post / c['gamma_post'] + c.get('b', 0.0)) * spared


def critical_data(c, N, post):
    """D beyond which more data makes the model of N weights, quantized to `post` bits, worse."""
    top = c['beta'] * c['B'] * N ** c['gamma_N'] * math.exp(post / c['gamma_post'] - c.get('b', 0))
    return (top / (c['gamma_D'] * c['C_T'])) ** (1 / (c['gamma_D'] + c['beta']))


def best_precision(c, kinds=('w', 'a', 'kv')):
    """P* = argmax of prod f_x(P) / P: bits that are best where compute is N D P."""
    P = np.linspace(1, 16, 3001)
    return P[np.argmax(np.prod([np.clip(f(c, x, P), 0, None) for x in kinds], 0) / P)]


def equivalent(c, N, loss, full):
    """f of a run: the share of N weights that reach this loss in full precision, whose loss is
    `full`: [(L - L16) / A + N^-alpha]^(-1 / alpha) / N."""
    return max((loss - full) / c['A'] + N ** -c['alpha'], 1e-12) ** (-1 / c['alpha']) / N


# ------------------------------------------------------------------------------------------------
# fits

POSITIVE = ('A', 'alpha', 'B', 'beta', 'E', 'C_T', 'gamma_D', 'gamma_N', 'gamma_post', 'C_w',
            *(f'gamma_{x}' for x in KINDS))         # fitted as logarithms


def least(residuals, names, starts):
    """{name: value} with the least Huber loss of residuals({name: value}) over all starts."""
    from scipy.optimize import least_squares
    into = lambda c: [math.log(c[k]) if k in POSITIVE else c[k] for k in names]
    out = lambda t: {k: math.exp(min(max(v, -60.0), 60.0)) if k in POSITIVE else v
                     for k, v in zip(names, t)}
    with np.errstate(over='ignore'):        # of steps too far, which are not taken
        fits = [least_squares(lambda t: residuals(out(t)), into(start), loss='huber',
                              f_scale=1e-2) for start in starts]
    return out(min(fits, key=lambda found: found.cost).x)


def grid(**values):
    """All combinations, as dicts."""
    found = [{}]
    for name, options in values.items():
        found = [{**start, name: v} for start in found for v in options]
    return found


def columns(points):
    """{field: array} of points; bits that are not there are inf."""
    fields = ('N', 'D', 'post', 'loss', 'full', *KINDS)
    return {k: np.array([p.get(k, np.inf) for p in points], float) for k in fields}


def plain(points):
    return [p for p in points if not any(x in p for x in (*KINDS, 'post', 'direct', 'constant'))]


def fit_base(points, start=None):
    """A, alpha, B, beta, E of full-precision points, or None: three sizes and three D it takes."""
    p = columns(plain(points))
    if len(set(p['N'])) < 3 or len(set(p['D'])) < 3:
        return None
    names = 'A', 'alpha', 'B', 'beta', 'E'
    starts = [start] if start else grid(A=(3.0, 100.0), alpha=(0.2, 0.5), B=(10.0, 1e3),
                                        beta=(0.3, 0.6), E=(0.3, 1.0))
    return least(lambda c: np.log(trained(c, p['N'], p['D']) / p['loss']), names, starts)


def resolved(points, x, noise):
    """Bits of kind x whose mean excess over full precision is more than two of its errors."""
    found = {}
    for p in points:
        found.setdefault(p[x], []).append(p['loss'] - p['full'])
    return [bits for bits, excess in found.items()      # both losses have the noise of a seed
            if statistics.mean(excess) > 2 * noise * math.sqrt(2 / len(excess))]


def fit_kind(points, base, x, noise, start=None, least_bits=2):
    """gamma_x and n_x, or None where fewer than two bit widths are resolved."""
    mine = [p for p in points if p.get(x, 0) >= least_bits and 'post' not in p]
    p = columns(mine)
    if len(resolved(mine, x, noise)) < 2:
        return None
    names = f'gamma_{x}', f'n_{x}'
    starts = [start] if start else grid(**{names[0]: (0.5, 1.0, 2.0, 3.0),
                                           names[1]: (-1.0, 0.0, 0.5, 1.0)})
    # the excess over the same run in full precision: its own noise is in both
    return least(lambda c: np.log((p['full'] + trained({**base, **c}, p['N'], p['D'], **{x: p[x]})
                                   - trained(base, p['N'], p['D'])) / p['loss']), names, starts)


def fit_post(points, noise, start=None):
    """C_T, gamma_D, gamma_N and gamma_post of full-precision models quantized afterwards, or None
    where fewer than two bit widths cost as much as seeds differ."""
    mine = [p for p in points if 'post' in p and 'w' not in p and 'constant' not in p]
    p = columns(mine)
    if len(set(p['N'])) < 3 or len(set(p['D'])) < 3 or len(resolved(mine, 'post', noise)) < 2:
        return None
    names = 'C_T', 'gamma_D', 'gamma_N', 'gamma_post'
    starts = [start] if start else grid(C_T=(0.01, 1.0), gamma_D=(0.2, 0.5), gamma_N=(0.2, 0.5),
                                        gamma_post=(0.3, 0.6, 1.0))
    return least(lambda c: np.log((p['full'] + delta(c, p['N'], p['D'], p['post'])) / p['loss']),
                 names, starts)


def fit_spared(points, base, post, start=None):
    """C_w of models that were trained with low-bit weights and quantized further afterwards, or
    None where there are none."""
    p = columns([p for p in points if 'post' in p and 'w' in p])
    if not len(p['N']):
        return None
    starts = [start] if start else grid(C_w=(0.1, 0.5, 2.0))
    return least(lambda c: np.log((p['full'] + delta({**base, **post, **c}, *(
        p[k] for k in ('N', 'D', 'post', 'w')))) / p['loss']), ['C_w'], starts)


def fit_unified(points, c, start=None):
    """All constants at once, on all points, from the ones found one after the other."""
    mine = [q for q in points if 'direct' not in q and 'constant' not in q]
    p, kinds = columns(mine), [x for x in KINDS if f'gamma_{x}' in c]
    mine = np.all([np.isinf(p[x]) for x in KINDS if x not in kinds] + [p['N'] > 0], axis=0)
    p = {k: v[mine] for k, v in p.items()}

    def residuals(c):
        L = trained(c, p['N'], p['D'], **{x: p[x] for x in kinds})
        after = np.isfinite(p['post'])
        L[after] += delta(c, *(p[k][after] for k in ('N', 'D', 'post', 'w')))
        return np.log(L / p['loss'])

    return least(residuals, list(c), [{**c, **(start or {})}])


def fit(points, noise, start=None):
    """{'base', kinds, 'post', 'spared', 'unified': constants, None where data does not resolve
    them}, one after the other, and all at once."""
    start = start or {}
    found = {'base': fit_base(points, start.get('base'))}
    if found['base'] is None:
        return found
    for x in KINDS:
        found[x] = fit_kind(points, found['base'], x, noise, start.get(x))
    found['post'] = fit_post(points, noise, start.get('post'))
    found['spared'] = found['unified'] = None
    if found['w'] and found['post']:
        c = {**found['base'], **found['w']}
        found['spared'] = fit_spared(points, c, found['post'], start.get('spared'))
    if found['spared']:
        found['unified'] = fit_unified(points, merged(found), start.get('unified'))
    return found


def merged(found):
    """The constants that were found one after the other, in one dict."""
    return {k: v for part, c in found.items() if c and part != 'unified' for k, v in c.items()}


def bootstrap(points, noise, best, draws=100, seed=0):
    """Fits of resamples of the runs, each with what was made of it after training. Runs in low
    precision share the run that they are compared with, whose noise is drawn anew for all."""
    rng, runs = np.random.default_rng(seed), {}
    for p in points:
        if not p.keys() & {'direct', 'constant'}:
            runs.setdefault(p['run'], []).append(p)
    names, fits = list(runs), []
    while len(fits) < draws:
        twins, drawn = {}, []
        for i in rng.integers(len(names), size=len(names)):
            for p in runs[names[i]]:
                if p.keys() & KINDS.keys() and 'post' not in p:
                    twin = p['N'], p['D'], p['seed']
                    p = {**p, 'full': p['full'] + twins.setdefault(twin, noise * rng.normal())}
                drawn.append(p)
        found = fit(drawn, noise, best)
        if found['base']:
            fits.append(found)
    return fits


def interval(values):
    """The middle 90 %, or None of nothing."""
    return [float(v) for v in np.quantile(values, (0.05, 0.95))] if len(values) else None


# ------------------------------------------------------------------------------------------------
# the sweep

def rows(size):
    """{name: (point without its loss, keys for train.py)}; the held-out width is marked. The rate
    is .4 / d, of embeddings 24e-3, by a few tries at d = 32 and 96."""
    sweep, found = SWEEPS[size], {}

    def add(name, d, D, text='', **point):
        D = int(D * 2 ** 20)
        hidden = 8 * round(d / 3)                               # N = 12 d^2 a layer, nearly
        batch = math.prod(int(word.split('=')[1]) for word in sweep['shape'].split())
        steps = D // batch
        shape = f'n_layer=2 n_embd={d} n_head={d // 16} hidden={hidden} {sweep["shape"]} ' \
            f'max_iters={steps} warmup_iters={steps // 10} dataset={sweep["data"]} beta2=.99 ' \
            f'learning_rate={0.4 / d:.2g} embedding_lr=24e-3 {text}'
        N = 2 * (4 * d * d + 3 * d * hidden)
        point = {'N': N, 'D': D, 'held': d == sweep['held'], **point}
        found[f'd={d} D={D >> 10}k {name}'.strip()] = point, shape

    *_, third, last = widths = sweep['widths']
    for d in (*widths, sweep['held']):
        for D in sweep['D']:
            add('', d, D)
        for bits in (2, 3, 4, 6):
            add(f'w{bits}', d, sweep['at'], KINDS['w'].format(bits), w=bits)
        for name, config in DIRECT.items():
            add(name, d, sweep['at'], config, direct=name)
        if d in (widths[1], last, sweep['held']):
            for x, low in (('a', 3), ('token', 3), ('kv', 2)):
                for bits in (low, low + 1, low + 3):
                    add(f'{x}{bits}', d, sweep['at'], KINDS[x].format(bits), **{x: bits})
    for D in sweep['D']:
        add('constant rate', third, D, 'min_lr=1', constant=True)
    return found


def jobs_of(size):
    """[(Job, point)]: a seed of every row, three of the two that tell the noise."""
    third, at = SWEEPS[size]['widths'][2], SWEEPS[size]['at']
    twice = [f'd={third} D={int(1024 * at)}k{more}' for more in ('', ' w3')]
    each = 'eval_interval=100000 final_tokens=131072 compile=no'
    return [(Job(name, arguments(f'{text} {each}'), seed), point)
            for name, (point, text) in rows(size).items()
            for seed in ((1, 2, 3) if name in twice else (1,))]


def measure(job):
    """run_one, and the loss after rounding to nearest and GPTQ to each of POST bits; of weights
    trained in few bits, as the forward saw them, to fewer."""
    result = run_one(job)
    config = parse(job.args)
    if result['val_loss'] is None or config.stored or config.activations or config.kv_cache:
        return result
    for how in ('rtn', 'gptq'):
        result[how] = {}
        for bits in POST:
            if not config.weights or f'int{bits}/row' < config.weights:
                run = load(job, '--sequences=64')
                for layer in linears(run.model).values():
                    layer.weight.data = fake_quant(layer.weight.data, layer.how.weights)
                    layer.how = replace(layer.how, weights='')
                if how == 'rtn':
                    rtn_(run.model, f'int{bits}/row')
                else:
                    gptq_(run.model, f'int{bits}/row', run.sequences())
                result[how][bits] = run.evaluate(config.final_tokens, run.val_data)
    return result


def points_of(results, size, how='gptq'):
    """Results as points {'run', 'N', 'D', 'loss', 'full', kinds and 'post' in bits}; 'full' is the
    loss of the same run in full precision, and of what is quantized afterwards, before that."""
    known, full, points = rows(size), {}, []
    for r in results:
        point = known[r['name']][0]
        if not point.keys() & {*KINDS, 'direct', 'constant'} and r['val_loss'] is not None:
            full[point['N'], point['D'], r['seed']] = r['val_loss']
    for r in results:
        p = {**known[r['name']][0], 'run': f"{r['name']} {r['seed']}", 'seed': r['seed'],
             'loss': r['val_loss']}
        p['full'] = full.get((p['N'], p['D'], p['seed']))
        if p['loss'] is not None and p['full'] is not None:     # else it has diverged, or no twin
            points += [p, *({**p, 'post': int(bits), 'loss': loss, 'full': p['loss']}
                            for bits, loss in r.get(how, {}).items())]
    return points


def noise_of(points):
    """Standard deviation of the loss over seeds, nats per token; None where no run has two."""
    groups = {}
    for p in points:
        if 'post' not in p:
            groups.setdefault(p['run'].rsplit(' ', 1)[0], []).append(p['loss'])
    spreads = [statistics.variance(losses) for losses in groups.values() if len(losses) > 1]
    return math.sqrt(statistics.mean(spreads)) if spreads else None


# ------------------------------------------------------------------------------------------------
# the held-out size

def foretell(c, points):
    """{run or run at so many bits: loss} by the constants c, of points whose loss is not used."""
    found = {}
    for p in points:
        kinds = {x: p[x] for x in KINDS if x in p}
        known = 'C_w' if 'post' in p and 'w' in p else 'C_T' if 'post' in p else 'A'
        if 'direct' in p or 'constant' in p or known not in c or \
                not all(f'gamma_{x}' in c for x in kinds):
            continue
        L = trained(c, p['N'], p['D'], **kinds)
        if 'post' in p:
            L = L + delta(c, p['N'], p['D'], p['post'], p.get('w', np.inf))
        found[key(p)] = float(L)
    return found


def key(p):
    return p['run'] + (f" then {p['post']} bits" if 'post' in p else '')


def excesses(told, points):
    """{key: (predicted, measured)} of what low precision adds to the loss of the same run in full
    precision, and quantizing afterwards to that of the run before it."""
    full, found = {(p['N'], p['D']): told.get(key(p)) for p in plain(points)}, {}
    for p in points:
        k = key(p)
        if k in told and p.keys() & {*KINDS, 'post'}:
            own = told[k.split(' then ')[0]] if 'post' in p else full[p['N'], p['D']]
            found[k] = told[k] - own, p['loss'] - p['full']
    return found


def score(told, points, before, noise, bars):
    """[(what, value, bar, 'PASS', 'FAIL' or 'UNRESOLVED')] of predictions of the held-out points;
    `before` are those of the next smaller size."""
    found = excesses(told, points)
    raw = [abs(told[key(p)] / p['loss'] - 1) for p in points if key(p) in told and 'post' not in p]
    lines = [('mean error of the loss, training', 100 * statistics.mean(raw), bars[0])]
    of = lambda p: (p['D'], *(p.get(x) for x in (*KINDS, 'post')))
    smaller = {of(q): q['loss'] - q['full'] for q in before}
    for text, bar, some in (
            ('training in low precision', bars[1],
             lambda p: 'post' not in p and p['loss'] - p['full'] > 2 * noise),
            ('quantizing afterwards to 2, 3 and 4 bits', bars[2],
             lambda p: p.get('post', 9) <= 4 and 'w' not in p),
            ('the same after training with quantized weights', bars[2],
             lambda p: p.get('post', 9) <= 4 and 'w' in p)):
        pairs = [(*found[key(p)], smaller.get(of(p))) for p in points
                 if key(p) in found and some(p)]
        median = lambda errors: 100 * statistics.median(errors) if errors else math.nan
        wrong = median([abs(a / b - 1) for a, b, _ in pairs])
        copied = median([abs(c / b - 1) for _, b, c in pairs if c is not None])
        lines += [(f'median error of the excess of {text}, {len(pairs)} points', wrong, bar),
                  ('the same less that of no law for precision (100 %)', wrong - 100, 0.0),
                  ('the same less that of copying the next smaller size', wrong - copied, 0.0)]
    return [(text, value, bar, 'UNRESOLVED' if math.isnan(value) else
             'PASS' if value <= bar else 'FAIL') for text, value, bar in lines]


def mean_of(values):
    """Mean and standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.inf
    return statistics.mean(values) if values else math.nan, error


def more(text, a, b, noise):
    """The claim a > b in the mean of a - b over sizes, whose error is no less than of seeds."""
    gaps = [x - y for x, y in zip(a, b) if x is not None and y is not None]
    mean, error = mean_of(gaps)
    error = max(error, noise * math.sqrt(2 / max(1, len(gaps))))
    return (text, decide(mean, error, len(gaps)),
            f'{mean:+.4f} ± {error:.4f} nats, wanted > 0')


def times(text, a, b):
    """The claim a > b in the mean of log(a / b): what quantizing afterwards costs has noise that
    grows with it."""
    logs = [math.log(max(x, 1e-4) / max(y, 1e-4)) for x, y in zip(a, b)
            if x is not None and y is not None]
    mean, error = mean_of(logs)
    return (text, decide(mean, error, len(logs)), f'{math.exp(mean):.2f} times as much, '
            f'up or down by {100 * math.expm1(error):.0f} %, wanted > 1')


def claims(points, noise):
    """[(claim, verdict, numbers)] of the paper's qualitative findings."""
    once = [p for p in points if p['seed'] == 1]
    after = [p for p in once if 'post' in p and 'w' not in p]
    excess_of = lambda some: {(p['N'], p['D'], p['post']): p['loss'] - p['full'] for p in some}
    extra = excess_of(p for p in after if 'constant' not in p)
    control = excess_of(p for p in after if 'constant' in p)
    excess = {(x, p[x], p['N']): p['loss'] - p['full'] for p in once for x in KINDS
              if x in p and 'post' not in p}
    found, sizes = [], sorted({N for N, *_ in extra})
    data = sorted({D for _, D, _ in extra})

    for bits in (2, 3):
        at, after = lambda N, D: extra.get((N, D, bits)), f'quantizing to {bits} bits afterwards'
        found += [
            times(f'{after} costs more after {data[-1] / data[0]:.0f} times the data, at each N',
                  [at(N, data[-1]) for N in sizes], [at(N, data[0]) for N in sizes]),
            times(f'{after} costs more at the smallest N than at the largest, for each D',
                  [at(sizes[0], D) for D in data], [at(sizes[-1], D) for D in data]),
            times(f'{after} costs more where the rate has decayed than where it is constant',
                  [at(N, D) for N, D, b in control if b == bits],
                  [x for (_, _, b), x in control.items() if b == bits])]
    for x, name in NAMES.items():
        widths = sorted({bits for kind, bits, _ in excess if kind == x})
        for pair in zip(widths, widths[1:]):
            found.append(more(
                f'training with {name} in {pair[0]} bits costs more than in {pair[1]}',
                *([excess.get((x, bits, N)) for N in sizes] for bits in pair), noise))
    for x in ('a', 'token'):
        for bits in (3, 4):
            found.append(more(
                f'{NAMES[x]} in {bits} bits cost more than weights in {bits}',
                *([excess.get((kind, bits, N)) for N in sizes] for kind in (x, 'w')), noise))
    worst = max(abs(x) for (_, _, bits), x in extra.items() if bits == 8)
    found.append(('8 bits after training are within the noise of seeds', 'PASS'
                  if worst <= noise else 'FAIL', f'{worst:.4f} nats at most, noise {noise:.4f}'))
    four = statistics.mean(x for (kind, bits, _), x in excess.items() if (kind, bits) == ('w', 4))
    found.append(('the cost of training with 4-bit weights is above twice the noise',
                  'PASS' if four > 2 * noise else 'UNRESOLVED', f'{four:+.4f} nats'))
    found.append(('seeds differ by .01 nats or less', 'PASS' if noise <= 0.01 else 'FAIL',
                  f'{noise:.4f} nats'))
    return found


# ------------------------------------------------------------------------------------------------
# what to train

def plan(c, compute=None, memory=None, tokens=None):
    """(loss, N, D, P) with the least loss by the constants c. Of compute = (6 / 16) N D P, in
    operations of 16 bits, weights, activations (a scale per token), keys and values all have P
    bits; without compute only weights. N P / 8 <= memory in bytes, D <= tokens."""
    N, P = np.meshgrid(np.geomspace(1e3, 1e12, 1801), np.arange(2.0, 17))
    D = compute * 16 / (6 * N * P) if compute else np.full_like(N, tokens)
    D = np.minimum(D, tokens or math.inf)
    L = trained(c, N, D, **{x: P for x in (TOGETHER if compute else ('w',)) if f'gamma_{x}' in c})
    if memory:
        L[N * P / 8 > memory] = math.inf
    best = np.unravel_index(L.argmin(), L.shape)
    return tuple(float(x[best]) for x in (L, N, D, P))


def say_plan(found, options):
    """The plan by the best fit and its spread over the bootstrap, as lines."""
    kinds = TOGETHER if options.compute else ('w',)
    lacking = [NAMES[x] for x in kinds if x in found['unresolved']]
    if lacking:
        raise SystemExit(f'unresolved: the sweep does not show what {lacking[0]} in low precision '
                         'cost')
    ask = options.compute, options.memory, options.tokens
    best = plan(found['constants'], *ask)
    if math.isinf(best[0]):
        raise SystemExit(f'{options.memory:g} bytes are too few: give --memory=1e3 or more')
    others = [plan(c, *ask) for c in found['bootstrap'] if all(f'gamma_{x}' in c for x in kinds)]
    given = zip(ask, ('compute of {:g} operations of 16 bits', 'memory of {:g} bytes for weights',
                      'at most {:g} bytes of text'))
    lines = ['given: ' + ', '.join(text.format(value) for value, text in given if value),
             f'{", ".join(NAMES[x] for x in kinds)} have P bits, all else is in full precision']
    for i, (name, form, unit) in enumerate((('loss', '{:.3f}', 'nats/byte'),
                                            ('N', '{:.3g}', 'weights'),
                                            ('D', '{:.3g}', 'bytes of text trained on'),
                                            ('P', '{:.0f}', 'bits'))):
        low, high = map(form.format, interval([other[i] for other in others]))
        lines.append(f"{name:5}{form.format(best[i])} {unit}, 90 % of the bootstrap "
                     f"{low} to {high}")
    within = {x: found['range'][x] for x in 'ND'}
    if any(not low <= value <= high for value, (low, high) in zip(best[1:], within.values())):
        lines.append('an extrapolation: the fit is of ' + ' and '.join(
            f'{x} = {low:.3g} to {high:.3g} {unit}' for (x, (low, high)), unit in
            zip(within.items(), ('weights', 'bytes'))))
    if len(found['widths']['w']) < 3:
        widths = ' and '.join(map(str, sorted(found['widths']['w'])))
        lines.append(f'of weights only {widths} bits cost more than noise here: what more bits '
                     'gain is the form of the law')
    return lines


# ------------------------------------------------------------------------------------------------
# steps

def paths(size):
    stem = RESULTS / f'scaling-{size}'
    return [stem.with_name(stem.name + end) for end in
            ('.jsonl', '-fit.json', '-predictions.json', '.md', '.png')]


def points_at(size, held):
    jobs = [job for job, point in jobs_of(size) if point['held'] == held]
    return points_of(results_of(paths(size)[0], jobs), size)


def train_all(options, held):
    """Train the runs of the sizes that are fitted, or of the one that is held out."""
    sweep = SWEEPS[options.size]
    data, most = sweep['data'], int(2 ** 20 * max(sweep['D']))
    if options.size == 'cpu' and not os.path.exists(f'{data}/meta.json'):
        subprocess.run([sys.executable, 'data/python/prepare.py', '--tokenizer=256',
                        f'--out={data}'], check=True)
    bytes_there = os.path.getsize(f'{data}/train.bin') // 2 if os.path.exists(data) else 0
    if bytes_there < most:
        raise SystemExit(f'{data} has {bytes_there} bytes to train on, fewer than the {most} of '
                         'the longest run: python data/text/prepare.py FOLDER --tokenizer=256 '
                         f'--out={data}')
    jobs = [job for job, point in jobs_of(options.size) if point['held'] == held]
    run_all(paths(options.size)[0], jobs, options.jobs, run=measure)


def sweep(options):
    train_all(options, held=False)


def fit_step(options):
    """Fit the sizes that are not held out, and write constants with their bootstrap."""
    points = points_at(options.size, held=False)
    noise = noise_of(points)
    best = fit(points, noise) if noise else {'base': None}
    if not best['base']:
        raise SystemExit('unresolved: a fit takes three sizes, three D and two seeds; run the '
                         'step sweep to its end')
    fits = bootstrap(points, noise, best)
    staged, unified = [merged(f) for f in fits], [f['unified'] for f in fits if f['unified']]
    spread = lambda fits, c: {k: interval([f[k] for f in fits if k in f]) for k in c or ()}
    three = fit_kind(points, best['base'], 'w', noise, least_bits=3)
    c = merged(best)
    found = {'constants': c, 'interval': spread(staged, c), 'unified': best['unified'],
             'interval_unified': spread(unified, best['unified']), 'three_bits': three,
             'unresolved': [part for part, found in best.items() if not found],
             'widths': {x: resolved([p for p in points if x in p and 'post' not in p], x, noise)
                        for x in KINDS},
             'shares': {part: statistics.mean(bool(f.get(part)) for f in fits) for part in best},
             'noise': noise, 'bootstrap': staged,
             'range': {k: [min(p[k] for p in points), max(p[k] for p in points)] for k in 'ND'},
             'best_precision': [
                 (kinds, best_precision(c, kinds), interval(
                     [best_precision(f, kinds) for f in staged
                      if all(f'gamma_{x}' in f for x in kinds)]))
                 for kinds in (('w',), TOGETHER, ('w', 'a', 'kv')) if all(best[x] for x in kinds)]}
    paths(options.size)[1].write_text(json.dumps(found), encoding='utf-8')


def read_fit(options):
    path = paths(options.size)[1]
    if not path.exists():
        raise SystemExit(f'{path.name} is not there: run the steps sweep and fit first')
    return json.loads(path.read_text(encoding='utf-8'))


def predict(options):
    """Write what the fit says of the held-out size, and only then train it. What was written once
    stays, whatever is fitted later."""
    path, c = paths(options.size)[2], read_fit(options)['constants']
    if not path.exists():
        low = {job.name: range(2, point.get('w', 9)) for job, point in jobs_of(options.size)
               if point['held'] and not point.keys() & {'direct', 'a', 'token', 'kv'}}
        empty = [{'name': job.name, 'seed': 1, 'val_loss': 0.0, 'gptq': {
            bits: 0.0 for bits in POST if bits in low.get(job.name, ())}}
            for job, point in jobs_of(options.size) if point['held']]
        told = foretell(c, points_of(empty, options.size))
        path.write_text(json.dumps({'constants': c, 'losses': told}, indent=1), encoding='utf-8')
    train_all(options, held=True)


def plot(options):
    """The tables and the figures."""
    found, path = read_fit(options), paths(options.size)[2]
    if not path.exists():
        raise SystemExit(f'{path.name} is not there: run the step predict first')
    told = json.loads(path.read_text(encoding='utf-8'))['losses']
    c, noise = found['constants'], found['noise']
    points, held = (points_at(options.size, held) for held in (False, True))
    lines = ['| claim | | |', '|---|---|---|', *(
        f'| {text} | **{said}** | {numbers} |' for text, said, numbers in
        claims(points + held, noise))]
    largest = max(p['N'] for p in points)
    before = [p for p in points if p['N'] == largest and 'constant' not in p]
    scored = score(told, held, before, noise, SWEEPS[options.size]['bars']) if held else []
    lines += ['', '| held-out size | | bar | |', '|---|---|---|---|', *(
        f'| {text} | {value:.1f} % | {bar:g} % | **{said}** |'
        for text, value, bar, said in scored)]
    lines += ['', '| constant | one after the other | 90 % of the bootstrap | all at once | '
              '90 % | paper 4 |', '|---|---|---|---|---|---|']
    show = lambda numbers: ' to '.join(
        f'{v if abs(v) > 1e-6 else 0:.4g}' for v in numbers or () if v is not None)
    published = {**PUBLISHED, 'C_T': PUBLISHED['C_T'] * math.exp(PUBLISHED['b'])}   # as ours, no b
    unified, spread = found['unified'] or {}, found['interval_unified']
    lines += [f'| {name} | {value:.4g} | {show(found["interval"][name])} | '
              f'{show([unified.get(name)])} | {show(spread.get(name, []))} | '
              f'{show([published.get(name)])} |' for name, value in c.items()]
    three = found['three_bits'] or {'w': None}
    lines += [f'| {name}, of 3 bits and more | {show([value]) or "unresolved"} | | | | |'
              for name, value in three.items()]
    lines += [f'| {part} | unresolved | | | | |' for part in found['unresolved']]
    for kinds, P, spread in found['best_precision']:
        known = all(f'gamma_{x}' in PUBLISHED for x in kinds)
        lines.append(f'| P* of {", ".join(kinds)}, bits | {P:.1f} | {show(spread)} | | | '
                     f'{show([best_precision(PUBLISHED, kinds)]) if known else ""} |')
    some = [f'{100 * share:.0f} % of the bootstrap resolve {part}'
            for part, share in found['shares'].items() if share < 1]
    lines += ['', f'{", ".join(some)}; intervals are of those that do.'] if some else []
    lines += equivalents(found, points + held)
    paths(options.size)[3].write_text('\n'.join(lines) + '\n', encoding='utf-8')
    print('\n'.join(lines))
    draw(c, noise, found['bootstrap'], points, held, told, paths(options.size)[4])


def equivalents(found, points):
    """Lines of a table: the share of N weights in full precision that direct training is worth."""
    c, noise = found['constants'], found['noise']
    lines = ['', '| trained directly | N_eff / N and 90 % of the bootstrap, small to large |',
              '|---|---|']
    rng = np.random.default_rng(0)      # both losses of a share have the noise of a seed
    for name in DIRECT:
        cells = []
        for p in sorted((p for p in points if p.get('direct') == name),
                        key=lambda p: p['N']):
            drawn = [equivalent(f, p['N'], p['loss'] + math.sqrt(2) * noise * rng.normal(),
                                p['full']) for f in found['bootstrap']]
            cells.append(f'{equivalent(c, p["N"], p["loss"], p["full"]):.2f} '
                         '({:.2f} to {:.2f})'.format(*interval(drawn)))
        lines.append(f'| {name} | ' + ', '.join(cells) + ' |')
    return lines


def draw(c, noise, fits, points, held, told, path):
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot
    fig, axes = pyplot.subplots(2, 3, figsize=(16, 9), layout='constrained')
    (a, b, d), (e, g, h) = axes
    sizes = sorted({p['N'] for p in points + held})
    color = {N: f'C{i}' for i, N in enumerate(sizes)}
    everything = [p for p in points + held if p['seed'] == 1]
    draw_loss(a, c, everything, color)
    draw_excess(b, c, noise, everything, max(p['N'] for p in points))
    draw_after(d, c, everything, color)
    draw_predicted(e, c, points, held, told)
    draw_precision(g, c, fits, color)
    draw_critical(h, c, fits, {p['D'] for p in points}, sizes)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    fig.savefig(path, dpi=110)


def draw_loss(a, c, everything, color):
    """Loss against data, before and after quantizing."""
    for N in color:
        mine = sorted((p['D'], p['loss']) for p in plain(everything) if p['N'] == N)
        a.plot(*zip(*mine), 'o', color=color[N], label=f'N = {N / 1e3:.0f}k'
               + (', held out' if N == max(color) else ''))
        D = np.geomspace(mine[0][0], mine[-1][0])
        a.plot(D, trained(c, N, D), color=color[N], lw=1)
        for post, style in ((3, '--'), (2, ':')):
            after = sorted((p['D'], p['loss']) for p in everything if p['N'] == N
                           and p.get('post') == post and not any(x in p for x in KINDS)
                           and 'constant' not in p)
            a.plot(*zip(*after), style, color=color[N], lw=1, marker='.')
    a.set(xscale='log', xlabel='D, bytes trained on', ylabel='loss, nats/byte',
          title='Loss; dashed: quantized to 3 bits afterwards, dotted: 2', ylim=(None, min(
              3.5, max(p['loss'] for p in plain(everything)) + 0.5)))
    a.legend(fontsize=8)


def draw_excess(b, c, noise, everything, fitted):
    """What training in low precision costs, against bits."""
    for i, (x, name) in enumerate(NAMES.items()):
        mine = [p for p in everything if x in p and 'post' not in p]
        b.plot([p[x] for p in mine], [max(p['loss'] - p['full'], 1e-4) for p in mine], 'os^v'[i],
               color=f'C{i}', ms=4, label=name)
        if f'gamma_{x}' in c:
            P = np.linspace(min(p[x] for p in mine), 8)
            D = mine[0]['D']
            b.plot(P, trained(c, fitted, D, **{x: P}) - trained(c, fitted, D), color=f'C{i}',
                   lw=1)
    b.axhline(2 * noise, color='0.5', ls=':', label='twice the noise of seeds')
    b.set(yscale='log', ylim=(1e-4, None), xlabel='bits', ylabel='excess loss, nats/byte',
          title=f'What training in low precision costs; lines: the fit, N = {fitted / 1e3:.0f}k')
    b.legend(fontsize=8)


def draw_after(d, c, everything, color):
    """What quantizing after training costs, against data."""
    for N in color:
        for post, style in ((2, ':'), (3, '--'), (4, '-')):
            mine = sorted((p['D'] / N, p['loss'] - p['full']) for p in everything if p['N'] == N
                          and p.get('post') == post and not any(x in p for x in KINDS)
                          and 'constant' not in p)
            d.plot(*zip(*mine), 'o', color=color[N], ms=4)
            if 'C_T' in c:
                D = np.array([m[0] * N for m in mine])
                d.plot(D / N, delta(c, N, D, post), style, color=color[N], lw=1,
                       label=f'{post} bits' if N == min(color) else None)
    d.set(xscale='log', yscale='log', xlabel='D / N', ylabel='delta, nats/byte',
          title='What quantizing after training (GPTQ) costs')
    d.legend(fontsize=8)


def draw_predicted(e, c, points, held, told):
    """Predicted against measured."""
    for some, style, name in ((points, 'o', 'fitted'), (held, 'D', 'held out')):
        found = excesses(foretell(c, some) if name == 'fitted' else told, some)
        e.plot(*zip(*(found.values() or [(np.nan, np.nan)])), style, ms=4, alpha=0.6, label=name)
    e.axline((0.01, 0.01), (1, 1), color='0.5', lw=1)
    e.set(xscale='log', yscale='log', xlabel='predicted excess, nats/byte', ylabel='measured',
          xlim=(1e-3, 5), ylim=(1e-3, 5), title='Excess loss, predicted and measured')
    e.legend(fontsize=8)


def draw_precision(g, c, fits, color):
    """The bits that are best, against compute."""
    compute, P = np.geomspace(1e10, 1e15, 121), np.linspace(2, 16, 281)
    together = [f for f in (c, *fits) if all(f'gamma_{x}' in f for x in TOGETHER)]
    if together and together[0] is c:
        for N in color:     # a row for each compute, a column for each P
            D = compute[:, None] * 16 / (6 * N * P)
            best = trained(c, N, D, **dict.fromkeys(TOGETHER, P)).argmin(1)
            D = np.take_along_axis(D, best[:, None], 1)[:, 0]
            near = (2e5 < D) & (D < 1e8)
            g.plot(compute[near], P[best[near]], color=color[N])
        g.axhline(best_precision(c, TOGETHER), color='k', label='N is free')
        g.axhspan(*interval([best_precision(f, TOGETHER) for f in together[1:]]), color='0.9',
                  label='90 % of the bootstrap')
        g.legend(fontsize=8)
    g.set(xscale='log', xlabel='compute, (6/16) N D P', ylabel='P, bits of w, x, k and v',
          ylim=(0, 17), title='Best precision; colors: at that N')


def draw_critical(h, c, fits, data, sizes):
    """The data beyond which more of it does harm, against N."""
    if 'C_T' in c:
        N = np.geomspace(sizes[0], 10 * sizes[-1])
        after = [f for f in fits if 'C_T' in f]
        for post in (2, 3, 4):
            past = lambda f: [critical_data(f, n, post) / n for n in N]
            line, = h.plot(N, past(c), label=f'{post} bits')
            h.fill_between(N, *np.quantile([past(f) for f in after], (0.05, 0.95), axis=0),
                           color=line.get_color(), alpha=0.2)
        D = sorted(data)
        h.fill([sizes[0], sizes[0], sizes[-1], sizes[-1]],
               [D[0] / sizes[0], D[-1] / sizes[0], D[-1] / sizes[-1], D[0] / sizes[-1]],
               color='0.5', alpha=0.2, label='what was trained')
        h.legend(fontsize=8)
    h.set(xscale='log', yscale='log', xlabel='N', ylabel='D / N',
          title='Past this, more data makes the quantized model worse')


def positive(text):
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f'{text} is not a positive number')
    return value


STEPS = {'sweep': sweep, 'fit': fit_step, 'predict': predict, 'plot': plot}

if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('steps', nargs='*', choices=[*STEPS, 'plan', []], metavar='STEP',
                        help=', '.join([*STEPS, 'plan']))
    parser.add_argument('--size', choices=SWEEPS, default='cpu')
    parser.add_argument('--jobs', type=int, default=2, help='runs at a time, sharing the cores')
    for name, text in (('compute', 'of plan: operations of 16 bits, (6 / 16) N D P'),
                       ('memory', 'of plan: bytes of the weights, N P / 8'),
                       ('tokens', 'of plan: most tokens there are; a token is a byte')):
        parser.add_argument(f'--{name}', type=positive, help=text)
    os.chdir(ROOT)                                      # where config/ is
    options = parser.parse_args()
    if 'plan' in options.steps:
        if not options.compute and not (options.memory and options.tokens):
            parser.error('plan needs --compute, or --memory and --tokens')
        print('\n'.join(say_plan(read_fit(options), options)))
    else:
        for step in options.steps or STEPS:
            STEPS[step](options)
