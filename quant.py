"""
Quantized training of language models: every strategy, one vocabulary.

A linear layer is three matmuls. With the tokens in rows, x (N, in), w (out, in), g = dL/dy (N, out):

    forward     y  = x^ w^T  (+ b)       x^ = Q_a(x),  w^ = Q_w(w)
    backward    dx = g^ w^               g^ = Q_g(g)
                dw = g^T x^

and a step of AdamW reads and writes three more tensors of the shape of w: w itself, m and v. Each of
these tensors can be quantized, and a string says how: 'int8/row', 'ternary/tensor/absmean',
'uint8/256/root4', '' for not at all. The file goes through them in this order:

    Spec, QTensor         how a tensor is quantized; what is stored: codes, packed below 8 bits, and scales
    uniform               the noise of stochastic rounding, a hash of (seed, step, index): no generator
    quantize, dequantize  the two verbs; fake_quant is both in a row
    Matmul, Linear        weights, activations and gradients, with the straight-through estimator
    KVCache               keys and values
    AdamW                 optimizer states, low-bit masters and the direct ternary update
    held, health          the bytes really held, and what quantization does to a model

There are two ways to have low-bit weights. Either a float32 weight is kept and rounded at every forward
(`weights`: BitNet and paper 1), or the low-bit codes are the only weight there is (`master`: direct
training, paper 2); then the optimizer step moves the codes themselves, by stochastic rounding.

    paper 1: Chitsaz et al., Exploring Quantization for Efficient Pre-Training, arXiv 2407.11722
    paper 2: Zhao et al., Direct Quantized Training with Stochastic Rounding, arXiv 2412.04787
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
FORMATS = {'nvfp4': 'fp4/16', 'mxfp4': 'fp4/32'}  # a word for a whole format, scales included
WORDS = {  # field of Spec: its words; a block size, any number, is the other kind of group
    'grid': [*INTEGERS, *FLOATS], 'group': ['tensor', 'row', 'column'], 'scale': ['absmax', 'absmean'],
    'rounding': ['nearest', 'stochastic'], 'map': ['linear', 'sqrt', 'root4'],
    'sign': ['symmetric', 'asymmetric'], 'packing': ['bits', 'trits'],
}


@dataclass(frozen=True)
class Spec:
    """How a tensor is quantized, parsed from words in any order by `spec('int8/row/stochastic')`.

    grid      the codes: ternary, int2 .. int8, uint4, uint8, fp4 (e2m1), fp8 (e4m3), fp8e5 (e5m2), bf16
    group     what shares a scale: the tensor, a row (the last axis), a column (all other axes), or a
              block of so many neighbours on the last axis
    scale     absmax: s = max|x| / Qp, nothing is clipped; absmean: s = mean|x| / Qp
    rounding  nearest, or stochastic: up with the probability that keeps the mean
    map       the level of code c is c (linear), sign(c) c^2 (sqrt: for m) or sign(c) c^4 (root4: for v, so
              rounded to the nearest root, and never from positive to zero)
    sign      asymmetric: a zero point z per group, x^ = (q + z) s, so that the range is [min, max]
    packing   trits: five ternary codes a byte (3^5 = 243) instead of four
    format    '' or 'nvfp4' (blocks of 16, e4m3 scales) or 'mxfp4' (blocks of 32, power-of-two scales)
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
        """Number of values one packed code can take: 3, 4, 16, or 256 where a code is a byte or more."""
        if self.packing == 'trits':
            return 3
        return {'ternary': 4, 'int2': 4, 'int3': 16, 'int4': 16, 'uint4': 16, 'fp4': 16}.get(self.grid, 256)

    @property
    def per_byte(self):
        return {3: 5, 4: 4, 16: 2, 256: 1}[self.base]


