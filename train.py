"""
Train, evaluate and sample one GPT, with any quantization strategy:

    python train.py config/ternary.py                           a strategy, at the default size
    python train.py config/gpt2.py config/w8a8.py --seed=2      a size and a strategy: later wins
    python train.py config/ternary.py --init_from=resume        go on where it stopped
    python train.py out/ternary/ckpt.pt --eval_only=True        evaluate and sample a checkpoint
    python train.py out/baseline/ckpt.pt config/gptq.py         quantize a trained model
    torchrun --nproc_per_node=8 train.py config/gpt2.py --grad_accum=2     data-parallel

A checkpoint is a config file that also has weights; give it first. A run writes <out_dir>/ckpt.pt
and <out_dir>/log.jsonl, one JSON object a line.
"""
import codecs
import ctypes
import json
import math
import os
import re
import signal
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from config import STRATEGY, configure, fail, locked, open_log, open_run, save
from data.corpus import TOKENIZER, build, load_data, sequence_starts, window_starts
from data.tokenizer import encoding
from model import GPT
from quant import (Optimizer, bytes_held, gptq_, health, level_shares, linears, noise_key, rtn_,
                   spec)

resource = None     # on Windows: no peak of memory in the log
with suppress(ImportError):
    import resource


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
    init_gain: float = 0.7       # block linears start from N(0, init_gain^2 / fan_in); 0: as GPT-2
    quantize_head: bool = False  # weights, activations and gradients are for the head, too
    keep: str = ''               # block linears with this regular expression in their names stay
                                 # in full precision: 'h.0|mlp.c_proj'

    # the strategy: Specs as in quant.py, 'int8/row', 'ternary/tensor/absmean'; '': full precision
    weights: str = ''            # weights of block linears, as the forward sees them
    activations: str = ''        # their inputs
    gradients: str = ''          # gradients of their outputs,
    gradients_in: str = 'both'   # where the backward uses them: dx, dw or both
    backward: str = 'ste'        # the x and w it multiplies: quantized (ste), full (full), codes
                                 # (fold), or quantized anew along the sum (requantize)
    compute: str = 'float'       # multiplies dequantized codes; codes: the codes themselves
    kv_cache: str = ''           # keys and values
    stored: str = ''             # the weights as they are stored between steps
    adam_m: str = ''             # the optimizer's moments as they are stored; with code_lr, e
    adam_v: str = ''             # rank1 is a row and a column, as in Adafactor

    # the optimizer: linear warm-up, cosine to min_lr
    optimizer: str = 'adamw'     # of block linears; or muon, of floats; scales, of stored codes
    learning_rate: float = 1.5e-3   # of block linears without code_lr, up to a width of base_width
    embedding_lr: float = 6e-3   # of embeddings, head, norms and biases; 0: learning_rate
    base_width: int = 256        # above it learning_rate falls as 1 / n_embd, code_lr as its root
    min_lr: float = 0.0          # as a fraction of each rate
    warmup_iters: int = 100
    max_iters: int = 2400        # resumed with more, a run follows the schedule of the new length
    weight_decay: float = 0.1    # of matrices, but not of codes that code_lr moves
    beta1: float = 0.9           # 0: no momentum, and AdamW holds no m
    beta2: float = 0.999         # small batches want a long memory
    eps: float = 1e-8
    grad_clip: float = 1.0       # by global norm; 0: off
    code_lr: float = 0.0         # > 0: codes move, and a step adds this share of Qp to e
    scale_lr: float = 0.01       # of scales, with code_lr or optimizer = scales; 0: fixed
    update_in_backward: bool = False  # each gradient at once, clipped by its norm, then freed
    shard: bool = False          # a process holds the optimizer states of its share of the weights
    reduce_dtype: str = ''       # of gradients as processes sum them: their own, or bfloat16

    # instead of training
    ptq: str = ''                # rtn or gptq: quantize trained weights, which become `stored`
    damping: float = 0.01        # added to the diagonal of GPTQ's Hessian, times its mean
    act_order: bool = True       # GPTQ takes columns by descending diagonal, not as they come

    # the data
    dataset: str = 'python'      # folder in data/, or with a / in it a path
    batch_size: int = 8          # sequences of block_size tokens, per process and micro-step
    grad_accum: int = 1          # micro-steps per step
    sequences: int = 0           # calibrate or train on this many windows alone; 0: all

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
    samples: int = 1             # how many, from seed, seed + 1, ..
    temperature: float = 0.8     # 0: always the likeliest token
    top_k: int = 200             # sample from so many likeliest tokens; 0: from all
    device: str = 'auto'         # cuda or cpu; cuda:1 for one of several
    dtype: str = 'auto'          # of activations: bfloat16 where it is fast, or float32
    compile: str = 'auto'        # torch.compile: yes or no; auto: where it works and pays


