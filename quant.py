"""
Quantized training of language models: every strategy, one vocabulary.

A linear layer is three matmuls. With tokens in rows, x (N, in), w (out, in), g = dL/dy (N, out):

    forward     y  = x^ w^T  (+ b)       x^ = Q_a(x),  w^ = Q_w(w)
    backward    dx = g^ w^               g^ = Q_g(g)
                dw = g^T x^

A step of AdamW reads and writes three more tensors, each of the shape of w: w itself, m and v. All
of these can be quantized, and a string says how: 'int8/row', 'ternary/tensor/absmean',
'uint8/256/root4', or '' for full precision. This file goes through them in order:

    Spec, QTensor         how a tensor is quantized; what is stored of it: packed codes and scales
    uniform               the noise of stochastic rounding: a hash of (seed, step, index)
    quantize, dequantize  the two verbs; fake_quant is both in a row
    Matmul, Linear        weights, activations and gradients, with the straight-through estimator
    KVCache               keys and values
    AdamW                 optimizer states, low-bit masters and the direct ternary update
    held, health          the bytes really held, and what quantization does to a model

There are two ways to have low-bit weights. Either a float32 weight is kept and rounded at every
forward (`weights`: paper 1 and BitNet), or low-bit codes are the only weight there is (`master`:
paper 2); then the optimizer moves the codes themselves, by stochastic rounding. Or both: a ternary
forward on an int8 master.

    paper 1  Chitsaz et al., Exploring Quantization for Efficient Pre-Training, arXiv 2407.11722
    paper 2  Zhao et al., Direct Quantized Training with Stochastic Rounding, arXiv 2412.04787
"""
import difflib
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

# ------------------------------------------------------------------------------------------------
# Spec: how a tensor is quantized

INTEGERS = {  # grid: (Qn, Qp), the lowest and the highest code
    'ternary': (-1, 1), 'int2': (-2, 1), 'int3': (-4, 3), 'int4': (-8, 7), 'int5': (-16, 15),
    'int6': (-32, 31), 'int7': (-64, 63), 'int8': (-128, 127), 'uint4': (0, 15), 'uint8': (0, 255),
}
FLOATS = {  # grid: (mantissa bits, smallest exponent, largest value, dtype of the codes)
    'fp4': (1, 0, 6.0, torch.uint8),                        # e2m1, two codes a byte
    'fp8': (3, -6, 448.0, torch.float8_e4m3fn),
    'fp8e5': (2, -14, 57344.0, torch.float8_e5m2),
    'bf16': (7, -119, torch.finfo(torch.bfloat16).max, torch.bfloat16),   # has no scale
}
FORMATS = {'nvfp4': 16, 'mxfp4': 32}  # words for fp4 in blocks of so many, with small scales
WORDS = {  # field of Spec: its words; a block size, any number, is the other kind of group
    'grid': [*INTEGERS, *FLOATS], 'group': ['tensor', 'row', 'column'],
    'scale': ['absmax', 'absmean'], 'rounding': ['nearest', 'stochastic'],
    'map': ['linear', 'sqrt', 'root4'], 'sign': ['symmetric', 'asymmetric'],
    'packing': ['bits', 'trits'],
}


@dataclass(frozen=True)
class Spec:
    """How a tensor is quantized; spec('int8/row/stochastic') parses one, words in any order.

    grid      the codes: ternary, int2 .. int8, uint4, uint8, fp4 (e2m1), fp8 (e4m3), fp8e5 (e5m2),
              bf16
    group     what shares a scale: the tensor, a row (along the last axis), a column (along all the
              others), or a block of so many neighbours on the last axis
    scale     absmax: s = max|x| / Qp, which clips nothing; absmean: s = mean|x| / Qp
    rounding  nearest, or stochastic: up with the probability that makes the mean right
    map       the level of code c is c (linear), c |c| (sqrt, for m) or c |c|^3 (root4, for v:
              nearest by the fourth root, and never from positive to zero)
    sign      asymmetric: a zero point z per group, x^ = (q + z) s, so that codes span [min, max]
    packing   trits: five ternary codes a byte (3^5 = 243) instead of four
    format    '', 'nvfp4' (fp4, blocks of 16, e4m3 scales under one float32 scale) or 'mxfp4' (fp4,
              blocks of 32, scales that are powers of two)
    """
    grid: str
    group: str | int = 'tensor'
    scale: str = 'absmax'
    rounding: str = 'nearest'
    map: str = 'linear'
    sign: str = 'symmetric'
    packing: str = 'bits'
    format: str = ''

    @property
    def top(self):
        """Level of the highest code: Qp, Qp^2 or Qp^4, or the largest number of a float grid."""
        if self.grid in FLOATS:
            return FLOATS[self.grid][2]
        return float(INTEGERS[self.grid][1] ** {'linear': 1, 'sqrt': 2, 'root4': 4}[self.map])

    @property
    def base(self):
        """Number of values of a packed code: 3, 4, 16, or 256 if a code takes a byte or more."""
        if self.packing == 'trits':
            return 3
        two_bits, four_bits = ('ternary', 'int2'), ('int3', 'int4', 'uint4', 'fp4')
        return 4 if self.grid in two_bits else 16 if self.grid in four_bits else 256

    @property
    def shared(self):
        """Do rows share a scale, directly or, in nvfp4, the scale of their scales?"""
        return self.group in ('tensor', 'column') and self.grid != 'bf16' or self.format == 'nvfp4'

    @property
    def per_byte(self):
        return {3: 5, 4: 4, 16: 2, 256: 1}[self.base]