def spec(text):
    """Parse 'int8/row/...' into a Spec; '' gives None, full precision. Raises ValueError for a word that
    is unknown, comes twice, or contradicts another."""
    if text is None or isinstance(text, Spec):
        return text
    if not text:
        return None
    fields = {}
    for word in text.split('/'):
        if word in FORMATS:
            found = {'format': word, 'grid': 'fp4', 'group': int(FORMATS[word].split('/')[1])}
        elif word.isdigit() and int(word) > 0:
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
        raise ValueError(f"spec '{text}' names no grid; start with one of {', '.join(WORDS['grid'])}")
    s = Spec(**fields)
    floating = s.grid in FLOATS
    for bad, why in (
        (s.sign == 'asymmetric' and (floating or s.grid == 'ternary'), 'only int and uint grids have a zero point'),
        (s.sign == 'asymmetric' and s.scale == 'absmean', 'an asymmetric scale comes from min and max, not absmean'),
        (s.sign == 'asymmetric' and s.map != 'linear', 'a zero point needs the linear map'),
        (floating and s.map != 'linear', 'a float grid has no map'),
        (s.packing == 'trits' and s.grid != 'ternary', 'only ternary packs as trits'),
        (s.format and s.scale == 'absmean', f'the scales of {s.format} come from absmax'),
        (s.grid == 'bf16' and len(fields) > 1 + ('rounding' in fields), 'bf16 has no scale: it takes a rounding only'),
    ):
        if bad:
            raise ValueError(f"spec '{text}' contradicts itself: {why}")
    return s


# ------------------------------------------------------------------------------------------------
# noise: a hash instead of a generator

