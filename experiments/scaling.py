"""
Scaling laws of low precision (paper 4, Kumar et al., 2411.04330): do they carry to a larger model?

    python -m experiments.scaling [sweep] [predict] [plot]         four hours on two cores
    python -m experiments.scaling plan --memory=1e5 --tokens=1e7   which N, D and precision

N is the number of weights of the block linears and D the number of bytes trained on, each of them
read once. A run in full precision ends with the loss L = A N^-alpha + B D^-beta + E, and low
precision, in training or after it, adds delta. Two forms say how much:

    log delta = log k - g log N + h log D

    A, of the paper    training acts as if there were N_eff = f N weights, with one f a precision:
                       k = A (f^-alpha - 1), g = alpha and h = 0. Quantizing to P bits afterwards
                       has k = C_T exp(-P / gamma_post), and one g and h for all P.
    B                  training has one k a precision, and one g and h a kind of tensor.
                       Quantizing afterwards has k, g and h of each P.

`sweep` trains all sizes but the largest. `predict` fits both forms to them, writes down what each
says of the largest size, and only then trains that. `plot` makes tables and a figure, and `plan`
uses the form that was better on the largest size. What costs less than four times the noise, the
standard deviation of the loss over seeds in full precision, is neither fitted nor scored.

Every D has a run with a cosine of its own. Branches that decay from one run at a constant rate
would read less, but they would take machinery that nothing else needs.
"""
import copy
import json
import math
import os
import statistics
import subprocess
import sys
from collections import defaultdict

import numpy as np

from data.corpus import folder_of
from experiments.runs import (RESULTS, Job, arguments, decide, interval, keys, load, parser_of,
                              report, results_of, run_all, run_one)
from quant import gptq_, rtn_

# width: megabytes of text to train on; 8 at widths of 144 and 208 would take more than an hour
SIZES = {48: (1, 2, 4, 8), 64: (1, 2, 4, 8), 96: (1, 2, 4, 8), 144: (1, 2, 4), 208: (1, 2, 4)}
HELD, BAR = 208, 20      # held out; percent, what the median error of delta there may be
# seeds on which no rate was tuned: the first everywhere, others for some precisions and megabytes
SEEDS = {48: (11, 12, 13), 64: (11, 12, 13), 96: (11, 12), 144: (11,), 208: (11,)}
SEEDED, SEEDED_MB = ('', 'w2', 'direct ternary'), (1, 2)
# name: kind of tensor, bits and keys for train.py
PRECISIONS = {'w2': ('weights', 2, 'weights=int2/row'),
              'token3': ('activations', 3, 'activations=int3/row'),
              'token4': ('activations', 4, 'activations=int4/row'),
              'kv2': ('cache', 2, 'kv_cache=int2/row'),
              'direct ternary': ('direct', 2, 'config/ternary.py'),
              'direct 4-bit': ('direct', 4, 'config/direct4.py')}
AFTER = {f'{how} {bits}': (how, bits) for how in ('rtn', 'gptq') for bits in (2, 3, 4)}
KIND, BITS = ({name: row[i] for name, row in (PRECISIONS | AFTER).items()} for i in (0, 1))

# what is claimed: delta rises with D and falls with N, or the first costs more than the second
CLAIMS = [(name, x) for name in ('gptq 2', 'gptq 3', 'direct ternary', 'direct 4-bit')
          for x in 'DN']
CLAIMS += [('w2', 'N'), ('token3', 'N'), ('kv2', 'N'), ('token3', 'token4'), ('gptq 2', 'gptq 3'),
           ('gptq 3', 'gptq 4'), ('direct ternary', 'direct 4-bit')]


# ------------------------------------------------------------------------------------------------
# the laws

