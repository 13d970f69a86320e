"""
What each strategy costs in quality, part 2: direct quantized training (paper 2, 2412.04787).

    python -m experiments.direct                                     the small model
    python -m experiments.direct --size=default --sections hard      the hard goal at 3.7M,
    python -m experiments.direct --size=large --sections hard        and at 41M for 5,000 steps
    python -m experiments.direct --sections                          only print and draw

Low-bit masters against BitNet b1.58 and full precision, each with rates of its own, found by as
many tries (section `tune`); the controls; the ingredients of the direct update, and ideas that are
not in it. Writes experiments/results/direct-<size>.jsonl (one line a run; finished ones are
skipped), .md and .png.
"""
import argparse
import os
import statistics

from experiments.runs import (RESULTS, ROOT, SIZES, Job, claim_lines, keys, losses, results_of,
                              run_all, table)

BASE, BITNET, TERNARY = 'full precision', 'BitNet b1.58', 'direct ternary'
CONFIGS = {BASE: 'config/baseline.py', BITNET: 'config/bitnet.py', TERNARY: 'config/ternary.py'}
# what direct training takes for granted, offered to the others
RECIPE = keys(beta2=0.999, ramp=20.0, init_gain=0.7, adam_v='factored')

# size: the tries of each side, one seed each; all rows take the first, the best when it was chosen
TRIES = {
    'small': {
        BASE: [keys(learning_rate=lr, embedding_lr=embedding) for lr, embedding in (
            (1.5e-3, 12e-3), (1.5e-3, 24e-3), (2e-3, 12e-3), (1.5e-3, 6e-3), (0.75e-3, 6e-3))]
        + [RECIPE + keys(learning_rate=1.5e-3, embedding_lr=12e-3)],
        BITNET: [keys(learning_rate=lr, embedding_lr=embedding) for lr, embedding in (
            (4e-3, 24e-3), (3e-3, 12e-3), (3e-3, 6e-3), (1.5e-3, 6e-3), (6e-3, 24e-3))]
        + [RECIPE + keys(learning_rate=4e-3, embedding_lr=24e-3)],
        TERNARY: [keys(learning_rate=embedding, code_lr=code, threshold=tau)
                  for embedding, code, tau in (
            (24e-3, 0.1, 1.0), (12e-3, 0.1, 1.0), (6e-3, 0.1, 1.0), (48e-3, 0.1, 1.0),
            (24e-3, 0.2, 1.5), (24e-3, 0.05, 1.0))]},
    'default': {
        BASE: [RECIPE + keys(learning_rate=lr, embedding_lr=6e-3) for lr in (1.5e-3, 0.75e-3)]
        + [keys(learning_rate=lr, embedding_lr=embedding) for lr, embedding in (
            (1.5e-3, 6e-3), (3e-3, 3e-3))],
        BITNET: [RECIPE + keys(learning_rate=lr, embedding_lr=6e-3)
                 for lr in (1.5e-3, 0.75e-3, 3e-3)]
        + [keys(learning_rate=lr, embedding_lr=embedding) for lr, embedding in (
            (1.5e-3, 6e-3), (3e-3, 6e-3), (3e-3, 3e-3))],
        TERNARY: [keys(learning_rate=embedding, code_lr=code, threshold=tau)
                  for embedding, code, tau in (
            (6e-3, 0.1, 1.0), (24e-3, 0.1, 1.0), (6e-3, 0.2, 1.5))]}}
TRIES['large'] = {      # scaled down from there, not tried
    BASE: [RECIPE + keys(learning_rate=1e-3, embedding_lr=4e-3)],
    BITNET: [RECIPE + keys(learning_rate=1e-3, embedding_lr=4e-3)],
    TERNARY: [keys(learning_rate=4e-3)]}
TRIES['gpt2'] = {
    BASE: [keys(learning_rate=6e-4)], BITNET: [RECIPE + keys(learning_rate=6e-4)],
    TERNARY: [keys(learning_rate=2e-3)]}


