"""
Quantized training of language models: every strategy, one vocabulary.

A linear layer is three matmuls. With tokens in rows, x (N, in), w (out, in), g = dL/dy (N, out):

    forward     y  = x^ (w^)^T  (+ b)    x^ = Q_a(x),  w^ = Q_w(w)
    backward    dx = g^ w^               g^ = Q_g(g)
                dw = (g^)^T x^

A step of AdamW reads and writes three more tensors, each of the shape of w: w itself, m and v. All
of these can be quantized, and a string says how: 'int8/row', 'ternary/tensor/absmean',
'uint8/256/root4', or '' for full precision. This file goes through them in order:

    Spec, QTensor         how a tensor is quantized; what is stored of it: packed codes and scales
    uniform               the noise of stochastic rounding: a hash of (seed, step, index)
    quantize, dequantize  the two verbs; fake_quant is both in a row
    matmul, Matmul        of weights, activations and gradients, as floats or on their codes
    Linear                with the straight-through estimator, or a low-bit weight and no other
    KVCache               keys and values
    AdamW                 optimizer states, low-bit masters and the direct ternary update
    rtn_, gptq_           post-training quantization: without training, of weights that are trained
    held, health          the bytes really held, and what quantization does to a model

There are two ways to have low-bit weights. Either a float32 weight is kept and rounded at every
forward (`weights`: paper 1 and BitNet), or low-bit codes are the only weight there is (`master`:
paper 2); then the optimizer moves the codes themselves, by stochastic rounding. Or both: a ternary
forward on an int8 master.

    paper 1  Chitsaz et al., Exploring Quantization for Efficient Pre-Training, arXiv 2407.11722
    paper 2  Zhao et al., Direct Quantized Training with Stochastic Rounding, arXiv 2412.04787
    paper 3  Xu et al., Understanding the Difficulty of Low-Precision Post-Training Quantization of
             Large Language Models, arXiv 2410.14570
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
    'fp4': (1, 0, 6.0, torch.uint8),                        # e2m1, two codes per byte
    'fp8': (3, -6, 448.0, torch.float8_e4m3fn),
    'fp8e5': (2, -14, 57344.0, torch.float8_e5m2),
    'bf16': (7, -119, torch.finfo(torch.bfloat16).max, torch.bfloat16),   # has no scale
}
FORMATS = {'nvfp4': 16, 'mxfp4': 32}  # words for fp4 in blocks of so many, with small scales
WORDS = {  # field of Spec: its words; a block size, any number, is the other kind of group
    'grid': [*INTEGERS, *FLOATS], 'group': ['tensor', 'row', 'column'],
    'scale': ['absmax', 'absmean', 'mse'], 'rounding': ['nearest', 'stochastic'],
    'map': ['linear', 'sqrt', 'root4'], 'sign': ['symmetric', 'asymmetric'],
    'rotation': ['hadamard'], 'packing': ['bits', 'trits'],
}


@dataclass(frozen=True)
class Spec:
    """How a tensor is quantized; spec('int8/row/stochastic') parses one, words in any order.

    grid      the codes: ternary, int2 .. int8, uint4, uint8, fp4 (e2m1), fp8 (e4m3), fp8e5 (e5m2),
              bf16
    group     what shares a scale: the tensor, a row (along the last axis), a column (along all the
              others), or a block of so many neighbours on the last axis
    scale     absmax: s = max|x| / Qp, which clips nothing and leaves codes below -Qp unused (so
              that int2 has three levels); absmean: s = mean|x| / Qp; mse: of .3, .4 .. 1 times
              absmax the one with the least |x - x^|^2
    rounding  nearest, or stochastic: up with the probability that makes the mean right, of all
              that is not clipped
    map       the level of code c is c (linear), c |c| (sqrt, for m) or c |c|^3 (root4, for v:
              nearest by the fourth root, and never from positive to zero)
    sign      asymmetric: a zero point z per group, x^ = (q + z) s, so that codes span [min, max]
    rotation  hadamard: x H is quantized, and x^ = (x H)^ H, see `rotate`
    packing   trits: five ternary codes per byte (3^5 = 243) instead of four
    format    '', 'nvfp4' (fp4, blocks of 16, e4m3 scales under one float32 scale) or 'mxfp4' (fp4,
              blocks of 32, scales that are powers of two); their scales are rounded, so that the
              largest of a block may be clipped, in mxfp4 by up to a quarter
    """
    grid: str
    group: str | int = 'tensor'
    scale: str = 'absmax'
    rounding: str = 'nearest'
    map: str = 'linear'
    sign: str = 'symmetric'
    rotation: str = ''
    packing: str = 'bits'
    format: str = ''

    @property
    def top(self):
        """Level of the highest code: Qp, Qp^2 or Qp^4, or the largest number of a float grid."""
        if self.grid in FLOATS:
            return FLOATS[self.grid][2]
        return float(INTEGERS[self.grid][1] ** {'linear': 1, 'sqrt': 2, 'root4': 4}[self.map])

    @property
    def packed(self):
        """Do several codes share a byte?"""
        return self.grid == 'fp4' or self.grid in INTEGERS and self.grid[-1] != '8'

    @property
    def packs(self):
        """How many codes share a byte, for each field of their bits, low ones first: codes of six
        bits have a field of four, two a byte, and one of two, four a byte, [2, 4]."""
        if not self.packed or self.packing == 'trits':
            return [5 if self.packed else 1]
        bits = 2 if self.grid == 'ternary' else int(self.grid[-1])
        return [8 // field for field in (4, 2, 1) if bits & field]

    @property
    def shared(self):
        """Do rows share a scale, directly or, in nvfp4, the scale of their scales?"""
        return self.group in ('tensor', 'column') and self.grid != 'bf16' or self.format == 'nvfp4'

    @property
    def factors(self):
        """Do the scales come out of a matmul along rows: x^ = s q, with one s a row or in all? (A
        rotation of both operands cancels.)"""
        codes = self.grid in INTEGERS and self.grid[0] != 'u' or self.grid in ('fp8', 'fp8e5')
        linear = self.map == 'linear' and self.sign == 'symmetric'
        return codes and linear and self.group in ('row', 'tensor')


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
        (zero_point and s.scale != 'absmax', f'an asymmetric scale is of min, max, not {s.scale}'),
        (zero_point and s.map != 'linear', 'a zero point needs the linear map'),
        (floating and s.map != 'linear', 'a float grid has no map'),
        (s.packing == 'trits' and s.grid != 'ternary', 'only ternary packs as trits'),
        (s.format and s.scale == 'absmean', f'the scales of {s.format} come from absmax'),
        (s.format == 'mxfp4' and s.scale == 'mse', 'the scales of mxfp4 come from absmax'),
        (s.rotation and s.grid[0] == 'u' and not zero_point, 'what is rotated has negatives'),
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
        for _ in range(2):  # in the style of splitmix64
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


def rotate(x):
    """x H along the last axis, float32: H the orthogonal Hadamard matrix, in blocks as long as the
    highest power of two that divides the axis, at most 128. H H = 1, so rotating twice undoes it;
    and (x H)(w H)^T = x w^T, so a matmul of two rotated operands needs no undoing.

    A rotation spreads an outlier over its block: what is quantized is close to normal (QuaRot,
    arXiv 2404.00456; in pre-training, QuEST, arXiv 2502.05003)."""
    n = max(2 ** i for i in range(8) if x.shape[-1] % 2 ** i == 0)
    h = torch.ones(1, 1, device=x.device)
    while len(h) < n:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return (x.float().unflatten(-1, (-1, n)) @ h * n ** -0.5).flatten(-2)


def _levels(c, s):
    """The number each code stands for, float32, before the scale."""
    if s.grid == 'fp4':     # 0 .5 1 1.5 2 3 4 6, then their negatives; the slope is 1/2, 1, 2
        i = (c & 7).float()
        y = i.clamp(max=4) / 2 + (i - 4).clamp(0, 2) + 2 * (i - 6).clamp(min=0)
        return y * (1 - 2 * (c > 7).float())
    c = c.float()
    return c if s.map == 'linear' else c * c.abs() if s.map == 'sqrt' else c * c.abs() ** 3


def _round(y, s, key, start):
    """Codes of y = x / scale on the grid of s, float32; of a float grid, the rounded y itself."""
    stochastic = s.rounding == 'stochastic'
    u = uniform(y, key, start) if stochastic else None
    if s.grid in FLOATS:
        mantissa, smallest, top, _ = FLOATS[s.grid]
        power = (y.view(torch.int32) & 0x7F800000).view(torch.float32)  # 2^floor(log2 |y|)
        spacing = power.clamp(2.0 ** smallest, top) * 2.0 ** -mantissa  # of the grid around y
        y = y / spacing                                                # exact: a power of two
        below = y.floor()                                              # up if u < y - below
        y = below + (y - below - u).ceil() if stochastic else y.round()
        return (y * spacing).clamp(-top, top)
    low, high = INTEGERS[s.grid]
    c = y
    if s.map == 'sqrt':             # nearest: c + 1 from the middle of c^2 and (c + 1)^2 on, so
        a = y.abs() if stochastic else (y.abs() - 0.25).clamp(min=0)   # sqrt(y - 1/4) > c + 1/2
        c = a.sqrt().copysign(y)
    elif s.map == 'root4':
        c = y.abs().sqrt().sqrt().copysign(y)
    if stochastic:                  # up by chance, so that the mean is y
        c = c.floor()
        below = _levels(c, s)
        c = c + (u * (_levels(c + 1, s) - below) < y - below)
    else:
        c = c.round()
    if s.map == 'root4':
        c = torch.where((c == 0) & (y > 0), 1, c)  # v is a divisor
    return c.clamp(low, high)


BASE = {2: 16, 4: 4, 5: 3, 8: 2}                # so many digits of this base are a byte


def _encode(c, s):
    """Codes (float32) as they are stored, not packed yet: uint8 from 0 up if they will be."""
    if s.grid == 'fp4':
        a = c.abs()
        i = 2 * a.clamp(max=2) + (a - 2).clamp(0, 2) + (a - 4).clamp(min=0) / 2
        return (i + 8 * (c < 0).float()).to(torch.uint8)
    if s.grid in FLOATS:
        return c.to(FLOATS[s.grid][3])
    if s.packed:
        return (c - INTEGERS[s.grid][0]).to(torch.uint8)
    return c.to(torch.uint8 if s.grid == 'uint8' else torch.int8)


def pack(c, s):
    """Several codes to a byte below 8 bits: of n bytes in a row the j-th holds the codes j, j + n,
    j + 2n ..; that way packing and unpacking go through memory in order. Codes of 3, 5, 6 or 7
    bits lie in two or three fields (`Spec.packs`), one behind the other."""
    if not s.packed:
        return c
    fields = []
    for n in s.packs:
        field = c if n == s.packs[-1] else c & (BASE[n] - 1)
        digits = F.pad(field, (0, -c.shape[-1] % n)).unflatten(-1, (n, -1)).unbind(-2)
        fields.append(sum(digit * BASE[n] ** i for i, digit in enumerate(digits)))
        c = c >> (8 // n)
    return torch.cat(fields, -1)


def _digits(field, n):
    """The n places of all bytes, each a tensor of the shape of field, from the lowest on."""
    if n == 5:
        return [field.div(3 ** i, rounding_mode='floor') % 3 for i in range(5)]
    return [(field >> (8 // n * i)) & (BASE[n] - 1) for i in range(n)]


def unpack(codes, s, cols):
    """Storage to one code an element: int8, uint8, or the float dtype of the grid."""
    if not s.packed:
        return codes
    c, shift = 0, 0
    for n, field in zip(s.packs, codes.split([-(-cols // n) for n in s.packs], -1)):
        c = c + (torch.cat(_digits(field, n), -1)[..., :cols] << shift)
        shift += 8 // n
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
    size = size.mean(axis, keepdim=True) if s.scale == 'absmean' else size.amax(axis, keepdim=True)
    if s.scale == 'mse':
        size = _least_error(x, size, s, axis)
    if s.format == 'nvfp4':                        # e4m3 goes from 2^-9 to 448
        outer = size.amax() / (s.top * FLOATS['fp8'][2])
        outer = torch.where(outer == 0, 1.0, outer)
        return (size / s.top / outer).clamp(min=2.0 ** -9).to(torch.float8_e4m3fn), None, outer
    size = torch.where(size == 0, s.top, size)
    if s.format == 'mxfp4':                        # 4 = 2^2 is the highest power of two in fp4
        return torch.exp2(size.log2().floor() - 2).to(torch.float8_e8m0fnu), None, None
    return size / s.top, None, None


def _least_error(x, size, s, axis):
    """The one of .3, .4 .. 1 times size = max|x| with the least |x - x^|^2, of each group."""
    def error(fraction):
        step = torch.where(size == 0, 1.0, fraction * size / s.top)
        c = _round(x / step, replace(s, rounding='nearest'), 0, 0)
        return (x - step * (c if s.grid in FLOATS else _levels(c, s))).square().sum(axis, True)

    best, least = size, error(1.0)
    for tenths in range(3, 10):
        e = error(tenths / 10)
        best, least = torch.where(e < least, tenths / 10 * size, best), torch.minimum(e, least)
    return best


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
    x = rotate(x) if s.rotation else x.float()
    if s.grid == 'bf16':
        return QTensor(_encode(_round(x, s, key, start), s), spec=s, cols=x.shape[-1])
    scale, zero, outer = _scales(x, s, parts) if scale is None else (scale, None, None)
    y = _grouped(x, s, parts) / _real_scale(scale, outer)
    y = y if zero is None else y - zero
    codes = pack(_encode(_round(y, s, key, start), s).reshape(x.shape), s)
    return QTensor(codes, scale, zero, outer, s, x.shape[-1])


def dequantize(q, dtype=torch.float32):
    """x^ = level(codes) * scale, computed in float32, then cast; shape (..., C)."""
    if q.scale is None:
        return q.codes.to(dtype)
    y = _levels(unpack(q.codes, q.spec, q.cols), q.spec)
    x = _grouped(y, q.spec, q.scale.shape[0])
    x = x if q.zero is None else x + q.zero
    x = x * _real_scale(q.scale, q.outer)
    x = rotate(x.view(y.shape)) if q.spec.rotation else x
    return x.to(dtype).view(y.shape)    # last: else inductor finds a block's scale by dividing


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
# matmuls of quantized operands, and their gradients

@dataclass(frozen=True)
class Recipe:
    """What a Linear quantizes, and how it multiplies; the config keys of the same names.

    weights, activations, gradients   Specs of w, x and g; None is full precision
    gradients_in   'dx', 'dw' or 'both': the matmuls of the backward that see g^ instead of g
    backward       'ste': they see x^ and w^, as the forward did; 'full': x and w; 'fold' and
                   'requantize': all operands are codes, see `matmul_on_codes`
    compute        'float': dequantized operands are multiplied; 'int8', 'fp8': the codes are, in
                   the forward, and with fold and requantize in the backward
    The three meanings of "quantized gradients" in paper 1 and its code: straight-through as in the
    text is (ste, both); its released code is (full, dw); like SwitchBack, but for its quantized w
    in dx, is (full, dx).
    """
    weights: Spec | None = None
    activations: Spec | None = None
    gradients: Spec | None = None
    gradients_in: str = 'both'
    backward: str = 'ste'
    compute: str = 'float'
    parts: int = 1

    def __post_init__(self):
        for name, good in (('gradients_in', ('both', 'dx', 'dw')),
                           ('backward', ('ste', 'full', 'fold', 'requantize')),
                           ('compute', ('float', 'int8', 'fp8'))):
            if getattr(self, name) not in good:
                raise ValueError(f"{name} = '{getattr(self, name)}': use {', '.join(good)}")

    def check(self, master):
        """Raises ValueError where codes are to be multiplied but the Specs do not allow it."""
        codes = {'weights (or master)': self.weights or master, 'activations': self.activations}
        if self.backward == 'requantize' and self.gradients is None:
            raise ValueError("backward = 'requantize' quantizes by gradients: give that too")
        if self.backward in ('fold', 'requantize'):
            codes['gradients'] = self.gradients
        if self.compute == 'float' and self.backward != 'fold':
            return
        first = self.weights or master
        fp8 = first is not None and first.grid in FLOATS if self.compute == 'float' else \
            self.compute == 'fp8'
        for name, s in codes.items():
            gradient = name == 'gradients'
            if s is None or not s.factors or (s.grid in FLOATS) != fp8 or \
                    (s.group != 'row' if gradient else s.grid == 'fp8e5'):
                kind = 'fp8' if fp8 else 'integers, symmetric and linear'
                scales = 'row' if gradient else 'row or per tensor'
                key, instead = ('backward', 'ste') if gradient or self.compute == 'float' else \
                    ('compute', 'float')
                raise ValueError(f"{key} = '{getattr(self, key)}' multiplies codes: quantize "
                                 f"{name} to {kind}, with one scale per {scales}; or {key} = "
                                 f"'{instead}'")
        rotated = {s.rotation for s in codes.values()}
        if self.backward == 'requantize':           # the gradients meet only what goes by them
            rotated = {first.rotation, codes['activations'].rotation}
        if rotated == {'', 'hadamard'} or self.backward == 'fold' and 'hadamard' in rotated:
            raise ValueError('codes can be multiplied if both operands are rotated or neither: '
                             'give hadamard to weights and to activations, and not with '
                             "backward = 'fold'")


TUNED = {'max_autotune_gemm': True}     # to inductor: scales fuse only into Triton's int8 matmuls


def _row_scale(q):
    """The scale of each row, (rows, 1), where rows have their own or share that of their part."""
    rows, n = q.codes.shape[0], q.scale.shape[0]
    return q.scale.expand(n, rows // n).contiguous().view(-1).unsqueeze(1)  # strides (1, 1)


def matmul(a, b, compute, dtype, bias=None):
    """y = a^ b^T (+ bias) of QTensors a (M, K) and b (N, K), in dtype.

    float    y = (s_a a) (s_b b)^T      dequantized, then multiplied in dtype
    int8     y = s_a s_b (a b^T)        the codes are multiplied, exactly, as int32
    fp8      y = s_a s_b (a b^T)        by the fp8 units, which round y to bfloat16

    int8 and fp8 need scales that are constant along K, and read a byte an element."""
    if compute == 'float':
        if all(q.spec and q.spec.rotation for q in (a, b)):         # (a H)(b H)^T = a b^T
            a, b = (q._replace(spec=replace(q.spec, rotation='')) for q in (a, b))
        return F.linear(dequantize(a, dtype), dequantize(b, dtype), bias)
    s_a, s_b = _row_scale(a), _row_scale(b).T                               # (M, 1), (1, N)
    a, b = (unpack(q.codes, q.spec, q.cols) for q in (a, b))
    M, N = len(a), len(b)
    if a.is_cuda:       # both along K, more than 16 rows, and the other sides multiples of 16
        a = _padded(a.contiguous(), -a.shape[1] % 16, max(0, 17 - M))
        b = _padded(b.contiguous(), -b.shape[1] % 16, -N % 16)
    if compute == 'int8':
        y = int_matmul(a, b)[:M, :N] * s_a * s_b
    else:
        s_a, s_b = _padded(s_a, 0, len(a) - M), _padded(s_b, len(b) - N, 0)
        y = torch._scaled_mm(a, b.T, s_a, s_b, out_dtype=torch.bfloat16)[:M, :N]
    return y.to(dtype) if bias is None else (y + bias).to(dtype)


def _padded(x, columns, rows):
    """x with so many columns and rows of zeros more; itself, not a copy, if there are none."""
    if not columns and not rows:
        return x
    bits = x.view(torch.int8) if x.element_size() == 1 else x           # fp8 cannot be padded
    return F.pad(bits, (0, columns, 0, rows)).view(x.dtype)


INT_MM_CPU = 'AVX' in torch.backends.cpu.get_cpu_capability()    # elsewhere it is a plain loop


def int_matmul(a, b):
    """a b^T of int8 codes, (M, K) and (N, K), as float32: int32 sums of up to 2^16 products, or
    sums in float32 where there are no integer matmuls (exact below 2^24: K up to 1024)."""
    if not (a.is_cuda or a.device.type == 'cpu' and INT_MM_CPU):
        return a.float() @ b.float().T
    y, *more = (torch._int_mm(p, q.T).float()
                for p, q in zip(a.split(2 ** 16, 1), b.split(2 ** 16, 1)))
    return sum(more, y)


def operands(x, w, how, key):
    """x^ (N, in) and w^ (out, in) as the forward multiplies them; QTensors in, QTensors out."""
    if how.weights is not None:
        w = quantize(dequantize(w), how.weights, key, parts=how.parts)
    if how.activations is not None:
        x = quantize(dequantize(x), how.activations, key + 1)
    return x, w


def _transpose(q):
    """The transpose of a QTensor, a byte per code: scales of columns become those of rows."""
    codes = unpack(q.codes, q.spec, q.cols).T
    plain = Spec(q.spec.grid if q.spec.grid in FLOATS else 'int8', 'row')
    return QTensor(codes, q.scale.T, spec=plain, cols=codes.shape[1])


def matmul_on_codes(g, q, how, key, transposed):
    """g^ w^ for dx, or (g^)^T x^ (transposed) for dw, on codes: q = w^ or x^; g (N, out).

    The sum is over the rows of q, which have scales of their own, so those do not come out of it.
    Either g takes them in, or q is quantized anew, along the sum:

        fold          dx = Q(g s_w) codes(w)        dw = Q(g s_x)^T codes(x)
        requantize    dx = Q(g) Q((w^)^T)^T         dw = Q(g^T) Q((x^)^T)^T

    Q is the Spec of the gradients, groups and rotation along the sum; x^ and w^ are rounded to
    nearest, and to e4m3 where g is e5m2. Folding reuses the codes of the forward, and costs
    accuracy in dw where some tokens of x are far larger than others."""
    dtype = g.dtype
    if how.backward == 'fold':
        g = g.float() * (_row_scale(q) if transposed else _row_scale(q).T)
        g = quantize(g, replace(how.gradients, group='column' if transposed else 'row'), key)
        q = q._replace(scale=g.scale.new_ones(1, 1))
        return matmul(_transpose(g) if transposed else g, _transpose(q), how.compute, dtype)
    g = quantize(g.T if transposed else g, how.gradients, key)
    grid = 'fp8' if how.gradients.grid == 'fp8e5' else how.gradients.grid
    q = quantize(dequantize(q).T, replace(how.gradients, grid=grid, rounding='nearest'))
    return matmul(g, q, how.compute, dtype)


def matmul_backward(g, x, w, how, key):
    """dx = g^ w^ (N, in) and dw = g^T x^ (out, in) of QTensors x, w and g = dL/dy (N, out)."""
    dtype, in_dx, in_dw = g.dtype, how.gradients_in != 'dw', how.gradients_in != 'dx'
    on_codes, gq = how.backward in ('fold', 'requantize'), g
    if how.gradients is not None and not on_codes:  # q, k and v have gradients of their own size
        gq = torch.cat([fake_quant(part, how.gradients, key + 4 + i)
                        for i, part in enumerate(g.chunk(how.parts, -1))], -1)
    if on_codes and in_dx:
        dx = matmul_on_codes(g, w, how, key + 2, transposed=False)
    else:
        dx = (gq if in_dx else g) @ dequantize(w, dtype)
    if on_codes and in_dw:
        dw = matmul_on_codes(g, x, how, key + 3, transposed=True)
    else:
        dw = (gq if in_dw else g).T @ dequantize(x, dtype)
    return dx, dw


class Matmul(torch.autograd.Function):
    """y = x^ (w^)^T + b,  dx = g^ w^,  dw = (g^)^T x^,  db = sum g,  of x (N, in), w (out, in) and
    g (N, out).

    w is `weight`, or the codes and scale of a low-bit master; then `weight` is only where its
    gradient goes. What is saved for the backward is codes and scales, not what they stand for."""

    @staticmethod
    def forward(ctx, x, weight, bias, key, how, master, codes, scale):
        full = QTensor(x, cols=x.shape[1]), QTensor(weight, cols=x.shape[1])
        if master is not None:
            full = full[0], QTensor(codes, scale, spec=master, cols=x.shape[1])
        xq, wq = operands(*full, how, key)
        saved = full if how.backward == 'full' else (xq, wq)
        ctx.save_for_backward(key, *saved[0][:4], *saved[1][:4])
        ctx.specs, ctx.how, ctx.cols = [q.spec for q in saved], how, x.shape[1]
        ctx.bias = bias is not None
        bias = None if bias is None else bias.to(x.dtype)
        return matmul(xq, wq, how.compute, x.dtype, bias)

    @staticmethod
    def backward(ctx, g):
        key, *saved = ctx.saved_tensors
        x, w = (QTensor(*saved[i:i + 4], s, ctx.cols) for i, s in zip((0, 4), ctx.specs))
        dx, dw = matmul_backward(g, x, w, ctx.how, key)
        return dx, dw, g.sum(0) if ctx.bias else None, None, None, None, None, None


def cross_entropy(x, w, targets, how, key, weight):
    """Sum over tokens of L = -log softmax(x^ (w^)^T)[target], weight dL/dx and weight dL/dw.

    x (n, in), w (vocab, in), targets (n,). weight None: no gradients. In float32 but for matmuls:

        L = logsumexp(z) - z[target],    dL/dz = softmax(z) - onehot(target),    z = x^ (w^)^T"""
    dtype, full = x.dtype, (QTensor(x, cols=x.shape[1]), QTensor(w, cols=x.shape[1]))
    seen = operands(*full, how, key)
    z = matmul(*seen, how.compute, dtype).float()                          # (n, vocab)
    log_sum, targets = z.logsumexp(1, keepdim=True), targets.unsqueeze(1)
    loss = (log_sum - z.gather(1, targets)).sum()
    if weight is None:
        return loss, None, None
    onehot = targets == torch.arange(z.shape[1], device=z.device)
    g = (weight * ((z - log_sum).exp() - onehot.float())).to(dtype)
    return loss, *matmul_backward(g, *(full if how.backward == 'full' else seen), how, key)


class CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of x (N, in), w (vocab, in), targets (N,), a chunk of tokens at a time:
    the logits of one, and their gradients, go before those of the next come. What is kept for
    the backward is dx and dw, already finished."""

    @staticmethod
    def forward(ctx, x, w, targets, key, how, chunk, training):
        N, most = len(x), 2 ** 28 if x.is_cuda else 2 ** 20                # elements of logits
        chunks = min(N, math.ceil(N * len(w) / most))
        n = math.ceil(N / chunks / 128) * 128                   # blocks of a Spec divide it
        loss, dx, dw = 0.0, [], None
        for i, (x_i, t_i) in enumerate(zip(x.split(n), targets.split(n))):
            l_i, dx_i, dw_i = chunk(x_i, w, t_i, how, key + 8 * i, 1 / N if training else None)
            loss = loss + l_i
            if training:
                dx.append(dx_i)
                dw = dw_i.float() if dw is None else dw.add_(dw_i)
        if training:
            ctx.save_for_backward(torch.cat(dx), dw)
        return loss / N

    @staticmethod
    def backward(ctx, g):
        dx, dw = ctx.saved_tensors
        return dx * g, dw * g, None, None, None, None, None