def spec(text):
    """Parse 'int8/row/...' into a Spec; '' is None, full precision. Raises ValueError for a word
    that is unknown, comes twice, or contradicts another."""
    if text is None or isinstance(text, Spec):
        return text
    if not text:
        return None
    fields = {}
    for word in text.split('/'):
        if word in FORMATS:
            found = {'format': word, 'grid': 'fp4', 'group': FORMATS[word]}
        elif word.isdecimal() and int(word) > 0:
            found = {'group': int(word)}
        else:
            found = {field: word for field, words in WORDS.items() if word in words}
        if not found:
            good = [w for words in WORDS.values() for w in words] + list(FORMATS)
            near = difflib.get_close_matches(word, good, 1)
            raise ValueError(f"spec '{text}': unknown word '{word}'"
                             + (f", did you mean '{near[0]}'?" if near else '')
                             + f" Good words: {', '.join(good)}, or a block size")
        for field, value in found.items():
            if field in fields:
                raise ValueError(f"spec '{text}': '{word}' says the {field} a second time, after "
                                 f"'{fields[field]}'; keep one of them")
            fields[field] = value
    if 'grid' not in fields:
        raise ValueError(f"spec '{text}' names no grid; add one of {', '.join(WORDS['grid'])}")
    s = Spec(**fields)
    floating, zero_point = s.grid in FLOATS, s.sign == 'asymmetric'
    for wrong, why in (
        (zero_point and (floating or s.grid == 'ternary'), 'only int and uint have a zero point'),
        (zero_point and s.scale == 'absmean', 'asymmetric scales are of min and max, not absmean'),
        (zero_point and s.map != 'linear', 'a zero point needs the linear map'),
        (floating and s.map != 'linear', 'a float grid has no map'),
        (s.packing == 'trits' and s.grid != 'ternary', 'only ternary packs as trits'),
        (s.format and s.scale == 'absmean', f'the scales of {s.format} come from absmax'),
        (s.grid == 'bf16' and fields.keys() - {'grid', 'rounding'}, 'bf16 has no scale'),
    ):
        if wrong:
            raise ValueError(f"spec '{text}' contradicts itself: {why}")
    return s


# ------------------------------------------------------------------------------------------------
# noise: a hash instead of a generator

def _mix(h):
    """A bijection of int32 in which every bit depends on all others (lowbias32 of C. Wellons)."""
    h = (h ^ ((h >> 16) & 0xFFFF)) * 0x7FEB352D
    h = (h ^ ((h >> 15) & 0x1FFFF)) * (0x846CA68B - (1 << 32))
    return h ^ ((h >> 16) & 0xFFFF)


