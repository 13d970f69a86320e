"""
Direct quantized training (paper 2, 2412.04787) against BitNet and full precision.

    python -m experiments.direct                                 the tiny size, the Python corpus
    python -m experiments.direct --sections hard --dataset=sympy      the hard goal on the other
    python -m experiments.direct --sections hard --size=default       corpus, at 3.7M parameters,
    python -m experiments.direct --sections hard --size=large --seeds 14     and at 41M

Every side has rates of its own, found by tries on seeds 1 to 4 only (section `tune`); what is
reported are other seeds. No token is read twice. Besides the hard goal: other sides, codes of
other grids, states in few bits, controls, the ingredients of the direct update, and ideas that are
not in it.
Writes experiments/results/direct-<size>-<corpus>.jsonl (one line a run; finished ones are
skipped), .md and .png.
"""
import math
import statistics

from experiments.runs import (RESULTS, SIZES, Job, arguments, claim_lines, interval, losses,
                              parser_of, report, results_of, run_all, table)

ADAMW, PLAIN, ROWS, TERNARY, MUON, BITNET, INT8, BF16 = SIDES = (
    'AdamW', 'AdamW without momentum', 'BitNet, per-row scales', 'direct ternary', 'Muon', 'BitNet',
    'int8 codes, ternary forward', 'bfloat16 without momentum')
HOW = dict(zip(SIDES, (
    'config/baseline.py', 'config/baseline.py beta1=0.',
    'config/bitnet.py weights=ternary/row/absmean', 'config/ternary.py',
    'config/baseline.py optimizer=muon init_gain=0.', 'config/bitnet.py', 'config/ternary_int8.py',
    'config/baseline.py stored=bf16/stochastic weight_decay=0 beta1=0. adam_v=rank1')))
# {side: its tries, with seed 1}: the first of them is what a side takes. Half and twice are of the
# rate of the size. Still to be made are those of BitNet, of int8 codes, and all but the second of
# Muon, and at the tiny size all
TRIES = {
    ADAMW: ('', 'learning_rate={half}', 'learning_rate={twice}'),
    PLAIN: ('learning_rate={half}', ''),
    MUON: ('', 'learning_rate={half}', 'beta1=.95'),
    BITNET: ('', 'learning_rate={half}', 'learning_rate={twice}'),
    ROWS: ('', 'learning_rate={half}', 'learning_rate={twice}', 'embedding_lr={more}', 'beta1=0.',
           'learning_rate={half} beta1=0.'),
    TERNARY: ('', 'code_lr=.044', 'code_lr=.088', 'code_lr=.044 idea=root'),
    INT8: ('', 'code_lr=.006', 'code_lr=.024'),
    BF16: ('learning_rate={half}', '')}
# how codes are stored: on their own, and under a ternary forward
GRIDS = 'int3', 'int4', 'int8'