# ------------------------------------------------------------------------------------------------
# the linear layer

def check_master(master):
    """The Spec of weights as they are stored. Raises ValueError for one that cannot be."""
    s = spec(master)
    if s and (s.sign == 'asymmetric' or s.map != 'linear' or s.grid[0] == 'u' or s.format
              or s.rotation):
        raise ValueError(f"master = '{master}': a stored weight takes a symmetric, signed, linear "
                         'grid with float32 scales, not rotated')
    return s


class Linear(nn.Module):
    """y = x^ (w^)^T + b over the last axis of x (..., in). Arguments: those of Recipe, as strings.

    parts     number of equal, independent slices of the output (3 for a fused q, k, v): what has a
              scale per tensor has one for each, and so have gradients (but in fold and requantize)
    store_()  replaces the float32 weight by codes, which are then all there is of it
    """

    def __init__(self, n_in, n_out, bias=False, weights='', activations='', gradients='',
                 gradients_in='both', backward='ste', compute='float', parts=1):
        super().__init__()
        self.how = Recipe(spec(weights), spec(activations), spec(gradients),
                          gradients_in, backward, compute, parts)
        for s, n in ((self.how.weights, n_in), (self.how.activations, n_in),
                     (self.how.gradients, n_out // parts)):
            quantize(torch.zeros(1, n), s)          # ValueError now if a block does not divide
        self.cross_entropy = cross_entropy
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.zeros(n_out)) if bias else None
        self.master = None
        self.register_buffer('codes', None)
        self.register_buffer('scale', None)
        self.register_buffer('key', torch.zeros((), dtype=torch.int32), persistent=False)
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x):
        self.how.check(self.master)
        y = Matmul.apply(x.reshape(-1, x.shape[-1]), self.weight, self.bias, self.key, self.how,
                         self.master, self.codes, self.scale)
        return y.view(*x.shape[:-1], -1)

    def loss(self, x, targets):
        """Mean cross-entropy of the logits y, which never exist as a whole, with targets (...), of
        which all count. For a head, which has neither bias nor master."""
        assert self.bias is None and self.master is None
        self.how.check(None)
        return CrossEntropy.apply(x.flatten(0, -2), self.weight, targets.flatten(), self.key,
                                  self.how, self.cross_entropy, torch.is_grad_enabled())

    def stored(self):
        """The weight as it is stored: the master's codes and scale, or the parameter itself."""
        if self.master is None:
            return QTensor(self.weight.data, cols=self.weight.shape[1])
        return QTensor(self.codes, self.scale, spec=self.master, cols=self.weight.shape[1])

    @torch.no_grad()
    def store_(self, master, q=None):
        """Keep only codes: q = clip(round(w / s), Qn, Qp), or the QTensor that is given. s comes
        from w as it is now and from then on is fixed, or learned, but not computed again: absmean
        of a ternary w would shrink.

        autograd still wants a float leaf of the weight's shape to hang .grad on: a ghost, one zero
        expanded to that shape, in four bytes of memory. Call this on the device where it stays."""
        s = check_master(master)
        if s is None:
            return
        if q is None:
            w = dequantize(self.stored())
            q = quantize(w, replace(s, rounding='nearest'), parts=self.how.parts)
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


