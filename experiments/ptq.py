"""
Post-training quantization against quantization-aware fine-tuning (paper 3, 2410.14570).

    python -m experiments.ptq                       two models, six hours or more on two cores
    python -m experiments.ptq --models small        one of them

The block weights of a trained model are brought to 4, 3 and 2 bits: rounded to nearest (RTN), by
GPTQ, and by fine-tuning with quantized weights (QAFT), which starts from the trained weights or
from GPTQ's, and may have the trained model as its teacher. Or GPTQ's codes stay, and their scales
are fine-tuned (PEQA, Kim et al., arXiv 2305.14152), with embeddings and norms or without.
GPTQ and fine-tuning see the same new text, of files that a model trained here has not read. A
control is fine-tuned on it in full precision, with as many tries. The cost of a method is the rise
of the loss: of RTN and GPTQ over the trained model, of others over the control, so that what any
model gains from new text does not count.
Rates and epochs are chosen on one half of the validation text, and losses are of the other.

Writes results/ptq.jsonl, one line a run, ptq.md and ptq.png; with --models, ptq-small.md and so on.
Finished runs are skipped; but where out/, in which their models are, is gone, a model begins anew
only if its lines are removed.
"""
import math
import statistics
from itertools import pairwise, product
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import config
import train
from data.corpus import sequence_starts, write
from data.tokenizer import make_tokenizer
from experiments import ideas, pretrained
from experiments.runs import (RESULTS, ROOT, Job, arguments, decide, idea, interval, keys, load,
                              parser_of, read, report, run_all, run_one)
from model import GPT
from quant import dequantize, fake_quant, linears


class Plan(NamedTuple):
    """A model, and what is made of it."""
    start: str              # how it is trained, or the checkpoint that it comes from
    windows: int            # of new text, to calibrate and to fine-tune on
    batch: int              # windows a step
    groups: tuple           # what shares a scale; tries are made with the first of them
    bits: tuple
    rates: tuple            # learning_rate of fine-tuning, each tried; more keys may follow it
    epochs: tuple           # each tried with each of the rates
    methods: tuple          # of fine-tuning: all but QAFT below 4 bits alone, with first of groups
    scale_rates: tuple      # the same, of `SCALES`
    tuned: int              # the seed that chooses
    seeds: int              # at most so many of --seeds report
    tokens: int             # of validation text to report on; half as many to choose by
    step: float             # seconds of a step of fine-tuning, on one core of an AMD EPYC


SCALES = 'scales of GPTQ'
TUNED = 'QAFT', 'QAFT from GPTQ', 'QAFT with a teacher', SCALES
DRAWN = 'RTN', 'GPTQ', *TUNED, 'random'
RATES = '3e-5', '1e-4', '3e-4', '1e-3'
# a model that is trained here reads 4.1M tokens, each once, 2,048 a step, without momentum and
# at the best of the rates that were tried for its size (results/tries.jsonl)
PLANS = {
    'small': Plan('config/small.py beta1=0. max_iters=2000', 1024, 8, (64, 'row'), (4, 3, 2), RATES,
                  (1, 2, 4), TUNED[:3], (), 1, 9, 2 ** 16, 0.17),
    # a step at a rate of zero makes it a run like any other; one seed chooses, and reports
    'smollm2': Plan('out/pretrained/ckpt.pt block_size=512 batch_size=4 learning_rate=0. '
                    'embedding_lr=0. max_iters=1 warmup_iters=0', 128, 4, (64,), (3, 2),
                    (*RATES[2:], '1e-3 embedding_lr=1e-12'), (1,), (*TUNED[:2], SCALES),
                    ('1e-2', '1e-2 learning_rate=1e-3', '0. learning_rate=1e-3'), 11, 1, 2 ** 13,
                    33)}
TAU = 0.05                  # nats: the rise of the loss at the edge of the basin
WAY = 0, 0.25, 0.5, 0.75, 1, 1.25, 1.5      # from the trained weights to those of a method


# ------------------------------------------------------------------------------------------------
# the text, and the runs

