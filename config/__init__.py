"""
The menu, and how it is read: from a command line to a checked config.

The other files of this folder are the menu, lines key = value. They, checkpoints and flags stack,
and later ones win: `configure(['config/gpt2.py', '--seed=2'], Config)`. All of them are data: what
they say is read and never run. The keys and their defaults are those of train.Config; which values
make sense, and which together, is said in `check`. What is wrong ends the program with one line.
"""
import ast
import difflib
import inspect
import json
import math
import operator
import os
import re
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, replace

import torch

from quant import FORMATS, GRIDS, MAPS, WORDS, spec

try:
    import fcntl
except ImportError:     # on Windows: no lock
    fcntl = None

# keys of a run, not of its model: a checkpoint does not hand them on
OWN_KEYS = {'out_dir', 'overwrite', 'init_from', 'checkpoint', 'eval_only', 'ptq', 'damping',
            'act_order', 'prompt', 'sample_tokens', 'samples', 'temperature', 'top_k', 'device',
            'compile', 'shard', 'reduce_dtype', 'sequences'}
# what may differ when a run is resumed; the data may lie elsewhere, but must be the same
RUN_KEYS = OWN_KEYS - {'ptq', 'damping', 'act_order', 'sequences'} | {
    'dataset', 'batch_size', 'grad_accum', 'max_iters', 'eval_interval', 'eval_tokens',
    'final_tokens', 'log_interval'}
SPECS = 'weights', 'activations', 'gradients', 'kv_cache', 'stored', 'adam_m', 'adam_v'
STRATEGY = (*SPECS, 'gradients_in', 'backward', 'compute', 'quantize_head', 'keep', 'optimizer',
            'code_lr')
MAY_BE_ZERO = 'seed', 'warmup_iters', 'sample_tokens', 'top_k'    # and what is so by default
CHOICES = {'init_from': ('scratch', 'resume', 'checkpoint'), 'ptq': ('', 'rtn', 'gptq'),
           'optimizer': ('adamw', 'muon', 'scales'), 'compile': ('auto', 'yes', 'no'),
           'dtype': ('auto', 'float32', 'bfloat16'), 'reduce_dtype': ('', 'bfloat16')}
IDLE = {    # a key: what it has no effect without, one of some keys or of their values
    'rope_theta': 'flavour=llama', 'quantize_head': 'weights activations gradients',
    'backward': 'weights activations gradients', 'prompt': 'sample_tokens',
    'samples': 'sample_tokens', 'temperature': 'sample_tokens', 'top_k': 'sample_tokens',
    'keep': 'weights activations gradients stored', 'code_lr': 'stored',
    'scale_lr': 'code_lr optimizer=scales', 'adam_m': 'optimizer=adamw optimizer=muon',
    'adam_v': 'optimizer=adamw', 'damping': 'ptq=gptq', 'act_order': 'ptq=gptq'}


def fail(message, own=False):
    """End with one short line; one rank of a machine prints it, or each whose `own` fault it is."""
    line = ' '.join(f'error: {message}'.split())
    if len(line) > 320:     # someone's argument is long; the advice comes last
        line = f'{line[:160]} .. {line[-156:]}'
    raise SystemExit(line if own or os.environ.get('LOCAL_RANK', '0') == '0' else 1)


# ------------------------------------------------------------------------------------------------
# config files and flags

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv,
             ast.Pow: lambda a, b: a ** b if abs(b) < 64 else math.inf}     # 9**9**9 never ends


def literal(node):
    """The value of a literal, or of arithmetic on some. Any exception for anything else."""
    if isinstance(node, ast.BinOp):
        return OPERATORS[type(node.op)](literal(node.left), literal(node.right))
    return ast.literal_eval(node)


def value_of(key, text, where, Config):
    """The value of a config key: a literal, or in a flag the bare text of a string."""
    kinds = {f.name: f.type for f in fields(Config) if f.name != 'checkpoint'}
    if key not in kinds:
        near = difflib.get_close_matches(key[:99], kinds, 1) or ['--help']
        fail(f"unknown key '{key[:99]}', did you mean '{near[0]}'? ({where})")
    value, kind = None, kinds[key]
    with suppress(Exception):       # no literal, whatever the reason
        value = literal(ast.parse(text, mode='eval').body)
        value = float(value) if kind is float and type(value) is int else value
    if where.startswith('--') and type(value) is not kind:
        # --weights=8 is a string too, and --bias=true a bool
        value = text if kind is str else {'true': True, 'false': False}.get(text.lower(), value)
    if type(value) is not kind:
        fail(f"{where}: {key} must be {'an' if kind is int else 'a'} {kind.__name__}, not {text}")
    return value