def linears(model):
    """{name of its weight: Linear}, of those whose weight is theirs alone: not of a tied head."""
    layers = {f'{name}.weight': m for name, m in model.named_modules() if isinstance(m, Linear)}
    return {name: layers[name] for name, _ in model.named_parameters() if name in layers}


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
    clip: torch.Tensor     # the gradient counts so many times, in [0, 1]


def direction(m, v, h):
    """r = mhat / (sqrt(vhat) + eps), then sign(r) max(0, |r| - tau), none below the noise. Both
    bias corrections are taken together, which saves two divisions an element."""
    r = m / (h.bias1 / h.bias2.sqrt() * v.sqrt() + h.bias1 * h.eps)
    return (r.abs() - h.tau).clamp(min=0).copysign(r)


def factor(g, row, col, h):
    """row_i, col_j <- beta2 row_i, col_j + (1 - beta2) mean of g_ij^2 over j, over i, in place;
    then v_ij = row_i col_j / mean(row), and mean(row) is returned (Adafactor, arXiv 1804.04235)"""
    g2 = (h.clip * g.float()).square()
    row.lerp_(g2.mean(1, keepdim=True), 1 - h.beta2)
    col.lerp_(g2.mean(0, keepdim=True), 1 - h.beta2)
    return row.mean().clamp(min=1e-30)


