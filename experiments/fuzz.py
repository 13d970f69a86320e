"""
Random configurations, each of which train.py must refuse in one line or carry through:

    python -m experiments.fuzz [--configs=200] [--seed=0]

Values are drawn for all keys that choose what is quantized and how, and Specs for all tensors;
what train.py refuses is left out again. What is accepted must train four steps, go on after Ctrl-C
to the same checkpoint, bit for bit, evaluate from it to the same loss, sample, and (half of what is
stored in full precision) be quantized after training. Prints counts, and for each failure commands
that reproduce it; the exit code is then 1. A loss that becomes nan or infinite is no failure.
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
from config import SPECS, fail
from data.corpus import prepare
from experiments.runs import ROOT
from model import GPT

FIXED = ['--n_layer=2', '--n_head=2', '--n_embd=64', '--hidden=64', '--block_size=32',
         '--batch_size=2', '--max_iters=4', '--warmup_iters=2', '--eval_interval=100',
         '--eval_tokens=32', '--final_tokens=96', '--log_interval=1']
OWN = ['--sample_tokens=3', '--device=cpu', '--compile=no']    # what a checkpoint does not hand on
USUAL = ('int8/row', 'int8/row/stochastic', 'ternary/row/absmean', 'ternary/row/absmean/stochastic',
         'fp8/row', 'int4/32', 'int8/32/sqrt',
         'uint8/32/root4', 'rank1', 'bf16/stochastic', 'nvfp4', 'mxfp8', '')
KEYS = {
    'flavour': ('gpt2', 'llama'), 'n_embd': (32, 64), 'n_head': (2, 4), 'n_kv_head': (0, 1, 2),
    'hidden': (36, 40, 96), 'block_size': (16, 48), 'norm_eps': (0.1,), 'rope_theta': (100.0,),
    'tied': (True, False), 'bias': (False, True), 'quantize_head': (True, False),
    'dropout': (0.0, 0.2), 'init_gain': (0.0, 0.7), 'batch_size': (2, 3), 'grad_accum': (1, 2),
    'sequences': (0, 20), 'sample_tokens': (0, 28), 'dtype': ('float32', 'bfloat16'),
    'keep': ('h.0', 'mlp', 'attn.c_proj'), 'temperature': (0.0, 1.0), 'top_k': (0, 5),
    'backward': ('ste', 'full', 'fold', 'requantize'), 'gradients_in': ('both', 'dx', 'dw'),
    'compute': ('float', 'codes'), 'optimizer': ('adamw', 'muon', 'scales'),
    'learning_rate': (1e-3, 1e-2), 'embedding_lr': (0.0, 1e-2), 'weight_decay': (0.0, 0.1),
    'min_lr': (0.0, 1.0), 'warmup_iters': (0, 9), 'beta1': (0.0, 0.99), 'beta2': (0.95, 0.999),
    'eps': (1e-3,), 'grad_clip': (0.0, 1.0), 'update_in_backward': (True, False),
    'code_lr': (0.0, 0.01, 1.0), 'scale_lr': (0.0, 0.01), 'log_interval': (1, 3),
    'eval_interval': (1, 3)}
STRATEGIES = [path for path in sorted(ROOT.glob('config/[!_]*.py')) if path.stem not in
              ('small', 'gpt2', 'gpt2_medium', 'gpt2_xl', 'llama_1b', 'gptq', 'qaft', 'peqa')]


class Failure(Exception):
    """train.py did what it must not."""


# ------------------------------------------------------------------------------------------------
# drawing a configuration

def draw_spec(rng):
    """A Spec as a string; of what is drawn word by word many contradict themselves."""
    if rng.random() < 0.4:
        return rng.choice(USUAL)
    words = [rng.choice([*quant.WORDS['grid'], *quant.FORMATS])]
    for field, good in quant.WORDS.items():
        if field != 'grid' and rng.random() < 0.4:
            words.append(rng.choice(good + ['8', '16', '32'] * (field == 'group')))
    return '/'.join(rng.sample(words, len(words)))


def step(config):
    """A step of one block in place of a dry run, which takes ten times as long."""
    try:
        model = GPT(replace(config, n_layer=1), 64)
        quant.rtn_(model, config.stored)
        idx = torch.zeros(1, config.block_size, dtype=torch.long)
        model(idx, idx).backward()
        quant.Optimizer(model, config).step()
    except ValueError as e:
        fail(e)


def draw(rng, fixed, counts):
    """Arguments of which each, with those before it, gets past train.parse; one time in five past
    all but its dry run, so that this too has something to refuse."""
    argv, dry_run = list(fixed), step if rng.random() < 0.8 else None
    if rng.random() < 0.5:              # by chance hardly anything multiplies codes
        argv = [str(rng.choice(STRATEGIES)), *argv]
    keys = [key for key in (*SPECS, *KEYS) if rng.random() < 0.5]
    for key in rng.sample(keys, len(keys)):
        for _ in range(3):
            value = draw_spec(rng) if key in SPECS else rng.choice(KEYS[key])
            trial = [*argv, f'--{key}={value}']
            if not call(trial, train.parse, dry_run):
                argv = trial
                break
            counts['values refused'] += 1
    return argv


# ------------------------------------------------------------------------------------------------
# trying it

def call(argv, run=train.main, dry_run=None):
    """What a command prints: nothing if it is only parsed; 'stopped'; or, refused, one line that
    begins with 'error: '. Raises Failure for all else that it may do."""
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()), \
                mock.patch.object(train, 'dry_run', dry_run or (lambda *_: None)):
            run(list(argv))
        return out.getvalue()
    except SystemExit as e:
        said = 'stopped' if e.code == 130 else str(e.code)
    except Exception as e:
        said = f'error: {type(e).__name__}: {e}'
    # what begins with the name of an exception is a refusal that nobody thought of
    if said != 'stopped' and not re.fullmatch(r'error: (?!\w+(Error|Exception): ).*', said):
        raise Failure(f'{said}\n{line(argv)}')
    return said


def line(argv):
    return shlex.join(['python', 'train.py', *argv])


def interrupted(argv):
    """train.main with a Ctrl-C that comes in the second step."""
    advance = train.Run.advance

    def stop(run):
        if run.step == 1:
            signal.raise_signal(signal.SIGINT)
        return advance(run)

    with mock.patch.object(train.Run, 'advance', stop):
        train.main(argv)


def equal(a, b):
    """Equal checkpoints, bit for bit; where they lie, and how long they took, aside."""
    if isinstance(a, dict):
        keys = a.keys() - {'seconds', 'config'}
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in keys)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def evaluate(ckpt, said):
    """Failure unless a checkpoint has the loss that was printed when it was written."""
    argv = [str(ckpt), '--eval_only=True', *OWN]
    again = call(argv)
    a, b = (re.findall('^val loss .*|^error: .*', text, re.MULTILINE) for text in (said, again))
    if a != b:
        raise Failure(f'evaluated {b}, before {a}\n{line(argv)}')


def carry_through(argv, folder, rng):
    """What became of a configuration, in words. Raises Failure."""
    whole, half = folder / 'whole', folder / 'half'
    first, resume = [*argv, f'--out_dir={whole}'], [f'--out_dir={half}', '--init_from=resume']
    said = call(first, dry_run=DRY_RUN)
    if said == 'stopped':
        raise KeyboardInterrupt
    if re.search(' is (nan|inf) ', said):
        return 'not finite'
    if said.startswith('error: '):
        if (whole / 'log.jsonl').exists():      # it had begun, and could have known before
            raise Failure(f'late: {said}\n{line(first)}')
        return 'refused'
    try:
        stopped, resumed = call([*argv, f'--out_dir={half}'], interrupted), call(resume)
        saved = [torch.load(run / 'ckpt.pt', weights_only=True) for run in (whole, half)]
        if stopped != 'stopped' or resumed.startswith('error: ') or not equal(*saved):
            raise Failure(f'{stopped} after two steps and resumed, it is not the same: '
                          f'{resumed.splitlines()[-1]}\n{line(resume)}')
        evaluate(whole / 'ckpt.pt', said)
        if saved[0]['config']['stored'] or rng.random() < 0.5:
            return 'trained'
        how = rng.choice((['--ptq=rtn'], ['--ptq=gptq', f'--act_order={rng.random() < 0.5}']))
        said = call([f'{whole}/ckpt.pt', f'--stored={draw_spec(rng)}', '--weights=', *how, *OWN,
                     '--sequences=8', f'--out_dir={folder / "after"}'], dry_run=DRY_RUN)
        if said.startswith('error: '):
            return 'trained'
        evaluate(folder / 'after' / 'ckpt.pt', said)
    except Failure as e:
        raise Failure(f'{e}\nwhich comes after\n{line(first)}') from None
    return 'trained and then quantized'


DRY_RUN = train.dry_run


def main(configs=200, seed=0):
    """How many configurations failed."""
    counts, failed, folder = Counter(), 0, Path(tempfile.mkdtemp(prefix='fuzz-'))
    text = (ROOT / 'quant.py').read_text(encoding='utf-8')
    with contextlib.redirect_stdout(io.StringIO()):
        prepare(folder / 'data', 'fuzz', [('train', text[4000:]), ('val', text[:4000])], 256)
    fixed = [*FIXED, *OWN, f'--dataset={folder / "data"}']
    for i in tqdm(range(configs), 'fuzz', disable=None):
        rng = random.Random(f'{seed} {i}')      # each is by itself, whatever came before
        try:
            counts[carry_through(draw(rng, fixed, counts), folder / str(i), rng)] += 1
            shutil.rmtree(folder / str(i), ignore_errors=True)
        except Failure as e:
            failed += 1
            tqdm.write(f'{i}: {e}\n')
    print(', '.join(f'{n} {what}' for what, n in counts.items()) + f', {failed} failed')
    if not failed:                              # else the commands need the data
        shutil.rmtree(folder)
    return failed


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--configs', type=int, default=200)
    parser.add_argument('--seed', type=int, default=0)
    options = parser.parse_args()
    sys.exit(main(options.configs, options.seed) > 0)