def noise_key(*numbers):
    """One int32 from (seed, step, ...): the same numbers give the same noise on any machine."""
    key = 0
    for n in numbers:
        for _ in range(2):  # one step of the 64-bit splitmix a number
            key = (key + n * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & ((1 << 64) - 1)
            key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & ((1 << 64) - 1)
            key ^= key >> 27
    return (key & 0xFFFFFFFF) - (1 << 31)


def uniform(x, key, start=0):
    """u in [0, 1), one for each element of x: u_i = hash(i + start, key), 24 bits, float32.

    Stateless: neither device nor compilation nor the block of rows that is updated changes it.
    Raises ValueError beyond 2^31 elements, where the index would repeat."""
    if x.numel() >= 2 ** 31:
        raise ValueError(f'{x.numel()} elements at once are too many for stochastic rounding; '
                         'lower batch_size and raise grad_accum')
    i = torch.arange(x.numel(), dtype=torch.int32, device=x.device).view(x.shape) + start
    return ((_mix(_mix(i) ^ key) >> 8) & 0xFFFFFF).float() * 2.0 ** -24


# ------------------------------------------------------------------------------------------------
# quantize and dequantize

class QTensor(NamedTuple):
    """What is stored of a tensor: x^ = level(codes) * scale, or (codes + zero) * scale."""
    codes: torch.Tensor                # packed uint8, int8, fp8, bf16, or x itself
    scale: torch.Tensor | None = None  # one per group: float32, or a byte in nvfp4 and mxfp4
    zero: torch.Tensor | None = None   # float32, an integer per group, asymmetric only
    outer: torch.Tensor | None = None  # float32, the scale of nvfp4's scales
    spec: Spec | None = None
    cols: int = 0                      # length of the last axis, which packing may pad


def _grouped(x, s, parts=1):
    """View x with what shares a scale along the last axis (a column: along the first)."""
    if isinstance(s.group, int):
        if x.shape[-1] % s.group:
            raise ValueError(f'blocks of {s.group} do not divide a last axis of {x.shape[-1]}; '
                             'choose a block that does, or row')
        return x.unflatten(-1, (-1, s.group))      # (..., C / group, group)
    if s.group == 'tensor':
        return x.reshape(parts, -1)                # (1, numel): q, k and v count as three tensors
    return x.flatten(0, -2) if s.group == 'column' else x


def _levels(c, s):
    """The number each code stands for, float32, before the scale."""
    if s.grid == 'fp4':                            # 0 .5 1 1.5 2 3 4 6, then their negatives
        i = (c & 7).float()
        y = torch.where(i < 4, i / 2, torch.where(i < 6, i - 2, 2 * i - 8))
        return torch.where(c > 7, -y, y)
    c = c.float()
    return c if s.map == 'linear' else c * c.abs() if s.map == 'sqrt' else c * c.abs() ** 3


def _round(y, s, key, start):
    """Codes of y = x / scale on the grid of s, float32; of a float grid, the rounded y itself."""
    stochastic = s.rounding == 'stochastic'
    u = uniform(y, key, start) if stochastic else None
    if s.grid in FLOATS:
        mantissa, smallest, top, _ = FLOATS[s.grid]
        exponent = ((y.view(torch.int32) >> 23) & 0xFF) - 127          # floor(log2 |y|)
        exponent = exponent.clamp(min=smallest) - mantissa
        spacing = ((exponent + 127) << 23).view(torch.float32)         # of the grid around y
        y = y / spacing                                                # exact: a power of two
        y = y.floor() + (u < y - y.floor()) if stochastic else y.round()
        return (y * spacing).clamp(-top, top)
    low, high = INTEGERS[s.grid]
    c = y if s.map == 'linear' else y.sign() * y.abs() ** (0.5 if s.map == 'sqrt' else 0.25)
    if stochastic or s.map == 'sqrt':              # up by chance, with E = y, or past the middle
        c = c.floor()
        below = _levels(c, s)
        c = c + ((u if stochastic else 0.5) < (y - below) / (_levels(c + 1, s) - below))
    else:
        c = c.round()
    if s.map == 'root4':
        c = torch.where((c == 0) & (y > 0), 1, c)  # v is a divisor
    return c.clamp(low, high)


def pack(c, s):
    """Codes (float32) to storage. Below 8 bits a byte holds several, of n bytes in a row the j-th
    the codes j, j + n, j + 2n ..: that way packing and unpacking go through memory in order."""
    if s.grid == 'fp4':
        a = c.abs()
        i = torch.where(a < 2, 2 * a, torch.where(a < 4, a + 2, a / 2 + 4))
        c = i + 8 * (c.signbit() & (a > 0))
    elif s.grid in FLOATS:
        return c.to(FLOATS[s.grid][3])
    if s.per_byte == 1:
        return c.to(torch.uint8 if s.grid == 'uint8' else torch.int8)
    low = 0 if s.grid == 'fp4' else INTEGERS[s.grid][0]
    c = F.pad((c - low).to(torch.uint8), (0, -c.shape[-1] % s.per_byte))
    digits = c.unflatten(-1, (s.per_byte, -1)).unbind(-2)
    return sum(digit * s.base ** i for i, digit in enumerate(digits))      # base 3, 4 or 16


def unpack(codes, s, cols):
    """Storage to one code an element: int8, uint8, or the float dtype of the grid."""
    if s.per_byte == 1:
        return codes
    if s.base == 3:
        digits = [codes.div(3 ** i, rounding_mode='floor') % 3 for i in range(5)]
    else:
        bits = 8 // s.per_byte
        digits = [(codes >> (bits * i)) & (s.base - 1) for i in range(s.per_byte)]
    c = torch.cat(digits, -1)[..., :cols]
    low = 0 if s.grid in FLOATS else INTEGERS[s.grid][0]
    return c.to(torch.int8) + low if low else c


def _scales(x, s, parts=1):
    """(scale, zero, outer) of the groups of x. A group of zeros has scale 1 and stays zero."""
    x = _grouped(x, s, parts)
    axis = 0 if s.group == 'column' else -1
    if s.sign == 'asymmetric':                     # the range takes in 0, so that 0 is a code
        low, high = INTEGERS[s.grid]
        least = x.amin(axis, keepdim=True).clamp(max=0)
        scale = (x.amax(axis, keepdim=True).clamp(min=0) - least) / (high - low)
        scale = torch.where(scale == 0, 1.0, scale)
        return scale, (least / scale - low).round(), None
    size = x.abs()
    size = size.amax(axis, keepdim=True) if s.scale == 'absmax' else size.mean(axis, keepdim=True)
    if s.format == 'nvfp4':                        # e4m3 goes from 2^-9 to 448
        outer = size.amax() / (s.top * FLOATS['fp8'][2])
        outer = torch.where(outer == 0, 1.0, outer)
        return (size / s.top / outer).clamp(min=2.0 ** -9).to(torch.float8_e4m3fn), None, outer
    size = torch.where(size == 0, s.top, size)
    if s.format == 'mxfp4':                        # 4 = 2^2 is the highest power of two in fp4
        return torch.exp2(size.log2().floor() - 2).to(torch.float8_e8m0fnu), None, None
    return size / s.top, None, None


def _real_scale(scale, outer):
    return scale.float() if outer is None else scale.float() * outer


def quantize(x, how, key=0, scale=None, parts=1, start=0):
    """q = clip(round(x / s), Qn, Qp): codes and scales of x, computed in float32, as a QTensor.

    x      any shape (..., C); `how` is a Spec, its string, or None, which stores x as it is
    key    int or int32 tensor, the noise of stochastic rounding; `start` is x[0]'s index in it
    scale  use this one, of the shape that a computed one would have
    parts  so many equal slices of the first axis count as tensors of their own (q, k and v)
    Raises ValueError when a block does not divide C.
    Paper 1: s = max|x| / Qp; asymmetric s = (max - min) / (Qp - Qn), z = round(min / s - Qn)."""
    s = spec(how)
    if s is None:
        return QTensor(x, cols=x.shape[-1])
    x = x.float()
    if s.grid == 'bf16':
        return QTensor(pack(_round(x, s, key, start), s), spec=s, cols=x.shape[-1])
    scale, zero, outer = _scales(x, s, parts) if scale is None else (scale, None, None)
    y = _grouped(x, s, parts) / _real_scale(scale, outer)
    y = y if zero is None else y - zero
    codes = pack(_round(y, s, key, start).reshape(x.shape), s)
    return QTensor(codes, scale, zero, outer, s, x.shape[-1])


def dequantize(q, dtype=torch.float32):
    """x^ = level(codes) * scale, computed in float32, then cast; shape (..., C)."""
    if q.scale is None:
        return q.codes.to(dtype)
    y = _levels(unpack(q.codes, q.spec, q.cols), q.spec)
    x = _grouped(y, q.spec, q.scale.shape[0])
    x = x if q.zero is None else x + q.zero
    return (x * _real_scale(q.scale, q.outer)).to(dtype).view(y.shape)


def fake_quant(x, how, key=0, parts=1):
    """dequantize(quantize(x)): the values a quantized x stands for, in x's dtype."""
    return dequantize(quantize(x, how, key, parts=parts), x.dtype)


class StraightThrough(torch.autograd.Function):
    """y = fake_quant(x), dx = dy: rounding has no gradient, so it is taken for the identity."""

    @staticmethod
    def forward(ctx, x, how):
        return fake_quant(x, how)

    @staticmethod
    def backward(ctx, g):
        return g, None


# ------------------------------------------------------------------------------------------------
# the linear layer: quantized weights, activations and gradients

@dataclass(frozen=True)
class Recipe:
    """What a Linear quantizes; the config keys of the same names.

    weights, activations, gradients   Specs of w, x and g; None is full precision
    gradients_in   'dx', 'dw' or 'both': the matmuls of the backward that see g^ instead of g
    backward       'ste': they see x^ and w^, as the forward did; 'full': x and w
    The three meanings of "quantized gradients" in paper 1 and its code: straight-through as in the
    text is (ste, both); its released code is (full, dw); like SwitchBack is (full, dx).
    """
    weights: Spec | None = None
    activations: Spec | None = None
    gradients: Spec | None = None
    gradients_in: str = 'both'
    backward: str = 'ste'
    parts: int = 1


class Matmul(torch.autograd.Function):
    """y = x^ w^T + b,  dx = g^ w^,  dw = g^T x^,  db = sum g:  x (N, in), w (out, in), g (N, out).

    w is `weight`, or the codes and scale of a low-bit master; then `weight` is only where its
    gradient goes. What is saved for the backward is codes and scales, not what they stand for."""

    @staticmethod
    def forward(ctx, x, weight, bias, key, how, master, codes, scale):
        xq, wq = QTensor(x), QTensor(weight)
        if master is not None:
            wq = QTensor(codes, scale, spec=master, cols=x.shape[1])
        full = xq, wq
        if how.weights is not None:
            wq = quantize(dequantize(wq), how.weights, key, parts=how.parts)
        if how.activations is not None:
            xq = quantize(x, how.activations, key + 1)
        saved = full if how.backward == 'full' else (xq, wq)
        ctx.save_for_backward(key, *saved[0][:4], *saved[1][:4])
        ctx.specs, ctx.how, ctx.cols = [q.spec for q in saved], how, x.shape[1]
        ctx.bias = bias is not None
        bias = None if bias is None else bias.to(x.dtype)
        return F.linear(dequantize(xq, x.dtype), dequantize(wq, x.dtype), bias)

    @staticmethod
    def backward(ctx, g):
        key, *saved = ctx.saved_tensors
        x = dequantize(QTensor(*saved[:4], ctx.specs[0], ctx.cols), g.dtype)
        w = dequantize(QTensor(*saved[4:], ctx.specs[1], ctx.cols), g.dtype)
        how, gq = ctx.how, g
        if how.gradients is not None:               # q, k and v have gradients of their own size
            gq = torch.cat([fake_quant(part, how.gradients, key + 2 + i)
                            for i, part in enumerate(g.chunk(how.parts, -1))], -1)
        dx = (g if how.gradients_in == 'dw' else gq) @ w
        dw = (g if how.gradients_in == 'dx' else gq).T @ x
        return dx, dw, g.sum(0) if ctx.bias else None, None, None, None, None, None


class Linear(nn.Module):
    """y = x^ w^T + b over the last axis of x (..., in). Arguments: those of Recipe, as strings.

    parts     number of equal, independent slices of the output (3 for a fused q, k, v): their
              weights and gradients are scaled separately
    store_()  replaces the float32 weight by codes, which are then all there is of it
    """

    def __init__(self, n_in, n_out, bias=False, weights='', activations='', gradients='',
                 gradients_in='both', backward='ste', parts=1):
        super().__init__()
        for name, value, good in (('gradients_in', gradients_in, ('both', 'dx', 'dw')),
                                  ('backward', backward, ('ste', 'full'))):
            if value not in good:
                raise ValueError(f"{name} = '{value}': use one of {', '.join(good)}")
        self.how = Recipe(spec(weights), spec(activations), spec(gradients),
                          gradients_in, backward, parts)
        for s, n in ((self.how.weights, n_in), (self.how.activations, n_in),
                     (self.how.gradients, n_out // parts)):
            quantize(torch.zeros(1, n), s)          # ValueError now if a block does not divide
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.zeros(n_out)) if bias else None
        self.master = None
        self.register_buffer('codes', None)
        self.register_buffer('scale', None)
        self.register_buffer('key', torch.zeros((), dtype=torch.int32), persistent=False)
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x):
        y = Matmul.apply(x.reshape(-1, x.shape[-1]), self.weight, self.bias, self.key, self.how,
                         self.master, self.codes, self.scale)
        return y.view(*x.shape[:-1], -1)

    def stored(self):
        """The weight as it is stored: the master's codes and scale, or the parameter itself."""
        if self.master is None:
            return QTensor(self.weight.data, cols=self.weight.shape[1])
        return QTensor(self.codes, self.scale, spec=self.master, cols=self.weight.shape[1])

    @torch.no_grad()
    def store_(self, master):
        """Keep only codes: q = clip(round(w / s), Qn, Qp). s comes from w as it is now and from
        then on is fixed, or learned, but not computed again: absmean of a ternary w would shrink.

        autograd still wants a float leaf of the weight's shape to hang .grad on: a ghost, one zero
        expanded to that shape, in four bytes of memory. Call this on the device where it stays."""
        s = spec(master)
        if s is None:
            return
        if s.sign == 'asymmetric' or s.map != 'linear' or s.grid[0] == 'u' or s.format:
            raise ValueError(f"master = '{master}': a stored weight takes a symmetric, signed, "
                             'linear grid with float32 scales')
        q = quantize(self.weight, replace(s, rounding='nearest'))
        self.master = s
        self.codes, self.scale = q.codes, q.scale
        self.weight = nn.Parameter(self.weight.new_zeros(()).expand(self.weight.shape))

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.master is not None:
            del destination[prefix + 'weight']      # four bytes of zero, not a weight

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, *rest):
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        if self.master is not None:
            missing.remove(prefix + 'weight')


