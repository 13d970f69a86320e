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
import signal
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, replace
from datetime import date
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import torch
from tqdm import tqdm

import quant
import train
from config import read_arg
from experiments.ideas import trying
from model import GPT

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / 'experiments' / 'results'


def arguments(text):
    """Keys as in a config file, 'config/w8.py learning_rate=1e-3', as arguments of train.py."""
    return [word if word.startswith('config/') or word.endswith('.pt') else f'--{word}'
            for word in text.split()]


SIZES = {  # name: arguments for train.py that come before all others
    'tiny': ['config/tiny.py'],
    'small': ['config/small.py'],
    'default': [],
    'large': ['--n_layer=8', '--n_embd=640', '--n_head=10', '--batch_size=4', '--max_iters=5000',
              '--warmup_iters=200'],                                            # 41M, 11 times
}


class Job(NamedTuple):
    name: str
    args: list      # for train.py, and at most one --idea=NAME
    seed: int

    @property
    def mark(self):
        """A digest of the seed, the idea and all arguments that matter to the loss and are not the
        default (after a checkpoint, also of those that are): a run whose config file changed is
        another. A default of train.Config that changed is not seen: remove the lines that had the
        old one."""
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
    """Processor, cores and vector units, as a string for the result files."""
    name = platform.processor() or platform.machine()
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo', encoding='utf-8') as f:
            names = [line.split(':')[1].strip() for line in f if line.startswith('model name')]
        name = names[0] if names else name
    return f'{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}'


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


def weights(config):
    """How many the block linears have."""
    with torch.device('meta'):
        return sum(m.weight.numel() for m in quant.linears(GPT(config, 1024)).values())


def load(job, *more):
    """The model of a job whose checkpoint is still there, as train.py builds it from that and from
    `more` arguments: a Run."""
    args = [f'{job.folder}/ckpt.pt', '--eval_only=True', *more]
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return train.Run(train.parse(args), 0, 1)


def run_one(job):
    """Train once, in this process; the result line. A run whose loss is no longer finite has
    val_loss None; any other failure of it raises RuntimeError with its last words."""
    given, failed, mark, folder = keys(job.args), '', job.mark, job.folder
    unfinished = (folder / 'ckpt.pt').exists() and not given.get('ptq')
    args = ['--init_from=resume'] if unfinished else \
        [*plain(job.args), f'--seed={job.seed}', '--sample_tokens=0', '--overwrite=True']
    torch._dynamo.reset()
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), \
            trying(idea(job.args)), probed():
        try:
            train.main([*args, f'--out_dir={folder}'])
        except SystemExit as e:
            if e.code == 130:                       # Ctrl-C: no more jobs
                os._exit(130)
            failed = str(e)
    if failed and ' is nan at ' not in failed and ' is inf at ' not in failed:
        raise RuntimeError(failed)
    log = read(folder / 'log.jsonl')
    first, last, moved = log[0], log[-1], [e['flips'] for e in log if 'flips' in e]
    dtypes = {e['versions']['dtype'] for e in log if 'versions' in e}           # of each start
    if len(dtypes) > 1:
        raise RuntimeError(f'it was computed in {" and in ".join(sorted(dtypes))}: remove {folder}')
    kept = {'val_loss': None, 'failed': failed.split(';')[0]} if failed else \
        {key: last[key] for key in ('val_loss', 'val_bpb', 'loss_on_train', 'tokens', 'bytes',
                                    'levels', 'seconds')}
    tests = [[e['iter'], e['val_loss'], e.get('copying')] for e in log if 'val_loss' in e]
    return {'name': job.name, 'seed': job.seed, 'args': job.args, 'mark': mark, **kept,
            'weights': weights(train.Config(**first['config'])),
            'evaluations': tests, 'moved': statistics.mean(moved) if moved else None,
            'threads': torch.get_num_threads(), 'sha256': first['sha256'],
            **first['versions'], 'machine': machine(), 'date': str(date.today())}


@torch.no_grad()
def copying(run):
    """How much less a sequence of random tokens costs the second time, in nats per token: nothing
    before a model can copy, up to the log of the vocabulary after."""
    n = run.config.block_size // 2
    few = torch.randint(run.meta['vocab_size'], (8, n), generator=torch.Generator().manual_seed(0))
    x = torch.cat((few, few, few[:, :1]), 1).to(run.device)
    with torch.compiler.set_stance('force_eager'):
        first = run.model.eval()(x[:, :n], x[:, 1:n + 1]).item()
        second = 2 * run.model(x[:, :-1], x[:, 1:]).item() - first
    run.model.train()
    return first - second


@contextmanager
def probed():
    """Within, the log line of an evaluation also says what the model copies."""
    original = train.Run.report

    def with_copying(run, *args, **more):
        return original(run, *args, copying=copying(run), **more)

    train.Run.report = with_copying
    try:
        yield
    finally:
        train.Run.report = original


