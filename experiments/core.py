"""
The numbers of the README: python -m experiments.core [tune] [main] [small] [compute] [--jobs=2]

    tune    what the settings of BitNet and of direct ternary training were chosen by
    main    config/ternary.py, its frozen-random control, config/bitnet.py and config/baseline.py
    small   every strategy on a small model, three seeds where one is compared closely
    compute the small model compiled, with dequantized codes or the codes themselves multiplied

Without a group, prints the table of what has been run. One JSON line a run goes to
experiments/results/core.jsonl; finished runs are skipped. Only lines of one sha256 compare.
"""
import argparse
import statistics

from experiments.runs import RESULTS, Job, read, run_all

PATH = RESULTS / 'core.jsonl'

# the control: rounded to nearest, small steps never move a code; the rest learns as ever
MAIN = {'ternary': ['config/ternary.py'], 'bitnet': ['config/bitnet.py'],
        'frozen': ['config/ternary.py', '--master=ternary/row/absmean', '--code_lr=1e-6'],
        'baseline': ['config/baseline.py']}

SHORT = ['--max_iters=600', '--warmup_iters=50', '--eval_interval=10000']       # half a run
HALF = [('bitnet', '--learning_rate=1.5e-3'), ('bitnet', '--learning_rate=3e-3'),
        ('bitnet', '--learning_rate=6e-3'), ('bitnet', '--learning_rate=3e-3 --init_gain=.7'),
        ('ternary', '--code_lr=.05'), ('ternary', '--code_lr=.1'), ('ternary', '--code_lr=.2'),
        ('ternary', '--code_lr=.4'), ('ternary', '--code_lr=.1 --init_gain=.5')]
WHOLE = [('bitnet', '--learning_rate=1.5e-3'), ('bitnet', '--learning_rate=2e-3'),
         ('bitnet', '--beta1=.95 --beta2=.999'), ('baseline', '--beta2=.999'),
         ('baseline', '--init_gain=.7')]

SMALL = ['--n_embd=128', '--hidden=384', '--block_size=128', '--batch_size=16', '--max_iters=400',
         '--warmup_iters=40', '--eval_interval=1000']
CLOSE = ['baseline', 'w8', 'a8', 'w8a8', 'adam8']       # within 1 % of baseline over three seeds?
OTHERS = ['w4', 'a4', 'g8', 'w8a8g8', 'adam4', 'kv4', 'bitnet', 'ternary', 'ternary_int8',
          'direct8', 'direct4', 'dqt_paper', 'everything']

COMPUTE = {
    'w8a8, float': ['w8a8'], 'w8a8, int8': ['w8a8', 'int8'],
    'ternary, float': ['ternary'], 'ternary, int8': ['ternary', 'int8'],
    'w8a8g8 fold, float': ['w8a8g8', 'float', 'fold'],
    'w8a8g8 fold, int8': ['w8a8g8', 'int8', 'fold'],
    'w8a8g8 requantize, int8': ['w8a8g8', 'int8', 'requantize']}


def compute_args(name, compute='float', backward='ste'):
    """Arguments of train.py."""
    return [f'config/{name}.py', *SMALL, '--compile=yes', f'--compute={compute}',
            f'--backward={backward}']


def groups():
    """{group: [(name, arguments of train.py, seed)]}"""
    tune = [(f'half {name} {flags}', [f'config/{name}.py', *SHORT, *flags.split()], 1)
            for name, flags in HALF]
    tune += [(f'{name} {flags}', [f'config/{name}.py', *flags.split()], 1)
             for name, flags in WHOLE]
    main = [(name, args, seed) for seed in (1, 2, 3) for name, args in MAIN.items()]
    small = [(f'small {name}', [f'config/{name}.py', *SMALL], seed) for seed in (1, 2, 3)
             for name in CLOSE + OTHERS if name in CLOSE or seed == 1]
    compute = [(name, compute_args(*args), seed) for seed in (1, 2, 3)
               for name, args in COMPUTE.items()]
    return {'tune': tune, 'main': main, 'small': small, 'compute': compute}


def table(results):
    """Mean and standard deviation over seeds, and the bytes per weight of the blocks, by name."""
    print('| run | seeds | val loss, nats/token | bits/byte | bytes: weight + optimizer |')
    print('|---|---|---|---|---|')
    for name in dict.fromkeys(r['name'] for r in results):
        rows = [r for r in results if r['name'] == name]
        losses, bpb = [r['val_loss'] for r in rows], statistics.mean(r['val_bpb'] for r in rows)
        spread = f' ± {statistics.stdev(losses):.4f}' if len(rows) > 1 else ''
        held = rows[0]['bytes']['linear']
        print(f'| {name} | {len(rows)} | {statistics.mean(losses):.4f}{spread} | {bpb:.4f} | '
              f'{held["weights"]:.2f} + {held["optimizer"]:.2f} |')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('groups', nargs='*', metavar='group')
    parser.add_argument('--jobs', type=int, default=2, help='runs at a time, sharing the cores')
    options = parser.parse_args()
    for group in options.groups:
        if group not in groups():
            parser.error(f"no group '{group}': choose from {', '.join(groups())}")
        run_all(PATH, [Job(*run) for run in groups()[group]], options.jobs)
    table(read(PATH))
