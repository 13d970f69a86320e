"""
Many runs of train.py, each one JSON line: what the experiments share.

A run is a name, arguments for train.py and a seed. Finished runs are found in the results file and
skipped, unfinished ones go on from their checkpoint, so a program that is interrupted goes on
where it stopped. Runs of one seed see the same data in the same order: comparisons are paired.
"""
import argparse
import hashlib
import io
import json
import math
import os
import platform
import shutil
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import quant
import train
from config import read_arg
from experiments.ideas import trying

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / 'experiments' / 'results'

SIZES = {  # name: arguments for train.py that come before all others
    'small': ['--n_embd=128', '--hidden=384', '--block_size=128', '--batch_size=16',
              '--max_iters=400', '--warmup_iters=40'],
    'default': [],
    'large': ['--n_layer=8', '--n_embd=640', '--n_head=10', '--batch_size=4', '--max_iters=5000',
              '--warmup_iters=200'],                                            # 41M, 11 times
    'gpt2': ['config/gpt2.py', '--max_iters=5000'],
}


def arguments(text):
    """Keys as in a config file, 'config/w8.py learning_rate=1e-3', as arguments of train.py."""
    return [word if word.startswith('config/') else f'--{word}' for word in text.split()]


class Job(NamedTuple):
    name: str
    args: list      # for train.py, and at most one --idea=NAME
    seed: int

    @property
    def mark(self):
        """A digest of what is not the default, or not the checkpoint's, and matters to the loss: a
        run whose config file changed is another."""
        default, given = asdict(train.Config()), keys(self.args)
        changed = {k: v for k, v in given.items() if k not in ('out_dir', 'compile')
                   and (v != default[k] or given.get('checkpoint'))}
        text = json.dumps([changed, idea(self.args), self.seed], sort_keys=True)
        return hashlib.sha256(text.replace(f'{ROOT}/', '').encode()).hexdigest()[:12]

    @property
    def folder(self):
        """Where it keeps its checkpoint while, and if wished after, it runs."""
        return ROOT / 'out' / 'experiments' / self.mark


def plain(args):
    return [a for a in args if not a.startswith('--idea=')]


def idea(args):
    return ''.join(a.removeprefix('--idea=') for a in args if a.startswith('--idea='))


def keys(args):
    """{key: value} that arguments of train.py give, neither checked nor tried; of a checkpoint,
    which may not be there yet, its path."""
    found = {}
    for arg in plain(args):
        found |= {'checkpoint': arg} if arg.endswith('.pt') else read_arg(arg, train.Config)
    return found


def machine():
    """Processor and cores, as a string for the result files."""
    name = platform.processor() or platform.machine()
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo', encoding='utf-8') as f:
            names = [line.split(':')[1].strip() for line in f if line.startswith('model name')]
        name = names[0] if names else name
    return f'{name}, {os.cpu_count()} cores'


