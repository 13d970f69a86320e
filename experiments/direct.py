"""
What each strategy costs in quality, part 2: direct quantized training (paper 2, 2412.04787).

    python -m experiments.direct                                     the small model
    python -m experiments.direct --size=default --sections hard      the hard goal at 3.7M,
    python -m experiments.direct --size=large --sections hard        and at 41M for 5,000 steps
    python -m experiments.direct --sections                          only print and draw

Weights that are stored in few bits against BitNet b1.58 and full precision, each with rates of its
own, found by tries on seed 1 (section `tune`); the controls; the ingredients of the direct update,
and ideas that are not in it. Writes experiments/results/direct-<size>.jsonl (one line a run;
finished ones are skipped), .md and .png.
"""
import argparse
import os
import statistics

from experiments.runs import (RESULTS, ROOT, SIZES, Job, arguments, claim_lines, losses,
                              report, results_of, run_all, table)

BASE, BITNET, TERNARY = 'full precision', 'BitNet b1.58', 'direct ternary'
CONFIGS = {BASE: 'config/baseline.py', BITNET: 'config/bitnet.py', TERNARY: 'config/ternary.py'}
# what direct training takes for granted, offered to the others, and the usual way
RECIPE, PLAIN = 'beta2=.999 ramp=20 init_gain=.7 adam_v=rank1 ', 'beta2=.95 '

# size: the tries of each side, one seed each; all rows take the first, the best when it was chosen
TRIES = {
    'small': {
        BASE: [*(PLAIN + rates for rates in (
            'learning_rate=1.5e-3 embedding_lr=12e-3', 'learning_rate=1.5e-3 embedding_lr=24e-3',
            'learning_rate=1.5e-3 embedding_lr=48e-3', 'learning_rate=1.5e-3 embedding_lr=96e-3',
            'learning_rate=2e-3 embedding_lr=12e-3', 'learning_rate=1.5e-3 embedding_lr=6e-3',
            'learning_rate=.75e-3 embedding_lr=6e-3')),
            RECIPE + 'learning_rate=1.5e-3 embedding_lr=12e-3'],
        BITNET: [*(PLAIN + rates for rates in (
            'learning_rate=4e-3 embedding_lr=48e-3', 'learning_rate=3e-3 embedding_lr=12e-3',
            'learning_rate=3e-3 embedding_lr=6e-3', 'learning_rate=1.5e-3 embedding_lr=6e-3',
            'learning_rate=4e-3 embedding_lr=12e-3', 'learning_rate=6e-3 embedding_lr=24e-3',
            'learning_rate=4e-3 embedding_lr=24e-3', 'learning_rate=4e-3 embedding_lr=96e-3',
            'learning_rate=6e-3 embedding_lr=96e-3',
            'learning_rate=4e-3 embedding_lr=24e-3 beta2=.999',
            'learning_rate=4e-3 embedding_lr=24e-3 weights=ternary/row/absmean',
            'learning_rate=4e-3 embedding_lr=48e-3 weights=ternary/row/absmean',
            'learning_rate=12e-3 embedding_lr=24e-3 ramp=40 threshold=1')),
            RECIPE + 'learning_rate=4e-3 embedding_lr=24e-3'],
        TERNARY: ['embedding_lr=96e-3', 'embedding_lr=12e-3', 'embedding_lr=24e-3',
                  'embedding_lr=48e-3', 'embedding_lr=48e-3 code_lr=.4',
                  'embedding_lr=48e-3 scale_lr=0', 'embedding_lr=96e-3 scale_lr=0',
                  'embedding_lr=192e-3 scale_lr=0', 'embedding_lr=96e-3 scale_lr=0 ramp=0',
                  'embedding_lr=48e-3 scale_lr=0 stored=ternary/tensor/absmean/stochastic',
                  'embedding_lr=24e-3 code_lr=.1 threshold=1 ramp=20',
                  'embedding_lr=24e-3 code_lr=.2 threshold=1.5 ramp=20',
                  'embedding_lr=24e-3 code_lr=.4', 'embedding_lr=24e-3 code_lr=1.6',
                  'embedding_lr=24e-3 threshold=2.5', 'embedding_lr=24e-3 ramp=20',
                  'embedding_lr=24e-3 ramp=0']},
    'default': {
        BASE: [*(RECIPE + rates for rates in (
            'learning_rate=.75e-3 embedding_lr=6e-3', 'learning_rate=1.5e-3 embedding_lr=6e-3',
            'learning_rate=5e-3 embedding_lr=6e-3 ramp=40 threshold=1',
            'learning_rate=.4e-3 embedding_lr=6e-3', 'learning_rate=.75e-3 embedding_lr=12e-3')),
            'learning_rate=.75e-3 embedding_lr=6e-3', *(PLAIN + rates for rates in (
                'learning_rate=.75e-3 embedding_lr=6e-3', 'learning_rate=1.5e-3 embedding_lr=6e-3',
                'learning_rate=3e-3 embedding_lr=3e-3'))],
        BITNET: [*(RECIPE + rates for rates in (
            'learning_rate=1.5e-3 embedding_lr=12e-3', 'learning_rate=1.5e-3 embedding_lr=6e-3',
            'learning_rate=1.5e-3 embedding_lr=24e-3',
            'learning_rate=5e-3 embedding_lr=6e-3 ramp=40 threshold=1',
            'learning_rate=15e-3 embedding_lr=6e-3 ramp=40 threshold=2',
            'learning_rate=.75e-3 embedding_lr=6e-3', 'learning_rate=3e-3 embedding_lr=6e-3')),
            *(PLAIN + rates for rates in (
                'learning_rate=1.5e-3 embedding_lr=6e-3', 'learning_rate=3e-3 embedding_lr=6e-3',
                'learning_rate=3e-3 embedding_lr=3e-3',
                'learning_rate=1.5e-3 embedding_lr=12e-3'))],
        TERNARY: ['embedding_lr=6e-3', 'embedding_lr=12e-3', 'embedding_lr=6e-3 code_lr=.4',
                  'embedding_lr=6e-3 code_lr=.1 threshold=1 ramp=20',
                  'embedding_lr=6e-3 scale_lr=0', 'embedding_lr=6e-3 ramp=0']},
    'large': {      # scaled down from there
        BASE: [RECIPE + 'learning_rate=1e-3 embedding_lr=4e-3'],
        BITNET: [RECIPE + 'learning_rate=2e-3 embedding_lr=4e-3 ramp=40 threshold=1',
                 RECIPE + 'learning_rate=1e-3 embedding_lr=4e-3'],
        TERNARY: ['embedding_lr=4e-3']},
    'gpt2': {
        BASE: ['learning_rate=6e-4'], BITNET: [RECIPE + 'learning_rate=6e-4 embedding_lr=6e-4'],
        TERNARY: ['embedding_lr=2e-3']}}