PUBLISHED = {   # by paper 4: N in parameters, D in tokens
    'A': 4299, 'alpha': 0.4965, 'B': 18060, 'beta': 0.4965, 'E': 2.7648, 'gamma_w': 2.6745,
    'n_w': 0.3037, 'gamma_a': 2.2102, 'n_a': 1.4072, 'gamma_kv': 0.9578, 'n_kv': 2.4185,
    'C_T': 0.0598, 'gamma_D': 0.5068, 'gamma_N': 0.3439, 'gamma_post': 0.5907, 'b': 1.1277}


def full_loss(c, N, D):
    """L = A N^-alpha + B D^-beta + E of a run in full precision, nats per byte."""
    return c['A'] * N ** -c['alpha'] + c['B'] * D ** -c['beta'] + c['E']


def cost(law, N, D):
    """delta = k N^-g D^h of a law (log k, g, h), nats per byte."""
    k, g, h = law
    return np.exp(k - g * np.log(N) + h * np.log(D))


def f(c, x, P):
    """The share of N weights that P bits are worth in the paper, 1 - exp(-P / gamma_x + n_x); x is
    w, a (a scale per tensor) or kv. Below 0 training diverges."""
    return 1 - math.exp(-P / c[f'gamma_{x}'] + c[f'n_{x}'])


def law_after(c, P):
    """C_T D^gamma_D N^-gamma_N exp(-P / gamma_post + b): what P bits after training add."""
    return math.log(c['C_T']) - P / c['gamma_post'] + c.get('b', 0), c['gamma_N'], c['gamma_D']


# ------------------------------------------------------------------------------------------------
# fits. A point of `full` has N, D, seed and loss; one of `points` has of, N, D, seed and delta

def arrays(some, *fields):
    return [np.array([p[field] for p in some], float) for field in fields]


def fit_base(full):
    """A, alpha, B, beta and E, none negative, with the least squares of relative errors, or None:
    it takes three N and three D. The powers are on a grid; for each pair the rest is linear."""
    N, D, L = arrays(full, 'N', 'D', 'loss')
    if min(len(set(N)), len(set(D))) < 3:
        return None
    powers = np.arange(0.02, 1.5, 0.01)
    alpha, beta = (x.reshape(-1, 1) for x in np.meshgrid(powers, powers))
    # (pairs, runs, 3): X c = 1 without error; N and D as multiples of the least keep c near 1
    X = np.stack([(N / min(N)) ** -alpha, (D / min(D)) ** -beta, N ** (0 * alpha)], -1)
    X /= L[:, None]
    c = np.linalg.solve(X.mT @ X, X.sum(1)[..., None])
    errors = ((X @ c - 1) ** 2).sum((1, 2))
    errors[(c < 0).any((1, 2))] = np.inf
    best = errors.argmin()
    (A, B, E), alpha, beta = c[best, :, 0], alpha[best, 0], beta[best, 0]
    values = A * min(N) ** alpha, alpha, B * min(D) ** beta, beta, E
    return dict(zip(PUBLISHED, map(float, values))) if errors[best] < np.inf else None


def least_squares(columns, y):
    """c of y = X c, or None where the data do not determine it."""
    c, _, rank, _ = np.linalg.lstsq(np.stack(columns, 1), y, rcond=None)
    return c.tolist() if rank == len(columns) else None


def fit_form(form, points, c):
    """({name: law}, {constant: value}) of the form A or B, of what the points determine."""
    laws, said, groups = {}, {}, defaultdict(list)
    for name, kind in KIND.items():     # names with slopes in common
        groups[kind if (name in AFTER) == (form == 'A') else name].append(name)
    for group, names in groups.items():
        mine = [p for p in points if p['of'] in names]
        N, D, y = np.log(arrays(mine, 'N', 'D', 'delta'))
        P = np.array([BITS[p['of']] for p in mine])
        there = [name for name in names if BITS[name] in P]
        if form == 'A' and group in PRECISIONS:
            if mine:
                k = float(np.mean(y + c['alpha'] * N))
                laws[group] = k, c['alpha'], 0.0
                said[f'f of {group}'] = (1 + math.exp(k) / c['A']) ** (-1 / c['alpha'])
        elif form == 'A':
            if fitted := least_squares([N ** 0, -P, -N, D], y):
                after = {'C_T': math.exp(fitted[0]), 'gamma_post': 1 / fitted[1],
                         'gamma_N': fitted[2], 'gamma_D': fitted[3]}
                laws |= {name: law_after(after, BITS[name]) for name in names}
                said |= {f'{group} {x}': value for x, value in after.items()}
        elif fitted := least_squares([*(1.0 * (P == BITS[name]) for name in there), -N, D], y):
            *k, g, h = fitted
            laws |= {name: (k, g, h) for name, k in zip(there, k)}
            said |= {f'{group} g': g, f'{group} h': h}
    return laws, said


