"""
Train, evaluate and sample one GPT, with any quantization strategy:

    python train.py config/ternary.py                           a strategy, at the default size
    python train.py config/gpt2.py config/w8a8.py               a size and a strategy: later wins
    python train.py config/ternary.py --embedding_lr=12e-3      and flags win over files
    python train.py config/ternary.py --init_from=resume        go on where it stopped
    torchrun --nproc_per_node=8 train.py config/gpt2.py         data-parallel

Writes <out_dir>/ckpt.pt and <out_dir>/log.jsonl, one JSON object a line.
"""
import ast
import difflib
import json
import math
import operator
import os
import platform
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data.tokenizer import encoding
from model import GPT
from quant import AdamW, KVCache, Recipe, gptq_, health, held, noise_key, rtn_, shares, spec


@dataclass
class Config:
    # the model; the default size trains in minutes on two CPU cores
    flavour: str = 'llama'       # or gpt2
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 256
    hidden: int = 0              # width of the MLP; 0: 4 n_embd (gpt2), 8/3 n_embd, rounded up
    block_size: int = 256        # longest context, in tokens
    bias: bool = False           # gpt2 only
    dropout: float = 0.0
    rope_theta: float = 10000.0  # llama only
    init_gain: float = 0.0       # > 0: block linears start from N(0, init_gain^2 / fan_in)
    quantize_head: bool = False  # the head too takes weights, activations and gradients

    # the strategy: Specs as in quant.py, 'int8/row', 'ternary/tensor/absmean'; '': full precision
    weights: str = ''            # weights of block linears, as the forward sees them
    activations: str = ''        # their inputs
    gradients: str = ''          # gradients of their outputs,
    gradients_in: str = 'both'   # where the backward uses them: dx, dw or both
    backward: str = 'ste'        # the backward sees quantized x and w (ste), full ones (full),
                                 # codes, with scales folded into g (fold), or x and w quantized
                                 # anew, by the Spec of the gradients (requantize)
    compute: str = 'float'       # what is multiplied: codes dequantized, or codes (int8, fp8)
    kv_cache: str = ''           # keys and values
    master: str = ''             # the weights as they are stored between steps
    adam_m: str = ''             # Adam's moments as they are stored
    adam_v: str = ''             # a Spec, or 'factored'

    # the optimizer: AdamW, linear warm-up, cosine to min_lr
    learning_rate: float = 0.75e-3
    embedding_lr: float = 6e-3   # of embeddings, head, norms and biases; 0: learning_rate
    min_lr: float = 0.0          # as a fraction of learning_rate
    warmup_iters: int = 100
    max_iters: int = 1200
    weight_decay: float = 0.1    # of matrices
    beta1: float = 0.9
    beta2: float = 0.999         # small batches want a long memory
    eps: float = 1e-8
    grad_clip: float = 1.0       # by global norm, or as update_in_backward says; 0: off
    # of block linears alone:
    threshold: float = 0.0       # no step on evidence below so many deviations of the noise in it
    ramp: float = 0.0            # beta1 = 1 - 1 / (10 + t / ramp); 0: beta1 as above
    # the direct update of low-bit masters, if code_lr > 0; else they too go by learning_rate
    code_lr: float = 0.0         # half ranges of the grid a step
    scale_lr: float = 0.01       # of their scales; 0: fixed
    update_in_backward: bool = False  # update a weight when its gradient is there, and free that;
                                 # grad_clip then goes by the norm of each gradient

    # instead of training
    ptq: str = ''                # rtn or gptq: quantize trained weights, which become `master`
    damping: float = 0.01        # of GPTQ's Hessian, times the mean of its diagonal
    act_order: bool = False      # GPTQ goes by descending diagonal

    # the data
    dataset: str = 'python'      # folder in data/, or the path of one
    batch_size: int = 8          # sequences of block_size tokens, a process and a micro-step
    grad_accum: int = 1          # micro-steps a step
    sequences: int = 0           # calibrate or train on so many windows alone; 0: all there are

    # the run
    out_dir: str = ''            # '': out/ and the names of the config files
    overwrite: bool = False      # throw away the run that is in out_dir
    init_from: str = 'scratch'   # or resume, the path of a checkpoint, gpt2, gpt2-medium, ..
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


# what may differ between a run and its continuation
RUN_KEYS = {'out_dir', 'overwrite', 'init_from', 'eval_only', 'eval_interval', 'eval_tokens',
            'final_tokens', 'log_interval', 'prompt', 'sample_tokens', 'device', 'compile',
            'batch_size', 'grad_accum'}


