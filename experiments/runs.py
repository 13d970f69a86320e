"""
Many runs of train.py, each one JSON line: what the experiments share.

A run is a name, arguments for train.py and a seed. Finished runs are found in the results file and
skipped, so a program that is interrupted goes on where it stopped.
"""
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / 'experiments' / 'results'


def machine():
    """Processor and cores, as a string for the result files."""
    name = platform.processor() or platform.machine()
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo', encoding='utf-8') as f:
            names = [line.split(':')[1].strip() for line in f if line.startswith('model name')]
        name = names[0] if names else name
    return f'{name}, {os.cpu_count()} cores'


def read(path):
    """The results in a file, a list of dicts; [] where there is none."""
    if not path.exists():
        return []
    with open(path, encoding='utf-8') as f:
        return [json.loads(line) for line in f]


def run_one(name, args, seed, threads):
    """Train once and return the result line. RuntimeError: the last words of one that failed."""
    out = tempfile.mkdtemp(prefix='run-')
    try:
        command = [sys.executable, 'train.py', *args, f'--seed={seed}', f'--out_dir={out}',
                   '--sample_tokens=0']
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                              env={**os.environ, 'OMP_NUM_THREADS': str(threads)})
        if done.returncode:
            raise RuntimeError(f'{name}: {(done.stderr or done.stdout).strip().splitlines()[-1]}')
        log = read(Path(out, 'log.jsonl'))
    finally:
        shutil.rmtree(out)
    first, last = log[0], log[-1]
    kept = {key: last[key] for key in ('val_loss', 'val_bpb', 'bytes', 'levels', 'seconds')}
    return {'name': name, 'seed': seed, 'args': args, **kept, 'threads': threads,
            'sha256': first['sha256'], **first['versions'], 'machine': machine(),
            'date': str(date.today())}


def run_all(path, runs, jobs):
    """Train what is not yet in the file `path`, `jobs` at a time; returns all its results."""
    done = {(r['name'], r['seed'], tuple(r['args'])) for r in read(path)}
    todo = [run for run in runs if (run[0], run[2], tuple(run[1])) not in done]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    path.parent.mkdir(exist_ok=True)
    with ThreadPoolExecutor(jobs) as pool:
        pending = [pool.submit(run_one, name, args, seed, threads) for name, args, seed in todo]
        try:
            for future in tqdm(pending, desc=path.stem, unit='run'):
                result = future.result()
                with open(path, 'a', encoding='utf-8') as f:
                    f.write(json.dumps(result) + '\n')
                tqdm.write(f"{result['name']} seed {result['seed']}: {result['val_loss']:.4f} "
                           f"nats/token, {result['val_bpb']:.4f} bits/byte")
        finally:
            for future in pending:
                future.cancel()
    return read(path)