def rows(size='tiny'):
    """{section: {name: keys for train.py}}; changes are of direct ternary."""
    rates = {'half': '.75e-3', 'twice': '3e-3', 'more': '12e-3'}
    if size == 'tiny':
        rates = {'half': '1.5e-3', 'twice': '6e-3', 'more': '96e-3'}
    tries = {side: [text.format(**rates) for text in texts] for side, texts in TRIES.items()}
    if size in ('tiny', 'small'):       # below the default size the higher rate is better
        tries[PLAIN].reverse()
        tries[BF16].reverse()
    sides = {side: f'{HOW[side]} {tries[side][0]}' for side in SIDES}
    tune = {f'{side} {text}': f'{HOW[side]} {text}' for side in SIDES for text in tries[side]}
    own = {'stored in int3': 'config/direct4.py stored=int3/row code_lr=.04',       # not tuned
           'stored in int4': 'config/direct4.py', 'stored in int8': 'config/direct8.py'}
    ternary = {f'stored in {grid}, ternary forward': f'config/ternary_int8.py stored={grid}/row'
               for grid in GRIDS}
    changes = {
        'controls': {
            'frozen random ternary': 'code_lr=1e-9 scale_lr=0',
            'stochastic rounding instead': 'idea=nothing'},
        'states': {
            'e and v float32': 'adam_m= adam_v=', 'v 8-bit': 'adam_v=uint8/64/root4',
            'e 8-bit to nearest': 'adam_m=int8/row', 'e 4-bit': 'adam_m=int4/row/stochastic'},
        'around': {
            'all else in float32': 'dtype=float32 activations= compute=float',
            'all else in bfloat16': 'dtype=bfloat16 activations= compute=float',
            'activations in fp8': 'activations=fp8/row compute=float',
            'codes not multiplied': 'compute=float'},
        'ingredients': {
            'a code moves at half a level': 'idea=half', 'e is emptied at the ends': 'idea=emptied',
            'fixed scales': 'scale_lr=0', 'no cool-down': 'min_lr=1',
            'steps in weight space': 'code_lr=0 stored=ternary/row/absmean/stochastic '
                                     'learning_rate=3e-3 weight_decay=0',
            'scale gain .35': 'init_gain=.35', 'scale gain 1.4': 'init_gain=1.4',
            'one scale per tensor': 'stored=ternary/tensor/absmean'},
        'ideas': {name: f'idea={name}' for name in ('sign', 'root', 'attention')}}
    sections = {section: {name: f'{sides[TERNARY]} {change}' for name, change in found.items()}
                for section, found in changes.items()}
    sections['controls']['as published'] = 'config/dqt_paper.py'
    hard, others = ({side: sides[side] for side in some} for some in (SIDES[:4], SIDES[4:]))
    return {'hard': hard, 'others': others, 'stored': own, 'ternary forward': ternary, **sections,
            'tune': tune}


CLAIMS = [  # (of paper 2 or ours, what it says, a, '<=' or '>=', percent, b)
    ('ours', 'direct ternary is no worse than BitNet', TERNARY, '<=', 0, BITNET),
    ('ours', 'nor than BitNet with per-row scales', TERNARY, '<=', 0, ROWS),
    ('ours', 'nor than AdamW in full precision', TERNARY, '<=', 0, ADAMW),
    ('ours', 'nor than that without momentum', TERNARY, '<=', 0, PLAIN),
    ('2', 'ternary converges', TERNARY, '<=', -5, 'frozen random ternary'),
    ('2', '8-bit is on par with BitNet', 'stored in int8', '<=', 1, BITNET),
    ('2', 'an 8-bit model can infer with ternary weights', 'stored in int8, as ternary', '<=', 5,
     'stored in int8'),
    ('2', 'bfloat16 around it costs nothing', 'all else in bfloat16', '<=', 1,
     'all else in float32'),
    ('2', 'nor does fp8', 'activations in fp8', '<=', 1, 'all else in float32'),
    ('ours', 'multiplying codes changes nothing', TERNARY, '<=', 0.5, 'codes not multiplied'),
    ('ours', 'code units beat weight space', TERNARY, '<=', 0, 'steps in weight space'),
    ('ours', 'what has not moved a code yet is worth keeping', TERNARY, '<=', 0,
     'stochastic rounding instead'),
    ('ours', 'a whole level, not half of one', TERNARY, '<=', 0, 'a code moves at half a level'),
    ('ours', 'learned scales help', TERNARY, '<=', 0, 'fixed scales'),
    ('ours', '4-bit e is free', 'e 4-bit', '<=', 1, TERNARY),
    ('ours', 'e is to be rounded stochastically', TERNARY, '<=', 0, 'e 8-bit to nearest'),
    ('ours', 'int8 codes under a ternary forward are no worse than BitNet', INT8,
     '<=', 0, BITNET), ('ours', 'nor than BitNet with per-row scales', INT8, '<=', 0, ROWS)]