GPT2 = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')


def fail(message):
    """End the program with one line; under torchrun one process speaks for all."""
    line = ' '.join(f'error: {message}'.split())
    raise SystemExit(line if os.environ.get('RANK', '0') == '0' else 1)


# ------------------------------------------------------------------------------------------------
# the command line: config files and flags are data, read without running them

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Pow: operator.pow}


def literal(node):
    """The value of a constant or of arithmetic on numbers. Raises ValueError for anything else."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -literal(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        a, b = literal(node.left), literal(node.right)
        if all(isinstance(x, (int, float)) and abs(x) < 2 ** 63 for x in (a, b)):
            if not isinstance(node.op, ast.Pow) or abs(b) < 64:
                return OPERATORS[type(node.op)](a, b)
    raise ValueError


def assign(config, key, node, text, where):
    """Set config.key to the value of an expression, or to the bare text of a flag for a string."""
    types = {f.name: f.type for f in fields(Config)}
    if key not in types:
        near = difflib.get_close_matches(key, types, 1)
        fail(f"{where}: unknown key '{key}'"
             + (f", did you mean '{near[0]}'?" if near else '; train.py lists them'))
    try:
        value = literal(node)
    except (ValueError, TypeError, ArithmeticError, RecursionError):
        value = text
    kind = types[key]
    if kind is float and type(value) is int:
        value = float(value)
    if kind is bool and isinstance(value, str) and value.lower() in ('true', 'false'):
        value = value.lower() == 'true'
    if kind is str and where.startswith('--') and type(value) is not str:
        value = text                                # --weights=8 is a string too
    if type(value) is not kind:
        fail(f"{where}: {key} must be {'an' if kind is int else 'a'} {kind.__name__}, not {text}")
    setattr(config, key, value)


def parse(argv):
    """Config files and --key=value flags, in order, to a checked Config."""
    config, names = Config(), []
    for arg in argv:
        if arg in ('-h', '--help'):
            raise SystemExit(print(__doc__) or 0)
        if arg.startswith('--') and '=' in arg:
            key, text = arg[2:].split('=', 1)
            try:
                node = ast.parse(text, mode='eval').body
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                node = None
            assign(config, key, node, text, f'--{key}')
        elif arg.startswith('-'):
            fail(f"'{arg}': flags look like --key=value")
        else:
            parse_file(config, arg)
            names.append(os.path.splitext(os.path.basename(arg))[0])
    config.out_dir = config.out_dir or 'out/' + ('-'.join(names) or 'default')
    check(config)
    return config


def parse_file(config, path):
    try:
        with open(path, encoding='utf-8-sig') as f:
            source = f.read()
        tree = ast.parse(source)
    except (OSError, UnicodeDecodeError) as e:
        fail(f'cannot read config file {path}: {e}')
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        fail(f"{path}:{getattr(e, 'lineno', None) or 1}: not a config file: {e}")
    for line in tree.body:
        where = f'{path}:{line.lineno}'
        if isinstance(line, ast.Assign) and [type(t) for t in line.targets] == [ast.Name]:
            text = ast.get_source_segment(source, line.value)
            assign(config, line.targets[0].id, line.value, text, where)
        elif not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)):
            fail(f'{where}: a config file has lines of the form key = value and comments only')


def check(config):
    """Everything that can be said to be wrong before anything is built."""
    for f in fields(Config):
        if f.type in (int, float) and not abs(getattr(config, f.name)) < 2 ** 63:
            fail(f'{f.name} = {getattr(config, f.name)} is not a number one can use')
    for key in ('n_layer', 'n_head', 'n_embd', 'block_size', 'max_iters', 'batch_size',
                'grad_accum', 'eval_interval', 'eval_tokens', 'final_tokens', 'log_interval',
                'learning_rate', 'eps', 'rope_theta'):
        if not getattr(config, key) > 0:
            fail(f'{key} = {getattr(config, key)} must be greater than 0')
    for key in ('hidden', 'init_gain', 'warmup_iters', 'weight_decay', 'grad_clip', 'code_lr',
                'scale_lr', 'embedding_lr', 'threshold', 'ramp', 'min_lr', 'sample_tokens',
                'seed', 'damping', 'sequences'):
        if not getattr(config, key) >= 0:
            fail(f'{key} = {getattr(config, key)} must not be negative')
    for key in ('dropout', 'beta1', 'beta2'):
        if not 0 <= getattr(config, key) < 1:
            fail(f'{key} = {getattr(config, key)} must lie in [0, 1)')
    if config.min_lr > 1:
        fail(f'min_lr = {config.min_lr} is a fraction of learning_rate: at most 1')
    for key, good in (('ptq', ('', 'rtn', 'gptq')), ('compile', ('auto', 'yes', 'no')),
                      ('dtype', ('auto', 'float32', 'bfloat16'))):
        if getattr(config, key) not in good:
            fail(f"{key} = '{getattr(config, key)}': use {', '.join(filter(None, good))}")
    for key in ('weights', 'activations', 'gradients', 'kv_cache', 'master', 'adam_m', 'adam_v'):
        if (key, getattr(config, key)) != ('adam_v', 'factored'):
            try:
                s = spec(getattr(config, key))
            except ValueError as e:
                fail(f'{key}: {e}')
            if s and key != 'adam_v' and s.grid[0] == 'u' and s.sign == 'symmetric':
                fail(f"{key} = '{getattr(config, key)}' has no negatives; use int, or asymmetric")
            if s and key == 'adam_v' and s.rotation:
                fail(f"{key} = '{getattr(config, key)}': v must stay positive; do not rotate it")
    specs = [spec(getattr(config, key)) for key in ('weights', 'activations', 'gradients')]
    try:
        how = Recipe(*specs, config.gradients_in, config.backward, config.compute)
        for master in (config.master, '') if config.quantize_head else (config.master,):
            how.check(spec(master))     # the head has no master
    except ValueError as e:
        fail(e)
    group = spec(config.gradients).group if config.backward == 'requantize' else 1
    if isinstance(group, int) and config.batch_size * config.block_size % group:
        fail(f"backward = 'requantize' groups tokens too: batch_size x block_size must be a "
             f'multiple of {group}')
    if config.code_lr and (not config.master or spec(config.master).grid == 'bf16'):
        fail('code_lr moves the codes of a low-bit master: give master too, or set code_lr = 0')
    if config.ptq:
        if not config.master or config.weights:
            fail(f"ptq = '{config.ptq}' quantizes weights once, to `master`: give that, and not "
                 '`weights`')
        if config.ptq == 'gptq' and not config.sequences:
            fail("ptq = 'gptq' needs data to calibrate on: --sequences=128")
    if config.update_in_backward and config.grad_accum > 1:
        fail('update_in_backward uses each gradient at once: set grad_accum = 1')
    if config.sample_tokens:            # better now than at the end
        try:
            KVCache(config.kv_cache)
        except ValueError as e:
            fail(f'{e}, or sample_tokens = 0')


# ------------------------------------------------------------------------------------------------
# data: flat files of uint16 tokens, and an order that is a function of (seed, step) alone

def load_data(config, rank):
    """train, val (uint16) and meta of data/<dataset>; corpora without a download are built."""
    root = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'data', config.dataset)
    if os.path.exists(os.path.join(config.dataset, 'meta.json')):
        root = config.dataset
    script = os.path.join(root, 'prepare.py')
    path = os.path.join(root, 'meta.json')
    if not os.path.exists(path) and config.dataset in ('python', 'sympy') and rank == 0:
        if subprocess.run([sys.executable, script]).returncode:
            fail(f'could not build the corpus {config.dataset}, see above')
    if dist.is_initialized():
        dist.barrier()
    if not os.path.exists(path):
        here = f'data/{config.dataset}'
        fail(f'no data in {here}: run python {here}/prepare.py' if os.path.exists(script) else
             f"no dataset '{config.dataset}': there is no {os.path.join(here, 'meta.json')}")
    try:
        with open(path, encoding='utf-8') as f:
            meta = json.load(f)
        for key, kinds in (('vocab_size', int), ('train_tokens', int), ('val_tokens', int),
                           ('bytes_per_token', (int, float)), ('sha256', str)):
            if not isinstance(meta[key], kinds) or isinstance(meta[key], int) and meta[key] < 1:
                raise ValueError(f'{key} = {meta[key]!r} in meta.json')
        splits = [read_split(root, split, meta, config.block_size) for split in ('train', 'val')]
    except (OSError, ValueError, KeyError, TypeError) as e:
        fail(f'cannot read the dataset {config.dataset}: {e!r}; run its prepare.py again')
    return *splits, meta


def read_split(root, split, meta, block_size):
    name, tokens = os.path.join(root, split + '.bin'), meta[split + '_tokens']
    size = os.path.getsize(name)
    if size != 2 * tokens:
        fail(f'{name} has {size} bytes instead of {2 * tokens}: it is truncated or of another '
             'vocabulary; run its prepare.py again')
    if tokens <= block_size:
        fail(f'{name} has {tokens} tokens, not more than block_size = {block_size}')
    if size > 100e6:
        return np.memmap(name, '<u2', mode='r')
    data = np.fromfile(name, '<u2')
    check_ids(data, meta['vocab_size'])
    return data


def check_ids(ids, vocab_size):
    if ids.max() >= vocab_size:
        fail(f'the data has token id {ids.max()}, beyond its vocabulary of {vocab_size}; run its '
             'prepare.py again')


def to_batch(data, starts, T, vocab_size, device):
    """x, y (B, T) from the windows that begin at `starts`; y is x one token on."""
    window = np.stack([data[i:i + T + 1] for i in starts]).astype(np.int64)
    check_ids(window, vocab_size)       # a file too large to look through might hold anything
    window = torch.from_numpy(window)
    if device.type == 'cuda':
        window = window.pin_memory().to(device, non_blocking=True)
    window = window.to(device)
    return window[:, :-1], window[:, 1:]


def window_starts(config, step, n_tokens, world):
    """Where the windows of a step begin, for micro-steps and ranks: (grad_accum, world, batch).

    Drawn anew for every step from (seed, step): resuming needs no state, and neither evaluation
    nor precision nor, at an equal product of the three, the number of processes matters. Of a few
    `sequences`, every epoch has all, in an order of its own."""
    shape = config.grad_accum, world, config.batch_size
    n = math.prod(shape)
    if not config.sequences:
        rng = np.random.default_rng((config.seed, step))
        return rng.integers(n_tokens - config.block_size, size=n).reshape(shape)
    few = sequence_starts(config, n_tokens)
    epoch, first = divmod(step * n, len(few))
    epochs = range(epoch, epoch + 1 + (first + n) // len(few))
    order = [np.random.default_rng((config.seed, e)).permutation(few) for e in epochs]
    return np.concatenate(order)[first:first + n].reshape(shape)


def sequence_starts(config, n_tokens):
    """Where `sequences` windows begin, which do not overlap: a function of the seed."""
    windows = (n_tokens - 1) // config.block_size
    if windows < config.sequences:
        fail(f'sequences = {config.sequences}: train.bin has {windows} of {config.block_size} '
             'tokens; ask for fewer, or lower block_size')
    rng = np.random.default_rng(config.seed)
    return rng.choice(windows, config.sequences, replace=False) * config.block_size


# ------------------------------------------------------------------------------------------------
# checkpoints: dicts, tensors and numbers

def save(path, checkpoint):
    """Write beside, then rename: whenever it is interrupted, `path` holds a whole checkpoint."""
    try:
        with open(path + '.tmp', 'wb') as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as e:        # RuntimeError is what torch makes of a full disk
        fail(f'could not save {path}, which is still what it was before: {e}')
    os.replace(path + '.tmp', path)


def load(path):
    if not os.path.isfile(path):
        fail(f'no checkpoint {path}')
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        Config(**checkpoint['config'])
        assert checkpoint['iter'] >= 0 and checkpoint['tokens'] > 0 and checkpoint['seconds'] >= 0
        assert checkpoint['model'].keys()
        assert checkpoint['optimizer'] is None or checkpoint['optimizer']['state'].keys()
        assert isinstance(checkpoint['sha256'], str) and isinstance(checkpoint['losses'], list)
        return checkpoint
    except Exception as e:              # a damaged or foreign file raises anything at all
        fail(f'{path} is not a whole checkpoint of this program ({type(e).__name__}); use another')


def load_weights(model, config, checkpoint, path):
    """Put a checkpoint's weights into a fresh model, stored as they are there."""
    for key in ('flavour', 'n_head', 'rope_theta'):         # what the shapes do not show
        if checkpoint['config'][key] != getattr(config, key):
            fail(f"{path} has {key} = {checkpoint['config'][key]}, not {getattr(config, key)}")
    master = checkpoint['config']['master']
    if master not in ('', config.master):
        fail(f"{path} stores its weights as '{master}' and has no others: use --master={master}"
             + (', or start from full-precision ones' if config.weights else ''))
    if master and config.ptq and not config.eval_only:
        fail(f"{path} stores its weights as '{master}' already, and ptq = '{config.ptq}' starts "
             'from full-precision ones: use another checkpoint')
    tuned = checkpoint['config']['weights']
    if tuned and config.ptq and not master and (config.ptq, config.master) != ('rtn', tuned):
        fail(f"{path} was trained with weights = '{tuned}': --ptq=rtn --master={tuned} packs them "
             'as they are')
    rtn_(model, master)
    try:
        model.load_state_dict(checkpoint['model'])
    except RuntimeError as e:
        detail = ' '.join(str(e).split('\n')[1].split())
        fail(f'{path} is a model of another shape: {detail}')


