"""
Direct quantized training (paper 2, 2412.04787) against BitNet and full precision.

    python -m experiments.direct                                 the tiny size, the Python corpus
    python -m experiments.direct --sections hard --dataset=sympy      the hard goal on the other
    python -m experiments.direct --sections hard --size=default       corpus, at 3.7M parameters,
    python -m experiments.direct --sections hard --size=large --seeds 14     and at 41M
    python -m experiments.direct --size=default --sections       nothing new, but the report

First every side tries four rates (BitNet with per-row scales those with momentum and without), on
seed 1 and the Python corpus, and takes the one that ends lowest; AdamW runs at half of it, too. The
large size takes the rates of the default size. What is reported are other seeds. No token is read
twice. Besides the hard goal: other sides, codes of other grids, states in few bits, controls, the
ingredients of the direct update, and ideas that are not in it.
Writes experiments/results/direct-<size>-<corpus>.jsonl (one line a run; finished ones are
skipped), .md and .png.
"""
import math
import re
import statistics

from experiments.runs import (RESULTS, SIZES, Job, arguments, claim_lines, interval, losses,
                              load, parser_of, report, results_of, run_all, run_one, table)

ADAMW, PLAIN, ROWS, TERNARY, BITNET, MUON, BITMUON, INT8, BF16 = SIDES = (
    'AdamW', 'AdamW without momentum', 'BitNet, per-row scales', 'direct ternary',
    'BitNet, one scale per tensor', 'Muon', 'BitNet with Muon', 'int8 codes, ternary forward',
    'bfloat16 without momentum')
HOW = dict(zip(SIDES, (
    'config/baseline.py', 'config/baseline.py beta1=0.',
    'config/bitnet.py weights=ternary/row/absmean', 'config/ternary.py',
    'config/bitnet.py', 'config/baseline.py optimizer=muon init_gain=0.',
    'config/bitnet.py optimizer=muon init_gain=0.', 'config/ternary_int8.py',
    'config/baseline.py stored=bf16/stochastic weight_decay=0 beta1=0. adam_v=rank1')))
HALF = 'AdamW, half the rate'       # at the tiny size as good on seed 1, and better on others
# grids to store codes in, on their own and under a ternary forward, and their code_lr
GRIDS = {'int3': 0.04, 'int4': 0.024, 'int8': 0.012}


def tries(size):
    """{side: [keys for train.py]}, the first of which it takes until all have ended."""
    found = {}
    for side, how in HOW.items():
        # of lower ones, the top was best for BitNet at the tiny size, and for Muon at each
        muon = side in (MUON, BITMUON)
        rate = 6e-3 if size == 'tiny' or muon and size == 'small' else 3e-3 if muon else 1.5e-3
        # without momentum, half the rate was better at the default size (results/tries.jsonl)
        first = 0.5 if side in (PLAIN, BF16) else 1
        key, middle = {TERNARY: ('code_lr', 0.08), INT8: ('code_lr', GRIDS['int8'])}.get(
            side, ('learning_rate', rate))
        found[side] = [f'{how} {key}={middle * x:g}{more}'
                       for more in ([''] + [' beta1=0.'] * (side == ROWS))
                       for x in sorted((0.25, 0.5, 1, 2), key=lambda x: x != first)]
    return found


def job(size, dataset, name, text, seed):
    every = f'dataset={dataset} final_tokens={2 ** 19} eval_interval=200'
    if size in ('tiny', 'small'):       # the same on a CPU that has no fast bfloat16
        every += ' dtype=float32'
    return Job(name, [*SIZES[size], *arguments(f'{every} {text}')], seed)


def every_try(size, sides=SIDES):
    """The tries of some sides, with seed 1; their names are their keys."""
    return [job(size, 'python', text, text, 1) for side in sides for text in tries(size)[side]]


def chosen(size):
    """{side: its keys}, of the try that ended lowest, or the first of them until all have ended."""
    size = 'default' if size == 'large' else size
    results = results_of(RESULTS / f'direct-{size}-python.jsonl', every_try(size))
    ended = lambda texts: all(losses(results, text) for text in texts)
    return {side: min(texts, key=lambda text: losses(results, text)[1]) if ended(texts)
            else texts[0] for side, texts in tries(size).items()}