def _mix(h):
    """A bijection of 32-bit integers in which every bit depends on all (lowbias32, C. Wellons), int32."""
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

    Stateless: neither device, compilation nor the block of rows an element is updated in changes it."""
    i = torch.arange(x.numel(), dtype=torch.int32, device=x.device).view(x.shape) + start
    return ((_mix(_mix(i) ^ key) >> 8) & 0xFFFFFF).float() * 2.0 ** -24


# ------------------------------------------------------------------------------------------------
# quantize and dequantize

class QTensor(NamedTuple):
    """What is stored of a tensor: x^ = level(codes) * scale, or (codes + zero) * scale."""
    codes: torch.Tensor                # uint8, packed on the last axis; int8; fp8 or bf16; or x itself
    scale: torch.Tensor | None = None  # one per group: float32, or a byte in nvfp4 and mxfp4
    zero: torch.Tensor | None = None   # float32, an integer per group, asymmetric only
    outer: torch.Tensor | None = None  # float32, the scale of nvfp4's scales
    spec: Spec | None = None
    cols: int = 0                      # length of the last axis, which packing may pad


def _grouped(x, s, parts=1):
    """View x so that the values that share a scale lie along the last axis (the first for a column)."""
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
    if s.grid == 'fp4':                            # bits seem: 0 .5 1 1.5 2 3 4 6, then their negatives
        i = (c & 7).float()
        y = torch.where(i < 4, i / 2, torch.where(i < 6, i - 2, 2 * i - 8))
        return torch.where(c > 7, -y, y)
    c = c.float()
    return {'linear': c, 'sqrt': c * c.abs(), 'root4': c.abs() ** 3 * c}[s.map] if s.map != 'linear' else c


def _round(y, s, key, start):
    """Codes of y = x / scale on the grid of s, as float32 (for a float grid, the rounded y itself)."""
    stochastic = s.rounding == 'stochastic'
    u = uniform(y, key, start) if stochastic else None
    if s.grid in FLOATS:
        mantissa, smallest, top, _ = FLOATS[s.grid]
        exponent = ((y.view(torch.int32) >> 23) & 0xFF) - 127             # floor(log2 |y|), from the bits
        exponent = exponent.clamp(min=smallest) - mantissa                # spacing of the grid around y
        spacing = ((exponent + 127) << 23).view(torch.float32)
        y = y / spacing                                                   # exact: a power of two
        y = y.floor() + (u < y - y.floor()) if stochastic else y.round()
        return (y * spacing).clamp(-top, top)
    low, high = INTEGERS[s.grid]
    c = y if s.map == 'linear' else y.sign() * y.abs() ** (0.5 if s.map == 'sqrt' else 0.25)
    if stochastic or s.map == 'sqrt':              # up by chance, so that E[level] = y, or past the middle
        c = c.floor()
        below = _levels(c, s)
        c = c + ((u if stochastic else 0.5) < (y - below) / (_levels(c + 1, s) - below))
    else:
        c = c.round()
    if s.map == 'root4':
        c = torch.where((c == 0) & (y > 0), 1, c)  # v is a divisor: nothing positive rounds to zero
    return c.clamp(low, high)


def pack(c, s):
    """Codes (float32, any shape) to storage: below 8 bits several a byte, byte j of a row holding the
    codes j, j + n, j + 2n .. of that row, n bytes a row, so that both ways are contiguous."""
    if s.grid == 'fp4':
        a = c.abs()
        i = torch.where(a < 2, 2 * a, torch.where(a < 4, a + 2, a / 2 + 4))
        c = i + 8 * (c.signbit() & (a > 0))
    elif s.grid in FLOATS:
        return c.to(FLOATS[s.grid][3])
    if s.per_byte == 1:
        return c.to(torch.uint8 if s.grid == 'uint8' else torch.int8)
    low = 0 if s.grid == 'fp4' else INTEGERS[s.grid][0]
    digits = F.pad((c - low).to(torch.uint8), (0, -c.shape[-1] % s.per_byte)).unflatten(-1, (s.per_byte, -1))
    out = digits.select(-2, 0)
    for i in range(1, s.per_byte):                 # base 3, 4 or 16
        out = out + digits.select(-2, i) * s.base ** i
    return out


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
    if s.sign == 'asymmetric':                     # the range takes in 0, which is then a code itself
        low, high = INTEGERS[s.grid]
        least = x.amin(axis, keepdim=True).clamp(max=0)
        scale = (x.amax(axis, keepdim=True).clamp(min=0) - least) / (high - low)
        scale = torch.where(scale == 0, 1.0, scale)
        return scale, (least / scale - low).round(), None
    size = x.abs()
    size = size.amax(axis, keepdim=True) if s.scale == 'absmax' else size.mean(axis, keepdim=True)
    size = torch.where(size == 0, s.top, size)
    if s.format == 'mxfp4':                        # 2^(floor(log2 absmax) - 2): 4 is fp4's top power of two
        return torch.exp2(size.log2().floor() - 2).to(torch.float8_e8m0fnu), None, None
    if s.format == 'nvfp4':                        # the scales are fp8 themselves, under one float32 scale
        outer = size.amax() / (s.top * FLOATS['fp8'][2])
        return (size / s.top / outer).to(torch.float8_e4m3fn), None, outer
    return size / s.top, None, None


def _scale(scale, outer):
    return scale.float() if outer is None else scale.float() * outer


def quantize(x, how, key=0, scale=None, parts=1, start=0):
    """q = clip(round(x / s), Qn, Qp): codes and scale of x as a QTensor, all in float32.

    x      any shape (..., C); `how` a Spec or its string; None or '' stores x as it is
    key    int or int32 tensor: the noise of stochastic rounding, with `start`, the index of x[0] in it
    scale  use this one, shaped as the one computed would be, instead of computing it
    parts  so many equal slices of the first axis count as tensors of their own (q, k and v)
    Raises ValueError when a block does not divide C.
    (paper 1, symmetric: s = max|x| / Qp; asymmetric: s = (max - min) / (Qp - Qn), z = round(min / s - Qn))
    """
    s = spec(how)
    if s is None:
        return QTensor(x, cols=x.shape[-1])
    x = x.float()
    if s.grid == 'bf16':
        return QTensor(pack(_round(x, s, key, start), s), spec=s, cols=x.shape[-1])
    scale, zero, outer = _scales(x, s, parts) if scale is None else (scale, None, None)
    y = _grouped(x, s, parts) / _scale(scale, outer)
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
    return (x * _scale(q.scale, q.outer)).to(dtype).view(y.shape)


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

    w is stored as a QTensor's fields in `stored`; a full-precision w is one without a scale. What is
    saved for the backward is codes and scales, not what they stand for."""

    @staticmethod
    def forward(ctx, x, weight, bias, key, how, master, codes, scale):
        wq = QTensor(weight) if master is None else QTensor(codes, scale, spec=master, cols=x.shape[1])
        xq = QTensor(x)
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
    """y = x^ w^T + b over the last axis of x (..., in). Specs are attributes: None is full precision.

    parts    number of equal, independent slices of the output (3 for a fused q, k, v), each with its
             own scale where weights share one per tensor, and in the gradient
    store_() replaces the float32 weight by codes, which are then all there is of it
    """

    def __init__(self, n_in, n_out, bias=False, weights='', activations='', gradients='',
                 gradients_in='both', backward='ste', parts=1):
        super().__init__()
        for name, value, good in (('gradients_in', gradients_in, ('both', 'dx', 'dw')),
                                  ('backward', backward, ('ste', 'full'))):
            if value not in good:
                raise ValueError(f"{name} = '{value}': use one of {', '.join(good)}")
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.zeros(n_out)) if bias else None
        self.how = Recipe(spec(weights), spec(activations), spec(gradients), gradients_in, backward, parts)
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
        """Keep only codes: q = clip(round(w / s), Qn, Qp), s from the present w and from then on fixed, or
        learned, but not computed again (absmean of a ternary weight would shrink at every step).

        autograd still wants a float leaf of the weight's shape to hang .grad on. A zero expanded to that
        shape is one, in four bytes of memory. Call it last, on the device where the model stays."""
        s = spec(master)
        if s is None:
            return
        if s.sign == 'asymmetric' or s.map != 'linear' or s.grid[0] == 'u' or s.format:
            raise ValueError(f"master = '{master}': a stored weight takes a symmetric, signed, linear grid")
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

    Every token is quantized once, when it arrives, so `how` must give a token scales of its own: row
    (one for each head and token) or blocks within the head. Raises ValueError otherwise."""

    def __init__(self, how):
        self.how = spec(how)
        if self.how is not None and self.how.group in ('tensor', 'column'):
            raise ValueError(f"kv_cache with one scale per {self.how.group} cannot grow token by token; "
                             'use row or a block size')
        self.k = self.v = None

    def append(self, k, v):
        """Store k, v of the new tokens; return all keys and values so far, dequantized to k's dtype."""
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
    """The numbers of one step, 0-d tensors, so that compiled code need not be compiled again."""
    lr: torch.Tensor       # in weight units, or in code units where `update` is told so
    decay: torch.Tensor    # decoupled weight decay, learning rate included
    beta1: torch.Tensor
    beta2: torch.Tensor
    bias1: torch.Tensor    # 1 - prod beta1
    bias2: torch.Tensor    # 1 - prod beta2
    eps: torch.Tensor
    tau: torch.Tensor      # threshold on |r|