# ------------------------------------------------------------------------------------------------
# training

def pick_device(config, local_rank):
    name = config.device
    if name == 'auto':
        mps = torch.backends.mps.is_available()
        name = 'cuda' if torch.cuda.is_available() else 'mps' if mps else 'cpu'
    try:
        device = torch.device(f'cuda:{local_rank}' if name == 'cuda' else name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as e:
        fail(f"device '{name}' is not there ({str(e).splitlines()[0]}); use --device=auto")
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
    trains = not (config.eval_only or config.ptq)
    pays = device.type == 'cuda' or device.type == 'cpu' and config.max_iters >= 250
    if config.compile == 'no' or config.compile == 'auto' and not (trains and pays):
        return False
    try:
        torch.compile(torch.neg)(torch.ones(8, device=device))
    except Exception as e:          # no compiler, no headers, ..: whatever it is, eager works
        if config.compile == 'yes':
            fail(f'torch.compile does not work here ({type(e).__name__}: {e}); use --compile=no')
        return False
    return True


def schedule(config, step):
    """The rates of a step (from 0) as a fraction of their peaks: linear up, cosine to min_lr."""
    if step < config.warmup_iters:
        return (step + 1) / (config.warmup_iters + 1)
    done = (step - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)
    return config.min_lr + (1 - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def build(config, checkpoint, vocab_size, device):
    """The model, from scratch, a checkpoint or GPT-2, on its device."""
    torch.manual_seed(config.seed)      # weights are drawn on the CPU: the same for every device
    if config.init_from in GPT2:
        try:
            model = GPT.from_pretrained(config, vocab_size, config.init_from).to(device)
        except (ImportError, OSError) as e:
            fail(f'cannot load {config.init_from}: {" ".join(str(e).split())[:200]}; it takes pip '
                 'install transformers and, once, a network')
    else:
        model = GPT(config, vocab_size).to(device)
    if checkpoint:
        load_weights(model, config, checkpoint, config.init_from)
    return model


def make_optimizer(config, model, device, compiled):
    """AdamW as the config says; on a GPU its gradients lie flat, unless they are freed at once."""
    flat = device.type == 'cuda' and not config.update_in_backward
    return AdamW(model, config.learning_rate, (config.beta1, config.beta2), config.eps,
                 config.weight_decay, config.adam_m, config.adam_v, config.code_lr,
                 config.scale_lr, config.threshold, config.ramp, config.embedding_lr, config.seed,
                 flat, compiled)


def run_files(config):
    return [os.path.join(config.out_dir, name) for name in ('ckpt.pt', 'log.jsonl')]


def open_run(config):
    """The checkpoint to start from, or None; fails if another run is in the way."""
    ckpt, log = run_files(config)
    if config.init_from == 'resume':
        checkpoint = load(ckpt)
        if checkpoint['optimizer'] is None and not config.eval_only:
            fail(f'{ckpt} is finished, there is nothing to go on with; evaluate it with '
                 '--eval_only=True')
        if checkpoint['config'].keys() != asdict(config).keys():
            fail(f'{ckpt} was trained by another version of this program; start a new run from '
                 'its weights, --init_from=PATH')
        for key, old in checkpoint['config'].items():
            if key not in RUN_KEYS and getattr(config, key) != old:
                fail(f'{ckpt} was trained with {key} = {old!r}, not {getattr(config, key)!r}; to '
                     'go on, give the same; for a new run from its weights, --init_from=PATH')
        return checkpoint
    if not (config.eval_only or config.overwrite):
        if os.path.exists(ckpt):
            fail(f'{config.out_dir} holds a run: go on with --init_from=resume, choose another '
                 '--out_dir, or throw it away with --overwrite=True')
        if os.path.exists(log):
            fail(f'{config.out_dir} holds the log of a run that saved no checkpoint: throw it '
                 'away with --overwrite=True, or choose another --out_dir')
    if (config.eval_only or config.ptq) and config.init_from == 'scratch':
        fail(f"{'eval_only' if config.eval_only else 'ptq'} needs weights: --init_from=PATH of a "
             'checkpoint')
    return load(config.init_from) if config.init_from not in ('scratch', *GPT2) else None


def cut_log(path, step):
    """Drop what a run logged after the checkpoint it resumes from, and half-written lines."""
    keep = []
    with open(path, encoding='utf-8', errors='replace') as f:
        for line in f:
            try:
                entry = json.loads(line)
                if entry.get('iter', 0) <= step and 'done' not in entry:
                    keep.append(line)
            except (ValueError, AttributeError, TypeError):
                continue
    with open(path + '.tmp', 'w', encoding='utf-8') as f:
        f.writelines(keep)
    os.replace(path + '.tmp', path)


class Log:
    """stdout for people, <out_dir>/log.jsonl for programs; only rank 0 writes."""

    def __init__(self, path, rank):
        self.file = open(path, 'a', encoding='utf-8') if path and rank == 0 else None
        self.rank = rank

    def say(self, text):
        if self.rank == 0:
            tqdm.write(text)
            sys.stdout.flush()

    def line(self, **entry):
        if self.file:
            self.file.write(json.dumps(entry, allow_nan=False) + '\n')
            self.file.flush()


class Run:
    """One run: the model, its optimizer, the data, and how far it is."""

    def __init__(self, config, rank, world):
        self.config, self.rank, self.world = config, rank, world
        checkpoint = open_run(config)
        self.device = pick_device(config, int(os.environ.get('LOCAL_RANK', 0)))
        self.train_data, self.val_data, self.meta = load_data(config, rank)
        sequence_starts(config, len(self.train_data))       # fails now if they are too many
        resuming = config.init_from == 'resume'
        if resuming and checkpoint['sha256'] != self.meta['sha256']:
            fail(f"the checkpoint was trained on data of sha256 {checkpoint['sha256'][:12]}, but "
                 f"{config.dataset} is now {self.meta['sha256'][:12]}: losses would not compare")
        self.vocab_size = -(-self.meta['vocab_size'] // 64) * 64     # 64 | it suits the matmuls
        self.model = build(config, checkpoint, self.vocab_size, self.device)
        self.model.dtype = pick_dtype(config, self.device)
        if not checkpoint or not checkpoint['config']['master']:
            self.store()
        self.compiled = pick_compile(config, self.device)
        if self.compiled:
            self.model.compile()
        self.optimizer = None
        if not (config.eval_only or config.ptq):
            self.optimizer = make_optimizer(config, self.model, self.device, self.compiled)
            if config.update_in_backward:
                for p in self.model.parameters():
                    p.register_post_accumulate_grad_hook(self.update)
        self.step, self.seconds, self.losses = 0, 0.0, []    # losses since the last log line
        self.limit = config.grad_clip or math.inf
        self.tokens = config.grad_accum * world * config.batch_size * config.block_size  # a step
        if resuming:
            if checkpoint['tokens'] != self.tokens:
                fail(f"the checkpoint was trained with {checkpoint['tokens']} tokens per step, "
                     f'not {self.tokens}: processes x grad_accum x batch_size must stay the same')
            if self.optimizer:
                self.optimizer.load_state_dict(checkpoint['optimizer'])
            self.step, self.seconds = checkpoint['iter'], checkpoint['seconds']
            self.losses = checkpoint['losses']
        self.encoding = encoding(self.meta)         # now, not after hours of training
        self.start_log(resuming)

    def store(self):
        """The weights become what `master` says, by GPTQ or rounded to nearest."""
        config = self.config
        if config.ptq != 'gptq':
            return rtn_(self.model, config.master)
        gptq_(self.model, config.master, self.sequences(), config.damping, config.act_order,
              lambda blocks: tqdm(blocks, 'GPTQ', unit='block', disable=None))

    def sequences(self):
        """The `sequences` to calibrate on, [(B, T)]."""
        T, B = self.config.block_size, self.config.batch_size
        starts = sequence_starts(self.config, len(self.train_data))
        return [to_batch(self.train_data, starts[i:i + B], T, self.vocab_size, self.device)[0]
                for i in range(0, len(starts), B)]

    def start_log(self, resuming):
        """Open the log; with everything built and checked, an old run may go if it must."""
        config, (ckpt, path) = self.config, run_files(self.config)
        if config.eval_only:
            path = None
        elif self.rank == 0:
            os.makedirs(config.out_dir, exist_ok=True)
            if resuming and os.path.exists(path):
                cut_log(path, self.step)
            for file in () if resuming else (ckpt, path):
                if os.path.exists(file):
                    os.remove(file)
        self.log = Log(path, self.rank)
        gpu = self.device.type == 'cuda'
        versions = {
            'python': platform.python_version(), 'torch': torch.__version__,
            'device': torch.cuda.get_device_name(self.device) if gpu else self.device.type,
            'dtype': str(self.model.dtype).split('.')[1]}
        if not resuming:
            self.log.line(config=asdict(config), sha256=self.meta['sha256'], versions=versions)
        count = sum(p.numel() for p in self.model.parameters())
        self.log.say(f'{config.flavour} {config.n_layer}x{config.n_embd}, {count / 1e6:.2f}M '
                     f'parameters, {versions["dtype"]}{", compiled" if self.compiled else ""} on '
                     f'{versions["device"]}, data {config.dataset} {self.meta["sha256"][:12]}')

    @torch.no_grad()
    def evaluate(self, most):
        """Loss, in nats per token and bits per byte, of windows all over val, of `most` tokens."""
        T, B, data = self.config.block_size, self.config.batch_size, self.val_data
        n = max(1, min(most // T, (len(data) - 1) // T))
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

    def save(self):
        weights = self.model.state_dict()
        norms = [t.float().norm().item() for t in weights.values() if t.is_floating_point()]
        self.check_finite(sum(norms), 'norm of the weights')
        if self.rank == 0:
            save(run_files(self.config)[0],
                 {'config': asdict(self.config), 'sha256': self.meta['sha256'], 'iter': self.step,
                  'tokens': self.tokens, 'seconds': self.seconds, 'losses': self.losses,
                  'model': weights,
                  'optimizer': self.optimizer.state_dict() if self.optimizer else None})

    def health(self):
        x, _ = to_batch(self.val_data, [0], self.config.block_size, self.vocab_size, self.device)
        with torch.compiler.set_stance('force_eager'):               # it hooks into the layers
            return health(self.model, x)

    def check_up(self):
        """Evaluate, look at the health of quantization, save."""
        result = self.evaluate(self.config.eval_tokens)
        self.log.line(iter=self.step, **result, health=self.health())
        self.log.say(f'step {self.step}: val loss {result["val_loss"]:.4f} nats/token, '
                     f'{result["val_bpb"]:.4f} bits/byte')
        self.save()

    def update(self, p):
        """A hook: the gradient of p is there; use it and free it."""
        if self.world > 1:
            dist.all_reduce(p.grad)
        norm = torch.linalg.vector_norm(p.grad)
        self.optimizer.apply(p, (self.limit / (norm + 1e-6)).clamp(max=1))
        self.norms.append(norm)
        p.grad = None

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
        total[1] = len(stopping)
        if world > 1:
            for g in self.optimizer.gradients():
                dist.all_reduce(g)
            dist.all_reduce(total)
        return total.tolist()

    def advance(self):
        """One optimizer step; returns what to log of it and whether to stop."""
        optimizer, scale = self.optimizer, schedule(self.config, self.step)
        if self.config.update_in_backward:
            self.norms = []
            optimizer.begin(scale)
            loss, stop = self.forward_backward()
            self.check_finite(loss, 'loss')
            self.check_finite(torch.stack(self.norms).max().item(), 'norm of a gradient')
            optimizer.finish()
        else:
            optimizer.zero_grad()
            loss, stop = self.forward_backward()
            norm = torch.nn.utils.get_total_norm(optimizer.gradients()).item()
            self.check_finite(loss, 'loss')
            self.check_finite(norm, 'norm of the gradient')
            optimizer.step(scale, min(1.0, self.limit / (norm + 1e-6)))
        self.step += 1
        return loss, stop

    def check_finite(self, value, name):
        if not math.isfinite(value):
            ckpt, _ = run_files(self.config)
            fail(f'the {name} is {value} at step {self.step}: lower learning_rate or use more bits'
                 + (f'; {ckpt} is the last good checkpoint' if os.path.exists(ckpt) else ''))

    def train(self):
        config = self.config
        bar = tqdm(total=config.max_iters, initial=self.step, unit='step',
                   disable=None if self.rank == 0 else True)         # None: only on a terminal
        busy, first = 0.0, len(self.losses)                          # since the last log line
        self.model.train()
        while self.step < config.max_iters:
            began = time.perf_counter()
            loss, stop = self.advance()
            self.losses.append(loss)
            busy += time.perf_counter() - began
            self.seconds += time.perf_counter() - began
            bar.update()
            if self.step % config.log_interval == 0:
                loss = sum(self.losses) / len(self.losses)
                rate = (len(self.losses) - first) * self.tokens / busy
                flips = {'flips': self.optimizer.flips()} if config.master else {}
                self.log.line(iter=self.step, train_loss=loss, tokens_per_s=rate, **flips)
                bar.set_postfix(loss=f'{loss:.3f}', tokens_per_s=f'{rate:.0f}')
                if bar.disable and self.step % (10 * config.log_interval) == 0:
                    self.log.say(f'step {self.step} of {config.max_iters}: loss {loss:.4f}, '
                                 f'{rate:.0f} tokens/s')
                self.losses, busy, first = [], 0.0, 0
            if self.step % config.eval_interval == 0 or self.step == config.max_iters:
                self.check_up()
            if stop:
                self.save()
                bar.close()
                self.log.say(f'saved after step {self.step}; to go on, give the same command with '
                             '--init_from=resume')
                raise SystemExit(130)
        bar.close()

    def sample(self):
        """The prompt and what the model makes of it, as text."""
        config, enc = self.config, self.encoding
        idx = torch.tensor([enc.encode_ordinary(config.prompt) or [0]], device=self.device)
        generator = torch.Generator(self.device).manual_seed(config.seed)
        self.model.eval()
        with torch.compiler.set_stance('force_eager'):               # shapes change every token
            tokens = self.model.generate(idx, config.sample_tokens, generator=generator)[0]
        tokens = [t for t in tokens.tolist() if t < self.meta['vocab_size']]     # no padding
        return enc.decode(tokens)

    def finish(self):
        """The last evaluation, a sample, and a summary."""
        log, size, levels = self.log, held(self.model, self.optimizer), shares(self.model)
        result = self.evaluate(self.config.final_tokens)
        log.line(done=True, iter=self.step, **result, bytes=size, levels=levels,
                 seconds=self.seconds, health=self.health())
        if self.config.sample_tokens:
            log.say(f'--- sample ---\n{self.sample()}\n--------------')
        log.say(f'val loss {result["val_loss"]:.4f} nats/token, {result["val_bpb"]:.4f} bits/byte')
        if self.config.eval_only:
            return
        if self.config.ptq:
            path = run_files(self.config)[0]
            log.say(f'{path}: {os.path.getsize(path) / 1e6:.1f} MB; bytes per weight of the '
                    f'blocks: {size["linear"]["weights"]:.2f}')
            return
        each, mega = size['linear'], {k: f'{size[k] / 1e6:.1f} MB' for k in size if k != 'linear'}
        log.say('held: ' + ', '.join(f'{k} {v}' for k, v in mega.items()))
        log.say('bytes per weight of the blocks: '
                + ', '.join(f'{k} {v:.2f}' for k, v in each.items())
                + f'; weights + optimizer {each["weights"] + each["optimizer"]:.2f}')
        if levels:
            log.say('share of codes: ' + ', '.join(f'{k}: {v:.3f}' for k, v in levels.items()))
        rate = self.config.max_iters * self.tokens / self.seconds
        log.say(f'{rate:.0f} tokens/s, {self.seconds:.0f} s of training')


stopping = []       # signals that came while a step was in progress


@contextmanager
def finishing_steps():
    """Within, the first Ctrl-C or SIGTERM only leaves a note: the step is finished first."""
    def note(number, _):
        if stopping:
            raise KeyboardInterrupt
        stopping.append(number)

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        stopping.clear()
        for s, handler in before.items():
            signal.signal(s, handler)


def main(argv):
    config = parse(argv)
    try:
        rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
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
    except (ValueError, OSError, MemoryError) as e:     # what does not fit, or cannot be written
        fail(e)
    except RuntimeError as e:
        if 'memory' not in str(e):
            raise
        fail(f'out of memory: lower batch_size and raise grad_accum ({str(e).splitlines()[0]})')
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == '__main__':
    sys.stdout.reconfigure(errors='replace')            # a terminal need not know every character
    main(sys.argv[1:])