def rows(size='small'):
    """{section: {name: arguments}}"""
    hard = {name: [CONFIGS[name], *TRIES[size][name][0]] for name in (TERNARY, BITNET, BASE)}
    tune = {f'{name}, {" ".join(flags).replace("--", "")}': [CONFIGS[name], *flags]
            for name, tries in TRIES[size].items() for flags in tries}

    def direct(*more, **values):
        return [*hard[TERNARY], *more, *keys(**values)]

    def plain(grid, **values):
        """A master of grid; the threshold is for few levels, bf16 moves in weight space."""
        rate = keys(code_lr=0.0, learning_rate=3e-3, weight_decay=0.0, compute='float',
                    embedding_lr=hard[TERNARY][1].split('=')[1]) if grid == 'bf16' else \
            keys(code_lr={'int2': 0.1, 'int3': 0.1, 'int4': 0.06, 'int8': 0.06}[grid])
        return [*direct(master=masters[grid] + '/stochastic', threshold=0.0, **values), *rate]

    masters = {'int2': 'int2/row/absmean', 'int3': 'int3/row', 'int4': 'int4/row',
               'int8': 'int8/row', 'bf16': 'bf16'}
    own = {f'{grid} master': plain(grid) for grid in masters}
    seen = {f'{grid} master, ternary forward': plain(grid, weights='ternary/row/absmean')
            for grid in masters}
    controls = {'round to nearest': direct(master='ternary/row/absmean'),
                'frozen random ternary': direct(master='ternary/row/absmean', code_lr=1e-6,
                                                scale_lr=0.0),
                'as published': ['config/dqt_paper.py']}
    states = {f'm and v {name}': direct(adam_m=m, adam_v=v) for name, m, v in (
        ('float32', '', ''), ('bf16', 'bf16', 'bf16'), ('8-bit', 'int8/row', 'uint8/64/root4'),
        ('4-bit', 'int4/64/sqrt', 'uint4/64/root4'))}
    states['m 4-bit, v factored'] = direct(adam_m='int4/64/sqrt')
    around = {'all else in float32': direct(dtype='float32', activations='', compute='float'),
              'all else in bfloat16': direct(dtype='bfloat16', activations='', compute='float'),
              'activations in fp8': direct(activations='fp8/row', compute='float')}
    without = {'no threshold': direct(threshold=0.0), 'no momentum ramp': direct(ramp=0.0),
               'fixed scales': direct(scale_lr=0.0), 'no cool-down': direct(min_lr=1.0),
               'steps in weight space': direct(
                   code_lr=0.0, learning_rate=3e-3, weight_decay=0.0, threshold=0.0,
                   embedding_lr=hard[TERNARY][1].split('=')[1]),
               'scale gain .35': direct(init_gain=0.35), 'scale gain 1.4': direct(init_gain=1.4),
               'a scale a tensor': direct(master='ternary/tensor/absmean/stochastic')}
    ideas = {name: direct(f'--idea={name}') for name in
             ('muon', 'estimated', 'reset', 'feedback', 'squared', 'sticky', 'attention',
              'growth')}
    ideas['sign'] = direct('--idea=sign', code_lr=0.02)
    return {'hard': hard, 'controls': controls, 'masters': own, 'ternary forward': seen,
            'states': states, 'around': around, 'ingredients': without, 'ideas': ideas,
            'tune': tune}


CLAIMS = [  # (of paper 2 or ours, what it says, a, '<=' or '>=', percent, b)
    ('2', 'ternary converges', TERNARY, '<=', -5, 'frozen random ternary'),
    ('2', 'stochastic rounding is what makes it', TERNARY, '<=', -5, 'round to nearest'),
    ('2', '8-bit is on par with BitNet', 'int8 master', '<=', 1, BITNET),
    ('2', 'bfloat16 around it costs nothing', 'all else in bfloat16', '<=', 1,
     'all else in float32'),
    ('2', 'nor does fp8', 'activations in fp8', '<=', 1, 'all else in float32'),
    ('ours', 'direct ternary is no worse than BitNet', TERNARY, '<=', 0, BITNET),
    ('ours', 'code units beat weight space', TERNARY, '<=', 0, 'steps in weight space'),
    ('ours', 'the threshold helps', TERNARY, '<=', 0, 'no threshold'),
    ('ours', 'the ramp helps', TERNARY, '<=', 0, 'no momentum ramp'),
    ('ours', 'learned scales help', TERNARY, '<=', 0, 'fixed scales'),
    ('ours', '4-bit m is free', 'm 4-bit, v factored', '<=', 1, TERNARY),
    ('ours', 'an int8 master under a ternary forward is no worse than BitNet',
     'int8 master, ternary forward', '<=', 0, BITNET)]


def draw(results, path):
    """Loss against the bytes a weight really held, and the flips a step over time."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot
    fig, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5.5), layout='constrained')
    names = [n for section, names in rows().items() for n in names
             if section in ('hard', 'masters', 'ternary forward', 'states') and losses(results, n)]
    least = min(statistics.mean(losses(results, n).values()) for n in names)
    for name in names:
        values = list(losses(results, name).values())
        mean = statistics.mean(values)
        if mean > 1.15 * least:                                 # off the page
            continue
        held = next(r for r in results if r['name'] == name)['bytes']['linear']
        size = held['weights'] + held['optimizer']
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0
        left.errorbar(size, mean, error, fmt='o', capsize=2)
        left.annotate(name, (size, mean), xytext=(5, 3), textcoords='offset points', fontsize=7)
    ticks = [0.5, 1, 1.5, 2, 3, 4, 6, 8, 12]
    left.set(xscale='log', xlabel='bytes held for a weight: itself and optimizer states',
             ylabel='validation loss, nats/token', title='Loss against bytes a weight')
    left.set_xticks(ticks, [f'{t:g}' for t in ticks])
    left.minorticks_off()
    left.grid(alpha=0.3)
    for name in (TERNARY, 'no threshold', 'no momentum ramp', 'no cool-down', 'as published',
                 'int4 master', 'int8 master'):
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
    jobs = {section: [Job(name, [*size, *args], seed) for seed in seeds
                      for name, args in sections[section].items()
                      if section != 'tune' or seed == 1] for section in sections}
    path = stem.with_suffix('.jsonl')
    run_all(path, [job for section in options.sections for job in jobs[section]], options.jobs)
    results = results_of(path, [job for section in sections for job in jobs[section]])
    lines = claim_lines(results, CLAIMS)
    for section, names in sections.items():
        names = [name for name in names if losses(results, name)]
        if names:
            lines += ['', f'**{section}**', '', *table(results, BITNET, names)]
    stem.with_suffix('.md').write_text('\n'.join(lines) + '\n', encoding='utf-8')
    print('\n'.join(lines))
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