def direction(m, v, h):
    """r = mhat / (sqrt(vhat) + eps), then sign(r) max(0, |r| - tau): no step on evidence below the noise."""
    r = (m / h.bias1) / ((v / h.bias2).sqrt() + h.eps)
    return r.sign() * (r.abs() - h.tau).clamp(min=0)


def update(wq, g, mq, vq, h, key, start, code_units):
    """One step of AdamW on a block of rows; w, m and v arrive and leave as they are stored.

    m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g^2,   w <- (1 - decay) w - lr r
    code_units: lr counts in half ranges of the grid, s Qp. For ternary codes that is the direct update
        q <- clip(SR(q - lr r), -1, 1):   a code moves one level against r with probability lr |r|.
    v may come as a plain tensor: it is finished then (factored), and not stored again.
    Returns the new w, m and v, dL/d log s = sum g w over the values that share a scale (or None), and
    how many codes changed.
    """
    w, g = dequantize(wq), g.float()
    m = h.beta1 * dequantize(mq) + (1 - h.beta1) * g
    v = vq if isinstance(vq, torch.Tensor) else h.beta2 * dequantize(vq) + (1 - h.beta2) * g * g
    lr, ds = h.lr, None
    if code_units:
        s, axes = wq.scale, {'tensor': None, 'column': 0}.get(wq.spec.group, -1)
        lr = lr * wq.spec.top * s.expand_as(_grouped(w, wq.spec)).reshape(w.shape)
        ds = _grouped(g * w, wq.spec).sum(axes, keepdim=True)
    new = (1 - h.decay) * w - lr * direction(m, v, h)
    new = quantize(new, wq.spec, key, scale=wq.scale, start=start)
    flips = None if wq.spec is None else (dequantize(new) != w).sum()
    m = quantize(m, mq.spec, key + 1, start=start)
    v = None if isinstance(vq, torch.Tensor) else quantize(v, vq.spec, key + 2, start=start)
    return new, m, v, ds, flips