CHANGES = 'controls', 'states', 'ingredients', 'ideas'      # sections about direct ternary
EMBEDDINGS = {  # the rates of stored codes on their own grid, and under a ternary forward
    'small': ('12e-3', '48e-3'), 'default': ('6e-3', '6e-3'), 'large': ('4e-3', '4e-3'),
    'gpt2': ('6e-4', '6e-4')}


def stored(size):
    """{grid: keys} of codes on their own grid, and under a ternary forward."""
    # a ternary forward wants longer steps; absmean has a wide range, 11 times mean |w|; bf16 has
    # no codes to count in
    grids = {  # stored as: (Spec, code_lr on its own grid, and under a ternary forward)
        'int2': ('int2/row/absmean/stochastic', .1, .1),
        'int3': ('int3/row/stochastic', .06, .1), 'int4': ('int4/row/stochastic', .06, .1),
        'int8': ('int8/row/stochastic', .06, .1),
        'int8 absmean': ('int8/row/absmean/stochastic', .015, .025),
        'bf16': ('bf16/stochastic compute=float weight_decay=0 learning_rate=1.5e-3', 0, 0)}
    own, ternary = {}, {}
    for grid, (how, *rates) in grids.items():
        for found, rate, embedding in zip((own, ternary), rates, EMBEDDINGS[size]):
            # the threshold is for evidence on few levels
            found[grid] = f'init_gain=0 threshold=0 ramp=20 embedding_lr={embedding} ' \
                f'stored={how} code_lr={rate}'
    return own, ternary