def fit(full, points, noise):
    """{'base': constants of L, 'A' and 'B': {name: law}, 'said': {constant: value}}, or None."""
    c, clear = fit_base(full), [p for p in points if p['delta'] > 4 * noise]
    if c:
        (a, said), (b, more) = (fit_form(form, clear, c) for form in 'AB')
        for name in PRECISIONS:     # to leave out small deltas makes a cheap precision look dear
            N, delta = arrays([p for p in points if p['of'] == name], 'N', 'delta')
            if len(N):
                x = N ** -c['alpha']
                k = x @ delta / (x @ x)         # least squares of delta = k N^-alpha
                said[f'f of {name}, of all runs'] = (1 + k / c['A']) ** (-1 / c['alpha'])
        return {'base': c, 'A': a, 'B': b, 'said': c | said | more}


def bootstrap(full, points, noise, draws=200):
    """{constant: its 95 % interval}, drawing runs with all that is compared with them."""
    rng, twins, seen = np.random.default_rng(0), defaultdict(list), defaultdict(list)
    for p in points:
        twins[p['N'], p['D'], p['seed']].append(p)
    for _ in range(draws):
        drawn = [full[i] for i in rng.integers(len(full), size=len(full))]
        found = fit(drawn, sum((twins[p['N'], p['D'], p['seed']] for p in drawn), []), noise)
        for name, value in found['said'].items() if found else ():
            seen[name].append(value)
    return {name: np.quantile(values, (0.025, 0.975)).tolist() for name, values in seen.items()}


# ------------------------------------------------------------------------------------------------
# runs

def rates_of(kind, MB):
    """Keys for train.py, near the best of a few tries with seed 2 (results/tries.jsonl): most at 2
    MB and widths of 48 and 208, so learning_rate goes as 1 / d; code_lr is that of the config. At
    8 MB and 48, half these rates ended 1 % lower in full precision and w2: on seed 2, not 11, and
    by less than seeds differ. Activations and a cache of few bits get worse with more text unless
    their rates fall."""
    lr, embedding_lr = 8e-3, 96e-3
    if kind in ('activations', 'cache'):
        lr, embedding_lr = lr * min(1, 2 / MB), embedding_lr / MB
    if kind == 'cache':
        lr /= 2
    floats = f'learning_rate={lr:g} base_width=48 ' if kind != 'direct' else ''
    return f'{floats}embedding_lr={embedding_lr:g}'


def rows(held):
    """[(Job, point without its loss)] of the sizes to fit, or of the held-out one; full precision
    is of ''. A step reads 4,096 bytes."""
    found = []
    for d, MB in [(d, MB) for d in SIZES if (d == HELD) == held for MB in SIZES[d]]:
        hidden, steps = 8 * round(d / 3), MB * 256              # N = 12 d^2 a layer, nearly
        shape = f'n_embd={d} hidden={hidden} block_size=128 batch_size=32 max_iters={steps} ' \
            f'warmup_iters={steps // 10} dataset=sympy-bytes eval_interval=100000 ' \
            'final_tokens=131072'
        for of in ('', *PRECISIONS):
            kind, _, text = PRECISIONS.get(of, ('', 0, ''))
            point = {'name': f'd={d} {MB} MB {of}'.strip(), 'of': of, 'D': MB * 2 ** 20,
                     'N': 4 * (4 * d * d + 3 * d * hidden)}
            often = of in SEEDED and MB in SEEDED_MB
            found += [(Job(point['name'], arguments(f'{text} {rates_of(kind, MB)} {shape}'), seed),
                       {**point, 'seed': seed}) for seed in SEEDS[d][:None if often else 1]]
    return found


