"""
Random configurations, each of which train.py must refuse in one line or carry through:

    python -m experiments.fuzz [--configs=200] [--seed=0]

Values are drawn for all keys that choose what is quantized and how, and Specs for all tensors;
what train.py refuses is left out again. What is accepted must train four steps, go on after Ctrl-C
to the same checkpoint, bit for bit, evaluate from it to the same loss, sample, and, stored in full
precision, be quantized after training. Prints counts, and for each failure the command line that
reproduces it; the exit code is then 1. A loss that becomes nan or infinite is no failure.
"""
import argparse
import contextlib
import io
import random
import re
import shlex
import shutil
import signal
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from tqdm import tqdm

import quant
import train
from data.corpus import prepare
from model import GPT

ROOT = Path(__file__).resolve().parents[1]
FIXED = ['--n_layer=2', '--hidden=64', '--block_size=32', '--max_iters=4', '--warmup_iters=2',
         '--eval_interval=100', '--eval_tokens=128', '--final_tokens=256', '--log_interval=1',
         '--sample_tokens=3', '--device=cpu', '--compile=no']
SPECS = 'weights', 'activations', 'gradients', 'kv_cache', 'stored', 'adam_m', 'adam_v'
KEYS = {
    'flavour': ('gpt2', 'llama'), 'n_embd': (32, 64), 'n_head': (2, 4), 'n_kv_head': (0, 1, 2, 3),
    'tied': (True, False), 'bias': (True, False), 'quantize_head': (True, False),
    'dropout': (0.0, 0.2), 'init_gain': (0.0, 0.7), 'batch_size': (2, 3), 'grad_accum': (1, 2),
    'sequences': (0, 20), 'sample_tokens': (0, 40), 'dtype': ('float32', 'bfloat16'),
    'backward': ('ste', 'full', 'fold', 'requantize'), 'gradients_in': ('both', 'dx', 'dw'),
    'compute': ('float', 'codes'), 'optimizer': ('adamw', 'muon'),
    'learning_rate': (1e-3, 1e-2), 'embedding_lr': (0.0, 1e-2), 'weight_decay': (0.0, 0.1),
    'beta2': (0.95, 0.999), 'grad_clip': (0.0, 1.0), 'update_in_backward': (True, False),
    'code_lr': (0.0, 0.1, 0.8), 'scale_lr': (0.0, 0.01), 'threshold': (0.0, 2.0),
    'ramp': (0.0, 20.0)}
USUAL = 'int8/row', 'int8/row/stochastic', 'ternary/row/absmean/stochastic', 'fp8/row', 'int4/32'


class Failure(Exception):
    """train.py did what it must not, and on which command lines."""


def call(*argv):
    """train.main: what it printed, or the one line by which it refused, from 'error: ' on."""
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            train.main(list(argv))
    except SystemExit as e:
        says = 'stopped' if e.code == 130 else e.code
        if says != 'stopped' and not re.fullmatch('error: .*', str(says)):
            raise Failure(f'not one line: {says!r}') from None
        return says
    except Exception as e:
        raise Failure(f'{type(e).__name__}: {e}') from e
    return out.getvalue()


def draw_spec(rng):
    """A Spec as a string; of what is drawn word by word many contradict themselves."""
    if rng.random() < 0.4:
        return rng.choice(USUAL)
    words = [rng.choice([*quant.WORDS['grid'], *quant.FORMATS])]
    for field, good in quant.WORDS.items():
        if field != 'grid' and rng.random() < 0.4:
            words.append(rng.choice(good + ['8', '16', '32'] * (field == 'group')))
    return '/'.join(rng.sample(words, len(words)))


def instead(dry_run=lambda config: None):
    """Within, configurations have another dry run, or none: they had it already, or will."""
    return mock.patch.object(train, 'dry_run', dry_run)


def step(config):
    """A step of one block: takes a tenth of what a dry run does."""
    try:
        model = GPT(replace(config, n_layer=1), 64)
        quant.rtn_(model, config.stored)
        idx = torch.zeros(1, config.block_size, dtype=torch.long)
        model(idx, idx).backward()
        quant.Optimizer(model, config).step()
    except ValueError as e:
        train.fail(e)


def draw(rng, fixed, counts):
    """Arguments of which each, with those before it, gets past train.parse; one time in five all but
    its dry run, so that this too has something to refuse. A refusal must be one line."""
    argv, dry_run = list(fixed), [step] if rng.random() < 0.8 else []
    keys = [key for key in (*SPECS, *KEYS) if rng.random() < 0.6]
    for key in rng.sample(keys, len(keys)):
        for _ in range(3):
            value = draw_spec(rng) if key in SPECS else rng.choice(KEYS[key])
            trial = [*argv, f'--{key}={value}']
            try:
                with instead(*dry_run):
                    train.parse(trial)
                argv = trial
                break
            except SystemExit as e:
                counts['values refused'] += 1
                if not re.fullmatch('error: .*', str(e.code)):
                    raise Failure(f'not one line: {e.code!r}\n{line(trial)}') from None
    return argv


