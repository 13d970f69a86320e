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

from experiments.runs import (RESULTS, ROOT, SIZES, Job, claim_lines, keys, losses, read, run_all,
                              table)

BASE, BITNET, TERNARY = 'full precision', 'BitNet b1.58', 'direct ternary'
FULL = ['config/baseline.py', *keys(learning_rate=1.5e-3, embedding_lr=12e-3)]
STRAIGHT = ['config/bitnet.py', *keys(learning_rate=4e-3, embedding_lr=24e-3)]
DIRECT = ['config/ternary.py']


def rows():
    """{section: {name: arguments}}"""
    def direct(*more, **values):
        return [*DIRECT, *more, *keys(**values)]

    hard = {BASE: FULL, BITNET: STRAIGHT, TERNARY: DIRECT}
    controls = {'round to nearest': direct(master='ternary/row/absmean'),
                'frozen random ternary': direct(master='ternary/row/absmean', code_lr=1e-6,
                                                scale_lr=0.0),
                'as published': ['config/dqt_paper.py', '--embedding_lr=24e-3']}
    grids = {'int2': 'int2/row/absmean', 'int3': 'int3/row', 'int4': 'int4/row',
             'int8': 'int8/row', 'bf16': 'bf16'}
    own, seen = {}, {}
    for grid, master in grids.items():
        rate = {'int2': {}, 'int3': {}, 'int4': {'code_lr': 0.06}, 'int8': {'code_lr': 0.06},
                'bf16': {'code_lr': 0.0, 'learning_rate': 3e-3, 'embedding_lr': 24e-3}}[grid]
        plain = {'threshold': 0.0, 'compute': 'float' if grid == 'bf16' else 'int8', **rate}
        own[f'{grid} master'] = direct(master=f'{master}/stochastic', **plain)
        seen[f'{grid} master, ternary forward'] = direct(
            master=f'{master}/stochastic', weights='ternary/row/absmean', **plain)
    states = {f'm and v {name}': direct(adam_m=m, adam_v=v) for name, m, v in (
        ('float32', '', ''), ('bf16', 'bf16', 'bf16'), ('8-bit', 'int8/row', 'uint8/64/root4'),
        ('4-bit', 'int4/64/sqrt', 'uint4/64/root4'))}
    states['m 4-bit, v factored'] = direct(adam_m='int4/64/sqrt')
    states['in float32'] = direct(dtype='float32')
    states['activations full'] = direct(activations='', compute='float')
    states['activations fp8'] = direct(activations='fp8/row', compute='float')
    without = {'no threshold': direct(threshold=0.0), 'no momentum ramp': direct(ramp=0.0),
               'fixed scales': direct(scale_lr=0.0), 'no cool-down': direct(min_lr=1.0),
               'steps in weight space': direct(code_lr=0.0, learning_rate=3e-3,
                                               embedding_lr=24e-3),
               'scale gain .35': direct(init_gain=0.35), 'scale gain 1.4': direct(init_gain=1.4),
               'scale of the tensor': direct(master='ternary/tensor/absmean/stochastic'),
               'BitNet with ramp and threshold': [*STRAIGHT, *keys(ramp=20.0, threshold=1.0,
                                                                   beta2=0.999)],
               'full precision with ramp': [*FULL, *keys(ramp=20.0, beta2=0.999)]}
    ideas = {name: direct(f'--idea={name}') for name in
             ('muon', 'estimated', 'reset', 'feedback', 'squared')}
    ideas['sign'] = direct('--idea=sign', code_lr=0.02)
    return {'hard': hard, 'controls': controls, 'masters': own, 'ternary forward': seen,
            'states': states, 'ingredients': without, 'ideas': ideas, 'tune': tune()}


def tune():
    """The tries behind the rates above, one seed each: as many for every side."""
    tries = {}
    for lr, embedding in ((0.75, 6), (1.5, 6), (1.5, 12), (1.5, 24), (2, 12), (3, 12)):
        tries[f'full precision, lr {lr}e-3, embeddings {embedding}e-3'] = [
            'config/baseline.py', f'--learning_rate={lr}e-3', f'--embedding_lr={embedding}e-3']
    for lr, embedding in ((1.5, 6), (3, 6), (3, 12), (3, 24), (4, 24), (6, 24)):
        tries[f'BitNet, lr {lr}e-3, embeddings {embedding}e-3'] = [
            'config/bitnet.py', f'--learning_rate={lr}e-3', f'--embedding_lr={embedding}e-3']
    for code, tau, embedding in ((0.1, 1, 6), (0.1, 1, 12), (0.1, 1, 24), (0.2, 1.5, 24),
                                 (0.05, 1, 24), (0.1, 1, 48)):
        tries[f'direct ternary, p0 {code}, tau {tau}, embeddings {embedding}e-3'] = [
            'config/ternary.py', f'--code_lr={code}', f'--threshold={tau}',
            f'--learning_rate={embedding}e-3']
    return tries


CLAIMS = [  # (of paper 2 or ours, what it says, a, '<=' or '>=', percent, b)
    ('2', 'ternary converges', TERNARY, '<=', -5, 'frozen random ternary'),
    ('2', 'stochastic rounding is what makes it', TERNARY, '<=', -5, 'round to nearest'),
    ('2', '8-bit is on par with BitNet', 'int8 master', '<=', 1, BITNET),
    ('2', 'bfloat16 around it costs nothing', TERNARY, '<=', 1, 'in float32'),
    ('2', 'nor does fp8', 'activations fp8', '<=', 1, 'in float32'),
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
    names = [n for section, names in rows().items() if section not in ('tune', 'ideas',
             'ingredients') for n in names if losses(results, n)]
    base = statistics.mean(losses(results, BASE).values())
    for name in names:
        values = list(losses(results, name).values())
        mean = statistics.mean(values)
        if not mean < 1.15 * base:
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
        runs = [r for r in results if r['name'] == name]
        if runs:
            steps, flips, _ = zip(*runs[0]['curve'])
            right.plot(steps, [100 * f for f in flips], label=name)
    right.set(yscale='log', xlabel='step', ylabel='% of the codes that a step changes',
              title='Flips')
    right.grid(alpha=0.3)
    right.legend(fontsize=8)
    fig.savefig(path, dpi=120)


def main(options):
    sections, stem = rows(), RESULTS / f'direct-{options.size}'
    size, seeds = [*SIZES[options.size], '--eval_interval=1000'], range(1, options.seeds + 1)
    jobs = {section: [Job(name, [*size, *args], seed) for seed in seeds
                      for name, args in sections[section].items()
                      if section != 'tune' or seed == 1] for section in sections}
    path = stem.with_suffix('.jsonl')
    run_all(path, [job for section in options.sections for job in jobs[section]], options.jobs)
    known = [job for section in sections for job in jobs[section]]
    results = [r for r in read(path) if Job(r['name'], r['args'], r['seed']) in known]
    lines = claim_lines(results, CLAIMS)
    for section, names in sections.items():
        names = [name for name in names if losses(results, name)]
        if names:
            lines += ['', f'**{section}**', '', *table(results, BITNET, names)]
    stem.with_suffix('.md').write_text('\n'.join(lines) + '\n', encoding='utf-8')
    print('\n'.join(lines))
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