def _rows(t, a, b, n):
    """Rows a to b of a tensor that has n of them; a scale or zero that all rows share comes whole."""
    return t[a:b] if t is not None and t.shape[0] == n else t


def _take(q, a, b, n):
    return q._replace(codes=q.codes[a:b], scale=_rows(q.scale, a, b, n), zero=_rows(q.zero, a, b, n))


def _put(q, new, a, b, n):
    """Write the block `new` into rows a to b of q, in place."""
    for old, t in zip(q[:4], new[:4]):
        if old is not None and old is not t:
            _rows(old, a, b, n).copy_(t)


class Slot:
    """A parameter with what the optimizer holds for it."""

    def __init__(self, name, p, layer, m, v, learn_scale):
        self.name, self.p, self.layer, self.key = name, p, layer, noise_key(*name.encode())
        zeros = torch.zeros_like(p, memory_format=torch.contiguous_format)
        self.m = quantize(zeros, m)
        self.factored = v == 'factored' and p.dim() == 2
        if self.factored:                # v_ij = row_i col_j / mean(row) (Adafactor, 1804.04235)
            self.v = zeros[:, :1].clone(), zeros[:1].clone()
        else:
            self.v = quantize(zeros.clone(), None if v == 'factored' else v)
        self.s = tuple(torch.zeros_like(layer.scale) for _ in 'mv') if learn_scale else ()
        # rows whose scale is theirs alone can be updated a block at a time
        alone = all(q.spec is None or q.spec.group not in ('tensor', 'column') and q.spec.format != 'nvfp4'
                    for q in (self.m, *([] if self.factored else [self.v])))
        block = 2 ** 24 if p.is_cuda else 2 ** 17      # elements: as many as the cache holds on a CPU
        self.block = max(1, block // p[0].numel()) if alone else p.shape[0]

    def tensors(self):
        """Every tensor that makes up the state, in a fixed order."""
        v = self.v if self.factored else self.v[:4]
        return [t for t in (*self.m[:4], *v, *self.s) if t is not None]


class AdamW:
    """AdamW whose weights, m and v are stored quantized between steps (Loshchilov & Hutter, 1711.05101;
    states: paper 1; low-bit masters: paper 2). The weights of Linear layers take the Specs; embeddings,
    norms and biases are float32 all through.

    adam_m, adam_v   Specs of the moments; adam_v = 'factored' keeps a row and a column of v
    code_lr          > 0: low-bit masters move by code_lr half ranges of their grid times r, instead of
                     by learning_rate in weight units (and have no weight decay)
    scale_lr         > 0: their scales learn, log s by Adam at this rate
    threshold        tau, in standard deviations of r under white gradient noise; masters only
    ramp             > 0: beta1_t = min(.9995, 1 - 1 / (10 + t / ramp)) for masters
    Raises ValueError for a bad Spec or a block that does not divide, when it is built.
    """

    def __init__(self, model, learning_rate=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0,
                 adam_m='', adam_v='', code_lr=0.0, scale_lr=0.0, threshold=0.0, ramp=0.0, seed=0,
                 compiled=False):
        self.learning_rate, self.betas, self.eps, self.weight_decay = learning_rate, betas, eps, weight_decay
        self.code_lr, self.scale_lr, self.threshold, self.ramp = code_lr, scale_lr, threshold, ramp
        self.seed, self.t, self.momentum, self.noise = seed, 0, 1.0, 0.0
        self.update = torch.compile(update) if compiled else update
        layers = {name + '.weight': layer for name, layer in model.named_modules() if isinstance(layer, Linear)}
        self.slots = []
        for name, p in model.named_parameters():       # a tied weight comes once, under its first name
            layer = layers.get(name)
            low_bit = layer is not None and layer.scale is not None
            m, v = (adam_m, adam_v) if layer is not None else ('', '')
            self.slots.append(Slot(name, p, layer, m, v, low_bit and code_lr > 0 and scale_lr > 0))

    def zero_grad(self):
        for slot in self.slots:
            slot.p.grad = None

    @torch.no_grad()
    def step(self, scale=1.0):
        """One step from the .grad of every parameter; `scale` in [0, 1] is the schedule, for all rates."""
        self.t += 1
        beta1 = beta = self.betas[0]
        if self.ramp:
            beta = min(0.9995, 1 - 1 / (10 + self.t / self.ramp))
        # r of white noise has the size sqrt(sum of the squared weights of the average, m)
        self.momentum *= beta
        self.noise = beta ** 2 * self.noise + (1 - beta) ** 2
        tau = self.threshold * math.sqrt(self.noise) / (1 - self.momentum)
        lr, wd = scale * self.learning_rate, self.weight_decay
        bias1, device = 1 - beta1 ** self.t, self.slots[0].p.device
        vector = self._hyper(device, lr, 0.0, beta1, bias1, 0.0)
        matrix = self._hyper(device, lr, lr * wd, beta1, bias1, 0.0)
        code_lr, decay = (scale * self.code_lr, 0.0) if self.code_lr else (lr, lr * wd)
        master = self._hyper(device, code_lr, decay, beta, 1 - self.momentum, tau)
        for slot in self.slots:
            if slot.p.grad is not None:
                low_bit = slot.layer is not None and slot.layer.scale is not None
                h = master if low_bit else matrix if slot.p.dim() > 1 else vector
                self._step(slot, h, low_bit and self.code_lr > 0, scale)

    def _hyper(self, device, lr, decay, beta1, bias1, tau):
        beta2 = self.betas[1]
        numbers = lr, decay, beta1, beta2, bias1, 1 - beta2 ** self.t, self.eps, tau
        return Hyper(*torch.tensor(numbers, dtype=torch.float32, device=device).unbind())

    def _step(self, slot, h, code_units, scale):
        p, g, n = slot.p, slot.p.grad, slot.p.shape[0]
        wq = slot.layer.stored() if slot.layer is not None else QTensor(p.data, cols=p.shape[-1])
        key = torch.tensor(noise_key(self.seed, self.t, slot.key), dtype=torch.int32, device=p.device)
        if slot.factored:
            row, col = slot.v                          # of g^2, without a temporary of its size
            row.lerp_(torch.linalg.vector_norm(g, dim=1, keepdim=True).square() / g.shape[1], 1 - h.beta2)
            col.lerp_(torch.linalg.vector_norm(g, dim=0, keepdim=True).square() / n, 1 - h.beta2)
        ds = torch.zeros_like(slot.layer.scale) if code_units else None
        slot.flips = torch.zeros((), dtype=torch.int64, device=p.device)
        for a in range(0, n, slot.block):
            b, start = min(a + slot.block, n), torch.tensor(a * (p.numel() // n), dtype=torch.int32, device=p.device)
            v = row[a:b] * col / row.mean() if slot.factored else _take(slot.v, a, b, n)
            w, m, v, d, flips = self.update(_take(wq, a, b, n), g[a:b], _take(slot.m, a, b, n), v, h, key,
                                              start, code_units)
            _put(wq, w, a, b, n)
            _put(slot.m, m, a, b, n)
            if v is not None:
                _put(slot.v, v, a, b, n)
            if code_units:
                _rows(ds, a, b, n).add_(d)
            if flips is not None:
                slot.flips += flips
        if slot.s:                                     # log s <- log s - lr mhat / sqrt(vhat), by Adam
            m, v = slot.s
            m.lerp_(ds, 1 - self.betas[0])
            v.lerp_(ds * ds, 1 - h.beta2)
            r = m / (1 - self.betas[0] ** self.t) / ((v / h.bias2).sqrt() + 1e-30)
            slot.layer.scale.mul_(torch.exp(-scale * self.scale_lr * r))

    def flips(self):
        """Share of the codes of the masters that the last step changed."""
        slots = [s for s in self.slots if s.layer is not None]
        return sum(s.flips.item() for s in slots) / sum(s.p.numel() for s in slots)

    def state_dict(self):
        """Numbers and tensors only, so that torch.load(weights_only=True) reads it."""
        return {'t': self.t, 'momentum': self.momentum, 'noise': self.noise,
                'slots': {slot.name: slot.tensors() for slot in self.slots}}

    def load_state_dict(self, state):
        """Copy a state in, tensor by tensor. Raises ValueError when it is of another model or Spec."""
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
    """Bytes really held, read off the tensors' storages: {'weights', 'optimizer', 'gradients', 'linear'}.

    'linear' is for the weights of Linear layers alone, in bytes a weight: {'weights', 'optimizer', 'gradients'}."""
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
    """{level: share of the codes} over the low-bit masters of at most 16 levels; {} if there are none."""
    counts = {}
    for layer in model.modules():
        if isinstance(layer, Linear) and layer.master is not None and layer.master.base < 256:
            levels = _levels(unpack(layer.codes, layer.master, layer.weight.shape[1]), layer.master)
            for level, n in zip(*(t.tolist() for t in levels.unique(return_counts=True))):
                counts[f'{level:g}'] = counts.get(f'{level:g}', 0) + n
    return {level: n / sum(counts.values()) for level, n in counts.items()}


def _damage(x, how, key=0):
    """What quantizing x by `how` does: signal-to-noise in dB, share of zeros and of clipped values."""
    x = x.float()
    q = quantize(x, how, key)
    y = dequantize(q)
    noise = (x - y).square().sum()
    snr = 10 * math.log10(x.square().sum() / noise) if noise > 0 else None   # None: exact
    clipped = 0.0
    if q.zero is None and q.scale is not None:
        most = q.spec.top * _scale(q.scale, q.outer) * (1 + 1e-5)
        clipped = (_grouped(x, q.spec).abs() > most).float().mean().item()
    return {'snr_db': snr, 'zero': (y == 0).float().mean().item(), 'clipped': clipped}


@torch.no_grad()
def health(model, *inputs):
    """Of each Linear: what its Specs do to its weight and to its input, on one batch; and how the stored
    codes of a low-bit master share the levels of their grid. {layer: {'weights', 'activations', 'levels'}}."""
    report, hooks = {}, []

    def look(name):
        def hook(layer, args):
            entry, how = {}, layer.how
            if how.weights is not None:
                entry['weights'] = _damage(dequantize(layer.stored()), how.weights)
            if how.activations is not None:
                entry['activations'] = _damage(args[0].flatten(0, -2), how.activations)
            entry['levels'] = shares(layer)
            report[name] = entry
        return hook

    for name, layer in model.named_modules():
        if isinstance(layer, Linear):
            hooks.append(layer.register_forward_pre_hook(look(name)))
    try:
        model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return report