def rows(sides):
    """{section: {name: keys for train.py}}, with the keys of each side; changes are of direct
    ternary. Int8 codes under a ternary forward are a side."""
    stored = {f'stored in {grid}': f'config/direct8.py stored={grid}/row code_lr={rate}'
              for grid, rate in GRIDS.items()}
    ternary = {f'{name}, ternary forward': f'{text} weights=ternary/row/absmean'
               for name, text in stored.items() if 'int8' not in name}
    changes = {
        'controls': {
            'frozen random ternary': 'code_lr=1e-9 scale_lr=0',
            'stochastic rounding instead': 'idea=nothing',
            'the same, fixed scales': 'idea=nothing scale_lr=0',
            'the same, steps in weight space': 'code_lr=0 stored=ternary/row/absmean/stochastic '
                                               'beta1=0. adam_m= weight_decay=0'},
        'states': {
            'e and v float32': 'adam_m= adam_v=', 'v 8-bit': 'adam_v=uint8/64/root4',
            'e 8-bit to nearest': 'adam_m=int8/row', 'e 4-bit': 'adam_m=int4/row/stochastic'},
        'around': {
            'computed in float32': 'dtype=float32 activations= compute=float',
            'computed in bfloat16': 'dtype=bfloat16 activations= compute=float',
            'activations in fp8': 'activations=fp8/row compute=float',
            'codes not multiplied': 'compute=float'},
        'ingredients': {
            'a code moves at half a level': 'idea=half', 'e is emptied at the ends': 'idea=emptied',
            'fixed scales': 'scale_lr=0', 'no cool-down': 'min_lr=1',
            'scale gain .35': 'init_gain=.35', 'scale gain 1.4': 'init_gain=1.4',
            'one scale per tensor': 'stored=ternary/tensor/absmean'},
        'ideas': {name: f'idea={name}' for name in ('sign', 'root', 'attention')}}
    sections = {section: {name: f'{sides[TERNARY]} {change}' for name, change in found.items()}
                for section, found in changes.items()}
    sections['controls']['as published'] = 'config/dqt_paper.py'
    hard, others = ({side: sides[side] for side in some} for some in (SIDES[:7], SIDES[7:]))
    hard[HALF] = re.sub('(?<=learning_rate=).+', lambda rate: f'{float(rate[0]) / 2:g}',
                        sides[ADAMW])
    return {'hard': hard, 'others': others, 'stored': stored, 'ternary forward': ternary,
            **sections}


CLAIMS = [  # (family, what is said of a, a, '<=' or '>=', percent, b); of paper 2 by our update
    ('goal', 'no worse than BitNet with one scale', TERNARY, '<=', 0, BITNET),
    ('goal', 'no worse than BitNet with per-row scales', TERNARY, '<=', 0, ROWS),
    ('goal', 'no worse than BitNet with Muon', TERNARY, '<=', 0, BITMUON),
    ('goal', 'no worse than AdamW in full precision', TERNARY, '<=', 0, ADAMW),
    ('goal', 'no worse than AdamW at half the rate', TERNARY, '<=', 0, HALF),
    ('goal', 'no worse than AdamW without momentum', TERNARY, '<=', 0, PLAIN),
    ('goal', 'no worse than AdamW in bfloat16, without momentum', TERNARY, '<=', 0, BF16),
    ('goal', 'no worse than Muon', TERNARY, '<=', 0, MUON),
    ('2', 'ternary converges', TERNARY, '<=', -5, 'frozen random ternary'),
    ('2', 'so it does as published', 'as published', '<=', -5, 'frozen random ternary'),
    ('2', '8-bit is on par with BitNet', 'stored in int8', '<=', 1, BITNET),
    ('2', 'an 8-bit model, with scales by the largest weight, can infer with ternary weights',
     'stored in int8, as ternary', '<=', 5, 'stored in int8'),
    ('2', 'to compute in bfloat16 costs nothing', 'computed in bfloat16', '<=', 1,
     'computed in float32'),
    ('2', 'nor does fp8', 'activations in fp8', '<=', 1, 'computed in float32'),
    ('ours', 'multiplying codes changes nothing', TERNARY, '<=', 0.5, 'codes not multiplied'),
    ('ours', 'what has not moved a code yet is worth keeping', TERNARY, '<=', 0,
     'stochastic rounding instead'),
    ('ours', 'without it, code units beat weight space', 'the same, fixed scales', '<=', 0,
     'the same, steps in weight space'),
    ('ours', 'a whole level, not half of one', TERNARY, '<=', 0, 'a code moves at half a level'),
    ('ours', 'learned scales help', TERNARY, '<=', 0, 'fixed scales'),
    ('ours', '4-bit e is free', 'e 4-bit', '<=', 1, TERNARY),
    ('ours', 'e is to be rounded stochastically', TERNARY, '<=', 0, 'e 8-bit to nearest'),
    ('ours', 'int8 codes under a ternary forward are no worse than BitNet with one scale', INT8,
     '<=', 0, BITNET), ('ours', 'nor than BitNet with per-row scales', INT8, '<=', 0, ROWS)]