def cores():
    """How many this process may use."""
    affinity = getattr(os, 'sched_getaffinity', None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def read(path):
    """The results in a file, a list of dicts; [] where there is none."""
    if not path.exists():
        return []
    with open(path, encoding='utf-8') as f:
        return [json.loads(line) for line in f]


def load(job, *more):
    """The model of a job whose checkpoint is still there, as train.py builds it from that and from
    `more` arguments: a Run."""
    args = [f'{job.folder}/ckpt.pt', '--eval_only=True', *more]
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return train.Run(train.parse(args), 0, 1)


def run_one(job):
    """Train once, in this process; the result line. A run whose loss is no longer finite has
    val_loss None; any other failure raises RuntimeError with its last words. Of stored codes with
    more levels than three, loss_as_ternary is that of the same model with ternary weights."""
    given, failed = keys(job.args), ''
    unfinished = (job.folder / 'ckpt.pt').exists() and not given.get('ptq')
    args = ['--init_from=resume'] if unfinished else \
        [*plain(job.args), f'--seed={job.seed}', '--sample_tokens=0', '--overwrite=True']
    torch._dynamo.reset()
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), trying(idea(job.args)):
        try:
            train.main([*args, f'--out_dir={job.folder}'])
        except SystemExit as e:
            if e.code == 130:                       # Ctrl-C: no more jobs
                os._exit(130)
            failed = str(e)
    if failed and ' is nan at ' not in failed and ' is inf at ' not in failed:
        raise RuntimeError(f'{job.name}: {failed}')
    log = read(job.folder / 'log.jsonl')
    first, last = log[0], log[-1]
    curve = [[e['iter'], e['flips'] if 'flips' in e else None, e['train_loss']]
             for e in log if 'train_loss' in e]
    kept = {'val_loss': None, 'failed': failed.split(';')[0]} if failed else \
        {key: last[key] for key in ('val_loss', 'val_bpb', 'bytes', 'levels', 'seconds')}
    coarse = 'ternary' in given.get('stored', '') + given.get('weights', '')
    if not failed and given.get('stored') and not given.get('ptq') and not coarse:
        run = load(job, '--weights=ternary/row/absmean')
        kept['loss_as_ternary'] = run.evaluate(run.config.final_tokens)['val_loss']
    return {'name': job.name, 'seed': job.seed, 'args': job.args, 'mark': job.mark, **kept,
            'curve': curve[::max(1, len(curve) // 20)], 'threads': torch.get_num_threads(),
            'sha256': first['sha256'], **first['versions'], 'machine': machine(),
            'date': str(date.today())}


def start_worker(threads):
    """Of a process that will train: its threads and memory, and the noise of stochastic rounding
    compiled, which is the same to the bit, but eager takes half the time of runs that quantize
    g."""
    torch.set_num_threads(threads)
    train.tell_system()
    noise = torch.compile(quant.uniform, dynamic=True)
    try:
        noise(torch.zeros(2, 2), torch.zeros((), dtype=torch.int32))
        quant.uniform = noise
    except Exception:       # no compiler, no headers, ..: eager it is
        pass


def run_all(path, todo, jobs, keep=(), run=run_one):
    """Train what is not yet in the file `path`, `jobs` at a time, and keep the checkpoints of the
    names in `keep`; returns the results of `todo`. `run` makes a result line of a job."""
    done = {r.get('mark') for r in read(path)}
    threads = max(1, cores() // jobs)
    path.parent.mkdir(exist_ok=True)
    spawn = get_context('spawn')
    with ProcessPoolExecutor(jobs, spawn, start_worker, (threads,)) as pool:
        missing = {job.mark: job for job in todo if job.mark not in done}      # each once
        keep = {job.mark for job in todo if job.name in keep}
        pending = {pool.submit(run, job): job for job in missing.values()}
        try:
            for future in tqdm(as_completed(pending), path.stem, len(pending), unit='run'):
                result = future.result()
                with open(path, 'a', encoding='utf-8') as f:
                    f.write(json.dumps(result) + '\n')
                if result['mark'] not in keep:
                    shutil.rmtree(pending[future].folder)
                tqdm.write(f"{result['name']}, seed {result['seed']}: val loss {show(result)}")
        except (KeyboardInterrupt, BrokenProcessPool):
            raise SystemExit('stopped; the same command goes on from here') from None
        finally:
            for future in pending:
                future.cancel()
    return results_of(path, todo)


def results_of(path, jobs):
    """The results of those jobs that are finished, under the names they have now."""
    found = {r.get('mark'): r for r in read(path)}
    results = [{**found[job.mark], 'name': job.name} for job in jobs if job.mark in found]
    if len({r['sha256'] for r in results}) > 1:
        raise SystemExit(f'{path} has results of several corpora: keep those of one')
    return results


# ------------------------------------------------------------------------------------------------
# comparisons

def options_of(doc, seeds):
    """The options of a program whose runs have seeds: --seeds and --jobs."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, nargs='*', default=seeds)
    parser.add_argument('--jobs', type=int, default=2, help='runs at a time, sharing the cores')
    os.chdir(ROOT)                                      # where config/ is
    return parser.parse_args()


def report(stem, lines):
    """Write the lines of a table beside the results, and print them."""
    stem.with_suffix('.md').write_text('\n'.join(lines) + '\n', encoding='utf-8')
    print('\n'.join(lines))


def show(result):
    return 'not finite' if result['val_loss'] is None else f"{result['val_loss']:.4f}"


def losses(results, name):
    """{seed: val loss} of a name; a run that failed has the loss infinity."""
    return {r['seed']: math.inf if r['val_loss'] is None else r['val_loss']
            for r in results if r['name'] == name}


def differences(results, a, b):
    """loss(a) / loss(b) - 1 in percent, for each seed that both have and on which b ended."""
    a, b = losses(results, a), losses(results, b)
    return [100 * (a[seed] / b[seed] - 1) for seed in a if b.get(seed, math.inf) < math.inf]


def compare(results, a, b):
    """Mean and standard error of loss(a) / loss(b) - 1 in percent over the seeds that both have;
    of a single seed the error is nan, and without any, so is the mean."""
    percent = differences(results, a, b)
    if math.inf in percent:
        return math.inf, 0.0
    if not percent:
        return math.nan, math.nan
    error = statistics.stdev(percent) / len(percent) ** 0.5 if len(percent) > 1 else math.nan
    return statistics.mean(percent), error


def verdict(results, a, b, sign, percent):
    """'loss(a) <= (1 + percent / 100) loss(b)' (sign '<=', or '>='), as `decide` says."""
    mean, error = compare(results, a, b)
    margin = (percent - mean) * (1 if sign == '<=' else -1)
    seeds = len(differences(results, a, b))
    spread = ' %, one seed' if math.isnan(error) else f' ± {error:.2f} %'
    numbers = f'{mean:+.2f}{spread}, wanted {sign} {percent:+g} %'
    return decide(margin, error, seeds), numbers


def decide(margin, error, seeds):
    """PASS or FAIL if a margin lies on that side of zero by so many of its standard errors that
    chance would do it in 5 % of all cases (Student's t, one-sided), else UNRESOLVED."""
    t = {2: 6.31, 3: 2.92, 4: 2.35, 5: 2.13}.get(seeds, 2.0)
    return 'UNRESOLVED' if not abs(margin) >= t * error else 'PASS' if margin > 0 else 'FAIL'


def claim_lines(results, claims):
    """Lines of a markdown table of verdicts; claims [(of, text, a, sign, percent, b)]."""
    lines = ['| of | claim | run, against | | |', '|---|---|---|---|---|']
    for of, text, a, sign, percent, b in claims:
        if losses(results, a) and losses(results, b):
            said, numbers = verdict(results, a, b, sign, percent)
            lines.append(f'| {of} | {text} | {a}, {b} | **{said}** | {numbers} |')
    return lines


def table(results, reference, names=None):
    """Lines of a markdown table: loss over seeds, difference from `reference`, and bytes."""
    lines = ['| run | seeds | val loss, nats/token | difference | bytes: weight + states |',
             '|---|---|---|---|---|']
    for name in names or dict.fromkeys(r['name'] for r in results):
        rows = [r for r in results if r['name'] == name]
        values = list(losses(results, name).values())
        if math.inf in values:
            lines.append(f'| {name} | {len(rows)} | not finite | | |')
            continue
        spread = f' ± {statistics.stdev(values):.3f}' if len(values) > 1 else ''
        mean, error = compare(results, name, reference)
        error = '' if math.isnan(error) else f' ± {error:.1f}'
        difference = '' if math.isnan(mean) else f'{mean:+.1f}{error} %'
        size = rows[0]['bytes']['linear']
        lines.append(f'| {name} | {len(rows)} | {statistics.mean(values):.3f}{spread} | '
                     f'{difference} | {size["weights"]:.2f} + {size["optimizer"]:.2f} |')
    return lines