# ------------------------------------------------------------------------------------------------
# keys and values

class KVCache:
    """The keys and values of one layer during generation, stored quantized; (B, nh, T, hs) each.

    Every token is quantized once, when it arrives, so its scales must be its own: row (one for
    each head and token) or blocks within the head. Raises ValueError otherwise."""

    def __init__(self, how):
        self.how = spec(how)
        if self.how is not None and self.how.shared:
            raise ValueError('kv_cache: scales that tokens share cannot grow token by token; use '
                             'row or a block size')
        self.k = self.v = None

    def append(self, k, v):
        """Store k, v of new tokens; return all keys and values so far, dequantized."""
        self.k = self._extend(self.k, quantize(k, self.how))
        self.v = self._extend(self.v, quantize(v, self.how))
        return dequantize(self.k, k.dtype), dequantize(self.v, v.dtype)

    @staticmethod
    def _extend(old, new):
        if old is None:
            return new
        grown = (None if b is None else torch.cat((a, b), 2) for a, b in zip(old[:3], new[:3]))
        return new._replace(**dict(zip(('codes', 'scale', 'zero'), grown)))


# ------------------------------------------------------------------------------------------------
# the optimizer: quantized states, low-bit masters, direct ternary updates

class Hyper(NamedTuple):
    """The numbers of one step, 0-d tensors: compiled code is not compiled again for others."""
    lr: torch.Tensor       # in the unit of w, or in code units where `update` is told so
    decay: torch.Tensor    # decoupled weight decay, learning rate included
    beta1: torch.Tensor
    beta2: torch.Tensor
    bias1: torch.Tensor    # 1 - prod beta1
    bias2: torch.Tensor    # 1 - prod beta2
    eps: torch.Tensor
    tau: torch.Tensor      # threshold on |r|


