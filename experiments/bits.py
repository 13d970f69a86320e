"""
Where does a weight keep what it has learned? python -m experiments.bits

Loss against all bits that last from one step to the next, of a weight of the blocks: its code,
with its share of the scales, and e, which gathers what has not moved it yet (quant.direct_step).
Either may have few bits. v is a row and a column. Model and text are those of
experiments.pretraining. Writes results/bits.jsonl, one line a run, .md and .png. 45 runs: an hour
on two cores; finished ones are skipped.
"""
import math

from experiments.runs import (RESULTS, SIZES, Job, arguments, claim_lines, interval, loss_cells,
                              losses, parser_of, report, run_all)

# how codes are stored. The rates of these configs were the best of tries on seed 2 with an e, and
# without one (of ternary codes they hardly matter there)
CODES = {'ternary': 'config/ternary.py', 'int4': 'config/direct4.py', 'int8': 'config/direct8.py'}
# how e is stored, rounded stochastically; none: a step is rounded to whole levels
GATHERED = {'none': 'idea=nothing', '2 bits': 'adam_m=int2/row/stochastic',
            '4 bits': 'adam_m=int4/row/stochastic', '8 bits': 'adam_m=int8/row/stochastic',
            '32 bits': 'adam_m='}
CLAIMS = [  # as in experiments.pretraining
    ('ours', 'ternary codes alone do not hold what is learned', 'ternary, e of none', '>=', 5,
     'ternary, e of 8 bits'),
    ('ours', 'nor do int4 codes', 'int4, e of none', '>=', 5, 'int4, e of 8 bits'),
    ('ours', 'int8 codes do', 'int8, e of none', '<=', 1, 'int8, e of 8 bits'),
    *(('ours', f'{code} codes are as good with 4 bits of e as with 32', f'{code}, e of 4 bits',
       '<=', 1, f'{code}, e of 32 bits') for code in CODES),
    ('ours', 'ten bits, of ternary codes and e, are as good as 16, of int8 codes and e',
     'ternary, e of 8 bits', '<=', 1, 'int8, e of 8 bits')]


def jobs(seeds):
    return [Job(f'{code}, e of {m}',
                [*SIZES['tiny'], *arguments(f'{CODES[code]} {GATHERED[m]}')], seed)
            for seed in seeds for code in CODES for m in GATHERED]


def bits(results, code, m):
    """Of a code and of its e, with their scales, read off what was held; v does not count."""
    size = {r['name'].split(' of ')[1]: r['bytes']['linear'] for r in results
            if r['name'].startswith(f'{code},') and r['val_loss']}
    if not {m, '32 bits'} <= size.keys():       # none of their runs has ended
        return math.nan, math.nan
    rest = 8 * size['32 bits']['optimizer'] - 32        # v, and the moments of scales
    return 8 * size[m]['weights'], 0.0 if m == 'none' else 8 * size[m]['optimizer'] - rest


def draw(results, path):
    """A line for each kind of codes, from no e to one of 32 bits."""
    from experiments.figures import METHODS, pyplot
    figure, panel = pyplot.subplots(figsize=(8, 5))
    marks = dict(zip(GATHERED, 'xv^so'))
    for code in CODES:
        points, color = [], METHODS[f'direct {code}']['color']
        for m in GATHERED:
            if found := [*losses(results, f'{code}, e of {m}').values()]:
                points.append((sum(bits(results, code, m)), *interval(found), m))
        for x, y, half, m in points:
            panel.errorbar(x, y, half if half > 0 else None, fmt=marks[m], capsize=2,
                           color=color, markersize=6)
        if points:
            x, y, *_ = zip(*points)
            panel.plot(x, y, color=color, label=f'codes: {code}')
    for m, mark in marks.items():
        panel.plot([], mark, color='0.4', label=f'e: {m}')
    panel.set(xscale='log', ylabel='validation loss, nats/token; bars: 95 % intervals',
              xlabel='bits of a weight that last: its code and scale, and e, the sum of steps that '
                     'have not moved the code')
    ticks = [2, 4, 8, 16, 32]
    panel.set_xticks(ticks, ticks)
    panel.minorticks_off()
    panel.legend(ncols=2)
    figure.savefig(path)


def main(options):
    stem, todo = RESULTS / 'bits', jobs(options.seeds)
    results = run_all(stem.with_suffix('.jsonl'), todo, options.jobs)
    lines = ['# Loss against the bits of a weight that last', *claim_lines(results, CLAIMS), '',
             '| codes | e | bits: code + e | val loss | train loss |', '|---|---|---|---|---|']
    for code in CODES:
        for m in GATHERED:
            if losses(results, name := f'{code}, e of {m}'):
                code_bits, more = bits(results, code, m)
                lines.append(f'| {code} | {m} | {code_bits:.2f} + {more:.2f} | '
                             f'{loss_cells(results, name)} |')
    report(stem, lines)
    draw(results, stem.with_suffix('.png'))


if __name__ == '__main__':
    main(parser_of(__doc__, [11, 12, 13]).parse_args())