def measure(job):
    """run_one, and in full precision the losses after rounding to nearest and after GPTQ."""
    result = run_one(job)
    low = {'weights', 'activations', 'kv_cache', 'stored'} & keys(job.args).keys()
    if not low and result['val_loss'] is not None:
        run = load(job, '--sequences=64')
        trained = run.model
        for name, (how, bits) in AFTER.items():
            run.model, grid = copy.deepcopy(trained), f'int{bits}/row'
            rtn_(run.model, grid) if how == 'rtn' else gptq_(
                run.model, grid, run.sequences(), act_order=False)
            result[name] = run.evaluate(run.config.final_tokens, run.val_data)
    return result


def path(end):
    return RESULTS / f'scaling{end}'


def train_all(held, jobs):
    """Train the sizes to fit, or the held-out one."""
    if not os.path.exists(f'{folder_of("sympy-bytes")}/meta.json'):
        subprocess.run([sys.executable, 'data/sympy/prepare.py', '--tokenizer=256',
                        '--out=data/sympy-bytes'], check=True)
    run_all(path('.jsonl'), [job for job, _ in rows(held)], jobs, run=measure)


def measured(held):
    """(full, points) of the runs that are there and did not diverge. Each delta is over the run of
    the same size, data and seed in full precision."""
    known = {(job.name, job.seed): point for job, point in rows(held)}
    results = results_of(path('.jsonl'), [job for job, _ in rows(held)])
    ended = [{**r, **known[r['name'], r['seed']], 'loss': r['val_loss']} for r in results
             if r['val_loss'] is not None]
    full = {(p['N'], p['D'], p['seed']): p for p in ended if not p['of']}
    pairs = [(p, full.get((p['N'], p['D'], p['seed']))) for p in ended if p['of']]
    points = [{**p, 'delta': p['loss'] - twin['loss']} for p, twin in pairs if twin]
    points += [{**p, 'name': f"{p['name']} {name}", 'of': name, 'delta': p[name] - p['loss']}
               for p in full.values() for name in AFTER]
    return [*full.values()], points


def noise_of(full):
    """Standard deviation of the loss over seeds, of runs that differ in nothing else, or None."""
    groups = defaultdict(list)
    for p in full:
        groups[p['N'], p['D']].append(p['loss'])
    spreads = [statistics.variance(losses) for losses in groups.values() if losses[1:]]
    return math.sqrt(statistics.mean(spreads)) if spreads else None


# ------------------------------------------------------------------------------------------------
# predictions and claims

def foretell(found, points):
    """{'full': {name: loss}, 'A', 'B' and 'copy': {name: delta}} of the held-out size, with the
    constants. `copy`, a yardstick, is the largest of the fitted sizes that has read as much."""
    some = [point for _, point in rows(held=True)]
    full = [p for p in some if not p['of']]
    some = [p for p in some if p['of']] + [
        {**p, 'name': f"{p['name']} {name}", 'of': name} for p in full for name in AFTER]
    told = {form: {p['name']: float(cost(found[form][p['of']], p['N'], p['D']))
                   for p in some if p['of'] in found[form]} for form in 'AB'}
    last = {(q['of'], q['D']): q['delta'] for q in sorted(points, key=lambda q: q['N'])}
    told['full'] = {p['name']: full_loss(found['base'], p['N'], p['D']) for p in full}
    return {**told, 'constants': found['said'],
            'copy': {p['name']: last[p['of'], p['D']] for p in some if (p['of'], p['D']) in last}}