def rows(size='small'):
    """{section: {name: keys for train.py}}"""
    hard = {name: f'{CONFIGS[name]} {TRIES[size][name][0]}' for name in (TERNARY, BITNET, BASE)}
    tune = {f'{name}, {more}': f'{CONFIGS[name]} {more}'
            for name, tries in TRIES[size].items() for more in tries}
    in_weight_space = 'code_lr=0 threshold=0 learning_rate=3e-3 weight_decay=0'

    own, ternary = stored(size)
    changes = {     # against direct ternary
        'controls': {
            'round to nearest': 'stored=ternary/row/absmean',
            'frozen random ternary': 'stored=ternary/row/absmean code_lr=1e-6 scale_lr=0'},
        'stored': {f'stored in {grid}': keys for grid, keys in own.items()},
        'ternary forward': {
            f'stored in {grid}, ternary forward': f'{keys} weights=ternary/row/absmean'
            for grid, keys in ternary.items()},
        'states': {
            'm and v float32': 'adam_m= adam_v=',
            'm and v bf16': 'adam_m=bf16 adam_v=bf16',
            'm and v 8-bit': 'adam_m=int8/row adam_v=uint8/64/root4',
            'm and v 4-bit': 'adam_m=int4/64/sqrt adam_v=uint4/64/root4',
            'm 4-bit, v rank1': 'adam_m=int4/64/sqrt'},
        'around': {
            'all else in float32': 'dtype=float32 activations= compute=float',
            'all else in bfloat16': 'dtype=bfloat16 activations= compute=float',
            'activations in fp8': 'activations=fp8/row compute=float',
            'codes not multiplied': 'compute=float'},
        'ingredients': {
            'no threshold': 'threshold=0 code_lr=.1',           # which would be far too fast
            'no momentum ramp': 'ramp=0', 'evidence is kept': 'idea=kept',
            'fixed scales': 'scale_lr=0', 'no cool-down': 'min_lr=1',
            'steps in weight space': in_weight_space,
            'scale gain .35': 'init_gain=.35', 'scale gain 1.4': 'init_gain=1.4',
            'one scale per tensor': 'stored=ternary/tensor/absmean/stochastic'},
        'ideas': {**{name: f'idea={name}' for name in (
            'estimated', 'feedback', 'squared', 'sticky', 'attention', 'growth')},
            **{name: f'idea={name} code_lr=.02' for name in ('sign', 'muon')}}}
    sections = {section: {name: f'{hard[TERNARY]} {change}' for name, change in found.items()}
                for section, found in changes.items()}
    sections['controls']['as published'] = 'config/dqt_paper.py'
    for rate in ('2e-3', '8e-3'):
        tune[f'as published, {rate}'] = f'config/dqt_paper.py learning_rate={rate}'
    return {'hard': hard, **sections, 'tune': tune}


CLAIMS = [  # (of paper 2 or ours, what it says, a, '<=' or '>=', percent, b)
    ('2', 'ternary converges', TERNARY, '<=', -5, 'frozen random ternary'),
    ('2', 'stochastic rounding is what makes it', TERNARY, '<=', -5, 'round to nearest'),
    ('2', '8-bit is on par with BitNet', 'stored in int8', '<=', 1, BITNET),
    ('2', 'an 8-bit model can infer with ternary weights', 'stored in int8, as ternary', '<=', 5,
     'stored in int8'),
    ('2', 'one whose scales are absmean can', 'stored in int8 absmean, as ternary', '<=', 5,
     'stored in int8 absmean'),
    ('2', 'bfloat16 around it costs nothing', 'all else in bfloat16', '<=', 1,
     'all else in float32'),
    ('2', 'nor does fp8', 'activations in fp8', '<=', 1, 'all else in float32'),
    ('ours', 'multiplying codes changes nothing', TERNARY, '<=', 0.5, 'codes not multiplied'),
    ('ours', 'direct ternary is no worse than BitNet', TERNARY, '<=', 0, BITNET),
    ('ours', 'code units beat weight space', TERNARY, '<=', 0, 'steps in weight space'),
    ('ours', 'the threshold helps', TERNARY, '<=', 0, 'no threshold'),
    ('ours', 'the ramp helps', TERNARY, '<=', 0, 'no momentum ramp'),
    ('ours', 'using evidence up helps', TERNARY, '<=', 0, 'evidence is kept'),
    ('ours', 'learned scales help', TERNARY, '<=', 0, 'fixed scales'),
    ('ours', '4-bit m is free', 'm 4-bit, v rank1', '<=', 1, TERNARY),
    ('ours', 'int8 codes under a ternary forward are no worse than BitNet',
     'stored in int8, ternary forward', '<=', 0, BITNET)]