def start_worker(threads, free):
    """Set up a process that will train, and that ends with the program which started it: threads,
    cores, memory, and stochastic rounding. Its noise is compiled, and stays the same to the bit;
    eager, it would take half the time of runs that quantize g."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # between runs it ends without a word
    Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(threads)
    if hasattr(os, 'sched_setaffinity'):
        ours = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {ours[free.get()] for _ in range(threads)})
    train.tell_system()
    noise = torch.compile(quant.uniform, dynamic=True)
    try:
        noise(torch.zeros(2, 2), torch.zeros((), dtype=torch.int32))
        quant.uniform = noise
    except Exception:       # no compiler, no headers, ..: eager it is
        pass


def run_all(path, todo, jobs, keep=(), run=run_one, cost=None):
    """Train what is not yet in the file `path`, `jobs` at a time, and keep the checkpoints of the
    names in `keep`; returns the results of `todo`. `run` makes a result line of a job, and `cost`
    says about how many seconds it takes on one core. Failures are reported at the end."""
    if path.exists():       # a full disk leaves a line without its end
        os.truncate(path, path.read_bytes().rfind(b'\n') + 1)
    old, failed = read(path), []
    done = {r.get('mark') for r in old}
    missing = {job.mark: job for job in todo if job.mark not in done}          # each once
    # of those that take what the machine is fast at; no config file gives a dtype
    there = {r['dtype'] for r in old if 'dtype' in r and not gives_dtype(r['args'])}
    here = str(train.pick_dtype(train.Config(), train.pick_device(train.Config()))).split('.')[1]
    if there - {here} and not all(gives_dtype(job.args) for job in missing.values()):
        raise SystemExit(f"{path} was computed in {', '.join(there)}, and here it would be {here}:"
                         ' go on where it began, or move the file away to begin anew')
    threads = max(1, cores() // jobs)
    path.parent.mkdir(exist_ok=True)
    spawn = get_context('spawn')
    free = spawn.SimpleQueue()              # a worker takes its cores from here
    for i in range(jobs * threads):
        free.put(i % cores())
    with ProcessPoolExecutor(jobs, spawn, start_worker, (threads, free)) as pool:
        keep = {job.mark for job in todo if job.name in keep}
        pending = {pool.submit(run, job): job for job in missing.values()}
        try:
            hours = sum(map(cost or seconds, missing.values())) / min(jobs, cores()) / 3600
            tqdm.write(f'{path.name}: {len(missing)} of {len(todo)} runs to train, about '
                       f'{hours:.1f} hours, or up to twice that')
            for future in tqdm(as_completed(pending), path.stem, len(pending), unit='run'):
                try:
                    result = future.result()
                except BrokenProcessPool:
                    raise
                except RuntimeError as e:
                    failed.append(f'{pending[future].name}: {e}')
                    tqdm.write(failed[-1])
                    continue
                with open(path, 'a', encoding='utf-8') as f:
                    f.write(json.dumps(result) + '\n')
                results_of(path, todo)          # of one corpus?
                if result['mark'] not in keep:
                    shutil.rmtree(pending[future].folder)
                tqdm.write(f"{result['name']}, seed {result['seed']}: val loss {show(result)}")
        except KeyboardInterrupt:
            raise SystemExit('stopped; the same command goes on from here') from None
        except BrokenProcessPool:
            raise SystemExit('stopped: a worker has ended, by Ctrl-C or for lack of memory (try '
                             '--jobs 1); the same command goes on from here') from None
        finally:
            pool.shutdown(cancel_futures=True)
    if failed:
        raise SystemExit(f'{len(failed)} of {len(missing)} runs failed: {failed[0]}')
    return results_of(path, todo)


def gives_dtype(args):
    return any(arg.startswith('--dtype=') for arg in args)


def seconds(job):
    """About what it takes to train, on one core: half a minute to compile and then, in bfloat16,
    4e10 weights times tokens a second; the rest goes with the width. Most of the runs in results/
    took .6 to 1.7 times as long."""
    c = replace(train.Config(), **{k: v for k, v in keys(job.args).items() if k != 'checkpoint'})
    tokens = c.max_iters * c.grad_accum * c.batch_size * c.block_size
    slower = (2 if c.dtype == 'float32' else 1) * (1.5 if c.optimizer == 'muon' else 1)
    return 30 + tokens * slower * (weights(c) / 4e10 + c.n_embd / 4e6)


def results_of(path, jobs):
    """The results of those jobs that are finished, under the names they have now."""
    found = {r.get('mark'): r for r in read(path)}
    results = [{**found[job.mark], 'name': job.name} for job in jobs if job.mark in found]
    if len({r['sha256'] for r in results}) > 1:
        raise SystemExit(f'{path} has results of several corpora: keep those of one')
    return results


# ------------------------------------------------------------------------------------------------
# comparisons

def seed(text):
    """The seeds of results: those up to 10 have chosen rates."""
    if int(text) <= 10:
        raise argparse.ArgumentTypeError('seeds up to 10 choose rates: report on 11 and up')
    return int(text)


class Once(argparse.Action):
    """Values of an option, each once: a seed that is given twice is no second run."""
    def __call__(self, parser, options, values, option=None):
        setattr(options, self.dest, [*dict.fromkeys(values)])


def parser_of(doc, seeds=None):
    """An argument parser with --jobs and, where `seeds` are given, --seeds. ROOT, where config/ is,
    becomes the current folder."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if seeds:
        parser.add_argument('--seeds', type=seed, nargs='+', default=seeds, action=Once)
    parser.add_argument('--jobs', type=int, default=2, choices=range(1, 65), metavar='N',
                        help='runs at a time, sharing the cores')
    os.chdir(ROOT)
    return parser


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