def score(told, points, noise):
    """{kind or 'all': (points, {form: median error of delta in percent})} of held-out points that
    are clear of the noise. A form that says nothing of a point is wrong by 100 % there."""
    errors, forms = defaultdict(list), ('A', 'B', 'copy')
    for p in points:
        if p['delta'] > 4 * noise:
            for kind in ('all', KIND[p['of']]):
                errors[kind].append([100 * abs(told[form].get(p['name'], 0) / p['delta'] - 1)
                                     for form in forms])
    return {kind: (len(found), dict(zip(forms, np.median(found, 0).tolist())))
            for kind, found in errors.items()}


def claims(points, noise):
    """[(claim, values, '<=' or '>=')]: the mean of the values is on that side of 0. Of the first
    seed, a slope each in log D for an N and in log N for a D, or a quotient for both."""
    at, found = defaultdict(dict), []
    for p in sorted(points, key=lambda p: -p['seed']):          # the first seed is the last here
        at[p['of']][p['N'], p['D']] = math.log(max(p['delta'], noise / 10))
    for name, other in CLAIMS:
        if other in KIND:
            text = f'{name}: log of its delta over that of {other}'
            values = [y - at[other][cell] for cell, y in at[name].items() if cell in at[other]]
        else:
            text, lines = f'{name}: slope of log delta in log {other}', defaultdict(list)
            for (N, D), y in at[name].items():
                x, line = (N, D) if other == 'N' else (D, N)
                lines[line].append((math.log(x), y))
            values = [np.polyfit(*zip(*line), 1)[0] for line in lines.values() if len(line) > 1]
        if values:
            found.append((text, values, '<=' if other == 'N' else '>='))
    return found


# ------------------------------------------------------------------------------------------------
# steps

def read(end):
    if not path(end).exists():
        raise SystemExit(f'{path(end).name} is not there: run the steps sweep and predict first')
    return json.loads(path(end).read_text())


def predict(options):
    """Fit both forms, write what they say of the held-out size, and only then train and score it.
    What was predicted once stays, whatever is fitted later."""
    full, points = measured(held=False)
    noise, jobs = noise_of(full), [job for job, _ in rows(held=False)]
    if len(results_of(path('.jsonl'), jobs)) < len(jobs) or not (
            noise and (found := fit(full, points, noise))):
        raise SystemExit('unresolved, for lack of runs: run the step sweep to its end')
    if not path('-predictions.json').exists():
        path('-predictions.json').write_text(json.dumps(foretell(found, points), indent=1))
    train_all(True, options.jobs)
    found |= {'noise': noise, 'interval': bootstrap(full, points, noise),
              'score': score(read('-predictions.json'), measured(held=True)[1], noise),
              'range': {x: [min(p[x] for p in full), max(p[x] for p in full)] for x in 'ND'}}
    path('-fit.json').write_text(json.dumps(found, indent=1))


