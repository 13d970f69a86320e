"""
What each quantized tensor costs in pre-training: paper 1 (2407.11722), and later 4-bit recipes.

    python -m experiments.pretraining       three and a half hours on two cores

Every row trains a model of width 64, .26M weights in the blocks, on the same 1.6M tokens, none of
them twice: 6.2 to a weight. Longer training drives runs apart that differ in next to nothing, since
attention learns this or that, sooner or later: after 2,400 steps, with one head a layer, full
precision and five ways of 8 bits were 6 % apart (results/tries.jsonl).

Writes results/pretraining.jsonl (one line a run; finished ones are skipped), .md (claims and
tables) and .png.
"""
import math
import statistics
from dataclasses import replace

import torch

from experiments.runs import (RESULTS, SIZES, Job, arguments, claim_lines, compare, decide,
                              interval, load, losses, parser_of, report, run_all, run_one, table)
from quant import fake_quant, linears

SEEDS = 11, 12, 13, 14, 15
BASE, STRATEGIES = 'baseline', 'w8 a8 g8 w8a8 w8a8g8 adam8 adam4 kv4 w4 a4 w4a4 w4a4g4 bitnet ' \
    'ternary ternary_int8 direct8 direct4 dqt_paper everything'
G4, M4, V8 = 'gradients=int4/row', 'adam_m=int4/row', 'adam_v=uint8/tensor'
DX, DW = 'mxfp4 in dx', 'mxfp4 in dw'
BY_CHANCE, ROTATED = 'mxfp4/stochastic in dw', 'mxfp4/hadamard in dw'
ROUNDED = 'baseline, rounded to int4/row'       # no run: see `run_and_look`


def rows():
    """{section: {name: keys for train.py}}; those without a config are named by what they do."""
    paper = 'weights=int4/tensor', 'activations=int4/row/asymmetric', G4, M4, V8
    # requantize: in each matmul of the backward, both sides have blocks along the sum
    three = 'weights={0} activations={0} gradients={0}{1} backward=requantize'.format
    one = 'gradients=mxfp4{} gradients_in={} backward=requantize'.format
    nvfp4 = three('nvfp4', '/hadamard/stochastic')      # about the recipe of 2509.25149
    muon = 'optimizer=muon init_gain=0.'
    return {
        'Strategies': {name: f'config/{name}.py' for name in (BASE, *STRATEGIES.split())},
        'Paper 1': dict(zip(paper, paper)),
        'Blocks, in all three matmuls': {
            'mxfp8': three('mxfp8', ''), 'nvfp4': nvfp4,
            'nvfp4, but the last layer': f'{nvfp4} keep=h.3'},
        'Four bits in one matmul': {
            'mxfp4 forward': 'weights=mxfp4 activations=mxfp4',
            DX: one('', 'dx'), DW: one('', 'dw'),
            BY_CHANCE: one('/stochastic', 'dw'), ROTATED: one('/hadamard', 'dw')},
        'Muon': {
            'muon': muon, 'muon, m in int8': f'{muon} adam_m=int8/row',
            'muon, m in mxfp8': f'{muon} adam_m=mxfp8'}}


CLAIMS = [  # (of whom, what it says, a, '<=' or '>=', percent, b): loss(a) against loss(b)
    ('paper 1', '8-bit weights and activations match full precision', 'w8a8', '<=', 1, BASE),
    ('ours', '8 bits in all three matmuls match full precision', 'w8a8g8', '<=', 1, BASE),
    ('paper 1', '4-bit weights are worse', 'w4', '>=', 0, BASE),
    ('paper 1', 'rounding them after training is worse still', ROUNDED, '>=', 0, 'w4'),
    ('paper 1', '4-bit activations are not close', 'a4', '>=', 1, BASE),
    ('paper 1', '4-bit gradients hurt', G4, '>=', 0, BASE),
    ('paper 1', '4-bit m is free', M4, '<=', 1, BASE),
    ('paper 1', 'linear 8-bit v blows up', V8, '>=', 5, BASE),
    ('2605.09825', 'dx in 4 bits costs little', DX, '<=', 1, BASE),
    ('2605.09825', 'dw in 4 bits is what hurts', DW, '>=', 0, DX),
    ('2605.09825', 'stochastic rounding does not help it', BY_CHANCE, '>=', 0, DW),
    ('2605.09825', 'a fixed rotation does', ROTATED, '<=', 0, DW)]


# ------------------------------------------------------------------------------------------------
# looking into trained models