def interval(values):
    """Mean, and half the width of its 95 % interval by Student's t. The half is nan of one value;
    an infinite value makes the mean infinite, and the half 0."""
    from scipy.stats import t
    n, mean = len(values), statistics.mean(values)
    if math.inf in values:
        return mean, 0.0
    return mean, t.ppf(0.975, n - 1) * statistics.stdev(values) / n ** 0.5 if n > 1 else math.nan


def loss_cells(results, name):
    """Two cells of a table: the loss of every seed on validation text, and on that of training."""
    return ' | '.join(', '.join(f'{r.get(key) or math.inf:.3f}' for r in results
                                if r['name'] == name) for key in ('val_loss', 'loss_on_train'))


def compare(results, a, b):
    """`interval` of loss(a) / loss(b) - 1 in percent, paired by seed; nan without a pair."""
    percent = differences(results, a, b)
    return interval(percent) if percent else (math.nan, math.nan)


def chance(values, bound):
    """The chance that a mean is so far from `bound` by luck alone: two-sided, by Student's t."""
    from scipy.stats import ttest_1samp
    if len(values) < 2:
        return 1.0
    if math.inf in values or len(set(values)) == 1:
        return 0.0
    return float(ttest_1samp(values, bound).pvalue)


def decide(claims):
    """A word for each of a family of claims [(values, '<=' or '>=', bound)] about a mean: PASS or
    FAIL if it lies on that side of the bound, at 95 % for all of them together (Holm), else
    UNRESOLVED."""
    chances = [chance(values, bound) for values, _, bound in claims]
    words, n = ['UNRESOLVED'] * len(claims), len(claims)
    for rank, i in enumerate(sorted(range(n), key=chances.__getitem__)):
        values, sign, bound = claims[i]
        if not chances[i] * (n - rank) < 0.05:
            break               # nor are those after it
        mean = statistics.mean(values)
        words[i] = 'PASS' if (mean <= bound if sign == '<=' else mean >= bound) else 'FAIL'
    return words


def claim_lines(results, claims):
    """Lines of markdown, a table of verdicts for each family; claims [(family, text, a, sign,
    percent, b)] say that loss(a) is so many percent above loss(b), at most or at least. Those whose
    runs are not there are left out."""
    claims, lines = [c for c in claims if losses(results, c[2]) and losses(results, c[5])], []
    for family in dict.fromkeys(claim[0] for claim in claims):
        some = [claim for claim in claims if claim[0] == family]
        words = decide([(differences(results, a, b), sign, percent)
                        for *_, a, sign, percent, b in some])
        lines += ['', '| of | claim | run, against | | mean and 95 % interval |',
                  '|---|---|---|---|---|']
        for word, (of, text, a, sign, percent, b) in zip(words, some):
            found = percents(compare(results, a, b))
            lines.append(f'| {of} | {text} | {a}, {b} | **{word}** | {found}, wanted {sign} '
                         f'{percent:+g} % |')
    return lines


def percents(found):
    """An interval in words."""
    mean, half = found
    if math.isnan(mean) or math.isinf(mean):
        return '' if math.isnan(mean) else 'not finite'
    between = '' if math.isnan(half) else f' [{mean - half:+.2f}, {mean + half:+.2f}]'
    return f'{mean:+.2f} %{between}'


def table(results, reference, names):
    """Lines of a markdown table: loss over seeds, difference from `reference`, and bytes."""
    lines = ['| run | seeds | val loss ± standard deviation | train loss | difference, 95 % '
             'interval | tokens a weight | bytes in training: weight + states |',
             '|---|---|---|---|---|---|---|']
    for name in names:
        rows = [r for r in results if r['name'] == name]
        values = list(losses(results, name).values())
        if math.inf in values:
            lines.append(f'| {name} | {len(rows)} | not finite | | | | |')
            continue
        sd = f' ± {statistics.stdev(values):.3f}' if len(values) > 1 else ''
        size, seen = rows[0]['bytes']['linear'], statistics.mean(r['loss_on_train'] for r in rows)
        difference = '' if name == reference else percents(compare(results, name, reference))
        lines.append(
            f'| {name} | {len(rows)} | {statistics.mean(values):.4f}{sd} | {seen:.4f} | '
            f'{difference} | {rows[0]["tokens"] / rows[0]["weights"]:.1f} | '
            f'{size["weights"]:.2f} + {size["optimizer"]:.2f} |')
    return lines