def plot(_):
    """The tables and the figure."""
    found, told = read('-fit.json'), read('-predictions.json')
    (full, points), (new, held) = measured(held=False), measured(held=True)
    off = ', '.join(f'{100 * (p["loss"] / told["full"][p["name"]] - 1):+.1f} %' for p in new)
    lines = ['# Scaling laws of low precision', '', f'Seeds differ by {found["noise"]:.4f} nats a '
             f'byte. The held-out losses in full precision are off by {off}.', '',
             f'| held out, median error of delta, wanted {BAR} % or less | points | form A | '
             'form B | copied |', '|---|---|---|---|---|']
    lines += [f'| {kind} | {n} | ' + ' | '.join(
        f'{x:.1f} % **{"PASS" if x <= BAR else "FAIL"}**' for x in errors.values()) + ' |'
        for kind, (n, errors) in found['score'].items()]
    lines += ['', '| claim | | mean and 95 % interval |', '|---|---|---|']
    some = claims(points + held, found['noise'])
    for (text, values, sign), said in zip(some, decide([(v, sign, 0) for _, v, sign in some])):
        mean, half = interval(values)
        lines.append(f'| {text} | **{said}** | {mean:+.2f} [{mean - half:+.2f}, '
                     f'{mean + half:+.2f}], {len(values)} values, wanted {sign} 0 |')
    theirs = PUBLISHED | {f'gptq {x}': value for x, value in PUBLISHED.items()} | {
        f'f of {name}': f(PUBLISHED, x, BITS[name])
        for name, x in (('w2', 'w'), ('token3', 'a'), ('token4', 'a'), ('kv2', 'kv'))}
    theirs['gptq C_T'] *= math.exp(PUBLISHED['b'])              # ours has no b
    lines += ['', '| constant | | 95 % of the bootstrap | paper 4 |', '|---|---|---|---|']
    for name, value in found['said'].items():
        low, high = found['interval'].get(name, (math.nan, math.nan))
        lines.append(f'| {name} | {value:.4g} | {low:.4g} to {high:.4g} | '
                     + (f'{theirs[name]:.4g} |' if name in theirs else '|'))
    lines += [f'| {name} | unresolved | | |' for name in BITS if name not in found['B']]
    report(path(''), lines + table(full + new, points + held))
    draw(found, told, points + held, path('.png'))


def table(full, points):
    """Lines of a table of mean losses in full precision, and of what low precision adds."""
    values = defaultdict(lambda: defaultdict(list))
    for some, field in ((full, 'val_loss'), (full, 'loss_on_train'), (points, 'delta')):
        for p in some:
            values[p['N'], p['of'] or field][p['D'] >> 20].append(p[field])
    return ['', '| N | | mean after so many megabytes |', '|---|---|---|', *(
        f'| {N} | {of} | ' + ', '.join(f'{MB} MB {statistics.mean(found):.4f}'
                                       for MB, found in by.items()) + ' |'
        for (N, of), by in values.items())]


def draw(found, told, points, target):
    """What three precisions add, against data, and all that was predicted of the held-out size."""
    from experiments.figures import pyplot
    figure, panels = pyplot.subplots(2, 2, figsize=(11, 9))
    (*laws, last), sizes = panels.flat, sorted({p['N'] for p in points})
    titles = {'w2': 'two-bit weights in the forward', 'direct ternary': 'direct ternary',
              'gptq 2': 'full precision, then GPTQ to two bits'}
    for panel, (name, title) in zip(laws, titles.items()):
        for i, N in enumerate(sizes):
            mine, held = [p for p in points if (p['of'], p['N']) == (name, N)], N == sizes[-1]
            D, delta = arrays(mine, 'D', 'delta')
            panel.plot(D, delta, 'oD'[held], color=f'C{i}',
                       label=f'{N / 1e3:.0f}k weights' + ', held out' * held)
            under = D[delta < found['noise']]           # at the edge
            panel.plot(under, 0 * under + found['noise'], 'v', color=f'C{i}')
            for form, style in (('A', '--'), ('B', '-')):
                law = found[form].get(name, (math.nan, 0, 0))
                panel.plot(np.sort(D), cost(law, N, np.sort(D)), style, color=f'C{i}')
        panel.set(title=title, xlabel='MB of text read', ylabel='rise of the loss, nats a byte')
        panel.axhline(4 * found['noise'], color='0.6', ls=':')
    clear = [p for p in points if p['N'] == sizes[-1] and p['delta'] > 4 * found['noise']]
    for form, mark, color in ('A', 's', '0.6'), ('B', 'o', 'black'):
        last.plot([p['delta'] for p in clear], [told[form].get(p['name']) for p in clear], mark,
                  color=color, label=f'predicted by form {form}')
    for factor, color, label in ((1, '0.4', 'as measured'), (1 - BAR / 100, '0.8', f'{BAR} % off'),
                                 (1 + BAR / 100, '0.8', None)):
        last.axline((0.1, 0.1 * factor), (1, factor), color=color, label=label)
    last.set(title='The held-out size, all ways of few bits', xlabel='measured, nats a byte',
             ylabel='predicted, nats a byte')
    last.legend()
    for panel in panels.flat:
        panel.set(xscale='log', yscale='log')
    for style, label in (('--', 'form A, fitted without the held-out size'),
                         ('-', 'form B, likewise'), ('v', 'below the picture'),
                         (':', 'four times the noise; nothing below it is fitted')):
        laws[0].plot([], style, color='0.4', label=label)
    figure.legend(*laws[0].get_legend_handles_labels(), loc='outside lower center', ncols=3)
    for panel in laws:
        low, high = panel.get_ylim()
        panel.set_xticks([MB * 2 ** 20 for MB in (1, 2, 4, 8)], (1, 2, 4, 8))
        panel.set_yticks(ticks := (0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 3), ticks)
        panel.set_ylim(max(0.97 * found['noise'], low), high)
        panel.minorticks_off()
    figure.savefig(target)


