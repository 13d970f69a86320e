"""
Quantized training of language models: every strategy, one vocabulary.

A linear layer is three matmuls. With tokens in rows, x (N, in), w (out, in), g = dL/dy (N, out):

    forward     y  = x^ (w^)^T  (+ b)    x^ = Q_a(x),  w^ = Q_w(w)
    backward    dx = g^ w^               g^ = Q_g(g)
                dw = (g^)^T x^

A step of the optimizer reads and writes w itself and its moments m and v. Each of these tensors
can be quantized, and a string says how: 'int8/row', 'ternary/tensor/absmean', 'uint8/256/root4',
or '' for full precision. Weights are low-bit in two ways: a float32 weight is rounded in every
forward (`weights`: paper 1 and BitNet), or low-bit codes are the only weight there is (`stored`:
paper 2), and the optimizer moves the codes themselves. The two combine.

    paper 1  Chitsaz et al., Exploring Quantization for Efficient Pre-Training, arXiv 2407.11722
    paper 2  Zhao et al., Direct Quantized Training with Stochastic Rounding, arXiv 2412.04787
"""
import difflib
import hashlib
import math
from collections import Counter, namedtuple
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

# ------------------------------------------------------------------------------------------------
# how a tensor is quantized: x^ = s level(q), a scale s for each group of x, a code q for each x

# a code is an integer from low = Qn to high = Qp; on a float grid, float = (mantissa bits, smallest
# exponent), it is the rounded number (fp4 stores its bits). Below 8 bits, codes are packed in bytes
Grid = namedtuple('Grid', 'bits low high dtype float', defaults=(torch.uint8, ()))
GRIDS = {
    'ternary': Grid(2, -1, 1),
    **{f'int{n}': Grid(n, -2 ** (n - 1), 2 ** (n - 1) - 1, torch.int8) for n in range(2, 9)},
    'uint4': Grid(4, 0, 15),
    'uint8': Grid(8, 0, 255),
    'fp4': Grid(4, -6, 6, torch.uint8, (1, 0)),                         # e2m1
    'fp8': Grid(8, -448, 448, torch.float8_e4m3fn, (3, -6)),            # e4m3
    'fp8e5': Grid(8, -57344, 57344, torch.float8_e5m2, (2, -14)),       # e5m2
    'bf16': Grid(16, -2. ** 128 + 2. ** 120, 2. ** 128 - 2. ** 120, torch.bfloat16, (7, -126)),
    'rank1': Grid(0, 0, 0),     # no codes, but a mean of each row and column: Adafactor's v
}
# what an integer code stands for, before the scale: its `level`. `code` is the inverse, a real
# number, and `nearest`, if not the same, a number that rounds to the code of the nearest level
Map = namedtuple('Map', 'level code nearest', defaults=(None,))
MAPS = {
    'linear': Map(lambda c: c, lambda y: y),
    # level c |c|, for m; the middle of c^2 and (c + 1)^2 is (c + 1/2)^2 + 1/4
    'sqrt': Map(lambda c: c * abs(c), lambda y: y.abs().sqrt().copysign(y),
                lambda y: (y.abs() - 0.25).clamp(min=0).sqrt().copysign(y)),
    # level c^4, for v: what is rounded is its root, and `quantize` keeps a positive v from 0
    'root4': Map(lambda c: c * abs(c) ** 3, lambda y: y.abs().sqrt().sqrt().copysign(y)),
}
FORMATS = {'nvfp4': ('fp4', 16), 'mxfp4': ('fp4', 32), 'mxfp8': ('fp8', 32)}    # grid and block
WORDS = {  # field of Spec: its words; a block size, any number, is the other kind of group
    'grid': list(GRIDS), 'group': ['tensor', 'row', 'column'],
    'scale': ['absmax', 'absmean', 'mse'], 'rounding': ['nearest', 'stochastic'],
    'map': list(MAPS), 'sign': ['symmetric', 'asymmetric'], 'rotation': ['hadamard'],
}
TINY = 2.0 ** -126      # the smallest scale, so that no quotient is 0 / 0; in nvfp4, of outer
INT_MM_CPU = 'AVX512' in torch.backends.cpu.get_cpu_capability()    # else _int_mm is plain loops


@dataclass(frozen=True)
class Spec:
    """How a tensor is quantized; spec('int8/row/stochastic') parses one, words in any order."""
    grid: str                   # the codes, a key of GRIDS
    group: str | int = 'tensor'     # what shares a scale: the tensor; a row, along the last axis;
                                # a column, along the others; n neighbours on the last axis
    scale: str = 'absmax'       # s = max|x| / top, which clips nothing (int2 then has 3 levels);
                                # absmean: mean|x| / sqrt(Qp) (BitNet b1.58, arXiv 2402.17764;
                                # a4.8, 2411.04965); mse: the one of `least_error`
    rounding: str = 'nearest'   # or stochastic: up with the probability that keeps the mean
    map: str = 'linear'         # a key of MAPS: what a code stands for
    sign: str = 'symmetric'     # asymmetric: x^ = (q + z) s; codes span [min, max] to half a step
    rotation: str = ''          # hadamard: x H is quantized, and x^ = (x H)^ H, see `rotate`
    format: str = ''            # nvfp4: e4m3 scales under one of float32, which clip up to 6 %,
                                # or a third in blocks 2^-17 as large as the largest;
                                # mxfp4: powers of two, rounded down, which clip up to a quarter;
                                # mxfp8: rounded up

    @property
    def top(self):      # level of the highest code
        return float(MAPS[self.map].level(GRIDS[self.grid].high))

    @property
    def axis(self):     # the axis of a `grouped` x along which a scale is shared
        return 0 if self.group == 'column' else -1