def parse(argv):
    """Checkpoints, config files and --key=value flags, in order, to a Config that works."""
    config = configure(argv, Config)
    dry_run(config)
    return config


def dry_run(config, vocab_size=1024):
    """A step of one block on the meta device: what does not fit together fails here, not late."""
    try:
        with torch.device('meta'):
            model = GPT(config if config.keep else replace(config, n_layer=1), vocab_size)
            if config.keep and len({m.keep for m in linears(model).values()}) < 2:
                raise ValueError(f"keep = '{config.keep}' matches no layer (h.0.mlp.c_fc) or all")
            rtn_(model, config.stored)
            idx = torch.zeros(config.batch_size, config.block_size, dtype=torch.long)
            loss = model(idx, idx)
            if not (config.eval_only or config.ptq):
                loss.backward()
                Optimizer(model, replace(config, shard=False)).step()
    except Exception as e:      # whatever it is, it is about these keys
        fail(e if isinstance(e, ValueError) else f'{type(e).__name__}: {e}')


def pick_device(config):
    """The device of this process, once it has held a tensor."""
    found = torch.accelerator.current_accelerator(check_available=True)
    name = str(found or 'cpu') if config.device == 'auto' else config.device
    try:
        rank = os.environ.get('LOCAL_RANK', 0)      # torchrun numbers those of a machine
        device = torch.device(f'cuda:{rank}' if name == 'cuda' else name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as e:
        fail(f"device '{name}' is not there ({str(e)[:150]}); use --device=auto", own=True)
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
    short = config.eval_only or config.ptq or not pays
    if config.compile == 'no' or config.compile == 'auto' and short:
        return False
    try:
        if device.type == 'cuda' and config.compute == 'codes' and 'fp8' in config.gradients:
            raise ValueError('seen on an H200, torch 2.11: gradients in codes of fp8 are zero')
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
        with suppress(OSError):     # nobody listens
            os.write(2, b'\nthis step is finished and saved first; Ctrl-C again stops at once\n')
    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except RuntimeError as e:       # a Ctrl-C ends a compiler, too
        if stopping:
            print(f'stopped by a signal; this step is not saved ({str(e)[:200]})', file=sys.stderr)
        raise KeyboardInterrupt if stopping else e
    finally:
        stopping.clear()
        for s, handler in before.items():
            signal.signal(s, handler)


class Run:
    """One run: the model, its optimizer, the data, and how far it is."""

    def __init__(self, config, rank, world):
        self.config, self.rank, self.world = config, rank, world
        # what can fail comes first: nothing is written before all is built
        checkpoint = open_run(config)
        self.device = pick_device(config)
        if rank == 0:
            build(config.dataset)
        if world > 1:
            dist.barrier()
        self.train_data, self.val_data, self.meta = load_data(config)
        self.tokenizer = {key: self.meta[key] for key in TOKENIZER}
        self.vocab_size = -(-self.meta['vocab_size'] // 64) * 64     # 64 suits the matmuls
        if config.quantize_head:        # its shape was not known to `parse`
            dry_run(config, self.vocab_size)
        self.tokens = config.grad_accum * world * config.batch_size * config.block_size  # a step
        self.step, self.seconds, self.losses = 0, 0.0, []       # losses since the last log line
        self.log = self.optimizer = None
        # weights are drawn on the CPU: the same for every device
        torch.manual_seed(config.seed)
        self.model = GPT(config, self.vocab_size).to(self.device)
        self.model.dtype = pick_dtype(config, self.device)
        if checkpoint:
            self.load(checkpoint)
        # the weights become what is `stored`, unless they are that already
        if config.ptq == 'gptq':
            gptq_(self.model, config.stored, self.sequences(), config.damping, config.act_order,
                  partial(tqdm, desc='GPTQ', unit='block', disable=None))
        elif not (checkpoint and checkpoint['config']['stored']):
            rtn_(self.model, config.stored)
        self.compiled = pick_compile(config, self.device)
        if self.compiled:
            self.model.compile()
        if not (config.eval_only or config.ptq):
            self.optimizer = Optimizer(self.model, config, self.compiled)
            if config.init_from == 'resume':
                self.optimizer.load_state_dict(checkpoint['optimizer'])
            hooked = world > 1 or config.update_in_backward
            for name, p in self.model.named_parameters() if hooked else ():
                p.register_post_accumulate_grad_hook(partial(self.update, name))
        self.start_log(checkpoint)

    def load(self, checkpoint):
        """Take what a checkpoint has: its weights, and how far it is if that goes on."""
        c, path, old = self.config, self.config.checkpoint, checkpoint['config']
        goes_on = c.init_from == 'resume' and not c.eval_only
        # what must be the same, and the shapes of the weights do not show
        shape = 'flavour n_head rope_theta norm_eps tied'.split() + ['keep'] * bool(old['stored'])
        same = {f'{k} ({old[k]}, not {vars(c)[k]})': (old[k], vars(c)[k]) for k in shape}
        same[f'tokenizer (prepare text with --tokenizer={path})'] = \
            checkpoint['tokenizer'], self.tokenizer
        if goes_on:
            same[f'sha256 of data than {c.dataset}'] = checkpoint['sha256'], self.meta['sha256']
            same[f'number of tokens per step ({checkpoint["tokens"]}, not {self.tokens}), by '
                 'processes, grad_accum and batch_size'] = checkpoint['tokens'], self.tokens
        if other := [key for key, (theirs, ours) in same.items() if theirs != ours]:
            fail(f'{path} has another {" and another ".join(other)}')
        if goes_on and not checkpoint['optimizer']:
            fail(f'{path} has no optimizer state to go on with')
        if old['stored'] and (c.ptq or spec(old['stored']) != spec(c.stored)):
            fail(f"{path} is quantized already: use --stored={old['stored']}, and no ptq")
        rtn_(self.model, old['stored'])
        try:
            self.model.load_state_dict(checkpoint['model'])
        except Exception as e:      # shapes, names, or no tensors at all
            fail(f'{path} is a model of another shape: {str(e).splitlines()[-1]}')
        if goes_on or c.eval_only:
            self.step, self.seconds = checkpoint['iter'], checkpoint['seconds']
            self.losses = checkpoint['losses']

    def batch(self, data, starts):
        """x, y (B, T) from the windows that begin at `starts`; y is x one token on."""
        T, n = self.config.block_size, self.vocab_size
        window = torch.from_numpy(np.stack([data[i:i + T + 1] for i in starts]).astype(np.int64))
        if window.max() >= n:
            fail(f'the data has id {window.max()}, beyond its vocabulary of {n}', own=True)
        window = window.pin_memory() if self.device.type == 'cuda' else window
        window = window.to(self.device, non_blocking=True)
        return window[:, :-1], window[:, 1:]

    def sequences(self):
        """The `sequences` to calibrate on, tokens (n, T), each once."""
        return self.batch(self.train_data, sequence_starts(self.config, len(self.train_data)))[0]

    def start_log(self, checkpoint):
        """Open the log; with everything built and checked, an old run may go if it must."""
        config, gpu, sha256 = self.config, self.device.type == 'cuda', self.meta['sha256']
        device = torch.cuda.get_device_name(self.device) if gpu else self.device.type
        dtype = str(self.model.dtype).removeprefix('torch.')
        if self.rank == 0 and not config.eval_only:
            os.makedirs(config.out_dir, exist_ok=True)
            for name in ('ckpt.pt', 'log.jsonl') if config.init_from != 'resume' else ():
                with suppress(FileNotFoundError):
                    os.remove(f'{config.out_dir}/{name}')
            self.log = open_log(f'{config.out_dir}/log.jsonl', self.step)
            self.line(iter=self.step, config=asdict(config), sha256=sha256, world=self.world,
                      versions={'python': sys.version.split()[0], 'torch': torch.__version__,
                                'device': device, 'dtype': dtype})      # one for each start
        words = ', '.join(f'{key} {getattr(config, key)}' for key in STRATEGY
                          if getattr(config, key) != getattr(Config, key)) or 'full precision'
        folder = os.path.dirname(config.checkpoint) if config.eval_only else config.out_dir
        name, data = map(os.path.basename, (os.path.abspath(folder), config.dataset))
        size = sum(p.numel() for p in self.model.parameters()) / 1e6
        other = checkpoint and checkpoint['sha256'] not in ('', sha256)
        self.say(f'{name}: {words}; {config.flavour} {config.n_layer}x{config.n_embd}, {size:.2f}M'
                 f' parameters, {dtype}{", compiled" * self.compiled} on {device}, data {data} '
                 + sha256[:12] + ', which is not what it was trained on' * bool(other))

    def line(self, **entry):
        """A line of log.jsonl, which only rank 0 has, and only where it trains or quantizes."""
        if self.log:
            self.log.write(json.dumps(entry, allow_nan=False) + '\n')
            self.log.flush()

    def say(self, text, end='\n'):
        """Print, on rank 0; where nobody listens any more, a run goes on all the same."""
        try:
            if self.rank == 0:
                tqdm.write(text, end=end)
                sys.stdout.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    @torch.no_grad()
    def evaluate(self, most, data):
        """Loss, in nats per token, of windows all over the ids `data`, of `most` tokens."""
        T, B = self.config.block_size, self.config.batch_size
        n = max(1, min(most // T, (len(data) - 1) // T))
        # the same windows whatever the number of processes; a rank takes every world-th batch
        starts = np.linspace(0, len(data) - 1 - T, n).astype(np.int64)
        total = torch.zeros(2, dtype=torch.float64)
        self.model.set_noise(self.config.seed, self.step, -1 - self.rank)
        self.model.eval()
        for i in range(self.rank * B, n, self.world * B):
            x, y = self.batch(data, starts[i:i + B])
            with torch.compiler.set_stance('default' if len(x) == B else 'force_eager'):
                loss = self.model(x, y).item()                       # one shape is compiled
            total += torch.tensor([loss * len(x), len(x)], dtype=torch.float64)
        self.model.train()
        if self.world > 1:
            total = total.to(self.device)
            dist.all_reduce(total)
        return (total[0] / total[1]).item()

    def report(self, most, **more):
        """Evaluate, look at the health of quantization, log both; what to print of it."""
        loss = self.evaluate(most, self.val_data)
        self.check_finite(loss, 'val loss')
        bpb = loss / math.log(2) / self.meta['bytes_per_token']
        with torch.compiler.set_stance('force_eager'):               # it hooks into the layers
            seen = health(self.model, self.batch(self.val_data, [0])[0])
        self.line(iter=self.step, tokens=self.step * self.tokens, val_loss=loss, val_bpb=bpb,
                  health=seen, **more)
        return f'val loss {loss:.4f} nats/token, {bpb:.4f} bits/byte'

    def save(self):
        """Write ckpt.pt, if all weights are finite. Its ptq is '': what was quantized stays so."""
        weights = self.model.state_dict()
        norms = [t.float().norm().item() for t in weights.values() if t.is_floating_point()]
        self.check_finite(sum(norms), 'norm of the weights')
        optimizer = self.optimizer.state_dict() if self.optimizer else None
        if self.rank == 0:
            save(f'{self.config.out_dir}/ckpt.pt', {
                'config': {**asdict(self.config), 'ptq': ''}, 'sha256': self.meta['sha256'],
                'tokenizer': self.tokenizer, 'iter': self.step, 'tokens': self.tokens,
                'seconds': self.seconds, 'losses': self.losses, 'model': weights,
                'optimizer': optimizer})

    def check_finite(self, value, name):
        if not math.isfinite(value):
            ckpt, log = f'{self.config.out_dir}/ckpt.pt', self.log
            fail(f'the {name} is {value} at step {self.step}: lower learning_rate or use more bits'
                 + f'; {ckpt} is the last good checkpoint' * bool(log and os.path.exists(ckpt)))

    def update(self, name, p):
        """A hook: the gradient of p is there. Begin to sum it over all processes; or, in the
        backward, use that sum at once, clipped by its own norm, and free it."""
        if self.world > 1 and self.last:
            g = p.grad.bfloat16() if self.config.reduce_dtype else p.grad
            self.sent.append((p.grad, g, dist.all_reduce(g, async_op=True)))
        if self.config.update_in_backward:
            self.receive()
            self.norms.append(torch.linalg.vector_norm(p.grad))
            p.grad.mul_((self.limit / (self.norms[-1] + 1e-6)).clamp(max=1))
            self.optimizer.apply(name)
            p.grad = None

    def receive(self):
        """Wait for all sums that have begun."""
        for grad, g, work in self.sent:
            work.wait()
            grad.copy_(g)       # nothing, where both are one
        self.sent = []

    def forward_backward(self):
        """Backward through all micro-steps and processes: (loss, wishes to stop)."""
        config, world = self.config, self.world
        starts = window_starts(config, self.step, len(self.train_data), world)
        total = torch.zeros(2, device=self.device)
        for micro in range(config.grad_accum):
            x, y = self.batch(self.train_data, starts[micro, self.rank])
            noise = config.seed, self.step, micro * world + self.rank
            self.model.set_noise(*noise)
            torch.manual_seed(noise_key(*noise))                     # for dropout
            loss = self.model(x, y) / (config.grad_accum * world)
            self.last = micro == config.grad_accum - 1
            loss.backward()
            total[0] += loss.detach()
        # a signal to one process stops all of them, after the same step
        total[1] = len(stopping)
        self.receive()
        if world > 1:
            dist.all_reduce(total)
        return total.tolist()

    def advance(self):
        """One optimizer step; its loss, and whether to stop."""
        at_once, rate = self.config.update_in_backward, schedule(self.config, self.step)
        self.norms, self.sent, self.limit = [], [], self.config.grad_clip or math.inf
        self.model.zero_grad(set_to_none=True)
        if at_once:
            self.optimizer.begin(rate)
        loss, stop = self.forward_backward()
        # an update in the backward has used them already, but nothing is saved before this check
        grads = self.norms or [p.grad for _, p, _ in self.optimizer.parts.values()]
        norm = torch.nn.utils.get_total_norm(grads).item()
        self.check_finite(loss, 'loss')
        self.check_finite(norm, 'norm of the gradient')
        if at_once:
            self.optimizer.share()
        else:
            self.optimizer.step(rate, min(1.0, self.limit / (norm + 1e-6)))
        self.step += 1
        return loss, stop

    def train(self):
        """Steps up to max_iters, with their log lines, evaluations and checkpoints."""
        config, self.mark = self.config, (self.step, self.seconds)   # of the last log line
        bar = tqdm(total=config.max_iters, initial=self.step, unit='step',
                   disable=None if self.rank == 0 else True)         # None: only on a terminal
        if self.compiled:       # now, as Ctrl-C ends a compiler, too, and loses what is not saved
            self.evaluate(self.tokens // config.grad_accum, self.val_data)
        while self.step < config.max_iters:
            began = time.perf_counter()
            loss, stop = self.advance()
            self.losses.append(loss)
            self.seconds += time.perf_counter() - began
            bar.update()
            if self.step % config.log_interval == 0:
                self.log_steps(bar)
            if self.step % config.eval_interval == 0 or self.step == config.max_iters:
                says = self.report(config.eval_tokens)
                self.save()                                          # only then tell
                self.say(f'step {self.step}: {says}')
            elif stop:
                self.save()
            if stop or stopping and self.step == config.max_iters:   # no step will see the note
                bar.close()
                self.say(f'saved after step {self.step}; to go on: python train.py '
                         f'--out_dir={config.out_dir} --init_from=resume')
                raise SystemExit(130)
        bar.close()

    def log_steps(self, bar):
        """A line in log.jsonl on the steps since the last one, and what of it is printed."""
        config, gpu = self.config, self.device.type == 'cuda'
        loss = sum(self.losses) / len(self.losses)
        rate = (self.step - self.mark[0]) * self.tokens / (self.seconds - self.mark[1])
        self.losses, self.mark = [], (self.step, self.seconds)
        peak = torch.cuda.max_memory_allocated(self.device) if gpu else 0
        if resource and not gpu:        # in kilobytes, except on a Mac
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            peak *= 1 if sys.platform == 'darwin' else 1024
        flips = {'flips': self.optimizer.flips()} if config.stored else {}
        self.line(iter=self.step, tokens=self.step * self.tokens, train_loss=loss, **flips,
                  schedule=schedule(config, self.step - 1), tokens_per_s=rate, peak_memory=peak)
        bar.set_postfix(loss=f'{loss:.3f}', tokens_per_s=f'{rate:.0f}')
        if bar.disable and self.step % (10 * config.log_interval) == 0:
            self.say(f'step {self.step}/{config.max_iters}: loss {loss:.4f}, {rate:.0f} tokens/s')

    def sample(self):
        """Print the prompt and what the model makes of it, `samples` times, as it comes."""
        c, enc, generator = self.config, encoding(self.meta), torch.Generator(self.device)
        start = [*self.meta['special'].values(), 0][:1]             # what ends a text begins one
        idx = torch.tensor([enc.encode_ordinary(c.prompt) or start], device=self.device)
        self.model.eval()
        for i in range(c.samples):
            generator.manual_seed(c.seed + i)
            text = codecs.getincrementaldecoder('utf-8')('replace')     # of a part of a character
            self.say(f'--- sample ---\n{c.prompt}', end='')
            with torch.compiler.set_stance('force_eager'):              # shapes change every token
                for new in self.model.generate(idx, c.sample_tokens, c.temperature, c.top_k,
                                               generator):
                    if new < self.meta['vocab_size']:
                        self.say(text.decode(enc.decode_single_token_bytes(new.item())), end='')
            self.say(text.decode(b'', True) + '\n--------------')

    def finish(self):
        """The last evaluation, a sample, and a summary."""
        config, out, levels = self.config, self.config.out_dir, level_shares(self.model)
        size = bytes_held(self.model, self.optimizer)
        seen = self.evaluate(config.final_tokens // 8, self.train_data)
        says = self.report(config.final_tokens, done=True, bytes=size, levels=levels,
                           seconds=self.seconds, loss_on_train=seen)
        if config.sample_tokens and self.rank == 0:
            self.sample()
        self.say(f'{says}; on train.bin {seen:.4f} (unigrams: {self.meta["unigram_loss"]:.2f} '
                 f'nats/token, xz: {self.meta["xz_bpb"]:.2f} bits/byte)')
        if config.eval_only:
            return
        each, held = size.pop('linear'), {k: n / 1e6 for k, n in size.items()}
        each['weights + optimizer'] = each['weights'] + each['optimizer']
        for what, numbers in (('held, MB', held), ('bytes per weight of the blocks', each),
                              ('share of codes', levels)):
            if numbers:
                self.say(f'{what}: ' + ', '.join(f'{k} {v:.2f}' for k, v in numbers.items()))
        if self.optimizer:
            rate = config.max_iters * self.tokens / self.seconds
            self.say(f'{rate:.0f} tokens/s, {self.seconds:.0f} s of training\ngo on: python '
                     f'train.py --out_dir={out} --init_from=resume --max_iters={2 * self.step}')
        self.say(f'sample: python train.py {out}/ckpt.pt --eval_only=True --prompt="def "\n'
                 f'plot: python -m experiments.curve {os.path.dirname(out) or "."}/*/log.jsonl\n'
                 f'checkpoint {out}/ckpt.pt, log {out}/log.jsonl')


def tell_system():
    """Have glibc keep what is freed: fetching pages anew takes time in every step. Have Linux kill
    this process when torchrun, which started it, ends, even by kill -9."""
    with suppress(AttributeError, OSError, TypeError):      # it has no such calls
        c = ctypes.CDLL(None)
        if 'TORCHELASTIC_RUN_ID' in os.environ:
            c.prctl(1, signal.SIGKILL)      # PR_SET_PDEATHSIG
        c.mallopt(-4, 0)                    # M_MMAP_MAX: no tensor has a mapping of its own
        c.mallopt(-1, 2 ** 31 - 1)          # M_TRIM_THRESHOLD: the heap does not shrink


def main(argv):
    """What the command line says, under the lock of out_dir."""
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    try:
        config = parse(argv)
        # an evaluation writes nothing, and other ranks are under the lock of rank 0
        with nullcontext() if rank or config.eval_only else locked(config.out_dir):
            if world > 1:
                gpu = torch.cuda.is_available() and config.device in ('auto', 'cuda')
                dist.init_process_group('nccl' if gpu else 'gloo')
            run = Run(config, rank, world)
            if run.optimizer:
                with finishing_steps():
                    run.train()
            elif not config.eval_only:
                run.save()      # what was just quantized
            run.finish()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (ValueError, OSError) as e:      # what does not fit, or cannot be written
        fail(e)
    except (MemoryError, RuntimeError) as e:
        if not re.search('(of|enough|allocate) memory|MemoryError|alloc_fail', f'{e!r}', re.I):
            raise                           # a mistake in this program
        fail('out of memory: lower batch_size and raise grad_accum, or with ptq lower sequences '
             f'({str(e)[:99]})', own=True)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == '__main__':
    # either may be closed, and a terminal need not know every character
    sys.stdout, sys.stderr = (f or open(os.devnull, 'w') for f in (sys.stdout, sys.stderr))
    sys.stdout.reconfigure(errors='replace')
    tell_system()
    main(sys.argv[1:])