def documents(model):
    """Three lists of documents: to train on, new ones, and to measure on. Of the files to train on
    every tenth is new: the base does not get it. What SmolLM2 has read is not known; of sympy and
    of pydoc_data.topics, it gets as many characters as the shorter one has."""
    texts = pretrained.documents()
    if '.pt' not in PLANS[model].start:
        old, val = texts['python']
        return [text for i, text in enumerate(old) if i % 10], old[::10], val
    new, val = (['\n'.join(part) for part in both] for both in zip(*texts.values()))
    return [], *([text[:min(map(len, part))] for text in part] for part in (new, val))


def make_text(model):
    """The datasets out/ptq/<model>-base and -new, with one val.bin, unless they are there."""
    folders = [ROOT / 'out' / 'ptq' / f'{model}-{name}' for name in ('base', 'new')]
    if (folders[1] / 'meta.json').exists():
        return
    *both, val = documents(model)
    tokenizer = make_tokenizer('1024' if both[0] else pretrained.convert()[0], ''.join(both[0]))
    for folder, texts in zip(folders, both):
        if texts:
            split = [('train', text) for text in texts] + [('val', text) for text in val]
            write(folder, model, tokenizer, split, math.inf)


def jobs_of(model, seed, chosen=None):
    """{(grid, method, how): Job}; of base and control the grid is '', and of fine-tuning how is
    (rate, epochs): all tries, or, to report, those `chosen`, {(bits, method): how}."""
    plan, found, new = PLANS[model], {}, f'--dataset=out/ptq/{model}-new'

    def add(grid, method, how, *args):
        """Add a job; returns the folder of its checkpoints."""
        name = ' '.join([model, *filter(None, (grid, method)), *map(str, how or ())])
        same = ['--dtype=float32'] * (model == 'smollm2')       # on a CPU without fast bfloat16
        found[grid, method, how] = Job(name, [*args, *same], seed)
        return found[grid, method, how].folder.relative_to(ROOT).as_posix()

    def fine_tune(grid, method, *start):
        every = product(plan.scale_rates if method == SCALES else plan.rates, plan.epochs)
        for rate, epochs in [chosen[grid[:4], method]] if chosen else every:
            steps = epochs * plan.windows // plan.batch
            what = f'config/qaft.py weights={grid} learning_rate={rate}'
            if method == SCALES:
                what = f'config/peqa.py scale_lr={rate}'
            add(grid, method, (rate, epochs), *start, *arguments(
                f'{what} max_iters={steps} warmup_iters={steps // 10} '
                f'sequences={plan.windows}'), new)

    base = add('', 'base', None, *arguments(
        f"{plan.start} dataset=out/ptq/{model}-{'new' if '.pt' in plan.start else 'base'} "
        'eval_interval=100000 eval_tokens=2048 final_tokens=2048')) + '/ckpt.pt'
    fine_tune('', 'control', base)
    for bits, group in product(plan.bits, plan.groups):
        grid, first = f'int{bits}/{group}/mse', group == plan.groups[0]
        rounded = base, 'config/gptq.py', f'--stored={grid}', f'--sequences={plan.windows}', new
        add(grid, 'RTN', None, *rounded, '--ptq=rtn')
        gptq = add(grid, 'GPTQ', None, *rounded)
        starts = [base], [f'{gptq}/floats.pt'], [base, '--idea=teacher'], [f'{gptq}/ckpt.pt']
        for method, start in zip(TUNED, starts):
            is_qaft = method == 'QAFT'
            wanted = first and (bits < 4 or is_qaft) or chosen and is_qaft
            if method in plan.methods and wanted:
                fine_tune(grid, method, *start)
    return found