def spec(text):
    """'int8/row/...' as a Spec, '' as None. Raises ValueError for a word that is unknown, said
    twice, or contradicts another."""
    if not text or isinstance(text, Spec):
        return text or None
    known, said = {word: {field: word} for field, words in WORDS.items() for word in words}, {}
    known |= {word: dict(grid=g, group=n, format=word) for word, (g, n) in FORMATS.items()}
    for word in text.split('/'):
        size = word.isdecimal() and int(word)
        found = {'group': size} if size else known.get(word)
        if not found:
            near = difflib.get_close_matches(word, known, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"use {', '.join(known)} or a size"
            raise ValueError(f"spec '{text}': unknown word '{word}', {hint}")
        for field in found.keys() & said.keys():
            raise ValueError(f"spec '{text}': '{word}' says the {field} a second time")
        said |= found
    if 'grid' not in said:
        raise ValueError(f"spec '{text}' names no grid; add one of {', '.join(GRIDS)}")
    s, grid, words = Spec(**said), GRIDS[said['grid']], {*map(str, said.values())}
    bent = MAPS.keys() - {'linear'}
    for is_so, wrong in (
            (s.grid == 'bf16', words - {'bf16', 'nearest', 'stochastic'}),
            (s.grid == 'rank1', words - {'rank1'}), (s.grid == 'ternary', {'asymmetric'}),
            (grid.float, bent | {'asymmetric', 'absmean'}),
            (s.sign == 'asymmetric', bent | {'absmean', 'mse'}),
            (s.sign == 'symmetric' and grid.low == 0, {'hadamard'}),
            (s.map != 'linear', {'absmean'}), (s.format[:2] == 'mx', {'mse'})):
        for word in sorted(words & wrong) if is_so else ():
            raise ValueError(f"spec '{text}': '{word}' does not go with the rest")
    return s


# ------------------------------------------------------------------------------------------------
# noise: a hash instead of a generator

def _mix(h):
    """A bijection of int32; each bit depends on all bits of h (lowbias32 of C. Wellons)."""
    h = (h ^ ((h >> 16) & 0xFFFF)) * 0x7FEB352D
    h = (h ^ ((h >> 15) & 0x1FFFF)) * (0x846CA68B - (1 << 32))
    return h ^ ((h >> 16) & 0xFFFF)


def noise_key(*numbers):
    """One int32 from (seed, step, ...): the same numbers give the same noise on any machine."""
    digest = hashlib.blake2s(repr(numbers).encode(), digest_size=4).digest()
    return int.from_bytes(digest, 'little', signed=True)


def stream(key, n):
    """The n-th key derived from `key`, int32 (): a Linear has 0 for w, 1 for x, 2 and 3 for g; the
    optimizer the key itself for w, 1 for m or e, 2 for v."""
    return _mix(_mix(key) + n)


def uniform(x, key):
    """u_i = hash(i, key) for each element of x, a float32 in [0, 1], the same on any device."""
    if x.numel() >= 2 ** 31:            # i would repeat
        raise ValueError(f'{x.numel()} elements at once are too many for stochastic rounding; '
                         'lower batch_size and raise grad_accum')
    i = torch.arange(x.numel(), dtype=torch.int32, device=x.device).view(x.shape)
    # the key enters both rounds: in the first alone, two keys would permute the same numbers
    return (_mix(_mix(i ^ key) + key) & 0x7FFFFFFF).float() * 2.0 ** -31


# ------------------------------------------------------------------------------------------------
# quantize and dequantize

class QTensor(NamedTuple):
    """What is stored of a tensor: x^ = (levels(q) + zero) * scale * outer."""
    codes: torch.Tensor                # int8, uint8, fp8, bf16; below 8 bits from 0 up, packed;
                                       # of rank1 a mean per row; without a spec x itself
    scale: torch.Tensor | None = None  # one per group: float32, or a byte in nvfp4 and mx; of
                                       # rank1 a mean per column
    zero: torch.Tensor | None = None   # asymmetric only, an integer per group
    outer: torch.Tensor | None = None  # nvfp4 only, the scale of the scales
    spec: Spec | None = None


def quantize(x, how, key=0, scale=None, packed=True):
    """x (..., C) as a QTensor. `how` is a Spec or its string; without it x is stored as it is.

        symmetric    q = clip(round(code(x / s)), Qn, Qp)    s = max|x| / level(Qp), see MAPS
        asymmetric   q = clip(round(x / s - z), Qn, Qp)      s = (max - min) / (Qp - Qn),
                     z = round(min / s - Qn)                 min <= 0 <= max (paper 1)

    All but `rotate` in float32. A `scale` that is given is kept. Unless `packed`, codes below 8
    bits stay float32. Raises ValueError if blocks or bytes do not divide C."""
    s = spec(how)
    if s is None:
        return QTensor(x)
    x = rotate(x) if s.rotation else x.float()
    if s.grid == 'rank1':
        return QTensor(x.mean(-1, keepdim=True), x.mean(-2, keepdim=True), spec=s)
    if s.grid == 'bf16':
        return QTensor(encode(round_to(x, s, key), s), spec=s)
    groups = grouped(x, s)
    scale, zero, outer = find_scale(groups, s) if scale is None else (scale, None, None)
    y = groups / full_scale(scale, outer, s)
    c = round_to(y if zero is None else y - zero, s, key)
    if s.map == 'root4':    # steps are divided by sqrt(v): a positive v must not become zero
        c = torch.where((c == 0) & (groups > 0), 1.0, c)
    codes = c.reshape(x.shape)
    if packed or GRIDS[s.grid].bits > 7:    # to pack and unpack would take most of the time
        codes = encode(codes, s)
    return QTensor(codes, scale, zero, outer, s)


def dequantize(q, dtype=torch.float32):
    """x^ = (levels(q) + zero) scale outer, in float32, rotated back, then cast; (..., C)."""
    s = q.spec
    if s is None or s.grid == 'bf16':
        return q.codes.to(dtype)
    if s.grid == 'rank1':
        # v_ij = row_i col_j / mean; the mean is repeated by row, to be fused into the rows' kernel
        mean = q.scale.expand(*q.codes.shape[:-1], -1).mean(-1, keepdim=True)
        return (q.codes / mean.clamp(min=TINY) * q.scale).to(dtype)
    y = levels(q)
    x = grouped(y, s) if q.zero is None else grouped(y, s) + q.zero
    x = x * full_scale(q.scale, q.outer, s)
    x = rotate(x.view(y.shape)) if s.rotation else x
    return x.to(dtype).view(y.shape)    # cast first: else inductor finds each block by a division


def fake_quant(x, how, key=0):
    """dequantize(quantize(x)): the values a quantized x stands for, in x's dtype."""
    return dequantize(quantize(x, how, key, packed=False), x.dtype)


# the steps of quantize, in its order

def rotate(x):
    """x H along the last axis, float32: H the orthogonal Hadamard matrix, which spreads outliers,
    in blocks of the highest power of two n <= 128 that divides the axis. H_ij is (-1)^k / sqrt(n),
    k the number of bits that i and j share; (x H)(w H)^T = x w^T (QuaRot, arXiv 2404.00456; in
    pre-training, QuEST, 2502.05003). The matmul runs in x's dtype, and rounds x H to it."""
    n = math.gcd(x.shape[-1], 128)
    i = torch.arange(n, device=x.device)
    signs = 1 - 2 * (sum((i[:, None] & i) >> bit for bit in range(7)) & 1)          # (n, n)
    y = x.unflatten(-1, (-1, n)) @ signs.to(x.dtype)                                # exact signs
    return y.float().flatten(-2) * n ** -0.5


def grouped(x, s):
    """View x with what shares a scale along one axis, s.axis."""
    if isinstance(s.group, int):
        if x.shape[-1] % s.group:
            raise ValueError(f'blocks of {s.group} do not divide a last axis of {x.shape[-1]}')
        return x.unflatten(-1, (-1, s.group))                       # (..., C / group, group)
    if s.group == 'row':
        return x
    return x.reshape(1, -1) if s.group == 'tensor' else x.flatten(0, -2)


def find_scale(x, s, weight=1.0):
    """(scale, zero, outer) of grouped x; mse weighs errors by `weight`. Zeros have TINY or less."""
    grid, axis = GRIDS[s.grid], s.axis
    if s.sign == 'asymmetric':
        least = x.amin(axis, keepdim=True).clamp(max=0)             # so that 0 is a code
        size = x.amax(axis, keepdim=True).clamp(min=0) - least
        scale = (size / (grid.high - grid.low)).clamp(min=TINY)
        return scale, (least / scale - grid.low).round(), None
    size, top = x.abs().amax(axis, keepdim=True), s.top
    if s.scale == 'absmean':
        size, top = x.abs().mean(axis, keepdim=True), grid.high ** 0.5
    if s.scale == 'mse':
        size = least_error(x, size, s, weight)
    if s.format == 'nvfp4':
        # e4m3 goes from 2^-9 to 448; the outer scale brings the largest of all to 448
        outer = (size.amax() / (top * 448)).clamp(min=TINY)
        return (size / top / outer).clamp(min=2.0 ** -9).to(torch.float8_e4m3fn), None, outer
    top = 4 if s.format == 'mxfp4' else top                         # fp4's largest power of two
    scale = (size / top).clamp(min=TINY)
    if s.format == 'mxfp8':
        # up: rounded down it would clip, which costs more than finer steps gain
        scale = scale * (2 - 2 ** -23)
    # its exponent byte, which rounds it down, is e8m0, a dtype that torch cannot compile on a CPU
    return (scale.view(torch.int32) >> 23).to(torch.uint8) if s.format else scale, None, None


def full_scale(scale, outer, s):
    """What a code is multiplied by, float32, of a scale as it is stored."""
    if s.format[:2] == 'mx':
        return (scale.int() << 23).view(torch.float32)
    return scale.float() if outer is None else scale.float() * outer


def least_error(x, size, s, weight):
    """For each group, max|x| times that of .3, .4 .. 1 with the least sum weight (x - x^)^2."""
    s, best, least = replace(s, rounding='nearest'), size, torch.full_like(size, math.inf)
    for fraction in (1, .3, .4, .5, .6, .7, .8, .9):                # a tie goes to the first
        step = (fraction * size / s.top).clamp(min=TINY)
        x_hat = step * MAPS[s.map].level(round_to(x / step, s, 0))
        error = (weight * (x - x_hat).square()).sum(s.axis, keepdim=True)
        best = torch.where(error < least, fraction * size, best)
        least = torch.minimum(error, least)
    return best


def round_to(y, s, key):
    """y = x / s on the grid: integer codes, as float32; of a float grid the rounded y itself."""
    grid = GRIDS[s.grid]
    u = uniform(y, key) if s.rounding == 'stochastic' else None
    if grid.float:
        # y's exponent bits alone are a power of two; from it to the next, floats are spaced alike
        mantissa, exponent = grid.float
        power = (y.view(torch.int32) & 0x7F800000).view(torch.float32)
        spacing = power.clamp(2.0 ** exponent, grid.high) * 2.0 ** -mantissa
        y = y / spacing                                             # exact
        y = y.round() if u is None else y.floor() + (u < y - y.floor()).float()
        return (y * spacing).clamp(grid.low, grid.high)
    level, code, nearest = MAPS[s.map]
    if u is None:
        return (nearest or code)(y).round().clamp(grid.low, grid.high)
    # up with probability (y - level(c)) / (level(c + 1) - level(c)), so that the mean is y
    c = code(y).floor()
    up = u * (level(c + 1) - level(c)) < y - level(c)
    return (c + up.float()).clamp(grid.low, grid.high)


def encode(c, s):
    """Codes (float32) as they are stored: in their dtype, or below 8 bits from 0 up, in bytes."""
    grid, bits = GRIDS[s.grid], GRIDS[s.grid].bits
    if bits > 7:
        return c.to(grid.dtype)
    if c.shape[-1] * bits % math.lcm(bits, 8):
        raise ValueError(f'{8 // math.gcd(bits, 8)} codes of {s.grid}, which fill bytes, do not '
                         f'divide a last axis of {c.shape[-1]}; choose another grid or size')
    if grid.float:
        # exponent and mantissa are bits of float32, whose least exponent is -126; a nan has more
        mantissa, exponent = grid.float
        i = (c.abs() * 2.0 ** (-126 - exponent)).view(torch.int32) >> (23 - mantissa)
        i = (i + (c < 0) * 2 ** (bits - 1)) & (2 ** bits - 1)
    else:
        i = c - grid.low
    return regroup(in_memory(i.to(torch.uint8)), bits, 8).to(torch.uint8)


def levels(q):
    """The number that each code stands for, float32, before the scale."""
    c, grid, level = q.codes, GRIDS[q.spec.grid], MAPS[q.spec.map].level
    if grid.bits > 7 or c.dtype == torch.float32:       # nothing is packed
        return level(c.float())
    c = regroup(c, 8, grid.bits)
    if not grid.float:
        return level(c.float() + grid.low)
    # the bits of a float32 again, and the sign above them
    mantissa, exponent = grid.float
    i = (c.int() & (2 ** (grid.bits - 1) - 1)) << (23 - mantissa)
    y = i.view(torch.float32) * 2.0 ** (126 + exponent)
    return torch.where(c >= 2 ** (grid.bits - 1), -y, y)


def regroup(x, a, b):
    """The bits of numbers of a bits (..., C) as numbers of b bits (..., C a / b). n / a of them,
    C a / n apart, low bits first, are joined to one of n = lcm(a, b), which is cut into n / b: of
    eight codes of 2 bits, byte 0 has codes 0, 2, 4 and 6, byte 1 the others."""
    n = math.lcm(a, b)
    digits = torch.arange(n, dtype=torch.int32 if n < 32 else torch.int64, device=x.device)
    whole = (x.unflatten(-1, (n // a, -1)) << digits[::a, None]).sum(-2, dtype=digits.dtype)
    return ((whole.unsqueeze(-2) >> digits[::b, None]) & (2 ** b - 1)).flatten(-2)


# ------------------------------------------------------------------------------------------------
# the three matmuls of a linear layer, on quantized operands
#
# Codes can be multiplied in place of what they stand for if no scale changes along the sum:
# sum_k (s_i a_ik) (t_j b_jk) = s_i t_j sum_k a_ik b_jk. In y that is so, with one scale for each
# token of x and each output of w: W8A8, an int8 matmul. In dx the sum goes over outputs, in dw
# over tokens, where the scale of w or x changes. So the backward multiplies floats (ste, full), or
# g is multiplied by those scales before it is rounded (fold), or all get scales that are constant
# along the sum (requantize).

@dataclass(frozen=True)
class How:
    """What a Linear quantizes, and how it multiplies. As (backward, gradients_in), paper 1 is
    (ste, both) in its text, (full, dw) in its code; SwitchBack is (full, dx), but has w^ in dx."""
    weights: Spec | None = None
    activations: Spec | None = None
    gradients: Spec | None = None
    gradients_in: str = 'both'  # or dx, dw: the matmuls of the backward that see g^ instead of g
    backward: str = 'ste'       # a key of BACKWARD
    compute: str = 'float'      # or codes: int8 or fp8 matmuls where scales come out of the sum

    def __post_init__(self):
        for name in ('weights', 'activations', 'gradients'):
            object.__setattr__(self, name, spec(getattr(self, name)))
        for name, good in (('gradients_in', ('both', 'dx', 'dw')), ('backward', BACKWARD),
                           ('compute', ('float', 'codes'))):
            if getattr(self, name) not in good:
                raise ValueError(f"{name} = '{getattr(self, name)}': use {', '.join(good)}")
        needs_spec = self.gradients_in != 'both' or self.backward in ('fold', 'requantize')
        if needs_spec and not self.gradients:
            raise ValueError('gradients_in, fold and requantize are about quantized gradients: '
                             'give gradients too')


def together(a, b):
    """Can codes of two Specs be multiplied in place of what they stand for? Signed integers, or
    fp8 (one e5m2 at most), x^ = s q, a scale for a row or the tensor, both rotated or neither."""
    def kind(s):            # False, or what must be the same in both
        grid, plain = GRIDS[s.grid], (s.map, s.sign) == ('linear', 'symmetric')
        fits = plain and (grid.bits == 8 if grid.float else grid.low < 0)
        return fits and s.group in ('row', 'tensor') and (bool(grid.float), s.rotation)

    return bool(a and b and kind(a)) and kind(a) == kind(b) and {a.grid, b.grid} != {'fp8e5'}


def matmul(a, b, codes, dtype, bias=None):
    """y = (s_a a) (s_b b)^T (+ bias), (M, N), of QTensors a (M, K) and b (N, K), in dtype; with
    `codes`, where Specs and shapes fit, s_a s_b (a b^T), of fp8 with y rounded to bfloat16."""
    if all(q.spec and q.spec.rotation for q in (a, b)):
        # no rotation is to be undone: (a H)(b H)^T = a b^T
        a, b = (q._replace(spec=replace(q.spec, rotation='')) for q in (a, b))
    if codes and together(a.spec, b.spec):
        # a scale for each row, (M, 1) and (N, 1); that of a tensor is repeated
        s_a, s_b = (q.scale.expand(q.codes.shape[0], 1).contiguous() for q in (a, b))
        p, q = codes_of(a), codes_of(b)
        # a GPU takes M > 16, K and N in multiples of 16; other shapes go as floats, below
        if not p.is_cuda or len(p) > 16 and p.shape[1] % 16 == len(q) % 16 == 0:
            p, q = p.contiguous(), q.contiguous()
            if GRIDS[a.spec.grid].float:
                y = torch._scaled_mm(p, q.T, s_a, s_b.T, out_dtype=torch.bfloat16)
            else:
                y = int_matmul(p, q) * s_a * s_b.T
            return y.to(dtype) if bias is None else (y + bias).to(dtype)
    return F.linear(dequantize(a, dtype), dequantize(b, dtype), bias)


def codes_of(q):
    """One code an element, int8 or fp8, of a grid whose codes can be multiplied."""
    return q.codes if GRIDS[q.spec.grid].bits > 7 else levels(q).to(torch.int8)


def int_matmul(a, b):
    """a b^T of int8 codes (M, K), (N, K) in float32: exact up to K = 1024, then rounded."""
    if not (a.is_cuda or a.device.type == 'cpu' and INT_MM_CPU):
        return a.float() @ b.float().T
    # 2^16 products of at most 2^14 fit in int32
    parts = zip(a.split(2 ** 16, 1), b.split(2 ** 16, 1))
    return sum(torch._int_mm(p, q.T).float() for p, q in parts)


# one matmul of the backward, g (M, K) times q (K, N): g and w^ give dx, g^T and x^ give dw

def straight_through(g, q, how=None, key=None):
    """dx = g^ w^, dw = (g^)^T x^: the straight-through estimator takes rounding and clipping for
    the identity (Bengio et al., 1308.3432). With backward = 'full', q is x or w as it was."""
    return g @ dequantize(q, g.dtype)


def fold(g, q, how, key):
    """dx = Q(g s_w) codes(w), dw = Q(g^T s_x) codes(x): column k of g is multiplied by scale k, so
    that Q alone errs. It errs more in dw, as scales of x differ more, from token to token."""
    if not together(q.spec, how.gradients) or how.gradients.group != 'row' or q.spec.rotation:
        raise ValueError("backward = 'fold' multiplies codes: give weights (or stored), gradients "
                         'and activations symmetric integers or fp8, not rotated, a scale per row')
    grid = q.spec.grid if GRIDS[q.spec.grid].float else 'int8'
    codes = QTensor(codes_of(q).T, q.scale.new_ones(1, 1), spec=Spec(grid, 'row'))
    folded = quantize(g * q.scale.T, how.gradients, key)        # the scale is (1, K) or (1, 1)
    return matmul(folded, codes, how.compute == 'codes', g.dtype)


def requantize(g, q, how, key):
    """dx = Q(g) Q((w^)^T)^T, dw = Q(g^T) Q((x^)^T)^T: rows, blocks and rotation lie along the sum.
    Q is how.gradients; x and w are rounded to nearest, in fp8 where g is fp8e5."""
    s = how.gradients
    other = replace(s, grid='fp8' if s.grid == 'fp8e5' else s.grid, rounding='nearest')
    # both as rows in memory: a CPU rounds along columns three times slower
    g, x = (in_memory(t.contiguous()) for t in (g, dequantize(q, g.dtype).T))
    rounded = quantize(g, s, key, packed=False), quantize(x, other, packed=False)
    return matmul(*rounded, how.compute == 'codes', g.dtype)


BACKWARD = dict(ste=straight_through, full=straight_through, fold=fold, requantize=requantize)


def operands(x, w, how, key):
    """x^ (N, in) and w^ (out, in) as the forward multiplies them; QTensors in, QTensors out."""
    if how.weights:     # `health` and convert's `exported` round w like this, too
        w = quantize(dequantize(w), how.weights, stream(key, 0))
    if how.activations:
        x = quantize(x.codes, how.activations, stream(key, 1))
    if how.compute == 'codes' and not together(x.spec, w.spec):
        raise ValueError("compute = 'codes' needs codes: give weights (or stored) and activations "
                         'symmetric integers or fp8, a scale per row or tensor, rotated alike')
    return x, w


def matmul_backward(g, x, w, how, key):
    """dx (N, in) and dw (out, in) of QTensors x and w, as saved, and g = dL/dy (N, out)."""
    method, where = BACKWARD[how.backward], how.gradients_in
    g = in_memory(g) if how.gradients else g
    # straight_through sees one g^ twice; fold and requantize round g for each matmul anew
    seen = fake_quant(g, how.gradients, stream(key, 2)) if method is straight_through else g
    # the matmul that gradients_in leaves out takes g as it is
    dx = straight_through(g, w) if where == 'dw' else method(seen, w, how, stream(key, 2))
    dw = straight_through(g.T, x) if where == 'dx' else method(seen.T, x, how, stream(key, 3))
    return dx, dw


class Matmul(torch.autograd.Function):
    """y = x^ (w^)^T + b, db = sum g; dx, dw by `matmul_backward`. `weight` is w, or, where there
    are codes, the leaf that receives dw. Saved are x^ and w^ as codes and scales, or x and w."""

    @staticmethod
    def forward(ctx, x, weight, bias, key, how, stored, codes, scale):
        full = QTensor(x), QTensor(codes, scale, spec=stored) if stored else QTensor(weight)
        xq, wq = operands(*full, how, key)
        saved = full if how.backward == 'full' else (xq, wq)
        ctx.save_for_backward(key, *saved[0][:4], *saved[1][:4])
        ctx.specs, ctx.how, ctx.bias = [q.spec for q in saved], how, bias is not None
        bias = None if bias is None else bias.to(x.dtype)
        return matmul(xq, wq, how.compute == 'codes', x.dtype, bias)

    @staticmethod
    def backward(ctx, g):
        key, *saved = ctx.saved_tensors
        x, w = (QTensor(*saved[i:i + 4], s) for i, s in zip((0, 4), ctx.specs))
        dx, dw = matmul_backward(g, x, w, ctx.how, key)
        return dx, dw, g.sum(0) if ctx.bias else None, *[None] * 5


# ------------------------------------------------------------------------------------------------
# the linear layer, and keys and values

def storable(how):
    """The Spec of weights as they are stored. Raises ValueError for one that cannot be."""
    s = spec(how)
    if s and (GRIDS[s.grid].low >= 0 or s.format or s.rotation
              or (s.sign, s.map) != ('symmetric', 'linear')):
        raise ValueError(f"stored = '{how}': a stored weight takes a symmetric, signed, linear "
                         'grid with float32 scales, not rotated')
    return s


class Linear(nn.Module):
    """y = x^ (w^)^T + b over the last axis of x (..., in). Its noise comes from `key`, int32 (),
    which GPT.set_noise sets: in training for every micro-step, else once for an evaluation."""

    def __init__(self, n_in, n_out, bias=False, how=How()):
        super().__init__()
        self.how, self.stored, self.keep = how, None, False     # keep: it stays a matrix of floats
        self.weight = nn.Parameter(torch.empty(n_out, n_in).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(n_out)) if bias else None
        self.register_buffer('codes', None)
        self.register_buffer('scale', None)
        self.register_buffer('key', torch.zeros((), dtype=torch.int32), persistent=False)

    def forward(self, x):
        y = Matmul.apply(x.reshape(-1, x.shape[-1]), self.weight, self.bias, self.key, self.how,
                         self.stored, self.codes, self.scale)
        return y.view(*x.shape[:-1], -1)

    def stored_weight(self):
        """The weight as it is stored, a QTensor: codes and scale, or the parameter itself."""
        q = QTensor(self.codes, self.scale, spec=self.stored)
        return q if self.stored else QTensor(self.weight.data)

    @torch.no_grad()
    def store_(self, how, q=None):
        """Keep only codes, q = clip(round(w / s), Qn, Qp), or the QTensor q with its scale."""
        s = storable(how)
        if s is None:
            return
        q = q or quantize(dequantize(self.stored_weight()), replace(s, rounding='nearest'))
        self.stored, self.codes, self.scale = s, q.codes, q.scale
        if s.grid != 'bf16':
            # codes of a group of zeros may move later: it gets the mean scale of the others, or, if
            # all are zero, one whose highest level is in^-1/2. A group with a nan is not zero
            alive = ~((q.scale <= TINY) & (grouped(levels(q), s) == 0).all(s.axis, keepdim=True))
            usual = (q.scale * alive).sum() / alive.sum().clamp(min=1)
            usual = torch.where(alive.any(), usual, self.weight.shape[1] ** -0.5 / s.top)
            self.scale = torch.where(alive, q.scale, usual)
        # what receives .grad is a ghost of that shape: one float zero, expanded, in four bytes
        self.weight = nn.Parameter(self.weight.new_zeros(()).expand(self.weight.shape))

    def _apply(self, fn, recurse=True):
        # codes and scales are moved, but never cast, and the ghost keeps its four bytes
        kept = self.codes, self.scale
        super()._apply(fn, recurse)
        if self.stored:
            self.codes, self.scale = (t if t is None else t.to(self.codes.device) for t in kept)
            self.weight.data = self.weight.data.new_zeros(()).expand(self.weight.shape)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.stored:     # the ghost is not part of a checkpoint
            del destination[prefix + 'weight']

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, *rest):
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        if self.stored and prefix + 'weight' in missing:
            missing.remove(prefix + 'weight')


def linears(model):
    """{name of its weight: Linear}, of all but the head."""
    return {f'{name}.weight': m for name, m in model.named_modules()
            if isinstance(m, Linear) and name != 'lm_head'}


class KVCache:
    """Keys and values of a layer in generation, each token quantized once, by its own scales."""

    def __init__(self, how):
        s = self.how = spec(how)
        self.kv = None                                              # (2, B, nh, T, hs)
        if s and (s.group in ('tensor', 'column') and s.grid != 'bf16' or s.format == 'nvfp4'
                  or s.rounding == 'stochastic'):
            raise ValueError('kv_cache: keys and values grow token by token, each rounded once: '
                             'use a row or a block size, and nearest')

    def __len__(self):
        return self.kv.codes.shape[3] if self.kv else 0

    def append(self, k, v):
        """Store k, v (B, nh, T, hs) of new tokens; return all so far, dequantized."""
        kv = torch.stack((k, v))
        new = quantize(kv.float() if self.how else kv, self.how)        # as `Attention` in training
        if self.kv:
            new = QTensor(*(t if t is None else torch.cat((kept, t), 3)
                            for kept, t in zip(self.kv[:4], new)), new.spec)
        self.kv = new
        return dequantize(new, k.dtype).unbind()


# ------------------------------------------------------------------------------------------------
# how a GPU compiles all this

# for the steps of the optimizer: compute noise and rounded values anew, do not store them
STEPS = {'realize_opcount_threshold': 1000, 'realize_reads_threshold': 64,
         'realize_acc_reads_threshold': 64}
# for matmuls of codes: Triton's kernel applies the scales, and no second one reads its int32
MATMULS = {'max_autotune_gemm': True, 'epilogue_fusion_first': True,
           'autotune_num_choices_displayed': 0}


def in_memory(x):
    """x itself, as a view: a compiler stores it once, and does not compute it for every use."""
    return x.as_strided(x.shape, x.stride())


def inductor(options, on_gpu=True):
    """Those of the options that this torch knows; none without a GPU. MATMULS change torch, too."""
    if options is MATMULS and on_gpu:
        with suppress(ImportError, AttributeError):     # private, but nothing else does it
            from torch._inductor import lowering, select_algorithm
            # else a transpose before an int8 matmul is dropped, and it is many times slower
            lowering.add_layout_constraint(torch.ops.aten._int_mm.default,
                                           lowering.constrain_to_fx_strides)
            # cuBLAS is best at floats: not trying Triton's kernels saves a minute or two
            select_algorithm.get_algorithm_selector_cache().add_preprocessing_fn(
                lambda choices: [c for c in choices if c.name in ('mm', 'addmm')] or choices)
    return {k: v for k, v in options.items() if on_gpu and k in torch._inductor.list_options()}


# ------------------------------------------------------------------------------------------------
# the optimizer: one step of a weight as it is stored
#
#     m <- beta1 m + (1 - beta1) g        mhat = m / (1 - beta1^t)
#     v <- beta2 v + (1 - beta2) g^2      vhat = v / (1 - beta2^t)
#
#     adamw_step     w <- Q((1 - decay) w - lr mhat / sqrt(vhat))     Q rounds w as it is stored
#     muon_step      w <- (1 - decay) w - lr c U V^T      U S V^T: m one step ahead; floats only
#     direct_step    e <- e + lr Qp g / sqrt(vhat)        of codes q, w = s q, with e in place of m
#                    q <- clip(q - trunc(e), Qn, Qp)      e keeps the rest
#     scale_step     log s <- log s - lr mhat / sqrt(vhat)      by dL/dlog s; codes stay
#
# Where the only w has few bits, and Q rounds stochastically or codes move, that is direct training
# (paper 2).

# the numbers of a step, 0-d tensors, so that new ones need no compiling. decay is lr weight_decay,
# bias1 and bias2 are 1 - beta^t; g is multiplied by clip
Rates = namedtuple('Rates', 'lr decay beta1 beta2 bias1 bias2 eps clip')


def second_moment(g, v, h, key):
    """(sqrt(vhat) + eps, v to store) with g in v; only rank1 steps by what is stored."""
    g2, s = (1 - h.beta2) * g * g, v.spec
    if s and s.grid == 'rank1':
        # the means of the rows of the old v are v.codes, those of its columns v.scale
        stored = QTensor((h.beta2 * v.codes + g2).mean(-1, keepdim=True),
                         (h.beta2 * v.scale + g2).mean(-2, keepdim=True), spec=s)
        v = dequantize(stored)
    else:
        v = h.beta2 * dequantize(v) + g2
        stored = quantize(v, s, key)
    return v.sqrt() * h.bias2.rsqrt() + h.eps, stored


def adamw_step(w, g, m, v, h, key):
    """w <- Q((1 - decay) w - lr mhat / sqrt(vhat)); returns how many codes moved, or None.
    Loshchilov & Hutter, arXiv 1711.05101; with quantized m and v, paper 1; with a low-bit w, paper
    2 as published."""
    h = Rates(*h.unbind())
    g, old = h.clip * g.float(), dequantize(w)
    m_new = h.beta1 * dequantize(m) + (1 - h.beta1) * g if m else g     # beta1 = 0: no m is held
    root, v_new = second_moment(g, v, h, stream(key, 2))
    # w keeps its scale: a new mean |w| of a ternary w would shrink. Without a spec: no rounding
    new = (1 - h.decay) * old - h.lr * m_new / (h.bias1 * root)
    new = quantize(new, w.spec, key, scale=w.scale)
    moved = (dequantize(new) != old).sum() if w.spec else None
    put(w, new)
    if m:
        put(m, quantize(m_new, m.spec, stream(key, 1)))
    put(v, v_new)
    return moved


def direct_step(w, g, e, v, m_s, v_s, h, h_s, key):
    """e <- e + lr Qp g / sqrt(vhat); q <- clip(q - trunc(e), Qn, Qp), and e keeps the rest; scales
    learn by scale_step. Returns how many codes moved, by row. e, (out, in) in levels, is stored as
    m would be. A weak but steady g moves a code in 1 / (lr Qp mean(g / sqrt(vhat))) steps, noise in
    about 1 / (lr Qp)^2. So q - e is a latent weight, as BitNet has, in few bits; but a code moves
    back only after a whole level. Paper 2 has no e, and rounds w stochastically."""
    scale_step(w, g, m_s, v_s, h_s, key)
    h, s = Rates(*h.unbind()), w.spec
    g, q = h.clip * g.float(), levels(w)                                # (out, in) both
    root, v_new = second_moment(g, v, h, stream(key, 2))
    e_new = dequantize(e) + h.lr * s.top * g / root
    new = (q - e_new.trunc()).clamp(GRIDS[s.grid].low, GRIDS[s.grid].high)
    e_new = (e_new + new - q).clamp(-1, 1)      # at an end of the grid, no more than a level
    w.codes.copy_(encode(new, s))
    put(e, quantize(e_new, e.spec, stream(key, 1)))
    put(v, v_new)
    return (new != q).sum(-1, dtype=torch.int32)


def scale_step(w, g, m, v, h, key):
    """s <- s exp(-lr mhat / sqrt(vhat)): Adam's step of log s by dL/dlog s = sum g w, the sum over
    the weights w = s q that share s. m and v have the shape of s, and codes stay: of a model that
    is trained, that is PEQA (Kim et al., arXiv 2305.14152, where the step is one of s)."""
    h, s = Rates(*h.unbind()), w.spec
    slope = grouped(h.clip * g.float() * levels(w), s).sum(s.axis, keepdim=True) * w.scale
    m.codes.lerp_(slope, 1 - h.beta1)
    v.codes.lerp_(slope ** 2, 1 - h.beta2)
    r = m.codes / h.bias1 / ((v.codes / h.bias2).sqrt() + 1e-18)        # no 0 / 0
    w.scale.mul_((-h.lr * r).exp())


def muon_step(w, g, m, h, key):
    """w <- (1 - decay) w - lr .2 sqrt(max(out, in)) U V^T, where U S V^T = beta1 m + (1 - beta1) g
    with the new m, by five Newton-Schulz steps (Jordan et al., Muon, 2024); .2 sqrt gives updates
    the size of AdamW's (Liu et al., arXiv 2502.16982)."""
    h = Rates(*h.unbind())
    g = h.clip * g.float()
    m_new = h.beta1 * dequantize(m) + (1 - h.beta1) * g
    x = h.beta1 * m_new + (1 - h.beta1) * g
    tall = x.shape[0] > x.shape[1]
    x = (x.T if tall else x) / (x.norm() + 1e-18)
    for _ in range(5):
        # an odd polynomial of the singular values, which takes them from (0, 1] to about 1
        y = x @ x.T
        x = 3.4445 * x + (-4.775 * y + 2.0315 * y @ y) @ x
    r = 0.2 * max(x.shape) ** 0.5 * (x.T if tall else x)
    w.codes.copy_((1 - h.decay) * w.codes - h.lr * r)
    put(m, quantize(m_new, m.spec, stream(key, 1)))


def put(old, new):
    """Write a QTensor over another, in place; a scale that was kept is one tensor in both."""
    for a, b in zip(old[:4], new[:4]):
        if a is not None and a is not b:
            a.copy_(b)


class Optimizer:
    """Steps every parameter: codes with scales by direct_step if code_lr > 0, by scale_step if
    optimizer = 'scales'; floats of a Linear by muon_step if it is 'muon', and all else by
    adamw_step. adam_m and adam_v are for block linears. The model is asked for its weights at every
    step. With `shard`, a process holds and steps its share of the states: ZeRO-1, 1910.02054."""

    def __init__(self, model, config, compiled=False):
        self.model, self.config, self.t, self.moved = model, config, 0, {}
        shared = config.shard and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if shared else (0, 1)
        self.parts, self.state, self.owners, held = self.look(), {}, {}, [0] * self.world
        specs = spec(config.adam_m), spec(config.adam_v)
        self.steps = dict(adamw=adamw_step, direct=direct_step, scales=scale_step, muon=muon_step)
        if compiled:
            # a graph for each shape, however many: dynamic shapes make 4-bit states far slower
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
            options = inductor(STEPS, next(model.parameters()).is_cuda)
            self.steps = {kind: torch.compile(f, dynamic=False, options=options)
                          for kind, f in self.steps.items()}
        for name, (kind, p, w) in self.parts.items():
            # embeddings, whose step is by element, are dealt out by rows; all else has one owner,
            # the rank that holds least so far, and on the others a state of shapes alone
            owners = [*range(self.world)] if kind == 'matrix' else [held.index(min(held))]
            self.owners[name], device = owners, (p.device if self.rank in owners else 'meta')
            how = [None if kind in ('matrix', 'vector') else s for s in specs]
            zeros = torch.zeros(self.mine(name, p).shape, device=device)
            of_m, of_v = (s.group if s else '' for s in how)
            if (kind == 'adamw' and not w.spec and of_m == of_v and isinstance(of_m, int)
                    and of_m % 8 == 0):
                # m and v are in like blocks, of whole bytes: as rows, with w and g, fewer kernels
                zeros = grouped(zeros, how[0]).flatten(0, -2)
            m, v = (quantize(zeros.clone(), s) for s in how)
            if config.beta1 == 0 and kind not in ('direct', 'muon'):
                m = None
            # muon has no v; scales learn, with moments of their own
            self.state[name] = {'muon': [m], 'scales': []}.get(kind, [m, v])
            if kind in ('direct', 'scales'):
                self.state[name] += [QTensor(torch.zeros_like(w.scale, device=device))
                                     for _ in range(2)]
            for rank in owners:
                held[rank] += sum(t.nbytes for t in self.tensors()[name])

    def base_rates(self):
        """{kind: (its learning rate before the schedule, its weight decay)}"""
        c = self.config
        narrow = min(1.0, c.base_width / c.n_embd)
        lr, others = c.learning_rate * narrow, c.embedding_lr or c.learning_rate
        return {'adamw': (lr, c.weight_decay), 'muon': (lr, c.weight_decay),
                'direct': (c.code_lr * narrow ** 0.5, 0.0), 'scales': (c.scale_lr, 0.0),
                'matrix': (others, c.weight_decay), 'vector': (others, 0.0)}

    def look(self):
        """{name: (kind, parameter, weight as it is stored)}, of what the model holds now. What has
        a rate of zero has no step and no state."""
        weights, layers, c, rates = {}, linears(self.model), self.config, self.base_rates()
        for name, p in self.model.named_parameters():
            if name in layers:
                w = layers[name].stored_weight()
                kind = 'direct' if c.code_lr > 0 and w.scale is not None else c.optimizer
                if kind == 'scales' and w.scale is None:                    # it is in `keep`
                    kind = 'adamw'
            else:       # of 2 dimensions, as embeddings and the head; or 1, as norms and biases
                w, kind = QTensor(p.data), 'matrix' if p.dim() > 1 else 'vector'
            if rates[kind][0]:
                weights[name] = kind, p, w
        return weights

    def step(self, schedule=1.0, clip=1.0):
        """One step of all by their .grad times `clip`, with learning rates times `schedule`."""
        self.begin(schedule, clip)
        for name in self.parts:
            self.apply(name)
        self.share()

    def begin(self, schedule=1.0, clip=1.0):
        """Rates by kind and keys by parameter, on the device: one int32 tensor, floats as bits."""
        self.parts, self.moved = self.look(), {}
        c, self.t = self.config, self.t + 1
        bias1, bias2 = 1 - c.beta1 ** self.t, 1 - c.beta2 ** self.t
        base = self.base_rates()
        rates = [Rates(schedule * lr, schedule * lr * decay, c.beta1, c.beta2, bias1, bias2, c.eps,
                       clip) for lr, decay in base.values()]
        keys = [noise_key(c.seed, self.t, i) for i in range(len(self.state))]
        numbers = torch.cat((torch.tensor(rates).flatten().view(torch.int32),
                             torch.tensor(keys, dtype=torch.int32)))
        numbers = numbers.to(next(self.model.parameters()).device)
        numbers, keys = numbers.split((len(numbers) - len(keys), len(keys)))
        self.rates = dict(zip(base, numbers.view(torch.float32).chunk(len(base))))
        self.keys = dict(zip(self.state, keys))

    @torch.no_grad()
    def apply(self, name):
        """Update one parameter by its .grad; if another process owns it, only free its .grad."""
        if name not in self.parts:      # its rate is zero
            return
        (kind, p, w), state = self.parts[name], self.state[name]
        if p.grad is None or self.rank not in self.owners[name]:
            p.grad = None
            return
        g, w = self.mine(name, p.grad), w._replace(codes=self.mine(name, w.codes))
        rows = len((state[0] or state[1]).codes)
        if kind == 'adamw' and rows != len(g):          # they are blocks, see __init__
            g, w = g.reshape(rows, -1), QTensor(w.codes.view(rows, -1))
        rates = [self.rates[k] for k in ((kind, 'scales') if kind == 'direct' else (kind,))]
        step = self.steps.get(kind, self.steps['adamw'])
        self.moved[name] = step(w, g, *state, *rates, self.keys[name])

    def mine(self, name, t):
        """What this process steps of t, a parameter, its gradient or state: its rows, or all."""
        n = len(self.owners.get(name, ()))
        return t.tensor_split(n)[self.rank] if n > 1 else t

    def share(self):
        """Each process gives all others its share as it is stored: a ternary weight is 2 bits."""
        for name, owners in self.owners.items() if self.world > 1 else ():
            for t in filter(torch.is_tensor, self.parts[name][2]):
                for rank, part in zip(owners, t.tensor_split(len(owners))):
                    dist.broadcast(part.view(-1).view(torch.uint8), rank)

    def flips(self):
        """Share of the stored codes that the last step changed."""
        moved = torch.zeros((), dtype=torch.int64, device=next(self.model.parameters()).device)
        moved += sum(n.sum() for n in self.moved.values() if n is not None)
        if self.world > 1:
            dist.all_reduce(moved)
        return moved.item() / max(1, sum(p.numel() for _, p, w in self.parts.values() if w.spec))

    def tensors(self):
        """{name: [every tensor of its state]}"""
        return {name: [t for q in state if q for t in q[:4] if t is not None]
                for name, state in self.state.items()}

    def state_dict(self):
        """Numbers and tensors only: the tensors themselves, or, if sharded, on rank 0 the whole, in
        CPU memory. All processes call it."""
        state = self.tensors()
        for name, ts in state.items() if self.world > 1 else ():
            found = None if self.rank else [None] * self.world
            held = [t.cpu().view(-1).view(torch.uint8) for t in ts if not t.is_meta]
            dist.gather_object(held, found)         # as bytes: fp8 does not pickle
            if found:
                state[name] = [torch.cat(parts).view(t.dtype).view((-1, *t.shape[1:])[:t.dim()])
                               for t, *parts in zip(ts, *filter(None, found))]
        return {'t': self.t, 'state': state}

    def load_state_dict(self, state):
        """Copy a state in. Raises ValueError if its shapes or dtypes are not those here."""
        mine = [(name, t) for name, ts in self.tensors().items() for t in ts]
        saved = [(name, self.mine(name, t)) for name, ts in state['state'].items() for t in ts]
        if [(n, t.shape, t.dtype) for n, t in mine] != [(n, t.shape, t.dtype) for n, t in saved]:
            raise ValueError('the optimizer state is of another model, or stored in another way: '
                             'use the same optimizer, beta1, adam_m, adam_v and stored')
        for (_, t), (_, kept) in zip(mine, saved):
            t.copy_(kept)
        self.t = state['t']


# ------------------------------------------------------------------------------------------------
# post-training quantization

def rtn_(model, how):
    """Block linears, but for `keep`, hold q = clip(round(w / s), Qn, Qp) alone, to nearest."""
    for layer in linears(model).values():
        if not layer.keep:
            layer.store_(how)


@torch.no_grad()
def gptq(W, H, how, damping=0.01, act_order=True):
    """Codes q of W (out, in), a QTensor, that make (W - s q) x small for inputs x of the layer. The
    scales s are those of W; with mse, those of least sum H_ii (W - s q)_i^2, q rounded to nearest:

        q_i = clip(round(W_i / s), Qn, Qp),  e = (W_i - s q_i) / U_ii,  W[:, i:] -= e U[i, i:]

    for columns i by descending H_ii (act_order), or in order, as published: later columns make up
    for what the rounding of one does to the output. H = 2 mean x x^T over tokens x, (in, in)
    float32; U is the upper Cholesky factor, U^T U = (H + d I)^-1, d = damping times the mean of
    H_ii > 0. Where H_ii is 0 it counts as 1, and the column is just rounded (Frantar et al., arXiv
    2210.17323). Raises ValueError where H is not positive definite."""
    s, n = replace(storable(how), rounding='nearest'), W.shape[1]
    s_W, *_ = find_scale(grouped(W.float(), s), s, grouped(H.diagonal().expand_as(W), s))
    scale = s_W.expand_as(grouped(W, s)).reshape(W.shape)              # (out, in)
    H, alive = H.clone(), H.diagonal() > 0
    damp = damping * H.diagonal()[alive].mean()
    H.diagonal().copy_(torch.where(alive, H.diagonal() + damp, 1.0))
    order = (H.diagonal() * act_order).argsort(descending=True, stable=True)    # all 0: as it is
    W, H, scale = W.float()[:, order], H[order][:, order], scale[:, order]
    # backwards, H is L L^T; so H^-1 = U^T U with U = L^-1 backwards, which is upper
    L, bad = torch.linalg.cholesky_ex(H.flip(0, 1))
    if bad or not L.isfinite().all():
        raise ValueError('H is not positive definite: give more sequences, or more damping')
    U = torch.linalg.solve_triangular(L, torch.eye(n, device=L.device), upper=False).flip(0, 1)
    codes = torch.empty_like(W)
    # in blocks of columns: those after a block are corrected once, by a matmul
    for a in range(0, n, 128):
        b = min(a + 128, n)
        E = torch.empty_like(W[:, a:b])
        for i in range(a, b):
            # a group of zeros stays zero, whatever corrections have made of its W
            codes[:, i] = round_to(W[:, i] / scale[:, i], s, 0) * (scale[:, i] > TINY)
            E[:, i - a] = (W[:, i] - scale[:, i] * codes[:, i]) / U[i, i]
            W[:, i:b] -= torch.outer(E[:, i - a], U[i, i:b])
        W[:, b:] -= E @ U[a:b, b:]
    return QTensor(encode(codes[:, order.argsort()], s), s_W, spec=s)


@torch.no_grad()
def gptq_(model, how, idx, damping=0.01, act_order=True, progress=iter):
    """GPTQ of block linears, but for `keep`, while all tokens idx (B, T) go through the model at
    once: what comes to a layer has gone through those before it, quantized."""
    if not len(idx) or not storable(how) or storable(how).grid == 'bf16':
        raise ValueError('GPTQ needs data: give sequences; and a grid with scales: not bf16')
    layers = {name: layer for name, layer in linears(model).items() if not layer.keep}
    for name, layer in layers.items():
        if layer.stored or layer.how.weights:
            raise ValueError(f'{name} is quantized already; GPTQ needs it in full precision')

    def look(layer, args):      # before it runs; x as it quantizes it
        x = fake_quant(args[0].flatten(0, -2), layer.how.activations)
        H = 2 / len(x) * sum(some.T @ some for some in map(torch.Tensor.float, x.split(2 ** 14)))
        layer.store_(how, gptq(layer.weight, H, how, damping, act_order))

    with ExitStack() as stack:
        stack.callback(model.train, model.training)
        for layer in layers.values():
            stack.enter_context(layer.register_forward_pre_hook(look))
        x, angles = model.eval().embed(idx)
        for block in progress(model.h):
            x = block(x, angles, None)


# ------------------------------------------------------------------------------------------------
# accounting and health

def bytes_held(model, optimizer=None):
    """Bytes of each kind, read off the storages; 'linear': of the block linears, per weight."""
    layers, states = linears(model), optimizer.tensors() if optimizer else {}

    def size(tensors):      # each storage counts once
        storages = (t.untyped_storage() for t in tensors if t is not None and not t.is_meta)
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())

    def of(weights, parameters):
        return {'weights': size(weights), 'gradients': size(p.grad for p in parameters.values()),
                'optimizer': size(t for name in parameters for t in states.get(name, ()))}

    whole = of([*model.parameters(), *model.buffers()], dict(model.named_parameters()))
    linear = of([t for m in layers.values() for t in m.stored_weight()[:2]],
                {name: m.weight for name, m in layers.items()})
    count = sum(m.weight.numel() for m in layers.values())
    return {**whole, 'linear': {kind: n / count for kind, n in linear.items()}}


def level_shares(model):
    """{level: share of the codes} of weights that are stored below 8 bits; {} without any."""
    counts = Counter()
    for m in linears(model).values():
        if m.stored and GRIDS[m.stored.grid].bits < 8:
            found, n = levels(m.stored_weight()).unique(return_counts=True)
            counts.update(dict(zip(found.tolist(), n.tolist())))
    return {f'{level:g}': n / counts.total() for level, n in sorted(counts.items())}


def snr(x, how):
    """10 log10(sum x^2 / sum (x - x^)^2), the ratio of signal to noise in dB; None: x^ is x."""
    x = x.float()
    size = x.abs().amax().clamp(min=TINY)   # divided first: a square may be 0 or inf
    signal, noise = ((t / size).square().sum().item() for t in (x, x - fake_quant(x, how)))
    return 10 * math.log10(signal / noise) if noise else None


@torch.no_grad()
def health(model, *inputs):
    """{layer: {'weights', 'activations': the snr of what it quantizes}} on one batch."""
    report, names = {}, {m: name for name, m in model.named_modules() if isinstance(m, Linear)}

    def look(layer, args):
        for kind, x in (('weights', dequantize(layer.stored_weight())),
                        ('activations', args[0].flatten(0, -2))):
            if how := getattr(layer.how, kind):
                report.setdefault(names[layer], {})[kind] = snr(x, how)

    with ExitStack() as stack:
        stack.callback(model.train, model.training)
        for layer in names:
            stack.enter_context(layer.register_forward_pre_hook(look))
        model.eval()(*inputs)
    return report
