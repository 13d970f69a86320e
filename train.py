"""
Train, evaluate and sample one GPT, with any quantization strategy:

    python train.py config/ternary.py                           a strategy, at the default size
    python train.py config/gpt2.py config/w8a8.py               a size and a strategy: later wins
    python train.py config/ternary.py --embedding_lr=12e-3      and flags win over files
    python train.py config/ternary.py --init_from=resume        go on where it stopped
    python train.py out/ternary/ckpt.pt --eval_only=True        evaluate and sample a checkpoint
    python train.py out/baseline/ckpt.pt config/gptq.py         quantize a trained model
    torchrun --nproc_per_node=8 train.py config/gpt2.py         data-parallel

A checkpoint is a config file that also has weights; give it first. A run writes <out_dir>/ckpt.pt
and <out_dir>/log.jsonl, one JSON object a line.
"""
import ast
import difflib
import inspect
import json
import math
import operator
import os
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache, partial

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data.tokenizer import encoding
from model import GPT
from quant import (FORMATS, WORDS, Optimizer, bytes_held, gptq_, health, level_shares, noise_key,
                   rtn_, spec)

try:
    import fcntl
    import resource
except ImportError:     # on Windows: no lock, and no peak of memory in the log
    fcntl = resource = None


@dataclass
class Config:
    # the model; the default size trains in minutes on two CPU cores
    flavour: str = 'llama'       # or gpt2
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 0           # heads of keys and values, each shared by some of q; 0: n_head
    n_embd: int = 256
    hidden: int = 0              # width of the MLP; 0: 4 n_embd (gpt2), 8/3 n_embd, rounded up
    block_size: int = 256        # longest context, in tokens
    tied: bool = True            # the head and the embedding are one matrix
    bias: bool = False           # gpt2 only
    dropout: float = 0.0
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0  # llama only
    init_gain: float = 0.0       # > 0: block linears start from N(0, init_gain^2 / fan_in)
    quantize_head: bool = False  # the head too takes weights, activations and gradients

    # the strategy: Specs as in quant.py, 'int8/row', 'ternary/tensor/absmean'; '': full precision
    weights: str = ''            # weights of block linears, as the forward sees them
    activations: str = ''        # their inputs
    gradients: str = ''          # gradients of their outputs,
    gradients_in: str = 'both'   # where the backward uses them: dx, dw or both
    backward: str = 'ste'        # what it sees of x and w: as quantized (ste), as full (full),
                                 # codes (fold), or quantized anew like gradients (requantize)
    compute: str = 'float'       # what is multiplied: codes dequantized, or the codes themselves
    kv_cache: str = ''           # keys and values
    stored: str = ''             # the weights as they are stored between steps
    adam_m: str = ''             # the optimizer's moments as they are stored
    adam_v: str = ''             # rank1 is a row and a column, as in Adafactor

    # the optimizer: linear warm-up, cosine to min_lr
    optimizer: str = 'adamw'     # or muon, for full-precision weights of block linears
    learning_rate: float = 0.75e-3
    embedding_lr: float = 6e-3   # of embeddings, head, norms and biases; 0: learning_rate
    min_lr: float = 0.0          # as a fraction of learning_rate
    warmup_iters: int = 100
    max_iters: int = 1200        # resumed with more, a run follows the schedule of the new length
    weight_decay: float = 0.1    # of matrices
    beta1: float = 0.9
    beta2: float = 0.999         # small batches want a long memory
    eps: float = 1e-8
    grad_clip: float = 1.0       # by global norm; 0: off
    threshold: float = 0.0       # block linears rest within so many deviations of noise
    ramp: float = 0.0            # their beta1 = 1 - 1 / (10 + t / ramp); 0: beta1 as above
    code_lr: float = 0.0         # > 0: the direct update of low-bit codes, half ranges a step
    scale_lr: float = 0.01       # of their scales, then; 0: fixed
    update_in_backward: bool = False  # each gradient at once, clipped by its norm, then freed

    # instead of training
    ptq: str = ''                # rtn or gptq: quantize trained weights, which become `stored`
    damping: float = 0.01        # of GPTQ's Hessian, times the mean of its diagonal
    act_order: bool = False      # GPTQ goes by descending diagonal

    # the data
    dataset: str = 'python'      # folder in data/, or with a / in it a path
    batch_size: int = 8          # sequences of block_size tokens, a process and a micro-step
    grad_accum: int = 1          # micro-steps a step
    sequences: int = 0           # calibrate or train on so many windows alone; 0: all there are

    # the run
    out_dir: str = ''            # '': out/ and the names of config files and checkpoint
    overwrite: bool = False      # throw away the run that is in out_dir
    init_from: str = 'scratch'   # or resume, or checkpoint, which giving one implies
    checkpoint: str = ''         # its path; not a flag, but an argument that ends in .pt
    seed: int = 1337
    eval_only: bool = False      # evaluate and sample, do not train
    eval_interval: int = 200     # steps between evaluations, each of which saves a checkpoint
    eval_tokens: int = 2 ** 15   # of val.bin
    final_tokens: int = 2 ** 22  # the same of the last evaluation
    log_interval: int = 10
    prompt: str = '\nclass'      # the sample continues it
    sample_tokens: int = 256
    device: str = 'auto'         # cuda, mps or cpu; cuda:1 for one of several
    dtype: str = 'auto'          # of activations: bfloat16 where it is fast, or float32
    compile: str = 'auto'        # torch.compile: yes or no; auto: where it works and pays