def time_of(job):
    """The seconds that a run takes on one core, roughly and at most."""
    plan, found = PLANS[job.name.split()[0]], keys(job.args)
    steps = {'rtn': 0, 'gptq': plan.windows // plan.batch, None: found.get('max_iters')}
    return plan.step * (10 + steps[found.get('ptq')])       # ten for evaluations


# ------------------------------------------------------------------------------------------------
# a run, and what is looked at in its model

def taught(teacher):
    """GPT.forward, but in training the loss is the cross-entropy with what the teacher says."""
    plain = GPT.forward

    def forward(model, idx, targets=None, caches=None):
        if targets is None or not model.training or idx.is_meta:        # meta: a dry run
            return plain(model, idx, targets, caches)
        with torch.no_grad():
            p = plain(teacher, idx).softmax(-1)                         # (B, T, vocab)
        return -(p * plain(model, idx).log_softmax(-1)).sum(-1).mean()

    return forward


@torch.no_grad()
def part_losses(run, data, starts):
    """Loss in nats per token of each of up to 32 parts of the windows that begin at `starts`."""
    run.model.eval()
    return [run.model(*run.batch(data, part)).item()
            for part in np.array_split(starts, min(32, len(starts)))]


def half(run, which, tokens):
    """`part_losses` of every second window of val.bin, or fewer: 0 to choose by, 1 to report."""
    T = run.config.block_size
    windows = np.arange(which, (len(run.val_data) - 1) // T, 2)
    few = np.linspace(0, len(windows) - 1, min(len(windows), tokens // T)).astype(int)
    return part_losses(run, run.val_data, windows[few] * T)


def measure(job):
    """run_one; the loss on both halves and on the new text, and what was done to the weights."""
    model, ptq = job.name.split()[0], keys(job.args).get('ptq')
    plan, base = PLANS[model], jobs_of(model, job.seed)['', 'base', None]
    opened = lambda job: load(job, f'--dataset=out/ptq/{model}-new', f'--sequences={plan.windows}')
    if idea(job.args) == 'teacher':
        ideas.PATCHES['teacher'] = GPT, 'forward', taught(opened(base).model)
    result = run_one(job)
    if result['val_loss'] is None:
        return {**result, 'choose': math.inf}
    run = opened(job)
    if ptq == 'gptq':
        save_floats(run, job.folder)
    few = sequence_starts(run.config, len(run.train_data))[:max(1, plan.windows // 32)]
    seen, choose = part_losses(run, run.train_data, few), half(run, 0, plan.tokens // 2)
    result |= {'choose': statistics.mean(choose), 'seen': statistics.mean(seen),
               'report': half(run, 1, plan.tokens)}
    return result if job.seed == plan.tuned else result | look(opened(base), run, ptq == 'rtn')


def save_floats(run, folder):
    """The checkpoint of quantized weights as floats, to fine-tune from. Their search for a scale
    finds GPTQ's in 2 bits; in 3, where a group has the lowest code, one 7 % beside it."""
    old = config.load(f'{folder}/ckpt.pt', train.Config)
    state = {name: t for name, t in run.model.state_dict().items()
             if not name.endswith(('.codes', '.scale'))}
    state |= {name: dequantize(m.stored_weight()) for name, m in linears(run.model).items()}
    config.save(f'{folder}/floats.pt', {
        **old, 'config': {**old['config'], 'stored': ''}, 'model': state})


@torch.no_grad()
def look(base, run, randomly):
    """Of the change d of the weights W: its length in the blocks; the local error |d X|^2 /
    |W X|^2, on inputs X of the base; and the loss along the way, if `randomly` also that along a
    random d with matrices as long."""
    layers, w = linears(base.model), {k: p.clone() for k, p in base.model.named_parameters()}
    q = dict(run.model.named_parameters()) | {      # block weights as the forward sees them
        k: fake_quant(dequantize(m.stored_weight()), m.how.weights)
        for k, m in linears(run.model).items()}
    d, sizes, idx = {name: q[name] - w[name] for name in w}, [], run.sequences()[:128]
    hooks = [layer.register_forward_pre_hook(lambda m, x, name=name: sizes.append([
        F.linear(x[0].float(), v[name]).square().sum().item() for v in (d, w)]))
        for name, layer in layers.items()]
    base.model(idx, idx)
    for hook in hooks:
        hook.remove()
    error, whole = np.array(sizes).T

    def line(d):
        found = []
        for a in WAY:
            for name, p in base.model.named_parameters():
                p.copy_(w[name] + a * d[name])
            found.append(statistics.mean(half(base, 1, 2 ** 14)))
        return found

    found = {'distance': sum(d[name].square().sum().item() for name in layers) ** 0.5,
             'error': error.sum() / whole.sum(), 'errors': [*(error / whole)], 'line': line(d)}
    if randomly:
        torch.manual_seed(0)
        noise = {name: torch.randn_like(t) for name, t in d.items()}
        found['random'] = line({name: d[name].norm() / t.norm() * t for name, t in noise.items()})
    return found


# ------------------------------------------------------------------------------------------------
# what it comes to: `found` is {(grid, method): [a result line of each seed]}

def of(found, grid, method, field):
    return np.array([r[field] for r in found[grid, method]])


def loss(found, grid, method):
    """That of each seed; if there is one alone, that of each part of the text."""
    parts = of(found, grid, method, 'report')
    return parts.mean(1) if len(parts) > 1 else parts[0]


def costs(found):
    """{(grid, method): rise of the loss}, of fine-tuning over the control, else over the base."""
    return {(grid, method): loss(found, grid, method) - loss(
        found, '', 'control' if method in TUNED else 'base') for grid, method in found if grid}


def ways(found, grid, method):
    """Of each seed the rise of the loss along WAY; of fine-tuning, over it towards the control."""
    if method in TUNED:
        return of(found, grid, method, 'line') - of(found, '', 'control', 'line')
    lines = of(found, grid, *(('RTN', 'random') if method == 'random' else (method, 'line')))
    return lines - lines[:, :1]


def claims(found):
    """{claim, written before these runs (P8 after a shorter try): [(text, a number of each seed,
    sign, bound)]}; the parts of a claim are about means, and one family."""
    cost_of, grids = costs(found), list(dict.fromkeys(grid for grid, _ in found if grid))
    low, best = [grid for grid in grids if grid[3] < '4'], ('QAFT', 'GPTQ', 'RTN')
    cost = lambda grid, method: cost_of[grid, method]
    gain = lambda grid: cost(grid, 'GPTQ') - cost(grid, 'QAFT')

    def rising(what, methods, which, bound=0):
        """On these grids each method has more of it than the one before."""
        return [(f'{g}, {b} - {a}', what(g, b) - what(g, a), '>=', bound)
                for a, b in pairwise(methods) for g in which]

    told = {
        'P0: at 3 and 2 bits QAFT costs less than GPTQ': rising(cost, best[:2], low),
        'P1: there QAFT costs less than GPTQ, and GPTQ than RTN, by .005 nats each':
            rising(cost, best, low, 0.005),
        'P2: the fewer bits, the more QAFT gains on GPTQ': [
            (f'{b} over {a}', gain(b) - gain(a), '>=', 0) for a in grids
            for b in [f'int{int(a[3]) - 1}{a[4:]}'] if b in grids],
        'P7: at 3 and 2 bits it pays to start from GPTQ, and to have a teacher': [
            part for method in TUNED[1:3] for part in rising(
                cost, (method, 'QAFT'), [g for g in low if (g, method) in found])],
        'P8: there it costs less to tune the scales of GPTQ than its weights, or nothing': [
            part for method in ('QAFT from GPTQ', 'GPTQ') for part in rising(
                cost, (SCALES, method), [g for g in low if (g, SCALES) in found])]}
    if 'line' not in found[grids[0], 'RTN'][0]:
        return told
    from scipy.stats import spearmanr
    r = lambda grid, method: of(found, grid, method.replace('random', 'RTN'), 'distance')
    error = lambda grid, method: of(found, grid, method, 'error')
    slope = lambda grid, method: ways(found, grid, method)[:, WAY.index(1)] / r(grid, method)
    share = np.mean([of(found, g, 'GPTQ', 'errors') < of(found, g, 'RTN', 'errors')
                     for g in grids], (0, 2))
    edge = {}
    for g in grids:     # R is read off the random way with the longest steps, where rise ~ r^2
        far = 'int2' + g[4:]
        edge[g] = r(g, 'RTN') / r(far, 'RTN') / [
            np.interp(TAU ** 0.5, way.clip(0) ** 0.5, WAY) for way in ways(found, far, 'random')]
    order = [spearmanr(x, y).statistic for x, y in zip(zip(*edge.values()), zip(*(
        of(found, g, 'RTN', 'report').mean(1) for g in grids)))]
    return told | {
        'P3: GPTQ has less local error than RTN in 90 % of the layers, at 3 and 2 bits QAFT more '
        'than GPTQ': [('share', share, '>=', 0.9), *rising(error, ('GPTQ', 'QAFT'), low)],
        'P4: RTN is no farther from the trained weights than GPTQ; at 3 and 2 bits QAFT is farther'
        : rising(r, ('RTN', 'GPTQ'), grids) + rising(r, ('GPTQ', 'QAFT'), low),
        f'P5: RTN ends within R, where random steps cost {TAU} nats, at 4 bits, and beyond it at '
        '2; r / R orders its costs, with a rank correlation of .9': [
            *((f'{g}, r / R', edge[g], '<=' if g[3] == '4' else '>=', 1)
              for g in grids if g[3] != '3'), ('rank correlation', order, '>=', 0.9)],
        'P6: a unit of distance costs least with QAFT, then GPTQ, RTN, and random steps':
            rising(slope, (*best, 'random'), grids)}


def plus_minus(values):
    return '{:+.4f} ± {:.4f}'.format(*interval([*values]))


def table(model, found, chosen):
    """Lines of markdown: the losses of a model, and what became of the claims."""
    cost_of, base, n = costs(found), loss(found, '', 'base'), len(found['', 'base'])
    seen = {what: statistics.mean(r['seen'] for r in lines) for what, lines in found.items()}
    lines = ['', f'## {model}, {statistics.mean(base):.4f} nats per token, '
             + (f'{n} seeds' if n > 1 else 'one seed: intervals are over parts of the text'), '',
             '| weights | method | rise of the loss | over the control | on text it saw | rate, '
             'epochs |', '|---|---|---|---|---|---|']
    for grid, method in [('', 'control'), *cost_of]:
        over = plus_minus(cost_of[grid, method]) if method in TUNED else ''
        how = ', '.join(map(str, chosen[grid[:4], method] or ()))
        rise = plus_minus(loss(found, grid, method) - base)
        lines.append(f'| {grid} | {method} | {rise} | {over} | '
                     f'{seen[grid, method] - seen["", "base"]:+.4f} | {how} |')
    lines += ['', '| claim | | its parts: mean and 95 % interval |', '|---|---|---|']
    for claim, parts in claims(found).items():
        words = decide([([*values], sign, bound) for _, values, sign, bound in parts])
        whole = next((word for word in ('FAIL', 'UNRESOLVED') if word in words), 'PASS')
        lines += [f'| {claim} | **{whole}** | ' + '; '.join(
            f'{text}: {plus_minus(values)}, wanted {sign} {bound}, {word}'
            for word, (text, values, sign, bound) in zip(words, parts)) + ' |'] if parts else []
    return lines


def draw(everything, path):
    """Costs by bits; of the first model that reports on other seeds than the one that chose, also
    costs by local error, and the loss on the way."""
    from experiments.figures import METHODS, pyplot
    color = lambda method: METHODS[method]['color']
    figure, (one, two, three) = pyplot.subplots(1, 3, figsize=(13, 4.4))
    for (model, found), marker in zip(everything.items(), 'oD'):
        curves = {}
        for (grid, method), value in costs(found).items():
            beside = int(grid[3]) + 0.04 * (len(DRAWN) / 2 - DRAWN.index(method))
            curves.setdefault((method, grid[5:-4]), []).append((beside, *interval([*value])))
        for (method, group), points in curves.items():
            one.errorbar(*zip(*points), marker=marker, capsize=3, color=color(method),
                         ls='-:'[group == 'row'])
        for group in sorted({group for _, group in curves}):
            one.plot([], [], marker + '-:'[group == 'row'], color='0.4',
                     label=f'{model}, a scale per {group}')
    name, found = next((name, found) for name, found in everything.items()
                       if 'line' in found['', 'base'][0])
    for (grid, method), value in costs(found).items():
        two.plot(of(found, grid, method, 'error').mean(), value.mean(), '^so'[int(grid[3]) - 2],
                 color=color(method))
    for mark, bits in zip('os^', (4, 3, 2)):
        two.plot([], mark, color='0.4', label=f'{bits} bits')
    grid = next(grid for grid, _ in found if grid[:4] == 'int3')
    for method in (m for m in DRAWN if m == 'random' or (grid, m) in found):
        r = of(found, grid, method.replace('random', 'RTN'), 'distance').mean()
        three.plot([a * r for a in WAY], ways(found, grid, method).mean(0), 'o-',
                   color=color(method), markevery=[WAY.index(1)])
    for axis, title, x, more in (
            (one, 'What few bits cost', 'bits of a weight; marks are shifted sideways',
             {'xticks': (2, 3, 4)}),
            (two, f'{name}: cost by local error', 'local error, |(Q - W) X|^2 / |W X|^2',
             {'xscale': 'log'}),
            (three, f'{name}: on the straight way to {grid[:4]}; dots: there',
             'distance from the trained weights', {})):
        axis.set(title=title, xlabel=x, **more)
        if axis is not three:
            low = axis.dataLim.ymin
            axis.set_yscale('symlog', linthresh=0.01, linscale=0.3)
            axis.set_ylim(0.8 * low if low > 0.01 else min(0, low))
            axis.legend(loc='upper right' if axis is one else 'upper left')
    one.set_ylabel('rise of the loss, nats/token')
    shown = {'random', *(method for found in everything.values() for _, method in found)}
    for method in filter(shown.__contains__, DRAWN):        # in any of the panels
        three.plot([], [], 'o-', color=color(method), label=method)
    figure.legend(*three.get_legend_handles_labels(), loc='outside lower center', ncols=7,
                  title='rise over the trained model; of what is fine-tuned, over the control')
    figure.savefig(path)


# ------------------------------------------------------------------------------------------------
# from the first run to the last

def run_model(model, options):
    """Train what is not in the results yet: ({(grid, method): [a result line of each seed]},
    {(bits, method): the chosen how})."""
    path, tries = RESULTS / 'ptq.jsonl', jobs_of(model, PLANS[model].tuned)

    def run(every):
        """Result lines by mark. What others start from comes first, and keeps its checkpoints."""
        keep = [job.name for found in every for what, job in found.items()
                if what[1] in ('base', 'GPTQ')]
        for stage in ('base',), ('RTN', 'GPTQ'), ('control', *TUNED):
            todo = [job for found in every for what, job in found.items() if what[1] in stage]
            run_all(path, todo, options.jobs, keep, measure, time_of)
        return {r['mark']: r for r in read(path)}

    lines = run([tries])
    best_last = sorted(tries.items(), key=lambda item: -lines[item[1].mark]['choose'])
    chosen = {(grid[:4], method): how for (grid, method, how), _ in best_last}
    reports = [jobs_of(model, seed, chosen) for seed in options.seeds[:PLANS[model].seeds]]
    lines = run(reports)
    for job in (job for found in reports for job in found.values()):
        if lines[job.mark]['val_loss'] is None:
            raise SystemExit(f'{job.name}, seed {job.seed}, is not finite: there is no table of it')
    return {what[:2]: [lines[found[what].mark] for found in reports]
            for what in reports[0]}, chosen


def main(options):
    everything, lines = {}, ['# Quantized after training, or fine-tuned']
    for model in options.models:
        make_text(model)            # what is not installed is said before hours have gone
    for model in options.models:
        everything[model], chosen = run_model(model, options)
        lines += table(model, everything[model], chosen)
    some = options.models if options.models != [*PLANS] else []
    stem = RESULTS / '-'.join(['ptq', *some])
    report(stem, lines)
    if any('line' in found['', 'base'][0] for found in everything.values()):
        draw(everything, stem.with_suffix('.png'))


if __name__ == '__main__':
    parser = parser_of(__doc__, [11, 12, 13, 14, 15])
    parser.add_argument('--models', nargs='+', choices=PLANS, default=[*PLANS])
    main(parser.parse_args())