def draw(results, path):
    """The loss of each side against the bytes that it holds of a weight, and the way there: its
    loss above that of direct ternary, and how well random tokens are copied."""
    from experiments.figures import METHODS, pyplot
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 4.2))

    def points(names):
        """(bytes, mean loss, half of its interval) of those that ran and ended."""
        for name in names:
            values = list(losses(results, name).values())
            if values and math.inf not in values:
                size = next(r for r in results if r['name'] == name)['bytes']['linear']
                mean, half = interval(values)
                yield size['weights'] + size['optimizer'], mean, half if len(values) > 2 else 0

    for name in SIDES:
        for x, y, half in points([name]):
            left.errorbar(x, y, half, fmt='o', capsize=2, color=METHODS[name], label=name)
    for section, mark in ('stored', 's-'), ('ternary forward', 'D-'):
        if found := [*zip(*points(rows()[section]))]:
            left.plot(*found[:2], mark, color='0.6', lw=1, label=f'{section}: int3, 4, 8')
    left.set(xscale='log', xlabel='bytes that a weight and its states hold',
             ylabel='validation loss, nats/token', title='Loss against bytes')
    ticks = [1, 1.5, 2, 3, 4, 6, 8, 12]
    left.set_xticks(ticks, [f'{t:g}' for t in ticks])
    left.minorticks_off()
    base = {r['seed']: r['evaluations'] for r in results if r['name'] == TERNARY and r['val_loss']}
    for side in SIDES:
        # (its evaluations but for the last, of more text; those of direct ternary) of each seed
        pairs = [(r['evaluations'][:-1], base[r['seed']]) for r in results
                 if r['name'] == side and r['val_loss'] and r['seed'] in base]
        if pairs:
            steps = [step for step, *_ in pairs[0][0]]
            both = [[*zip(*pair)] for pair in pairs]        # of each seed, by evaluation
            above = [statistics.mean(ours[1] - its[1] for ours, its in at) for at in zip(*both)]
            copied = [statistics.mean(ours[2] for ours, _ in at) for at in zip(*both)]
            middle.plot(steps, above, color=METHODS[side])
            right.plot(steps, copied, color=METHODS[side])
    middle.set(xlabel='step', ylabel='nats/token above direct ternary', title='The way there')
    right.set(xlabel='step', ylabel='nats that a token costs less',
              title='Random tokens, the second time')
    figure.legend(*left.get_legend_handles_labels(), loc='outside lower center', ncols=4)
    figure.savefig(path)


def jobs_of(size, dataset, seeds=None):
    """{section: [Job]}. A row that no claim is about has the first seed alone."""
    sections, of = rows(size), {'hard': seeds or [14, 15, 16, 17, 18], 'tune': [1]}
    base = [*SIZES[size], f'--dataset={dataset}', f'--final_tokens={2 ** 19}',
            '--eval_interval=200']
    claimed = {*sections['hard'], *(name for claim in CLAIMS for name in (claim[2], claim[5]))}
    return {section: [Job(name, [*base, *arguments(text)], seed)
                      for i, seed in enumerate(of.get(section, seeds or [14, 15, 16]))
                      for name, text in found.items() if i == 0 or name in claimed]
            for section, found in sections.items()}


def main(options):
    stem, sections = RESULTS / f'direct-{options.size}-{options.dataset}', rows(options.size)
    jobs = jobs_of(options.size, options.dataset, options.seeds)
    path = stem.with_suffix('.jsonl')
    run_all(path, [job for section in options.sections for job in jobs[section]], options.jobs)
    results = results_of(path, [job for section in jobs.values() for job in section])
    inferred = [{**r, 'name': f'{r["name"]}, as ternary', 'val_loss': r['loss_as_ternary']}
                for r in results if 'loss_as_ternary' in r]
    lines = [f'# Direct training, {options.size} size, {options.dataset} corpus', '',
             *claim_lines(results + inferred, CLAIMS)]
    for section, names in {**sections, 'as ternary': [r['name'] for r in inferred]}.items():
        if names := [name for name in dict.fromkeys(names) if losses(results + inferred, name)]:
            reference = ROWS if section in ('hard', 'others', 'tune') else TERNARY
            lines += ['', f'**{section}**, differences from {reference}', '',
                      *table(results + inferred, reference, names)]
    report(stem, lines)
    draw(results, stem.with_suffix('.png'))


if __name__ == '__main__':
    parser = parser_of(__doc__)
    parser.add_argument('--size', choices=SIZES, default='tiny')
    parser.add_argument('--dataset', choices=('python', 'sympy'), default='python')
    parser.add_argument('--sections', nargs='*', choices=rows(), default=[*rows()])
    main(parser.parse_args())