def draw(results, path):
    """The loss of each side, by the bytes that it holds of a weight, and the way there: its loss
    above that of direct ternary, and how well random tokens are copied."""
    from experiments.figures import METHODS, pyplot
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 4.2))
    found = []              # (bytes of a weight and its states, name, [losses of its seeds])
    for name in (*SIDES, HALF, *rows(HOW)['stored'], *rows(HOW)['ternary forward']):
        values = [*losses(results, name).values()]
        if values and math.inf not in values:
            size = next(r for r in results if r['name'] == name)['bytes']['linear']
            found.append((size['weights'] + size['optimizer'], name, values))
    found.sort(reverse=True)
    for place, (size, name, values) in enumerate(found):
        mean, half = interval(values)
        left.errorbar(mean, place, xerr=half if len(values) > 2 else None, capsize=2, ms=6,
                      **METHODS.get(name, dict(color='0.6', marker='.')))
    left.set_yticks(range(len(found)), [f'{name}, {size:.1f} bytes' for size, name, _ in found])
    low, high = left.get_xlim()         # at least 4 % of the loss, so that little looks little
    more = max(0, 0.02 * (low + high) - (high - low)) / 2
    bars = any(len(values) > 2 for *_, values in found)
    left.set(xlim=(low - more, high + more), title='At the end; bytes of a weight with its states',
             xlabel='validation loss, nats/token; ' + ('95 % intervals' if bars else 'one seed'))
    base = {r['seed']: r['evaluations'] for r in results if r['name'] == TERNARY and r['val_loss']}
    for side in (*SIDES, HALF):
        # (its evaluations but for the last, of more text; those of direct ternary) of each seed
        pairs = [(r['evaluations'][:-1], base[r['seed']]) for r in results
                 if r['name'] == side and r['val_loss'] and r['seed'] in base]
        if pairs:
            steps = [step for step, *_ in pairs[0][0]]
            both = [[*zip(*pair)] for pair in pairs]        # of each seed, by evaluation
            above = [statistics.mean(ours[1] - its[1] for ours, its in at) for at in zip(*both)]
            copied = [statistics.mean(ours[2] for ours, _ in at) for at in zip(*both)]
            middle.plot(steps, above, **METHODS[side])
            right.plot(steps, copied, **METHODS[side])
    middle.set(xlabel='step', ylabel='validation loss above that of direct ternary, nats/token',
               title='The lead of direct ternary on the way')
    right.set(xlabel='step', ylabel='how much less a token costs the second time, nats',
              title='Copying: random tokens that repeat')
    figure.savefig(path)


def jobs_of(size, dataset, seeds=(14, 15, 16, 17, 18)):
    """{section: [Job]}"""
    return {section: [job(size, dataset, *row, seed) for seed in seeds for row in found.items()]
            for section, found in rows(chosen(size)).items()}


def run_and_infer(job):
    """run_one, and of int8 codes the loss of the same model with ternary weights."""
    result = run_one(job)
    if job.name == 'stored in int8' and result['val_loss'] is not None:
        run = load(job, '--weights=ternary/row/absmean')
        result['loss_as_ternary'] = run.evaluate(run.config.final_tokens, run.val_data)
    return result


def main(options):
    size, path = options.size, lambda dataset: RESULTS / f'direct-{options.size}-{dataset}.jsonl'
    if size != 'large':
        used = {name for section in options.sections for name in (*rows(HOW)[section], TERNARY)}
        run_all(path('python'), every_try(size, [s for s in SIDES if s in used]), options.jobs)
    jobs = jobs_of(size, options.dataset, options.seeds)
    run_all(path(options.dataset), [job for section in options.sections for job in jobs[section]],
            options.jobs, run=run_and_infer)
    results = results_of(path(options.dataset), sum(jobs.values(), []))
    tried = results_of(path('python'), every_try(size))
    inferred = [{**r, 'name': f'{r["name"]}, as ternary', 'val_loss': r.get('loss_as_ternary')}
                for r in results if r['name'] == 'stored in int8']
    lines = [f'# Direct training, {size} size, {options.dataset} corpus',
             *claim_lines(results + inferred, CLAIMS)]
    for section, names in rows(HOW).items():
        if names := [name for name in names if losses(results, name)]:
            reference = ROWS if section in ('hard', 'others') else TERNARY
            lines += ['', f'**{section}**, differences from {reference}', '',
                      *table(results, reference, names)]
    if tried:
        lines += ['', '**tries**, seed 1 of python', '',
                  *table(tried, None, dict.fromkeys(r['name'] for r in tried))]
    stem = path(options.dataset).with_suffix('')
    report(stem, lines)
    draw(results, stem.with_suffix('.png'))


if __name__ == '__main__':
    parser = parser_of(__doc__, [14, 15, 16, 17, 18])
    parser.add_argument('--size', choices=SIZES, default='tiny')
    parser.add_argument('--dataset', choices=('python', 'sympy'), default='python')
    parser.add_argument('--sections', nargs='*', choices=rows(HOW), default=[*rows(HOW)])
    main(parser.parse_args())