def direction(m, v, h):
    """r = mhat / (sqrt(vhat) + eps), then sign(r) max(0, |r| - tau), none below the noise."""
    r = (m / h.bias1) / ((v / h.bias2).sqrt() + h.eps)
    return r.sign() * (r.abs() - h.tau).clamp(min=0)


def update(wq, g, mq, vq, h, key, start, code_units):
    """One step of AdamW on a block of rows; w, m and v arrive and leave as they are stored.

        m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g^2,   w <- (1 - decay) w - lr r

    code_units: lr counts in half ranges of the grid, s Qp. For ternary codes, the direct update:

        q <- clip(SR(q - lr r), -1, 1): a code moves a level against r with probability lr |r|

    A plain tensor for v is finished already (factored) and is not stored again. Returns new w, m
    and v, dL/d log s = sum g w over what shares a scale (or None), and how many codes changed."""
    w, g = dequantize(wq), g.float()
    m = h.beta1 * dequantize(mq) + (1 - h.beta1) * g
    factored = isinstance(vq, torch.Tensor)
    v = vq if factored else h.beta2 * dequantize(vq) + (1 - h.beta2) * g * g
    lr, ds = h.lr, None
    if code_units:
        s, axes = wq.scale, {'tensor': None, 'column': 0}.get(wq.spec.group, -1)
        lr = lr * wq.spec.top * s.expand_as(_grouped(w, wq.spec)).reshape(w.shape)
        ds = _grouped(g * w, wq.spec).sum(axes, keepdim=True)
    w_new = (1 - h.decay) * w - lr * direction(m, v, h)
    wq = quantize(w_new, wq.spec, key, scale=wq.scale, start=start)
    mq = quantize(m, mq.spec, key + 1, start=start)
    vq = None if factored else quantize(v, vq.spec, key + 2, start=start)
    return wq, mq, vq, ds, None if wq.spec is None else (dequantize(wq) != w).sum()