# keys of a run, not of its model: a checkpoint does not hand them on
OWN_KEYS = {'out_dir', 'overwrite', 'init_from', 'checkpoint', 'eval_only', 'ptq', 'damping',
            'act_order', 'prompt', 'sample_tokens', 'device', 'compile'}
# what may differ when a run is resumed; the data may lie elsewhere, but must be the same
RUN_KEYS = OWN_KEYS - {'ptq', 'damping', 'act_order'} | {
    'dataset', 'batch_size', 'grad_accum', 'max_iters', 'eval_interval', 'eval_tokens',
    'final_tokens', 'log_interval'}
SPECS = 'weights', 'activations', 'gradients', 'kv_cache', 'stored', 'adam_m', 'adam_v'
STRATEGY = *SPECS, 'gradients_in', 'backward', 'compute', 'quantize_head', 'optimizer', 'code_lr'
MAY_BE_ZERO = 'seed', 'warmup_iters', 'sample_tokens'     # and what is so by default
CHOICES = {'init_from': ('scratch', 'resume', 'checkpoint'), 'ptq': ('', 'rtn', 'gptq'),
           'optimizer': ('adamw', 'muon'), 'compile': ('auto', 'yes', 'no'),
           'dtype': ('auto', 'float32', 'bfloat16')}
IDLE = (    # a key, and what it does nothing without: one of some keys, or a value of one
    ('rope_theta', 'flavour', 'llama'), ('quantize_head', 'weights activations gradients', ''),
    ('backward', 'weights activations gradients', ''), ('prompt', 'sample_tokens', ''),
    ('code_lr', 'stored', ''), ('scale_lr', 'code_lr', ''), ('threshold', 'optimizer', 'adamw'),
    ('adam_v', 'optimizer', 'adamw'), ('damping', 'ptq', 'gptq'), ('act_order', 'ptq', 'gptq'))


def fail(message):
    """End the program with one short line; under torchrun one process speaks for all."""
    line = ' '.join(f'error: {message}'.split())
    if len(line) > 320:     # someone's argument is long; the advice comes last
        line = f'{line[:160]} .. {line[-156:]}'
    raise SystemExit(line if os.environ.get('RANK', '0') == '0' else 1)


# ------------------------------------------------------------------------------------------------
# the command line: config files and flags are data, read without running them

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv,
             ast.Pow: lambda a, b: a ** b if abs(b) < 64 else math.inf}     # 9**9**9 never ends


def literal(node):
    """The value of a constant, or of arithmetic. Raises some exception for anything else."""
    if isinstance(node, ast.BinOp):
        return OPERATORS[type(node.op)](literal(node.left), literal(node.right))
    return ast.literal_eval(node)


def value_of(key, text, where):
    """The value of a config key that an expression, or the bare text of a flag, stands for."""
    kinds = {f.name: f.type for f in fields(Config) if f.name != 'checkpoint'}
    if key not in kinds:
        near = difflib.get_close_matches(key[:99], kinds, 1) or ['--help']
        fail(f"unknown key '{key[:99]}', did you mean '{near[0]}'? ({where})")
    kind = kinds[key]
    try:
        value = literal(ast.parse(f'({text})', mode='eval').body)
    except Exception:       # no literal, whatever the reason
        value = None
    if where.startswith('--') and type(value) is not kind:
        # --weights=8 is a string too, and --bias=true a bool
        value = text if kind is str else {'true': True, 'false': False}.get(text.lower(), value)
    value = float(value) if kind is float and type(value) is int else value
    if type(value) is not kind:
        fail(f"{where}: {key} must be {'an' if kind is int else 'a'} {kind.__name__}, not {text}")
    # a name is one of data/, wherever one stands; a path means the same later on
    path = key == 'dataset' and os.path.basename(value) != value
    return os.path.abspath(value) if path else value


def read_config(path):
    """The lines key = value of a config file as {key: value}."""
    try:
        with open(path, encoding='utf-8-sig') as f:
            source, found = f.read(), {}
        lines = ast.parse(source).body
    except Exception as e:      # no such file, no text, no Python
        fail(f"{path}:{getattr(e, 'lineno', 1)}: cannot read it, or not a config file: {e}")
    for line in lines:
        where = f'{path}:{line.lineno}'
        if isinstance(line, ast.Assign) and [type(t) for t in line.targets] == [ast.Name]:
            key = line.targets[0].id
            found[key] = value_of(key, ast.get_source_segment(source, line.value), where)
        elif not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)):
            fail(f'{where}: a config file has lines of the form key = value and comments only')
    return found