def run_and_look(job):
    """run_one, and what the trained model of a baseline or of 4-bit weights shows."""
    result = run_one(job)
    if job.name not in (BASE, 'w4') or result['val_loss'] is None:
        return result
    result['sharpness'] = sharpness(load(job))
    if job.name == BASE:
        result['zeros'] = zeros(load(job))
        run = load(job, '--weights=int4/row')
        n = run.config.final_tokens
        result['rounded'] = {'val_loss': run.evaluate(n, run.val_data), 'evaluations': [],
                             'loss_on_train': run.evaluate(n // 8, run.train_data)}
    return result


@torch.no_grad()
def sharpness(run, size=0.2, draws=8):
    """How much the loss rises, in nats, if the weights that the forward sees get normal noise of
    `size` times their own rms; rounding to 4 bits changes them about half as much."""
    layers = list(linears(run.model).values())
    seen = [fake_quant(layer.weight, layer.how.weights).clone() for layer in layers]
    found, generator = [], torch.Generator().manual_seed(0)
    for noise in (0.0, *[size] * draws):
        for layer, w in zip(layers, seen):
            layer.how = replace(layer.how, weights=None)        # w is rounded already
            n = torch.randn(w.shape, generator=generator).to(w.device)
            layer.weight.copy_(w + noise * w.square().mean().sqrt() * n)
        found.append(run.evaluate(2 ** 13, run.val_data))
    return statistics.mean(found[1:]) - found[0]


def zeros(run):
    """Percents of the gradients that rounding to int8/row makes zero: {'layer': of the median
    block linear's output, 'logits': of softmax - onehot}."""
    def lost(g):
        gone = (fake_quant(g, 'int8/row') == 0) & (g != 0)
        return 100 * (gone.sum() / (g != 0).sum()).item()

    def look(layer, args, y):
        y.register_hook(lambda g: found.append(lost(g)))

    T, found = run.config.block_size, []
    x, y = run.batch(run.val_data, range(0, 8 * T, T))
    with torch.no_grad():
        p = run.model(x).softmax(-1)                                    # (8, T, vocab)
    for layer in linears(run.model).values():
        layer.register_forward_hook(look)
    run.model(x, y).backward()
    logits = lost(p - torch.nn.functional.one_hot(y, p.shape[-1]))
    return {'layer': statistics.median(found), 'logits': logits}


def look_lines(results):
    """Lines of a markdown table: verdicts on what `run_and_look` saw, over seeds."""
    base, four = ({r['seed']: r for r in results if r['name'] == name and 'sharpness' in r}
                  for name in (BASE, 'w4'))
    more = [four[s]['sharpness'] - base[s]['sharpness'] for s in four if s in base]
    claims = [('8 bits make most of a gradient zero: %, of the median layer', '>=', 50,
               [r['zeros']['layer'] for r in base.values()]),
              ('%, of the logits', '>=', 50, [r['zeros']['logits'] for r in base.values()]),
              ('4-bit weights are in sharper minima: nats that noise costs, less those at the '
               'baseline', '>=', 0, more)]
    claims = [claim for claim in claims if claim[3]]
    words = decide([(values, sign, bound) for _, sign, bound, values in claims])
    lines = ['| paper 1 in trained models | | mean and 95 % interval |', '|---|---|---|']
    for word, (text, sign, bound, values) in zip(words, claims):
        mean, half = interval(values)
        lines.append(f'| {text} | **{word}** | {mean:.3g} [{mean - half:.3g}, {mean + half:.3g}], '
                     f'wanted {sign} {bound} |')
    return lines


# ------------------------------------------------------------------------------------------------
# what comes out

def draw(results, sections, path, most=100):
    """A line for every row: its loss against the baseline, up to `most` percent."""
    from experiments.figures import pyplot
    ticks = [name for section, names in sections.items() for name in (section, *names)]
    ticks.remove(BASE)
    figure, panel = pyplot.subplots(figsize=(8, 0.21 * len(ticks) + 1.2))
    panel.set_xscale('symlog', linthresh=1, linscale=1.5)       # linear between -1 and 1
    found = [(*compare(results, name, BASE), place) for place, name in enumerate(ticks)]
    for label, mark, points in (
            ('mean and 95 % interval', 'o', [p for p in found if p[0] <= most]),
            (f'more than {most} %, or not finite', '>',
             [(most, 0, place) for mean, _, place in found if mean > most])):
        if points:
            x, halves, y = zip(*points)
            panel.errorbar(x, y, xerr=halves, fmt=mark, capsize=2, color='C0', label=label)
    panel.set_yticks(range(len(ticks)), ticks, fontsize=8)
    for label in panel.get_yticklabels():
        label.set_weight('bold' if label.get_text() in sections else 'normal')
    low, high = panel.get_xlim()        # the usual marks would be powers of ten alone
    marks = [x for x in (-20, -10, -5, -2, -1, -0.5, 0, 0.5, 1, 2, 5, 10, 20, 50)
             if low <= x <= high]
    panel.set_xticks(marks, [f'{x:g}' for x in marks])
    panel.minorticks_off()
    panel.set(ylim=(len(ticks) - 0.5, -0.5),
              xlabel='validation loss against the baseline, % (beyond 1: logarithmic)')
    panel.axvline(0, color='0.5', lw=1, zorder=0)
    panel.grid(False, axis='y')
    figure.legend(loc='outside upper center', ncols=3)
    figure.savefig(path)


def jobs_of(seeds):
    every = {name: text for section in rows().values() for name, text in section.items()}
    return [Job(name, [*SIZES['tiny'], *arguments(text)], seed)
            for seed in seeds for name, text in every.items()]


def main(options):
    stem, sections = RESULTS / 'pretraining', rows()
    results = run_all(stem.with_suffix('.jsonl'), jobs_of(options.seeds), options.jobs,
                      run=run_and_look)
    results += [{**r, **r['rounded'], 'name': ROUNDED} for r in results if 'rounded' in r]
    sections['Paper 1'][ROUNDED] = ''
    lines = ['# Quantized pre-training', *claim_lines(results, CLAIMS), '', *look_lines(results)]
    for section, names in sections.items():
        names = [name for name in names if losses(results, name)]
        lines += ['', f'**{section}**', '', *table(results, BASE, names)]
    report(stem, lines)
    draw(results, sections, stem.with_suffix('.png'))


if __name__ == '__main__':
    main(parser_of(__doc__, [*SEEDS]).parse_args())