def _put(q, new):
    """Write a QTensor over another, in place."""
    for old, t in zip(q[:4], new[:4]):
        if old is not None:
            old.copy_(t)


def update(wq, g, mq, vq, h, key, start, code_units):
    """One step of AdamW on a block of rows; w, m and v are overwritten, as they are stored.

        m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g^2,   w <- (1 - decay) w - lr r

    code_units: lr counts in half ranges of the grid, s Qp. For ternary codes, the direct update:

        q <- clip(SR(q - lr r), -1, 1): a code moves a level against r with probability lr |r|

    Where there is a threshold, evidence that moved a code is used up: its m <- 0.

    Factored, v is (row, col, mean): row col / mean. `start` is the index of the first element in
    the noise. Returns dL/d log s = sum g w over what shares a scale (or None), and how many codes
    changed (or None)."""
    w, g = dequantize(wq), h.clip * g.float()
    m = h.beta1 * dequantize(mq) + (1 - h.beta1) * g
    if isinstance(vq, QTensor):
        v = h.beta2 * dequantize(vq) + (1 - h.beta2) * g * g
    else:
        v = vq[0] * vq[1] / vq[2]
    lr, ds = h.lr, None
    parts = 1 if wq.scale is None else wq.scale.shape[0]        # q, k and v may have scales of own
    if code_units:
        s, axis = wq.scale, 0 if wq.spec.group == 'column' else -1
        lr = lr * wq.spec.top * s.expand_as(_grouped(w, wq.spec, parts)).reshape(w.shape)
        ds = _grouped(g * w, wq.spec, parts).sum(axis, keepdim=True)
    w_new = (1 - h.decay) * w - lr * direction(m, v, h)
    new = quantize(w_new, wq.spec, key, scale=wq.scale, parts=parts, start=start)
    flips = None
    if wq.spec is not None:
        moved = dequantize(new) != w
        m, flips = torch.where(moved & (h.tau > 0), 0.0, m), moved.sum()
    _put(wq._replace(scale=None), new)             # w keeps its scale
    _put(mq, quantize(m, mq.spec, key + 1, start=start))
    if isinstance(vq, QTensor):
        _put(vq, quantize(v, vq.spec, key + 2, start=start))
    return ds, flips