def line(argv):
    return shlex.join(['python', 'train.py', *argv])


def interrupted(*argv):
    """The same as `call`, with a Ctrl-C that comes in the second step."""
    advance = train.Run.advance

    def stop(run):
        if run.step == 1:
            signal.raise_signal(signal.SIGINT)
        return advance(run)

    with mock.patch.object(train.Run, 'advance', stop):
        return call(*argv)


def equal(a, b):
    """Equal checkpoints, bit for bit; where they lie, and how long they took, aside."""
    if isinstance(a, dict):
        keys = a.keys() - {'seconds', 'config'}
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in keys)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def same_loss(before, after):
    """Failure unless two runs of train.py printed the same last validation loss."""
    a, b = (re.findall('^val loss .*|^error: .*', text, re.MULTILINE) for text in (before, after))
    if a != b:
        raise Failure(f'{b} of a checkpoint, {a} when it was written')


def carry_through(argv, folder, rng):
    """What became of a configuration: 'refused', 'not finite' or 'trained'. Raises Failure."""
    whole, half = folder / 'whole', folder / 'half'
    done, lines = [*argv, f'--out_dir={whole}'], []

    def again(run, *argv):      # the keys had their dry run the first time
        lines.append(line(argv))
        with instead():
            return run(*argv)

    try:
        lines.append(line(done))
        said = call(*done)
        if re.search(' is (nan|inf) ', said):
            return 'not finite'
        if said.startswith('error: '):
            if (whole / 'log.jsonl').exists():      # it had begun: that was known before
                raise Failure(f'late: {said}')
            return 'refused'
        if again(interrupted, *argv, f'--out_dir={half}') != 'stopped':
            raise Failure('Ctrl-C did not stop it')
        resumed = again(call, f'--out_dir={half}', '--init_from=resume')
        if resumed.startswith('error: '):
            raise Failure(resumed)
        if not equal(*(torch.load(f / 'ckpt.pt', weights_only=True) for f in (whole, half))):
            raise Failure('resumed, it is another model')
        same_loss(said, again(call, f'{whole}/ckpt.pt', '--eval_only=True'))
        if '--stored=' not in ' '.join(argv) and rng.random() < 0.5:
            return quantize_after(whole, folder / 'after', rng, again)
    except Failure as e:
        raise Failure(f'{e}\n{" && ".join(lines[:1] + lines[1:][-1:])}') from e.__cause__
    return 'trained'


def quantize_after(base, folder, rng, again):
    """The same of post-training quantization of a checkpoint."""
    how = rng.choice((['--ptq=rtn'], ['--ptq=gptq', f'--act_order={rng.random() < 0.5}']))
    said = again(call, f'{base}/ckpt.pt', f'--out_dir={folder}', f'--stored={draw_spec(rng)}',
                 '--weights=', '--sequences=8', *how)
    if said.startswith('error: '):
        return 'trained'
    same_loss(said, again(call, f'{folder}/ckpt.pt', '--eval_only=True'))
    return 'trained and quantized after'


def main(configs=200, seed=0):
    """How many configurations failed."""
    counts, folder, failures = Counter(), Path(tempfile.mkdtemp(prefix='fuzz-')), []
    text = (ROOT / 'quant.py').read_text(encoding='utf-8')
    with contextlib.redirect_stdout(io.StringIO()):
        prepare(folder / 'data', 'fuzz', [('train', text[4000:]), ('val', text[:4000])], 256)
    fixed = [*FIXED, f'--dataset={folder / "data"}']
    for i in tqdm(range(configs), 'fuzz', disable=None):
        rng = random.Random(f'{seed} {i}')          # each by itself, whatever came before
        try:
            counts[carry_through(draw(rng, fixed, counts), folder / str(i), rng)] += 1
            shutil.rmtree(folder / str(i), ignore_errors=True)
        except Failure as e:
            failures.append(e)
            tqdm.write(f'{i}: {e}\n')
    print(', '.join(f'{n} {what}' for what, n in counts.items()) + f', {len(failures)} failed')
    if not failures:
        shutil.rmtree(folder)
    return len(failures)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--configs', type=int, default=200)
    parser.add_argument('--seed', type=int, default=0)
    options = parser.parse_args()
    sys.exit(main(options.configs, options.seed) > 0)