def plan(options):
    """Print and return the loss, N, D and precision that are best by the better form, of 6 N D <=
    compute, D <= tokens and weights of `memory` bytes at most, two each in full precision."""
    if math.isinf(min(options.compute, max(options.memory, options.tokens))):
        raise SystemExit('plan needs --compute, or --memory and --tokens')
    found, best = read('-fit.json'), (math.inf,)
    _, errors = found['score']['all']
    form = min('AB', key=errors.get)
    N, D = np.meshgrid(np.geomspace(1e3, 1e12, 901), np.geomspace(1e3, 1e15, 1201))
    for name in ('full precision', *found[form]):
        if KIND.get(name) not in ('activations', 'cache'):      # they save nothing here
            fits = (6 * N * D <= options.compute) & (D <= options.tokens) & \
                (N * BITS.get(name, 16) <= 8 * options.memory)
            delta = cost(found[form][name], N, D) if name in KIND else 0.0
            L = np.where(fits, full_loss(found['base'], N, D) + delta, np.inf)
            i = np.unravel_index(L.argmin(), L.shape)
            best = min(best, (float(L[i]), float(N[i]), float(D[i]), name))
    if math.isinf(best[0]):
        raise SystemExit('no model is so small: give more')
    L, N, D, name = best
    print(f'loss {L:.3f} nats a byte with N = {N:.3g} weights, D = {D:.3g} bytes of text, {name}')
    if name in KIND:
        n, errors = found['score'].get(KIND[name], (0, {}))
        print(f'by form {form}; on the held-out size, ' + (
            f'its median error of delta was {errors[form]:.0f} % with {KIND[name]} in few bits'
            if n else f'no delta of {name} was clear of the noise, so its error is not known'))
    for x, (low, high) in found['range'].items():
        beyond = '' if low <= {'N': N, 'D': D}[x] <= high else ', and this is beyond it'
        print(f'the law was fitted to {x} = {low:.3g} to {high:.3g}{beyond}')
    return best


STEPS = {'sweep': lambda options: train_all(False, options.jobs), 'predict': predict,
         'plot': plot, 'plan': plan}

if __name__ == '__main__':
    parser = parser_of(__doc__)
    parser.add_argument('steps', nargs='*', choices=[*STEPS, []], metavar='STEP')
    for name in ('compute', 'memory', 'tokens'):
        parser.add_argument(f'--{name}', type=float, default=math.inf, help='what plan may use: '
                            '6 N D operations, bytes of weights, bytes of text')
    options = parser.parse_args()
    limits = options.compute, options.memory, options.tokens
    if min(limits) < math.inf and 'plan' not in options.steps:
        parser.error('--compute, --memory and --tokens are for the step plan')
    for step in options.steps or ('sweep', 'predict', 'plot'):
        STEPS[step](options)