def _rows(t, a, b, n):
    """Rows a to b of a tensor that has n of them; a scale that all rows share comes whole."""
    return t[a:b] if t is not None and t.dim() and t.shape[0] == n else t


def _take(q, a, b, n):
    """Rows a to b of a QTensor of n rows, as views."""
    codes, scale, zero, outer = (_rows(t, a, b, n) for t in q[:4])
    return QTensor(codes, scale, zero, outer, q.spec, q.cols)


def _vary_rows(n, *tensors):
    """Tell torch.compile that only the number of rows, now n, differs from call to call."""
    for t in tensors:
        for axis in range(0 if t is None else t.dim()):
            if axis == 0 and t.shape[0] == n:
                torch._dynamo.maybe_mark_dynamic(t, 0)
            else:
                torch._dynamo.mark_static(t, axis)


class Group:
    """Parameters with what the optimizer holds for them, in flat buffers: their rows one below the
    other, so that one call updates them all. Their codes or values become views of the buffer.

    members  [(name, parameter, Linear or None)], of equal columns and stored alike
    flat     the gradients too are views of one buffer, and are zeroed instead of freed"""

    def __init__(self, members, m, v, learn_scale, decay, flat, compiled):
        self.names, self.params, self.layers = zip(*members)
        layer = self.layers[0]
        self.low_bit, self.decay = layer is not None and layer.scale is not None, decay
        stored = [self._stored(p, layer) for _, p, layer in members]
        ends = torch.tensor([q.codes.shape[0] for q in stored]).cumsum(0).tolist()
        self.spans = list(zip([0, *ends], ends))                       # rows of each parameter
        self.rows, self.cols = ends[-1], stored[0].cols
        self.w = stored[0]
        if len(stored) > 1:
            codes, scale = (None if t[0] is None else torch.cat(t)
                            for t in list(zip(*stored))[:2])
            self.w = self.w._replace(codes=codes, scale=scale)
        for (a, b), p, layer in zip(self.spans, self.params, self.layers):
            q = _take(self.w, a, b, self.rows)
            # .data: to autograd each is a tensor of its own, not changed when its neighbours are
            if layer is not None and layer.master is not None:
                layer.codes = q.codes.data
                layer.scale = None if q.scale is None else q.scale.data
            else:
                p.data = q.codes.view(p.shape)
        device = self.w.codes.device
        self.m, self.factored = self._zeros(m, device), v == 'factored'
        if self.factored:                                              # as `factor` says
            shapes = (self.rows, 1), (1, self.cols)
            self.v = tuple(torch.zeros(shape, device=device) for shape in shapes)
        else:
            self.v = self._zeros(v, device)
        learned = learn_scale and self.low_bit
        self.s = tuple(torch.zeros_like(self.w.scale) for _ in 'mv') if learned else ()
        self.g = torch.zeros(self.rows, self.cols, device=device) if flat else None
        # rows with scales of their own go a block at a time, as suits the cache of a CPU
        specs = [q.spec for q in (self.w, self.m, self.v) if isinstance(q, QTensor)]
        shared = any(s is not None and s.shared for s in specs)
        elements = 2 ** 28 if self.w.codes.is_cuda else 2 ** 18 if compiled else 2 ** 17
        self.block = self.rows if shared else max(1, elements // self.cols)

    @staticmethod
    def _stored(p, layer):
        """A parameter as it is stored, in rows; what is in no Linear counts as one column."""
        if layer is None:
            return QTensor(p.data.reshape(-1, 1), cols=1)
        return layer.stored()

    def _zeros(self, how, device):
        """Quantized zeros, made of one row of them."""
        q = quantize(torch.zeros(1, self.cols, device=device), how)
        shared = q.spec is not None and q.spec.group in ('tensor', 'column')    # by all rows
        codes, scale, zero = (
            None if t is None else t.repeat(self.rows, *[1] * (t.dim() - 1)) for t in q[:3])
        return q._replace(codes=codes) if shared else QTensor(codes, scale, zero, *q[3:])

    def state(self, i):
        """Every tensor of the state of parameter i, in a fixed order, as views."""
        a, b = self.spans[i]
        v = self.v if self.factored else self.v[:4]
        return [_rows(t, a, b, self.rows) for t in (*self.m[:4], *v, *self.s) if t is not None]


class AdamW:
    """AdamW whose weights, m and v are stored quantized between steps (Loshchilov & Hutter, arXiv
    1711.05101; quantized states: paper 1; low-bit masters: paper 2). Only the weights of Linear
    layers take the Specs: embeddings, norms and biases are float32 throughout.

    adam_m, adam_v  Specs of the moments; adam_v = 'factored' keeps one row and one column of v
    code_lr         > 0: the direct update of low-bit masters, by code_lr half ranges of their grid
                    times r, without weight decay; 0: they move by learning_rate, as published
    scale_lr        of the direct update: its scales learn at this rate, log s by Adam; 0: fixed
    embedding_lr    of all that is in no Linear: embeddings, norms, biases; 0: learning_rate
    threshold       of weights of Linear layers: tau, in standard deviations of r under white
                    noise; where a code moved, its m starts from zero again
    ramp            of the same: beta1_t = min(.9995, 1 - 1 / (10 + t / ramp)); 0: beta1 is fixed
    flat            gradients live in one buffer a group: one call a group, as suits a GPU
    compiled        torch.compile the update
    Raises ValueError for a bad Spec or a block that does not divide, when it is built.

    A step is zero_grad(), backward, step(). Or, to free each gradient as soon as it is there,
    begin(), and in a hook of every parameter apply(p), and finish().
    """

    def __init__(self, model, learning_rate=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0,
                 adam_m='', adam_v='', code_lr=0.0, scale_lr=0.0, threshold=0.0, ramp=0.0,
                 embedding_lr=0.0, seed=0, flat=False, compiled=False):
        self.learning_rate, self.betas, self.eps = learning_rate, betas, eps
        self.embedding_lr = embedding_lr or learning_rate
        self.weight_decay, self.code_lr, self.scale_lr = weight_decay, code_lr, scale_lr
        self.threshold, self.ramp, self.seed = threshold, ramp, seed
        self.t, self.momentum, self.noise = 0, 1.0, 0.0
        self.compiled, self.update, self.factor = compiled, update, factor
        if compiled:
            self.update, self.factor = torch.compile(update), torch.compile(factor)
        layers = linears(model)
        v = adam_v if adam_v == 'factored' else spec(adam_v)
        found = {}
        for name, p in model.named_parameters():       # a tied weight comes once, by one name
            layer = layers.get(name)
            specs = (spec(adam_m), v, layer.master) if layer else ()
            alone = any(s == 'factored' or s is not None and s.shared for s in specs)
            columns = p.shape[1] if layer else 1
            stored = layer.master if layer else None
            key = layer is not None, p.dim() > 1, columns, stored, name if alone else ''
            found.setdefault(key, []).append((name, p, layer))
        learn = code_lr > 0 and scale_lr > 0
        self.groups = []
        for (linear, matrix, *_), members in found.items():
            m, v = (adam_m, adam_v) if linear else ('', '')
            self.groups.append(Group(members, m, v, learn, matrix, flat, compiled))
        self.where = {p: (group, *span) for group in self.groups
                      for p, span in zip(group.params, group.spans)}
        self.zero_grad()

    def zero_grad(self):
        for p, (group, a, b) in self.where.items():
            p.grad = None if group.g is None else group.g[a:b].view(p.shape)
        for group in self.groups:
            if group.g is not None:
                group.g.zero_()

    def gradients(self):
        """All there are, one per group or one per parameter."""
        flat = [group.g for group in self.groups if group.g is not None]
        return flat or [p.grad for p in self.where if p.grad is not None]

    def step(self, scale=1.0, clip=1.0):
        """One step from the .grad of all parameters; `scale` in [0, 1] is the schedule, and the
        gradients count `clip` times."""
        self.begin(scale)
        for group in self.groups:
            if group.g is not None:
                self._step(group, 0, group.rows, group.g, clip)
                continue
            for p in group.params:
                if p.grad is not None:
                    self.apply(p, clip)
        self.finish()

    def begin(self, scale=1.0):
        """The numbers of the next step."""
        self.t, self.scale = self.t + 1, scale
        beta1 = self.betas[0]
        plain, linear = (beta1, 1 - beta1 ** self.t, 0.0), self._momentum()
        for i, group in enumerate(self.groups):
            group.direct = group.low_bit and self.code_lr > 0
            lr = scale * (self.code_lr if group.direct else
                          self.learning_rate if group.layers[0] else self.embedding_lr)
            decay = lr * self.weight_decay if group.decay and not group.direct else 0.0
            momentum = linear if group.layers[0] else plain
            group.h, group.key = self._hyper(group, i, lr, decay, *momentum)
            group.flips, group.ds = 0, None
            if group.direct:
                group.ds = torch.zeros_like(group.w.scale)

    def _momentum(self):
        """beta1, 1 - prod beta1 and tau of the weights of Linear layers. Of gradients that are
        white noise of variance v, m = sum w_i g_i has variance N v, N = sum w_i^2, so that r has
        the deviation sqrt(N) / bias1: tau is `threshold` times that."""
        beta1 = min(0.9995, 1 - 1 / (10 + self.t / self.ramp)) if self.ramp else self.betas[0]
        self.momentum *= beta1
        self.noise = beta1 ** 2 * self.noise + (1 - beta1) ** 2
        bias1 = 1 - self.momentum
        return beta1, bias1, self.threshold * math.sqrt(self.noise) / bias1

    def _hyper(self, group, i, lr, decay, beta1, bias1, tau):
        """The numbers and the key of the noise as tensors, on their device."""
        beta2, device = self.betas[1], group.w.codes.device
        numbers = lr, decay, beta1, beta2, bias1, 1 - beta2 ** self.t, self.eps, tau, 1.0
        key = torch.full((), noise_key(self.seed, self.t, i), dtype=torch.int32, device=device)
        return Hyper(*torch.tensor(numbers, device=device).unbind()), key

    @torch.no_grad()
    def apply(self, p, clip=1.0):
        """Update one parameter by its .grad, which counts `clip` times."""
        group, a, b = self.where[p]
        self._step(group, a, b, p.grad.reshape(b - a, -1), clip)

    @torch.no_grad()
    def _step(self, group, a, b, g, clip):
        n, device = group.rows, g.device
        h = group.h._replace(clip=torch.as_tensor(clip, dtype=torch.float32, device=device))
        if group.factored:
            mean = self.factor(g, *group.v, h)
        for c in range(a, b, group.block):
            d = min(c + group.block, b)
            v = (group.v[0][c:d], group.v[1], mean) if group.factored else _take(group.v, c, d, n)
            start = (c * group.cols + 2 ** 31) % 2 ** 32 - 2 ** 31      # wraps, as int32 does
            start = torch.full((), start, dtype=torch.int32, device=device)
            w, m, g_cd = _take(group.w, c, d, n), _take(group.m, c, d, n), g[c - a:d - a]
            if self.compiled:
                _vary_rows(d - c, g_cd, *w[:4], *m[:4], *v[:4])
            ds, flips = self.update(w, g_cd, m, v, h, group.key, start, group.direct)
            if ds is not None:
                _rows(group.ds, c, d, n).add_(ds)
            if flips is not None:
                group.flips += flips

    @torch.no_grad()
    def finish(self):
        """Learn the scales: log s <- log s - lr mhat / sqrt(vhat), m and v those of dL/d log s."""
        beta1, beta2 = self.betas
        for group in self.groups:
            if group.s:
                m, v = group.s
                m.lerp_(group.ds, 1 - beta1)
                v.lerp_(group.ds ** 2, 1 - beta2)
                r = m / (1 - beta1 ** self.t) / ((v / (1 - beta2 ** self.t)).sqrt() + 1e-30)
                group.w.scale.mul_(torch.exp(-self.scale * self.scale_lr * r))

    def flips(self):
        """Share of the codes of all masters that the last step changed."""
        groups = [g for g in self.groups if g.layers[0] is not None]
        return sum(int(g.flips) for g in groups) / sum(g.rows * g.cols for g in groups)

    def state_dict(self):
        """Numbers and tensors only, so that torch.load(weights_only=True) reads it."""
        state = {name: group.state(i) for group in self.groups
                 for i, name in enumerate(group.names)}
        return {'t': self.t, 'momentum': self.momentum, 'noise': self.noise, 'state': state}

    def load_state_dict(self, state):
        """Copy a state in. Raises ValueError if it is of another model or stored otherwise."""
        mine, saved = self.state_dict()['state'], state['state']
        if saved.keys() != mine.keys():
            raise ValueError('the optimizer state is of another model')
        for name, tensors in mine.items():
            kinds = [[(t.shape, t.dtype) for t in state] for state in (tensors, saved[name])]
            if kinds[0] != kinds[1]:
                raise ValueError(f'the optimizer state of {name} is stored in another way; '
                                 'use the same adam_m, adam_v and master')
            for t, s in zip(tensors, saved[name]):
                t.copy_(s)
        self.t, self.momentum, self.noise = state['t'], state['momentum'], state['noise']


# ------------------------------------------------------------------------------------------------
# post-training quantization

def rtn_(model, how):
    """Round to nearest: q = clip(round(w / s), Qn, Qp) for every block linear, which from then on
    holds those codes and nothing else. The nearest point of the grid, whatever the data."""
    for layer in linears(model).values():
        layer.store_(how)


def gptq(W, H, how, damping=0.01, act_order=False, parts=1):
    """Codes of W (out, in), a QTensor, that make (W - s Q) X small, not W - s Q:

        q_i = clip(round(w_i / s), Qn, Qp),  e = (w_i - s q_i) / U_ii,  W[:, i:] -= e U[i, i:]

    for columns i = 1 .. in: what rounding a column does to the output, those after it make up for.
    H = 2 mean x x^T over the inputs x of the layer, (in, in) float32, and U is the upper Cholesky
    factor, U^T U = (H + damping mean(diag H) 1)^-1, the mean over H_ii > 0. The grid is that of
    rounding W to nearest: s is of W as it comes. A channel without data (H_ii = 0) is rounded to
    nearest. Columns go in blocks of 128: what lies after a block is corrected by one matmul.
    (Frantar et al., GPTQ, arXiv 2210.17323, which sets weights of channels without data to 0.)

    act_order  columns by descending H_ii instead of in order; `parts` as in quantize
    Raises ValueError where H, damped, is not positive definite: more data, or more damping."""
    s, n = replace(spec(how), rounding='nearest'), W.shape[1]
    grid = quantize(W, s, parts=parts)
    step = grid.scale.expand_as(_grouped(W, s, parts)).reshape(W.shape)     # (out, in)
    H, alive = H.clone(), H.diagonal() > 0
    damp = damping * H.diagonal()[alive].mean() if alive.any() else 0
    H.diagonal().copy_(torch.where(alive, H.diagonal() + damp, 1.0))
    order = torch.arange(n, device=W.device)
    if act_order:
        order = H.diagonal().argsort(descending=True, stable=True)
    W, H, step = W.float()[:, order], H[order][:, order], step[:, order]
    L, bad = torch.linalg.cholesky_ex(H.flip(0, 1))         # with rows and columns backwards
    if bad or not L.isfinite().all():
        raise ValueError(f'the Hessian is not positive definite with damping = {damping}: give '
                         'more sequences, or more damping')
    U = torch.linalg.solve_triangular(L, torch.eye(n, device=L.device), upper=False).flip(0, 1)
    codes = torch.empty_like(W)
    for a in range(0, n, 128):
        b = min(a + 128, n)
        E = torch.empty_like(W[:, a:b])
        for i in range(a, b):
            codes[:, i] = _round(W[:, i] / step[:, i], s, 0, 0)
            E[:, i - a] = (W[:, i] - step[:, i] * codes[:, i]) / U[i, i]
            W[:, i:b] -= torch.outer(E[:, i - a], U[i, i:b])
        W[:, b:] -= E @ U[a:b, b:]
    return grid._replace(codes=pack(_encode(codes[:, order.argsort()], s), s))


@torch.no_grad()
def hessians(layers, run):
    """H = 2 mean x x^T, (in, in) float32, of each Linear, over the tokens that go through it in
    run(), x as it is multiplied: quantized, where the layer quantizes it."""
    found = {layer: [layer.weight.new_zeros(2 * layer.weight.shape[1:]), 0] for layer in layers}

    def look(layer, args):
        x = fake_quant(args[0].flatten(0, -2).float(), layer.how.activations)   # (N, in)
        found[layer][0].addmm_(x.T, x, alpha=2)
        found[layer][1] += len(x)

    hooks = [layer.register_forward_pre_hook(look) for layer in found]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return [H / max(1, tokens) for H, tokens in found.values()]


@torch.no_grad()
def gptq_(model, how, batches, damping=0.01, act_order=False, progress=iter):
    """GPTQ of all block linears, in the order in which they run, on the tokens of `batches`, a
    list of (B, T): the inputs of each have gone through those before it, quantized. Afterwards
    its codes are the weights, as after `rtn_`; `progress` is called on the list of blocks.

    Raises ValueError if there are no batches, where a Hessian is not positive definite, and where
    the weights are codes already or would be quantized a second time in the forward."""
    if not batches:
        raise ValueError('GPTQ needs data: give it sequences')
    if check_master(how).grid == 'bf16':
        raise ValueError('GPTQ needs a grid with scales; bf16 has none')
    for name, layer in linears(model).items():
        if layer.master is not None or layer.how.weights is not None:
            raise ValueError(f'{name} is quantized already; GPTQ needs it in full precision')
    mode = model.training
    model.eval()
    inputs = [model.embed(idx) for idx in batches]                  # of the block, [(x, angles)]
    for block in progress(model.h):
        for name, layer in linears(block).items():
            H, = hessians([layer], lambda: [block(x, angles, None) for x, angles in inputs])
            try:
                q = gptq(layer.weight, H, how, damping, act_order, layer.how.parts)
                layer.store_(how, q)
            except ValueError as e:
                raise ValueError(f'{name}: {e}') from None
        inputs = [(block(x, angles, None), angles) for x, angles in inputs]
    model.train(mode)


# ------------------------------------------------------------------------------------------------
# accounting and health

def _held(tensors):
    """Bytes of the storages behind tensors, each storage once."""
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def held(model, optimizer=None):
    """Bytes really held, read off the storages: {'weights', 'optimizer', 'gradients', 'linear'};
    'linear' is the same three for the weights of Linear layers alone, in bytes per weight."""
    groups, layers = optimizer.groups if optimizer else [], linears(model).values()

    def of(groups):
        grads = [p.grad for group in groups for p in group.params if p.grad is not None]
        states = [t for group in groups for i in range(len(group.names)) for t in group.state(i)]
        return {'optimizer': _held(states), 'gradients': _held(grads)}

    count = sum(layer.weight.numel() for layer in layers)
    weights = _held(t for layer in layers for t in layer.stored()[:2] if t is not None)
    linear = {'weights': weights, **of([g for g in groups if g.layers[0] is not None])}
    return {'weights': _held([*model.parameters(), *model.buffers()]), **of(groups),
            'linear': {k: n / count for k, n in linear.items()}}


def shares(model):
    """{level: share of the codes} of the low-bit masters below 8 bits; {} without any."""
    counts = {}
    for layer in model.modules():
        if isinstance(layer, Linear) and layer.master is not None and layer.master.packed:
            codes = unpack(layer.codes, layer.master, layer.weight.shape[1])
            levels = _levels(codes, layer.master)
            for level, n in zip(*(t.tolist() for t in levels.unique(return_counts=True))):
                counts[f'{level:g}'] = counts.get(f'{level:g}', 0) + n
    return {level: n / sum(counts.values()) for level, n in counts.items()}


def _damage(x, how, parts=1):
    """What quantizing x does: signal-to-noise in dB (None: exact), shares of zeros and of what is
    beyond the grid; where it is rotated, of x H."""
    x, s = rotate(x) if how.rotation else x.float(), replace(how, rotation='')
    q = quantize(x, s, parts=parts)
    y = dequantize(q)
    noise = (x - y).square().sum()
    snr = 10 * math.log10(x.square().sum() / noise) if noise > 0 else None
    clipped = 0.0
    if q.zero is None and q.scale is not None:
        low = -s.top if s.grid in FLOATS else _levels(torch.tensor(INTEGERS[s.grid][0]), s).item()
        levels = _grouped(x, s, parts) / _real_scale(q.scale, q.outer) / (1 + 1e-5)
        clipped = ((levels < low) | (levels > s.top)).float().mean().item()
    return {'snr_db': snr, 'zero': (y == 0).float().mean().item(), 'clipped': clipped}


@torch.no_grad()
def health(model, *inputs):
    """Of each Linear that quantizes, on one batch: what its Specs do to weight and input, and how
    the codes of a low-bit master share the levels: {layer: {'weights', 'activations', ..}}."""
    report, hooks = {}, []

    def look(name):
        def hook(layer, args):
            entry, how = {}, layer.how
            if how.weights is not None:
                entry['weights'] = _damage(dequantize(layer.stored()), how.weights, how.parts)
            if how.activations is not None:
                entry['activations'] = _damage(args[0].flatten(0, -2), how.activations)
            entry['levels'] = shares(layer)
            if any((how.weights, how.activations, how.gradients, layer.master)):
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