def parse(argv):
    """Checkpoints, config files and --key=value flags, in order, to a checked Config."""
    config, given, names = Config(), {}, []
    for arg in argv:
        key, equals, text = arg.partition('=')
        if arg in ('-h', '--help'):
            words = (f'    {field:9} {" ".join(good)}' for field, good in WORDS.items())
            print(__doc__, inspect.getsource(Config), 'A Spec is words in any order, between /:',
                  *words, f'or a format: {" ".join(FORMATS)}. A group can be a number.', sep='\n')
            raise SystemExit(0)
        if arg.endswith('.pt') and arg[0] != '-':
            if config.checkpoint:
                fail(f'{config.checkpoint} and {arg} are two checkpoints: give one')
            # it hands on what its model is, and how that was trained
            new = {k: v for k, v in load(arg)['config'].items() if k not in OWN_KEYS}
            new |= {'checkpoint': arg, 'init_from': 'checkpoint'}
            names.append(os.path.basename(os.path.dirname(os.path.abspath(arg))))
        elif not arg.startswith('-'):
            given |= (new := read_config(arg))
            names.append(os.path.splitext(os.path.basename(arg))[0])
        elif arg.startswith('--') and equals:
            given |= (new := {key[2:]: value_of(key[2:], text, key)})
        else:
            fail(f"'{arg}': flags look like --key=value")
        config = replace(config, **new)
    config.out_dir = config.out_dir or 'out/' + ('-'.join(names) or 'default')
    if config.init_from == 'resume':
        config = resumed(config, given)
    check(config, given)
    if config.ptq and spec(config.weights) == spec(config.stored):
        config.weights = ''     # what they were trained with: packed, they need no more rounding
    dry_run(config)
    return config


def resumed(config, given):
    """The config of the run in out_dir; what is given may differ only where that is harmless."""
    path = f'{config.out_dir}/ckpt.pt'
    checkpoint = load(path)
    old = Config(**checkpoint['config'])
    # `given` has files and flags alone: the same command may be repeated, and none need be
    for key, value in given.items():
        if key not in RUN_KEYS and value != getattr(old, key):
            fail(f'{path} was trained with {key} = {getattr(old, key)!r}, not {value!r}; leave it '
                 f'out, or start a new run from these weights: python train.py {path} ..')
        setattr(old, key, value)
    if old.max_iters < checkpoint['iter']:
        fail(f"{path} is at step {checkpoint['iter']}, beyond max_iters = {old.max_iters}")
    return replace(old, out_dir=config.out_dir, init_from='resume')


def check(config, given):
    """What can be said of the keys themselves; `dry_run` finds what does not fit together."""
    for key, value in asdict(config).items():
        least = type(value) is int and getattr(Config, key) and key not in MAY_BE_ZERO
        most = 1 if key in ('dropout', 'beta1', 'beta2') else 2 ** 63
        if value not in CHOICES.get(key, [value]):
            fail(f"{key} = '{value}': use {', '.join(filter(None, CHOICES[key]))}")
        if type(value) in (int, float) and not least <= value < most:
            fail(f'{key} = {value} must ' + ('be greater than 0' if least else
                 'lie in [0, 1)' if most == 1 else 'not be negative, nor infinite'))
        try:
            s = spec(value) if key in SPECS else None
        except ValueError as e:
            fail(f'{key}: {e}')
        if s and key != 'adam_v' and s.grid[0] in 'ur' and s.sign == 'symmetric':
            fail(f"{key} = '{value}' has no negatives; use int, or asymmetric")
    # a key that does nothing is a mistake, but for its default and for what a checkpoint hands on
    for key, others, good in IDLE:
        used = [v == good if good else v for v in map(vars(config).get, others.split())]
        if given.get(key, getattr(Config, key)) != getattr(Config, key) and not any(used):
            fail(f"{key} = {given[key]!r} does nothing without {' or '.join(others.split())}"
                 + (f' = {good}' if good else '') + '; leave it out')
    c, weights, stored = config, spec(config.weights), spec(config.stored)
    for wrong, why in (
        (c.min_lr > 1, f'min_lr = {c.min_lr} is a fraction of learning_rate'),
        (c.adam_v and spec(c.adam_v).rotation, 'adam_v: v must stay positive; do not rotate it'),
        (c.stored and c.optimizer == 'muon', 'muon is for full-precision weights: no stored'),
        (c.code_lr and stored and stored.grid == 'bf16', 'code_lr moves codes, and bf16 has none'),
        (c.ptq and not stored, 'ptq quantizes weights to `stored`: give that'),
        (c.ptq and weights and (c.ptq, weights) != ('rtn', stored), 'ptq quantizes weights once: '
         f'--ptq=rtn --stored={c.weights} packs what was trained with these `weights`'),
        (c.ptq == 'gptq' and not c.sequences, 'gptq needs data to calibrate on: --sequences=128'),
        (c.update_in_backward and c.grad_accum > 1, 'update_in_backward uses each gradient at '
         'once: set grad_accum = 1'),
    ):
        if wrong:
            fail(why)


def dry_run(config):
    """A step of one block on the meta device: what does not fit together fails here, not late."""
    try:
        with torch.device('meta'):
            # 1024 tokens of vocabulary: what divides the usual sizes divides it
            model = GPT(replace(config, n_layer=1), 1024)
            rtn_(model, config.stored)
            idx = torch.zeros(config.batch_size, config.block_size, dtype=torch.long)
            loss = model(idx, idx)
            if not (config.eval_only or config.ptq):
                optimizer = Optimizer(model, config)
                loss.backward()
                optimizer.step()
    except Exception as e:      # whatever it is, it is about these keys
        fail(e if isinstance(e, ValueError) else f'{type(e).__name__}: {e}')


# ------------------------------------------------------------------------------------------------
# data: flat files of tokens, and an order that is a function of (seed, step) alone