def read_arg(arg, Config):
    """What a config file or a flag says, as {key: value}."""
    if arg.startswith('-'):
        flag, equals, text = arg.partition('=')
        if not (arg.startswith('--') and equals):
            fail(f"'{arg}': flags look like --key=value")
        return {flag[2:]: value_of(flag[2:], text, flag, Config)}
    found = {}
    try:
        with open(arg, encoding='utf-8-sig') as f:
            lines = ast.parse(f.read()).body
        for line in lines:
            where = f'{arg}:{line.lineno}'
            if isinstance(line, ast.Assign) and [type(t) for t in line.targets] == [ast.Name]:
                key = line.targets[0].id
                found[key] = value_of(key, ast.unparse(line.value), where, Config)
            elif not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)):
                fail(f'{where}: a config file has lines of the form key = value and comments only')
    except Exception as e:      # no such file, no text, no Python
        fail(f"{arg}:{getattr(e, 'lineno', 1)}: cannot read it, or not a config file (of a "
             f"checkpoint the name ends in .pt): {e}")
    return found


# ------------------------------------------------------------------------------------------------
# checkpoints: a config file that also has weights. Dicts, tensors and numbers

FIELDS = {'config', 'sha256', 'tokenizer', 'iter', 'tokens', 'seconds', 'losses', 'model',
          'optimizer', 'format'}
FORMAT = 2      # 1 packed codes of 3, 5, 6 and 7 bits in another order
loaded = {}     # {path: the checkpoint that `configure` found there}, until a run takes it


def save(path, checkpoint):
    """Write beside, then rename: whenever it is interrupted, `path` holds a whole checkpoint."""
    try:
        with open(path + '.tmp', 'wb') as f:
            torch.save({**checkpoint, 'format': FORMAT}, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + '.tmp', path)
    except (OSError, RuntimeError) as e:        # RuntimeError is what torch makes of a full disk
        with suppress(OSError):
            os.remove(path + '.tmp')
        fail(f'could not save {path}, which is still what it was before: {e}')


def load(path, Config):
    """A whole checkpoint, its tensors mapped from the file. A key of Config that is newer gets its
    default: what was done before there was the key."""
    if not os.path.isfile(path):
        fail(f'no checkpoint {path}')
    try:
        with zipfile.ZipFile(path) as f:        # torch.load looks at no checksum
            if damaged := f.testzip():
                raise ValueError(f'{damaged} is damaged')
        checkpoint = torch.load(path, map_location='cpu', mmap=True, weights_only=True)
        checkpoint['config'] = asdict(Config()) | checkpoint['config']
        kinds = {key: type(value) for key, value in checkpoint['config'].items()}
    except Exception as e:              # a damaged or foreign file raises anything at all
        fail(f'{path} is not a whole checkpoint of this program ({e!r}); use another')
    if kinds != {f.name: f.type for f in fields(Config)} or checkpoint.keys() != FIELDS or \
            checkpoint['format'] != FORMAT:
        fail(f'{path} is by another version of this program: train it again')
    return checkpoint


def open_run(config):
    """The checkpoint to start from, or None; fails if another run is in the way."""
    out_dir, path = config.out_dir, config.checkpoint
    old = [f'{out_dir}/{name}' for name in ('ckpt.pt', 'log.jsonl')]
    old = list(filter(os.path.exists, old))
    if old and config.init_from != 'resume' and not config.eval_only:
        if not config.overwrite:
            go_on = 'go on with --init_from=resume, ' if 'ckpt.pt' in old[0] else ''
            fail(f'{out_dir} holds a run: {go_on}choose another --out_dir, or throw it away with '
                 '--overwrite=True')
        if path and os.path.samefile(path, old[0]):
            fail(f'--overwrite would throw away {path}, which this starts from: choose another '
                 '--out_dir')
    if path and config.init_from != 'scratch':
        return loaded.pop(path, None) or load(path, type(config))
    if config.init_from == 'checkpoint' or config.eval_only or config.ptq:
        fail('this needs a checkpoint before it: python train.py out/baseline/ckpt.pt ..')


