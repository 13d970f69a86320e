"""
Where does a weight keep what it has learned? python -m experiments.bits

Loss against all bits that last from one step to the next, of a weight of the blocks: its code,
with its share of the scales, and e, which gathers what has not moved it yet (quant.direct_step).
Either may have few bits. v is a row and a column. Model and text are those of
experiments.pretraining. Writes results/bits.jsonl, one line a run, .md and .png. 45 runs: less than
an hour on two cores; finished ones are skipped.
"""
import statistics

from experiments.runs import (RESULTS, SIZES, Job, arguments, interval, losses, parser_of,
                              report, run_all)

# how codes are stored, and their rate, see experiments.direct
CODES = {'ternary': 'config/ternary.py', **{
    name: f'config/direct4.py stored={name}/row' for name in ('int4', 'int8')}}
# how e is stored, rounded by chance; none: a step is rounded to whole levels
GATHERED = {'none': 'idea=nothing', '2 bits': 'adam_m=int2/row/stochastic',
            '4 bits': 'adam_m=int4/row/stochastic', '8 bits': 'adam_m=int8/row/stochastic',
            '32 bits': 'adam_m='}


def jobs(seeds):
    return [Job(f'{code}, e of {m}', [*SIZES['tiny'], *arguments(
        f'{CODES[code]} {GATHERED[m]}')], seed)
        for seed in seeds for code in CODES for m in GATHERED]


def bits(result):
    """Of a code and of its e, read off what was held."""
    size = result['bytes']['linear']
    return 8 * size['weights'], 0.0 if 'of none' in result['name'] else 8 * size['optimizer']


def draw(results, path):
    """A line for each kind of codes, from no e to one of 32 bits."""
    from experiments.figures import pyplot
    figure, panel = pyplot.subplots(figsize=(8, 5))
    marks = dict(zip(GATHERED, 'xv^so'))
    for i, code in enumerate(CODES):
        points = []
        for m in GATHERED:
            found = [*losses(results, name := f'{code}, e of {m}').values()]
            if found:
                one = next(r for r in results if r['name'] == name)
                points.append((sum(bits(one)), *interval(found), m))
        for x, y, half, m in points:
            panel.errorbar(x, y, half if half > 0 else None, fmt=marks[m], capsize=2,
                           color=f'C{i}', markersize=6)
        if points:
            x, y, *_ = zip(*points)
            panel.plot(x, y, color=f'C{i}', label=f'codes: {code}')
    for m, mark in marks.items():
        panel.plot([], mark, color='0.4', label=f'e: {m}')
    panel.set(xscale='log', xlabel='bits of a weight that last: code, scale and e',
              ylabel='validation loss, nats/token')
    ticks = [2, 4, 8, 16, 32]
    panel.set_xticks(ticks, ticks)
    panel.minorticks_off()
    panel.legend(ncols=2)
    figure.savefig(path)


def main(options):
    stem, todo = RESULTS / 'bits', jobs(options.seeds)
    results = run_all(stem.with_suffix('.jsonl'), todo, options.jobs)
    lines = ['# Loss against the bits of a weight that last', '',
             '| codes | e | bits: code + e | val loss |', '|---|---|---|---|']
    for code in CODES:
        for m in GATHERED:
            found = [*losses(results, name := f'{code}, e of {m}').values()]
            if found:
                code_bits, more = bits(next(r for r in results if r['name'] == name))
                lines.append(f'| {code} | {m} | {code_bits:.2f} + {more:.2f} | '
                             + ', '.join(f'{loss:.3f}' for loss in found) + ' |')
    report(stem, lines)
    draw(results, stem.with_suffix('.png'))


if __name__ == '__main__':
    main(parser_of(__doc__, [11, 12, 13]).parse_args())