def load_data(config, rank):
    """train, val and meta of data/<dataset>; corpora without a download are built."""
    root = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'data', config.dataset)
    script, path = f'{root}/prepare.py', f'{root}/meta.json'
    if not os.path.exists(path) and config.dataset in ('python', 'sympy') and rank == 0:
        if subprocess.run([sys.executable, script]).returncode:
            fail(f'could not build the corpus {config.dataset}, see above')
    if dist.is_initialized():
        dist.barrier()
    if not os.path.exists(path):
        fail(f"no dataset '{config.dataset}': there is no {path}" + (
            f'; run python data/{config.dataset}/prepare.py' if os.path.exists(script) else ''))
    try:
        meta = read_meta(path)
        train, val = (read_split(f'{root}/{split}.bin', meta[f'{split}_tokens'],
                                 meta['vocab_size']) for split in ('train', 'val'))
    except Exception as e:      # a damaged file raises anything at all
        fail(f'cannot read the dataset {config.dataset}: {e!r}; run its prepare.py again')
    T, windows = config.block_size, (len(train) - 1) // config.block_size
    if len(val) <= T or windows < max(1, config.sequences):
        fail(f'train.bin has {windows} windows of {T} tokens, val.bin {(len(val) - 1) // T}: ask '
             'for fewer sequences, or lower block_size')
    return train, val, meta


def read_meta(path):
    """meta.json, with numbers that make sense and a tokenizer that works; else any exception."""
    with open(path, encoding='utf-8') as f:
        meta = json.load(f)
    for key in ('vocab_size', 'train_tokens', 'val_tokens', 'val_bytes', 'bytes_per_token'):
        if type(meta[key]) not in (int, float) or not 0 < meta[key] < 2 ** 63:
            raise ValueError(f'{key} = {meta[key]!r} in meta.json')
    # tiktoken does not survive every damaged tokenizer: look before it does
    n, ranks = len(meta['ranks']), set(meta['ranks'])
    ids = [*range(n), *sorted(meta['special'].values())]
    ratio = meta['val_bytes'] / meta['val_tokens'] / meta['bytes_per_token']
    if len(ranks) < n or ids != [*range(meta['vocab_size'])] or abs(ratio - 1) > 1e-6 or \
            not ranks >= {chr(byte) for byte in range(256)} or not meta['sha256'].isalnum():
        raise ValueError('the tokenizer, bytes_per_token or sha256 in meta.json is damaged')
    encoding(meta).encode_ordinary(__doc__)
    return meta


def read_split(path, tokens, vocab_size):
    """The ids of train.bin or val.bin, mapped. Raises ValueError for what cannot be such ids."""
    dtype = np.dtype('<u4' if vocab_size > 2 ** 16 else '<u2')
    if os.path.getsize(path) != tokens * dtype.itemsize:
        raise ValueError(f'{path} is truncated, or of another vocabulary')
    data = np.memmap(path, dtype, mode='r').view(np.ndarray)
    # what is too large to look through is checked batch by batch
    if tokens < 5e7 and data.max() >= vocab_size:
        raise ValueError(f'{path} has id {data.max()}, beyond its vocabulary of {vocab_size}')
    return data


def to_batch(data, starts, T, vocab_size, device):
    """x, y (B, T) from the windows that begin at `starts`; y is x one token on."""
    window = torch.from_numpy(np.stack([data[i:i + T + 1] for i in starts]).astype(np.int64))
    if window.max() >= vocab_size:
        fail(f'the data has id {window.max()}, beyond its vocabulary of {vocab_size}')
    if device.type == 'cuda':
        window = window.pin_memory()
    window = window.to(device, non_blocking=True)
    return window[:, :-1], window[:, 1:]


@lru_cache(2)       # a batch may end in the next epoch
def epoch_order(seed, epoch, windows, sequences):
    """The windows of an epoch in its order; of so many `sequences`, if not 0, the same in all."""
    few = np.random.default_rng(seed).permutation(windows)[:sequences or windows]
    return np.random.default_rng((seed, epoch + 1)).permutation(few)