def open_log(path, step):
    """The log, to write on; what was logged after `step`, or half-written, is dropped from it."""
    kept = []
    with suppress(FileNotFoundError), open(path, encoding='utf-8', errors='replace') as f:
        for line in f:
            with suppress(ValueError, AttributeError, TypeError):       # it is no entry
                entry = json.loads(line)
                if entry.get('iter', 0) <= step and 'done' not in entry:
                    kept.append(line.strip() + '\n')
    with open(path + '.tmp', 'w', encoding='utf-8') as f:
        f.writelines(kept)
    os.replace(path + '.tmp', path)
    return open(path, 'a', encoding='utf-8')


@contextmanager
def locked(out_dir):
    """Within, no other run can begin in out_dir. An out_dir that stays empty is removed again."""
    os.makedirs(out_dir, exist_ok=True)
    with open(f'{out_dir}/.lock', 'w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f'{out_dir} has a run in progress: wait, or choose another --out_dir')
        except (AttributeError, OSError):       # there is no fcntl, or a file system without locks
            pass
        try:
            yield
        finally:
            with suppress(OSError):             # it is gone, or Windows keeps an open file
                if os.listdir(out_dir) == ['.lock']:
                    os.remove(file.name)
                    os.rmdir(out_dir)


# ------------------------------------------------------------------------------------------------
# the command line

def meaning(key, value):
    """What a value stands for: a Spec, whose words have any order, or the place of a dataset."""
    if key == 'dataset' and os.path.basename(value) != value:
        return os.path.abspath(value)       # else it is the name of a folder in data/
    try:
        return spec(value) if key in SPECS else value
    except ValueError as e:
        fail(f'{key}: {e}')


def differ(key, a, b):
    return meaning(key, a) != meaning(key, b)


def show_help(Config):
    """What train.py says of itself, all keys with their comments, and the words of a Spec."""
    words = (f'    {field:9} {" ".join(good)}' for field, good in WORDS.items())
    print(inspect.getmodule(Config).__doc__, inspect.getsource(Config),
          'A Spec is words in any order, between /:', *words,
          f'or a format: {" ".join(FORMATS)}. A group can be a number.', sep='\n')
    raise SystemExit(0)


def configure(argv, Config):
    """Checkpoints, config files and --key=value flags, in order, to a checked Config."""
    if '-h' in argv or '--help' in argv:
        show_help(Config)
    config, given, names = Config(), {}, []
    for arg in argv:
        path = arg
        if arg.startswith('-') or not arg.endswith('.pt'):
            given |= (new := read_arg(arg, Config))
        else:
            if config.checkpoint:
                fail(f'{config.checkpoint} and {arg} are two checkpoints: give one')
            # it hands on what its model is, and how that was trained
            loaded[arg] = load(arg, Config)
            new = {k: v for k, v in loaded[arg]['config'].items() if k not in OWN_KEYS}
            new |= {'checkpoint': arg, 'init_from': 'checkpoint'}
            if undone := [k for k in given if k in new and differ(k, new[k], given[k])]:
                fail(f'give {arg} first: it would undo {", ".join(undone)}')
            path = os.path.dirname(os.path.abspath(arg))        # its run has the folder's name
        if not arg.startswith('-'):
            names.append(os.path.basename(path).removesuffix('.py'))
        config = replace(config, **new)
    config.out_dir = os.path.normpath(config.out_dir or 'out/' + ('-'.join(names) or 'default'))
    if config.init_from == 'resume':
        config = resumed(config, given)
    check(config, given)
    config.dataset = meaning('dataset', config.dataset)         # the same later and elsewhere
    if config.ptq and not differ('weights', config.weights, config.stored):
        config.weights = ''     # what they were trained with: packed, they need no more rounding
    return config


def resumed(config, given):
    """The config of the run in out_dir; what is given may differ only where that is harmless."""
    path = f'{config.out_dir}/ckpt.pt'
    if config.checkpoint:
        fail(f'resume goes on with {path}: give --out_dir={config.out_dir} in place of '
             f'{config.checkpoint}')
    loaded[path] = load(path, type(config))
    old = loaded[path]['config']
    # `given` has files and flags alone: the same command may be repeated, or left out
    for key, value in given.items():
        if key not in RUN_KEYS and differ(key, value, old[key]):
            fail(f'{path} was trained with {key} = {old[key]!r}, not {value!r}; leave it out, or '
                 f'start a new run from these weights: python train.py {path} ..')
    own = {'out_dir': config.out_dir, 'checkpoint': path, 'init_from': 'resume'}
    config = replace(config, **old | given | own)
    if config.max_iters < loaded[path]['iter']:
        fail(f"{path} is at step {loaded[path]['iter']}, beyond max_iters = {config.max_iters}")
    return config


def check(c, given):
    """What can be said of the keys themselves; train.dry_run finds what does not fit together."""
    default, specs = type(c)(), {}
    for key, value in asdict(c).items():
        if value not in CHOICES.get(key, [value]):
            fail(f"{key} = '{value}': use {', '.join(filter(None, CHOICES[key]))}")
        least = int(type(value) is int and getattr(default, key) and key not in MAY_BE_ZERO)
        most = 1 - 2 ** -24 if key in ('dropout', 'beta1', 'beta2') else 2 ** 63   # in float32
        if type(value) in (int, float) and not least <= value < most:
            fail(f'{key} = {value} must be at least {least}, and below {most:.8g}')
        s = specs[key] = meaning(key, value) if key in SPECS else None
        lowest = MAPS[s.map].level(GRIDS[s.grid].low) if s else -1
        if lowest >= 0 and key != 'adam_v' and s.sign == 'symmetric':
            fail(f"{key} = '{value}' has no negatives; use int, or asymmetric")
    w, stored, m, v = (specs[key] for key in ('weights', 'stored', 'adam_m', 'adam_v'))
    try:
        re.compile(c.keep)
    except re.error as e:
        fail(f"keep = '{c.keep}' is no regular expression: {e}")
    for wrong, why in (
        (c.min_lr > 1, f'min_lr = {c.min_lr} is a fraction of each rate: at most 1'),
        (not c.beta2, 'beta2 = 0: v is 0 wherever the gradient is 0, and the step explodes'),
        (c.eps < 2 ** -126 or not c.rope_theta, 'eps must be at least 2 ** -126, and rope_theta '
         'greater than 0'),
        (c.ptq and not stored, 'ptq quantizes weights to `stored`: give --stored=int4/row'),
        (c.ptq and c.weights and c.quantize_head, 'ptq would leave the head in full precision: '
         'it was trained with quantize_head'),
        (c.ptq and c.optimizer == 'scales', 'ptq trains nothing, and optimizer = scales does: '
         'start it from the checkpoint of a run with config/gptq.py'),
        (c.quantize_head and not w and c.compute == 'codes', 'the head is not in `stored`: '
         'quantize_head needs weights, too, or compute = float'),
        (v and v.rotation, 'adam_v: v must stay positive; do not rotate it'),
        (stored and c.optimizer == 'muon' and not (c.ptq or c.eval_only), 'muon is for '
         'full-precision weights: no stored'),
        (c.optimizer == 'scales' and (c.code_lr or not stored or stored.grid == 'bf16'),
         'optimizer = scales trains the scales of codes that stay: start from a model of '
         'config/gptq.py, or give stored, other than bf16, and no code_lr'),
        (c.code_lr and stored and GRIDS[stored.grid].float, 'code_lr moves codes that are whole '
         'numbers: ternary or int2 .. int8'),
        (stored and stored.rounding == 'stochastic' and (c.code_lr or c.optimizer == 'scales'),
         'only adamw rounds stored weights: with a code_lr or optimizer = scales, no stochastic'),
        (given.get('backward') == 'full' and not (w or c.activations), 'backward = full is about '
         'quantized weights or activations: give one of them'),
        (c.code_lr and m and ({m.scale, m.sign} != {'absmax', 'symmetric'} or
                              m.format in ('nvfp4', 'mxfp4')), 'adam_m must hold the whole level '
         'that moves a code: with a code_lr, no absmean, mse, asymmetric or fp4 format in it'),
        (m and not (c.beta1 or c.code_lr or c.optimizer == 'muon'), 'beta1 = 0 leaves no m to '
         'store: no adam_m'),
        (c.ptq and w and (c.ptq, w) != ('rtn', stored), 'ptq quantizes weights once: --ptq=rtn '
         f'--stored={c.weights} packs what was trained with these `weights`'),
        (c.ptq == 'gptq' and not c.sequences, 'gptq needs data to calibrate on: --sequences=128'),
        (c.update_in_backward and c.grad_accum > 1, 'update_in_backward uses each gradient at '
         'once: set grad_accum = 1'),
    ):
        if wrong:
            fail(why)
    # a key that does nothing is a mistake, but for its default and for what a checkpoint hands on
    for key, others in IDLE.items():
        needs = [other.partition('=') for other in others.split()]
        used = [vars(c)[k] == good if good else vars(c)[k] for k, _, good in needs]
        if given.get(key, getattr(default, key)) != getattr(default, key) and not any(used):
            fail(f"{key} = {given[key]!r} does nothing without {' or '.join(others.split())}; "
                 f'leave it out, or undo it by --{key}={getattr(default, key)!r}')