def _rows(t, a, b, n):
    """Rows a to b of a tensor that has n of them; a scale that all rows share comes whole."""
    return t[a:b] if t is not None and t.dim() and t.shape[0] == n else t


def _take(q, a, b, n):
    scale, zero = _rows(q.scale, a, b, n), _rows(q.zero, a, b, n)
    return q._replace(codes=q.codes[a:b], scale=scale, zero=zero)


def _put(q, new, a, b, n):
    """Write the block `new` into rows a to b of q, in place."""
    for old, t in zip(q[:4], new[:4]):
        if old is not None and t is not None:
            _rows(old, a, b, n).copy_(t)


class Slot:
    """A parameter with what the optimizer holds for it: m, v, and Adam's m and v of log s."""

    def __init__(self, name, p, layer, m, v, learn_scale):
        self.name, self.p, self.layer = name, p, layer
        self.low_bit = layer is not None and layer.scale is not None
        self.key = noise_key(*name.encode())
        zeros = torch.zeros_like(p, memory_format=torch.contiguous_format)
        self.m = quantize(zeros, m)
        self.factored = v == 'factored' and layer is not None
        if self.factored:      # v_ij = row_i col_j / mean(row)   (Adafactor, arXiv 1804.04235)
            self.v = zeros[:, :1].clone(), zeros[:1].clone()
        else:
            self.v = quantize(zeros.clone(), v)
        learned = learn_scale and self.low_bit
        self.s = tuple(torch.zeros_like(layer.scale) for _ in 'mv') if learned else ()
        # rows with scales of their own go a block at a time, as much as fits the cache of a CPU
        specs = [q.spec for q in (self.m, self.v) if isinstance(q, QTensor)]
        shared = any(s is not None and s.shared for s in specs)
        elements = 2 ** 24 if p.is_cuda else 2 ** 17
        self.block = p.shape[0] if shared else max(1, elements // p[0].numel())

    def stored(self):
        """The weight as it is stored, a QTensor."""
        if self.layer is None:
            return QTensor(self.p.data, cols=self.p.shape[-1])
        return self.layer.stored()

    def tensors(self):
        """Every tensor that makes up the state, in a fixed order."""
        v = self.v if self.factored else self.v[:4]
        return [t for t in (*self.m[:4], *v, *self.s) if t is not None]


class AdamW:
    """AdamW whose weights, m and v are stored quantized between steps (Loshchilov & Hutter, arXiv
    1711.05101; quantized states: paper 1; low-bit masters: paper 2). Only the weights of Linear
    layers take the Specs: embeddings, norms and biases are float32 throughout.

    adam_m, adam_v  Specs of the moments; adam_v = 'factored' keeps one row and one column of v
    code_lr         > 0: the direct update of low-bit masters, by code_lr half ranges of their grid
                    times r, without weight decay; 0: they move by learning_rate, as published
    scale_lr        of the direct update: its scales learn at this rate, log s by Adam; 0: fixed
    threshold       of the direct update: tau, in standard deviations of r under white noise
    ramp            of the direct update: beta1_t = min(.9995, 1 - 1 / (10 + t / ramp)); 0: fixed
    compiled        torch.compile the update
    Raises ValueError for a bad Spec or a block that does not divide, when it is built.
    """

    def __init__(self, model, learning_rate=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0,
                 adam_m='', adam_v='', code_lr=0.0, scale_lr=0.0, threshold=0.0, ramp=0.0, seed=0,
                 compiled=False):
        self.learning_rate, self.betas, self.eps = learning_rate, betas, eps
        self.weight_decay, self.code_lr, self.scale_lr = weight_decay, code_lr, scale_lr
        self.threshold, self.ramp, self.seed = threshold, ramp, seed
        self.t, self.momentum, self.noise = 0, 1.0, 0.0
        self.update = torch.compile(update, dynamic=True) if compiled else update
        modules = model.named_modules()
        layers = {f'{name}.weight': m for name, m in modules if isinstance(m, Linear)}
        self.slots = []
        for name, p in model.named_parameters():       # a tied weight comes once, by one name
            layer = layers.get(name)
            m, v = ('', '') if layer is None else (adam_m, adam_v)
            self.slots.append(Slot(name, p, layer, m, v, code_lr > 0 and scale_lr > 0))

    def zero_grad(self):
        for slot in self.slots:
            slot.p.grad = None

    @torch.no_grad()
    def step(self, scale=1.0):
        """One step from the .grad of all parameters; `scale` in [0, 1] is the schedule."""
        self.t += 1
        lr, decay, beta1 = scale * self.learning_rate, self.weight_decay, self.betas[0]
        bias1 = 1 - beta1 ** self.t
        vector = self._hyper(lr, 0.0, beta1, bias1, 0.0)
        matrix = self._hyper(lr, lr * decay, beta1, bias1, 0.0)
        direct = self._direct(scale) if self.code_lr else None
        for slot in self.slots:
            if slot.p.grad is not None:
                code_units = slot.low_bit and self.code_lr > 0
                h = direct if code_units else matrix if slot.p.dim() > 1 else vector
                self._step(slot, h, code_units)
                if slot.s:
                    self._learn_scale(slot, scale * self.scale_lr)

    def _direct(self, scale):
        """The numbers of the direct update. tau counts in the size of r under white noise: the
        root of N, the sum of squared weights of the gradients in m, over bias1."""
        beta1 = min(0.9995, 1 - 1 / (10 + self.t / self.ramp)) if self.ramp else self.betas[0]
        self.momentum *= beta1
        self.noise = beta1 ** 2 * self.noise + (1 - beta1) ** 2
        bias1 = 1 - self.momentum
        tau = self.threshold * math.sqrt(self.noise) / bias1
        return self._hyper(scale * self.code_lr, 0.0, beta1, bias1, tau)

    def _hyper(self, lr, decay, beta1, bias1, tau):
        beta2, device = self.betas[1], self.slots[0].p.device
        numbers = lr, decay, beta1, beta2, bias1, 1 - beta2 ** self.t, self.eps, tau
        return Hyper(*torch.tensor(numbers, dtype=torch.float32, device=device).unbind())

    def _step(self, slot, h, code_units):
        p, g, n = slot.p, slot.p.grad, slot.p.shape[0]
        wq, cols = slot.stored(), p.numel() // n
        integer = {'dtype': torch.int32, 'device': p.device}
        key = torch.full((), noise_key(self.seed, self.t, slot.key), **integer)
        if slot.factored:              # the mean of g^2 over rows and columns, without a copy of g
            row, col = slot.v
            row.lerp_(torch.linalg.vector_norm(g, dim=1, keepdim=True) ** 2 / cols, 1 - h.beta2)
            col.lerp_(torch.linalg.vector_norm(g, dim=0, keepdim=True) ** 2 / n, 1 - h.beta2)
        slot.flips = torch.zeros((), dtype=torch.int64, device=p.device)
        slot.ds = torch.zeros_like(slot.layer.scale) if code_units else None
        for a in range(0, n, slot.block):
            b = min(a + slot.block, n)
            if slot.factored:
                v = row[a:b] * col / row.mean().clamp(min=1e-30)
            else:
                v = _take(slot.v, a, b, n)
            w, m, v, ds, flips = self.update(
                _take(wq, a, b, n), g[a:b], _take(slot.m, a, b, n), v, h, key,
                torch.full((), a * cols, **integer), code_units)
            _put(wq._replace(scale=None), w, a, b, n)          # w keeps its scale
            _put(slot.m, m, a, b, n)
            if v is not None:
                _put(slot.v, v, a, b, n)
            if ds is not None:
                _rows(slot.ds, a, b, n).add_(ds)
            if flips is not None:
                slot.flips += flips

    def _learn_scale(self, slot, lr):
        """log s <- log s - lr mhat / sqrt(vhat), with m and v of dL/d log s."""
        (m, v), (beta1, beta2) = slot.s, self.betas
        m.lerp_(slot.ds, 1 - beta1)
        v.lerp_(slot.ds ** 2, 1 - beta2)
        r = m / (1 - beta1 ** self.t) / ((v / (1 - beta2 ** self.t)).sqrt() + 1e-30)
        slot.layer.scale.mul_(torch.exp(-lr * r))

    def flips(self):
        """Share of the codes of all masters that the last step changed."""
        slots = [s for s in self.slots if s.layer is not None]
        return sum(s.flips.item() for s in slots) / sum(s.p.numel() for s in slots)

    def state_dict(self):
        """Numbers and tensors only, so that torch.load(weights_only=True) reads it."""
        return {'t': self.t, 'momentum': self.momentum, 'noise': self.noise,
                'slots': {slot.name: slot.tensors() for slot in self.slots}}

    def load_state_dict(self, state):
        """Copy a state in. Raises ValueError if it is of another model or stored otherwise."""
        if state['slots'].keys() != {slot.name for slot in self.slots}:
            raise ValueError('the optimizer state is of another model')
        for slot in self.slots:
            mine, saved = slot.tensors(), state['slots'][slot.name]
            if [(t.shape, t.dtype) for t in mine] != [(t.shape, t.dtype) for t in saved]:
                raise ValueError(f'the optimizer state of {slot.name} is stored in another way; '
                                 'use the same adam_m, adam_v and master')
            for t, s in zip(mine, saved):
                t.copy_(s)
        self.t, self.momentum, self.noise = state['t'], state['momentum'], state['noise']


# ------------------------------------------------------------------------------------------------
# accounting and health

def _held(tensors):
    """Bytes of the storages behind tensors, each storage once."""
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def held(model, optimizer):
    """Bytes really held, read off the storages: {'weights', 'optimizer', 'gradients', 'linear'};
    'linear' is the same three for the weights of Linear layers alone, in bytes a weight."""
    slots = [s for s in optimizer.slots if s.layer is not None]
    count = sum(s.p.numel() for s in slots)
    grads = [s.p.grad for s in optimizer.slots if s.p.grad is not None]
    linear = {'weights': _held(t for s in slots for t in s.layer.stored()[:2] if t is not None),
              'optimizer': _held(t for s in slots for t in s.tensors()),
              'gradients': _held(s.p.grad for s in slots if s.p.grad is not None)}
    return {'weights': _held([*model.parameters(), *model.buffers()]),
            'optimizer': _held(t for s in optimizer.slots for t in s.tensors()),
            'gradients': _held(grads), 'linear': {k: n / count for k, n in linear.items()}}


def shares(model):
    """{level: share of the codes} of the low-bit masters of at most 16 levels; {} without any."""
    counts = {}
    for layer in model.modules():
        if isinstance(layer, Linear) and layer.master is not None and layer.master.base < 256:
            codes = unpack(layer.codes, layer.master, layer.weight.shape[1])
            levels = _levels(codes, layer.master)
            for level, n in zip(*(t.tolist() for t in levels.unique(return_counts=True))):
                counts[f'{level:g}'] = counts.get(f'{level:g}', 0) + n
    return {level: n / sum(counts.values()) for level, n in counts.items()}


def _damage(x, how, parts=1):
    """What quantizing x does: signal-to-noise in dB (None: exact), shares of zeros and clipped."""
    x = x.float()
    q = quantize(x, how, parts=parts)
    y = dequantize(q)
    noise = (x - y).square().sum()
    snr = 10 * math.log10(x.square().sum() / noise) if noise > 0 else None
    clipped = 0.0
    if q.zero is None and q.scale is not None:
        most = q.spec.top * _real_scale(q.scale, q.outer) * (1 + 1e-5)
        clipped = (_grouped(x, q.spec, parts).abs() > most).float().mean().item()
    return {'snr_db': snr, 'zero': (y == 0).float().mean().item(), 'clipped': clipped}


@torch.no_grad()
def health(model, *inputs):
    """Of each Linear, on one batch: what its Specs do to weight and input, and how the codes of a
    low-bit master share the levels. {layer: {'weights', 'activations', 'levels'}}."""
    report, hooks = {}, []

    def look(name):
        def hook(layer, args):
            entry, how = {}, layer.how
            if how.weights is not None:
                entry['weights'] = _damage(dequantize(layer.stored()), how.weights, how.parts)
            if how.activations is not None:
                entry['activations'] = _damage(args[0].flatten(0, -2), how.activations)
            entry['levels'] = shares(layer)
            report[name] = entry
        return hook

    for name, layer in model.named_modules():
        if isinstance(layer, Linear):
            hooks.append(layer.register_forward_pre_hook(look(name)))
    mode = model.training
    try:
        model.eval()(*inputs)
    finally:
        model.train(mode)
        for hook in hooks:
            hook.remove()
    return report