def window_starts(config, step, n_tokens, world):
    """Where the windows of a step begin, for micro-steps and ranks: (grad_accum, world, batch).

    A function of (seed, step), whatever the product of the three is made of. Windows do not
    overlap, and every epoch has each once."""
    shape = config.grad_accum, world, config.batch_size
    # n windows a step, of `size` an epoch: a step may end an epoch, or see several
    windows, n = (n_tokens - 1) // config.block_size, math.prod(shape)
    size = config.sequences or windows
    epoch, first = divmod(step * n, size)
    order = [epoch_order(config.seed, e, windows, config.sequences)
             for e in range(epoch, epoch + -(-(first + n) // size))]
    return np.concatenate(order)[first:first + n].reshape(shape) * config.block_size


# ------------------------------------------------------------------------------------------------
# checkpoints: dicts, tensors and numbers

FIELDS = {'config': dict, 'sha256': str, 'tokenizer': dict, 'iter': int, 'tokens': int,
          'seconds': float, 'losses': list, 'model': dict, 'optimizer': (dict, type(None))}


def save(path, checkpoint):
    """Write beside, then rename: whenever it is interrupted, `path` holds a whole checkpoint."""
    try:
        with open(path + '.tmp', 'wb') as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + '.tmp', path)
    except (OSError, RuntimeError) as e:        # RuntimeError is what torch makes of a full disk
        with suppress(OSError):
            os.remove(path + '.tmp')
        fail(f'could not save {path}, which is still what it was before: {e}')


def load(path):
    """A whole checkpoint of this version of the program, its tensors mapped from the file."""
    if not os.path.isfile(path):
        fail(f'no checkpoint {path}')
    try:
        with zipfile.ZipFile(path) as f:        # torch.load looks at no checksum
            if f.testzip():
                raise ValueError(f'{f.testzip()} is damaged')
        checkpoint = torch.load(path, map_location='cpu', mmap=True, weights_only=True)
        kinds = {key: type(value) for key, value in checkpoint['config'].items()}
        ours = kinds == {f.name: f.type for f in fields(Config)}
        good = [isinstance(checkpoint.get(key), kind) for key, kind in FIELDS.items()]
        if ours and not (all(good) and min(checkpoint['iter'], checkpoint['seconds']) >= 0):
            raise ValueError('a field is missing, or wrong')
    except Exception as e:              # a damaged or foreign file raises anything at all
        fail(f'{path} is not a whole checkpoint of this program ({e!r}); use another')
    if not ours:
        fail(f'{path} is by another version of this program, with other keys: train it again')
    return checkpoint


def open_run(config):
    """The checkpoint to start from, or None, and its path; fails if another run is in the way."""
    if config.init_from == 'resume':
        return load(f'{config.out_dir}/ckpt.pt'), f'{config.out_dir}/ckpt.pt'
    for file in (f'{config.out_dir}/{name}' for name in ('ckpt.pt', 'log.jsonl')):
        if os.path.exists(file) and not (config.eval_only or config.overwrite):
            fail(f'{config.out_dir} holds a run, {file}: go on with --init_from=resume, choose '
                 'another --out_dir, or throw it away with --overwrite=True')
    path = config.checkpoint if config.init_from == 'checkpoint' else ''
    how = '--eval_only=True' if config.eval_only else 'config/gptq.py' if config.ptq else \
        'config/qaft.py' if config.init_from == 'checkpoint' else ''
    if how and not path:
        fail(f'{how} needs a checkpoint before it: python train.py out/baseline/ckpt.pt {how}')
    return load(path) if path else None, path


@contextmanager
def locked(config, rank):
    """Within, no other run can begin in out_dir. Leaves no folder behind that it made in vain."""
    if rank or config.eval_only:
        yield
        return
    os.makedirs(config.out_dir, exist_ok=True)
    with open(f'{config.out_dir}/.lock', 'w') as file:
        try:
            with suppress(AttributeError):      # there is no fcntl
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f'{config.out_dir} has a run in progress: wait, or choose another --out_dir')
        except OSError:         # a file system without locks
            pass
        try:
            yield
        finally:
            if os.listdir(config.out_dir) == ['.lock']:
                os.remove(file.name)
                os.rmdir(config.out_dir)


def cut_log(path, step):
    """Drop what a run logged after the checkpoint it resumes from, and half-written lines."""
    with open(path, encoding='utf-8', errors='replace') as old, \
            open(path + '.tmp', 'w', encoding='utf-8') as new:
        for line in old:
            with suppress(ValueError, AttributeError, TypeError):
                entry = json.loads(line)
                if entry.get('iter', 0) <= step and 'done' not in entry:
                    new.write(line)
    os.replace(path + '.tmp', path)


# ------------------------------------------------------------------------------------------------
# training

def pick_device(config):
    """The device of this process, which works."""
    mps, name = torch.backends.mps.is_available(), config.device
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'mps' if mps else 'cpu'
    try:
        rank = os.environ.get('LOCAL_RANK', 0)
        device = torch.device(f'cuda:{rank}' if name == 'cuda' else name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as e:
        fail(f"device '{name}' is not there ({str(e)[:150]}); use --device=auto")
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    return device


def pick_dtype(config, device):
    """bfloat16 where matmuls have hardware for it."""
    if config.dtype != 'auto':
        return getattr(torch, config.dtype)
    fast = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == 'cuda' else
            device.type == 'cpu' and torch.cpu._is_avx512_bf16_supported())
    return torch.bfloat16 if fast else torch.float32


def pick_compile(config, device):
    """auto: on a GPU, and on a CPU for runs that are longer than compiling; if it works."""
    pays = device.type == 'cuda' or device.type == 'cpu' and config.max_iters >= 250
    if config.compile == 'no' or config.compile == 'auto' and (
            config.eval_only or config.ptq or not pays):
        return False
    try:
        torch.compile(torch.neg)(torch.ones(8, device=device))
        return True
    except Exception as e:          # no compiler, no headers, ..: whatever it is, eager works
        if config.compile == 'yes':
            fail(f'torch.compile does not work here ({e!r}); use --compile=no')
        return False


def schedule(config, step):
    """The rates of a step (from 0) as a fraction of their peaks: linear up, cosine to min_lr."""
    if step < config.warmup_iters:
        return (step + 1) / (config.warmup_iters + 1)
    done = (step - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)
    return config.min_lr + (1 - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


stopping = []       # signals that came while a step was in progress


@contextmanager
def finishing_steps():
    """Within, SIGTERM and the first Ctrl-C only leave a note: the step is finished first."""
    def note(number, _):
        if number == signal.SIGINT and number in stopping:
            raise KeyboardInterrupt
        stopping.append(number)

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        stopping.clear()
        for s, handler in before.items():
            signal.signal(s, handler)


class Run:
    """One run: the model, its optimizer, the data, and how far it is."""

    def __init__(self, config, rank, world):
        self.config, self.rank, self.world = config, rank, world
        # what can fail comes first: nothing is written before all is built
        checkpoint, path = open_run(config)
        self.device = pick_device(config)
        self.train_data, self.val_data, self.meta = load_data(config, rank)
        self.encoding, words = encoding(self.meta), ('tokenizer', 'pattern', 'ranks', 'special')
        self.tokenizer = {key: self.meta[key] for key in ('vocab_size', *words)}
        self.vocab_size = -(-self.meta['vocab_size'] // 64) * 64     # 64 | it suits the matmuls
        self.tokens = config.grad_accum * world * config.batch_size * config.block_size  # a step
        self.step, self.seconds, self.losses = 0, 0.0, []            # since the last log line
        # weights are drawn on the CPU: the same for every device
        torch.manual_seed(config.seed)
        self.model = GPT(config, self.vocab_size).to(self.device)
        self.model.dtype = pick_dtype(config, self.device)
        if checkpoint:
            self.load(checkpoint, path)
        # the weights become what is `stored`, unless they are that already
        if config.ptq == 'gptq':
            gptq_(self.model, config.stored, self.sequences(), config.damping, config.act_order,
                  partial(tqdm, desc='GPTQ', unit='block', disable=None))
        elif not (checkpoint and checkpoint['config']['stored']):
            rtn_(self.model, config.stored)
        self.compiled = pick_compile(config, self.device)
        if self.compiled:
            self.model.compile()
        self.optimizer = None
        if not (config.eval_only or config.ptq):
            self.optimizer = Optimizer(self.model, config, self.compiled)
            if config.init_from == 'resume':
                try:
                    self.optimizer.load_state_dict(checkpoint['optimizer'])
                except Exception as e:      # it is of another optimizer
                    fail(f'{path} has no optimizer state that fits: {e!r}')
            if config.update_in_backward:
                for name, p in self.model.named_parameters():
                    p.register_post_accumulate_grad_hook(partial(self.update, name))
        self.start_log()

    def load(self, checkpoint, path):
        """Take what a checkpoint has: its weights, and how far it is if that goes on."""
        config, old, data = self.config, checkpoint['config'], self.config.dataset
        goes_on = config.init_from == 'resume' and not config.eval_only
        shape = [key for key in ('flavour', 'n_head', 'rope_theta', 'norm_eps')
                 if old[key] != getattr(config, key)]       # which the shapes do not show
        for wrong, why in (
            (shape, f'has another {" and ".join(shape)}'),
            (checkpoint['tokenizer'] != self.tokenizer, f'has another tokenizer than {data}'),
            (old['stored'] and config.ptq, 'is quantized already: ptq starts from floats'),
            (old['stored'] not in ('', config.stored),
             f"has no weights but those: use --stored={old['stored']}"),
            (goes_on and not checkpoint['optimizer'], 'has no optimizer state to go on with'),
            (goes_on and checkpoint['sha256'] != self.meta['sha256'],
             f'was trained on other data than {data} is now: their sha256 differ'),
            (goes_on and checkpoint['tokens'] != self.tokens, f"had {checkpoint['tokens']} tokens "
             f'per step, not {self.tokens}: keep processes x grad_accum x batch_size'),
        ):
            if wrong:
                fail(f'{path} {why}')
        rtn_(self.model, old['stored'])
        try:
            self.model.load_state_dict(checkpoint['model'])
        except Exception as e:      # shapes, names, or no tensors at all
            fail(f'{path} is a model of another shape: {str(e).splitlines()[-1]}')
        if goes_on or config.eval_only:
            self.step, self.seconds = checkpoint['iter'], checkpoint['seconds']
            self.losses = checkpoint['losses']

    def sequences(self):
        """The `sequences` to calibrate on, [(B, T)]."""
        c, windows = self.config, (len(self.train_data) - 1) // self.config.block_size
        starts = epoch_order(c.seed, 0, windows, c.sequences) * c.block_size
        return [to_batch(self.train_data, starts[i:i + c.batch_size], c.block_size,
                         self.vocab_size, self.device)[0]
                for i in range(0, len(starts), c.batch_size)]

    def start_log(self):
        """Open the log; with everything built and checked, an old run may go if it must."""
        config, self.log, gpu = self.config, None, self.device.type == 'cuda'
        device = torch.cuda.get_device_name(self.device) if gpu else self.device.type
        versions = {'python': sys.version.split()[0], 'torch': torch.__version__,
                    'device': device, 'dtype': str(self.model.dtype).split('.')[1]}
        if self.rank == 0 and not config.eval_only:
            os.makedirs(config.out_dir, exist_ok=True)
            path = f'{config.out_dir}/log.jsonl'
            if config.init_from != 'resume':
                for old in (path, f'{config.out_dir}/ckpt.pt'):
                    with suppress(FileNotFoundError):
                        os.remove(old)
            elif os.path.exists(path):
                cut_log(path, self.step)
            self.log = open(path, 'a', encoding='utf-8')
            if not os.path.getsize(path):
                self.line(config=asdict(config), sha256=self.meta['sha256'], versions=versions,
                          world=self.world)
        words = ', '.join(f'{key} {getattr(config, key)}' for key in STRATEGY
                          if getattr(config, key) != getattr(Config, key)) or 'full precision'
        size = sum(p.numel() for p in self.model.parameters()) / 1e6
        self.say(f'{os.path.basename(os.path.abspath(config.out_dir))}: {words}; {config.flavour} '
                 f'{config.n_layer}x{config.n_embd}, {size:.2f}M parameters, {versions["dtype"]}'
                 f'{", compiled" if self.compiled else ""} on {device}, data '
                 f'{os.path.basename(config.dataset)} {self.meta["sha256"][:12]}')

    def line(self, **entry):
        """A line of log.jsonl, which only rank 0 has, and only where it trains or quantizes."""
        if self.log:
            self.log.write(json.dumps(entry, allow_nan=False) + '\n')
            self.log.flush()

    def say(self, text):
        """Print, on rank 0; where nobody listens any more, a run goes on all the same."""
        try:
            if self.rank == 0:
                tqdm.write(text)
                sys.stdout.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    @torch.no_grad()
    def evaluate(self, most):
        """Loss, in nats per token and bits per byte, of windows all over val, of `most` tokens."""
        T, B, data = self.config.block_size, self.config.batch_size, self.val_data
        n = max(1, min(most // T, (len(data) - 1) // T))
        # the same windows whatever the number of processes; a rank takes every world-th batch
        starts = np.linspace(0, len(data) - 1 - T, n).astype(np.int64)
        total = torch.zeros(2, dtype=torch.float64)
        self.model.set_noise(self.config.seed, self.step, -1 - self.rank)
        self.model.eval()
        for i in range(self.rank * B, n, self.world * B):
            x, y = to_batch(data, starts[i:i + B], T, self.vocab_size, self.device)
            with torch.compiler.set_stance('default' if len(x) == B else 'force_eager'):
                loss = self.model(x, y).item()                       # one shape is compiled
            total += torch.tensor([loss * len(x), len(x)], dtype=torch.float64)
        self.model.train()
        if self.world > 1:
            total = total.to(self.device)
            dist.all_reduce(total)
        loss = (total[0] / total[1]).item()
        self.check_finite(loss, 'val loss')
        return {'val_loss': loss, 'val_bpb': loss / math.log(2) / self.meta['bytes_per_token']}

    def report(self, most, **more):
        """Evaluate, look at the health of quantization, log both; what to print of it."""
        result = self.evaluate(most)
        x, _ = to_batch(self.val_data, [0], self.config.block_size, self.vocab_size, self.device)
        with torch.compiler.set_stance('force_eager'):               # it hooks into the layers
            more['health'] = health(self.model, x)
        self.line(iter=self.step, tokens=self.step * self.tokens, **result, **more)
        return f'val loss {result["val_loss"]:.4f} nats/token, {result["val_bpb"]:.4f} bits/byte'

    def save(self):
        """Write ckpt.pt, if it is worth it; what was quantized is then a model like any other."""
        weights = self.model.state_dict()
        norms = [t.float().norm().item() for t in weights.values() if t.is_floating_point()]
        self.check_finite(sum(norms), 'norm of the weights')
        if self.rank == 0:
            save(f'{self.config.out_dir}/ckpt.pt', {
                'config': {**asdict(self.config), 'ptq': ''}, 'sha256': self.meta['sha256'],
                'tokenizer': self.tokenizer, 'iter': self.step, 'tokens': self.tokens,
                'seconds': self.seconds, 'losses': self.losses, 'model': weights,
                'optimizer': self.optimizer.state_dict() if self.optimizer else None})

    def check_up(self):
        """Evaluate and save; only then tell."""
        says = self.report(self.config.eval_tokens)
        self.save()
        self.say(f'step {self.step}: {says}')

    def check_finite(self, value, name):
        if not math.isfinite(value):
            ckpt = f'{self.config.out_dir}/ckpt.pt'
            fail(f'the {name} is {value} at step {self.step}: lower learning_rate or use more bits'
                 + (f'; {ckpt} is the last good checkpoint' if os.path.exists(ckpt) else ''))

    def update(self, name, p):
        """A hook: the gradient of p is there; use it, clipped by its own norm, and free it."""
        if self.world > 1:
            dist.all_reduce(p.grad)
        self.norms.append(torch.linalg.vector_norm(p.grad))
        p.grad.mul_(((self.config.grad_clip or math.inf) / (self.norms[-1] + 1e-6)).clamp(max=1))
        self.optimizer.apply(name)
        p.grad = None

    def gradients(self):
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def forward_backward(self):
        """The gradients of a step, over all micro-steps and processes; (loss, wishes to stop)."""
        config, world = self.config, self.world
        starts = window_starts(config, self.step, len(self.train_data), world)
        total = torch.zeros(2, device=self.device)
        for micro in range(config.grad_accum):
            x, y = to_batch(self.train_data, starts[micro, self.rank], config.block_size,
                            self.vocab_size, self.device)
            noise = config.seed, self.step, micro * world + self.rank
            self.model.set_noise(*noise)
            torch.manual_seed(noise_key(*noise))                     # for dropout
            loss = self.model(x, y) / (config.grad_accum * world)
            loss.backward()
            total[0] += loss.detach()
        # a signal to one process stops all of them, after the same step
        total[1] = len(stopping)
        for tensor in [*self.gradients(), total] if world > 1 else ():
            dist.all_reduce(tensor)
        return total.tolist()

    def advance(self):
        """One optimizer step; returns what to log of it and whether to stop."""
        rate, self.norms = schedule(self.config, self.step), []
        self.model.zero_grad(set_to_none=True)
        at_once = self.config.update_in_backward
        if at_once:
            self.optimizer.begin(rate)
        loss, stop = self.forward_backward()
        # an update in the backward has clipped and used them already, but saves nothing
        norm = torch.nn.utils.get_total_norm(self.norms if at_once else self.gradients()).item()
        self.check_finite(loss, 'loss')
        self.check_finite(norm, 'norm of the gradient')
        if not at_once:
            limit = self.config.grad_clip or math.inf
            self.optimizer.step(rate, min(1.0, limit / (norm + 1e-6)))
        self.step += 1
        return loss, stop

    def train(self):
        """Steps up to max_iters, with their log lines, evaluations and checkpoints."""
        config = self.config
        bar = tqdm(total=config.max_iters, initial=self.step, unit='step',
                   disable=None if self.rank == 0 else True)         # None: only on a terminal
        busy, first = 0.0, len(self.losses)                          # since the last log line
        self.model.train()
        while self.step < config.max_iters:
            began = time.perf_counter()
            loss, stop = self.advance()
            self.losses.append(loss)
            took = time.perf_counter() - began
            busy, self.seconds = busy + took, self.seconds + took
            bar.update()
            if self.step % config.log_interval == 0:
                loss = sum(self.losses) / len(self.losses)
                rate = (len(self.losses) - first) * self.tokens / busy
                self.log_step(loss, rate)
                bar.set_postfix(loss=f'{loss:.3f}', tokens_per_s=f'{rate:.0f}')
                if bar.disable and self.step % (10 * config.log_interval) == 0:
                    self.say(f'step {self.step} of {config.max_iters}: loss {loss:.4f}, '
                             f'{rate:.0f} tokens/s')
                self.losses, busy, first = [], 0.0, 0
            if self.step % config.eval_interval == 0 or self.step == config.max_iters:
                self.check_up()
            if stop:
                # losses since the last log line are saved too: a resumed run logs the same means
                self.save()
                bar.close()
                self.say(f'saved after step {self.step}; to go on: python train.py '
                         f'--out_dir={config.out_dir} --init_from=resume')
                raise SystemExit(130)
        bar.close()

    def log_step(self, loss, rate):
        """The line of a step in log.jsonl."""
        peak = 0
        if self.device.type == 'cuda':
            peak = torch.cuda.max_memory_allocated(self.device)
        elif resource:      # in kilobytes, but on a Mac
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            peak *= 1 if sys.platform == 'darwin' else 1024
        flips = {'flips': self.optimizer.flips()} if self.config.stored else {}
        self.line(iter=self.step, tokens=self.step * self.tokens, train_loss=loss,
                  lr=self.config.learning_rate * schedule(self.config, self.step - 1),
                  tokens_per_s=rate, **flips, peak_memory=peak)

    def sample(self):
        """The prompt and what the model makes of it, as text."""
        config, enc = self.config, self.encoding
        idx = torch.tensor([enc.encode_ordinary(config.prompt) or [0]], device=self.device)
        generator = torch.Generator(self.device).manual_seed(config.seed)
        self.model.eval()
        with torch.compiler.set_stance('force_eager'):               # shapes change every token
            tokens = self.model.generate(idx, config.sample_tokens, generator=generator)[0]
        return enc.decode([t for t in tokens.tolist() if t < self.meta['vocab_size']])

    def finish(self):
        """The last evaluation, a sample, and a summary."""
        config, levels = self.config, level_shares(self.model)
        size = bytes_held(self.model, self.optimizer)
        says = self.report(config.final_tokens, done=True, bytes=size, levels=levels,
                           seconds=self.seconds)
        if config.sample_tokens:
            self.say(f'--- sample ---\n{self.sample()}\n--------------')
        self.say(says)
        if config.eval_only:
            return
        each, out = size.pop('linear'), config.out_dir
        self.say('held: ' + ', '.join(f'{k} {v / 1e6:.1f} MB' for k, v in size.items()))
        self.say('bytes per weight of the blocks: '
                 + ', '.join(f'{k} {v:.2f}' for k, v in each.items())
                 + f'; weights + optimizer {each["weights"] + each["optimizer"]:.2f}')
        if levels:
            self.say('share of codes: ' + ', '.join(f'{k}: {v:.3f}' for k, v in levels.items()))
        if self.optimizer:
            rate = config.max_iters * self.tokens / self.seconds
            self.say(f'{rate:.0f} tokens/s, {self.seconds:.0f} s of training\ngo on: python '
                     f'train.py --out_dir={out} --init_from=resume --max_iters={2 * self.step}')
        self.say(f'sample: python train.py {out}/ckpt.pt --eval_only=True --prompt=..\n'
                 f'plot: python -m experiments.curve {os.path.dirname(out) or "."}/*/log.jsonl\n'
                 f'checkpoint {out}/ckpt.pt, log {out}/log.jsonl')


def main(argv):
    """What the command line says, under the lock of out_dir."""
    config = parse(argv)
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    try:
        with locked(config, rank):
            if world > 1:
                gpu = torch.cuda.is_available() and config.device in ('auto', 'cuda')
                dist.init_process_group('nccl' if gpu else 'gloo')
            run = Run(config, rank, world)
            if config.ptq and not config.eval_only:
                run.save()
            elif not config.eval_only:
                with finishing_steps():
                    run.train()
            run.finish()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (ValueError, OSError) as e:      # what does not fit, or cannot be written
        fail(e)
    except (MemoryError, RuntimeError) as e:
        if 'memory' not in f'{e!r}'.lower():
            raise                           # a mistake in this program
        fail(f'out of memory: lower batch_size and raise grad_accum ({str(e)[:99]})')
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == '__main__':
    # either may be closed, and a terminal need not know every character
    sys.stdout, sys.stderr = (f or open(os.devnull, 'w') for f in (sys.stdout, sys.stderr))
    sys.stdout.reconfigure(errors='replace')
    main(sys.argv[1:])