def draw(results, path):
    """Loss against the bytes per weight really held, and the flips per step over time."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot
    fig, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5.5), layout='constrained')
    kinds = {   # section: (in the legend, where a name is written beside its point)
        'hard': ('', (-6, 4), 'right'), 'stored': ('direct, on its own grid', (5, -10), 'left'),
        'ternary forward': ('direct, with a ternary forward', (5, 3), 'left'),
        'states': ('direct ternary, other states', (0, 16), 'center')}
    for color, (section, (label, at, side)) in zip(('k', 'C0', 'C1', 'C2'), kinds.items()):
        for name in rows()[section]:
            values = list(losses(results, name).values())
            if not values:
                continue
            size = next(r for r in results if r['name'] == name)['bytes']['linear']
            point = size['weights'] + size['optimizer'], statistics.mean(values)
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0
            left.errorbar(*point, error, fmt='o', capsize=2, color=color, label=label)
            left.annotate(name.replace(', ternary forward', '').replace('stored in ', ''), point,
                          xytext=at, ha=side, textcoords='offset points', fontsize=7, color=color)
            label = ''
    ticks = [0.5, 1, 1.5, 2, 3, 4, 6, 8, 12]
    if left.get_legend_handles_labels()[1]:
        left.legend(fontsize=8)
    left.set(xscale='log', xlabel='bytes held for a weight: itself and optimizer states',
             ylabel='validation loss, nats/token', title='Loss against bytes per weight')
    left.set_xticks(ticks, [f'{t:g}' for t in ticks])
    left.minorticks_off()
    left.grid(alpha=0.3)
    for name in (TERNARY, 'no threshold', 'no momentum ramp', 'no cool-down', 'as published',
                 'stored in int4', 'stored in int8'):
        runs = [r for r in results if r['name'] == name and r['curve']]
        if runs:
            steps, flips, _ = zip(*runs[0]['curve'])
            right.plot(steps, [100 * f for f in flips], label=name)
    right.set(yscale='log', xlabel='step', ylabel='% of the codes that a step changes',
              title='Flips')
    right.grid(alpha=0.3)
    right.legend(fontsize=8)
    fig.savefig(path, dpi=120)


def main(options):
    sections, stem = rows(options.size), RESULTS / f'direct-{options.size}'
    size, seeds = [*SIZES[options.size], '--eval_interval=1000'], range(1, options.seeds + 1)
    jobs = {section: [Job(name, [*size, *arguments(text)], seed) for seed in seeds
                      for name, text in sections[section].items()
                      if section != 'tune' or seed == 1] for section in sections}
    path = stem.with_suffix('.jsonl')
    run_all(path, [job for section in options.sections for job in jobs[section]], options.jobs)
    results = results_of(path, [job for section in sections for job in jobs[section]])
    inferred = [{**r, 'name': f'{r["name"]}, as ternary', 'val_loss': r['loss_as_ternary']}
                for r in results if 'loss_as_ternary' in r]
    sections['inferred with ternary weights'] = dict.fromkeys(r['name'] for r in inferred)
    results += inferred
    lines = claim_lines(results, CLAIMS)
    for section, names in sections.items():
        names = [name for name in names if losses(results, name)]
        if names:
            reference = TERNARY if section in CHANGES else BASE
            reference = reference if losses(results, reference) else BITNET
            lines += ['', f'**{section}**, differences from {reference}', '',
                      *table(results, reference, names)]
    report(stem, lines)
    if losses(results, TERNARY):
        draw(results, stem.with_suffix('.png'))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--size', choices=SIZES, default='small')
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--sections', nargs='*', choices=rows(), default=list(rows()))
    parser.add_argument('--jobs', type=int, default=2, help='runs at a time, sharing the cores')
    os.chdir(ROOT)                                      # where config/ is
    main(parser.parse_args())
