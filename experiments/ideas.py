"""
Ideas for the direct update that quant.py does not have: each a few lines, put in its place for one
run by the argument --idea=NAME of an experiment; experiments/direct.py does so.

    sign       r = sign(m), as in Lion (Chen et al., arXiv 2302.06675)
    muon       r = U V^T of m, of rms 1: Muon (Jordan et al., 2024)
    estimated  the noise floor is median |r| / .6745 of a block of rows, not computed from beta1
    kept       m stays where a code changed, instead of becoming zero
    feedback   what rounding left over goes into m: m is then also a low-bit residual, so that the
               weight is in effect a latent of more bits
    squared    p = lr r |r|: strong evidence counts for more
    sticky     hysteresis: from -1 or 1 back to 0 only on strong evidence
    attention  a rate of their own for its matrices
    growth     the batch grows from step to step, to twice its size
"""
from contextlib import contextmanager

import torch

import quant
import train

usual, update = quant.direction, quant.update


def sign(m, v, h):
    return m.sign()


def muon(m, v, h):
    """Five steps of Newton-Schulz; needs whole matrices."""
    x = m if m.shape[0] <= m.shape[1] else m.T
    x = x / (x.norm() + 1e-30)
    for _ in range(5):
        y = x @ x.T
        x = 3.4445 * x + (-4.775 * y + 2.0315 * y @ y) @ x
    x = x * max(x.shape) ** 0.5
    return x if m.shape[0] <= m.shape[1] else x.T


def estimated(m, v, h):
    r = usual(m, v, h._replace(tau=torch.zeros_like(h.tau)))
    return (r.abs() - r.abs().median() / 0.6745).clamp(min=0).copysign(r)


def squared(m, v, h):
    r = usual(m, v, h)
    return r * r.abs()


def evidence(m, g, h):
    """m after this step, before a code that moves uses it up."""
    return h.beta1 * quant.dequantize(m) + (1 - h.beta1) * h.clip * g


def kept(w, g, m, v, h, key, start, code_units):
    if not code_units:
        return update(w, g, m, v, h, key, start, code_units)
    whole = evidence(m, g, h)
    out = update(w, g, m, v, h, key, start, code_units)
    quant._put(m, quant.quantize(whole, m.spec, key + 1, start=start))
    return out


def feedback(w, g, m, v, h, key, start, code_units):
    """Wanted was q - lr r, within the grid; what rounding made of it differs by e. That comes back
    through m: m gives (1 - beta1) of itself at a step, in units of c sqrt(v) / lr."""
    if not code_units:
        return update(w, g, m, v, h, key, start, code_units)
    before, whole = quant.dequantize(w) / w.scale, evidence(m, g, h)    # q and m
    out = update(w, g, m, v, h, key, start, code_units)
    after, now = quant.dequantize(w) / w.scale, quant.dequantize(m)
    v = v[0] * v[1] / v[2] if not isinstance(v, quant.QTensor) else quant.dequantize(v)
    wanted = (before - h.lr * usual(whole, v, h)).clamp(-w.spec.top, w.spec.top)
    unit = h.bias1 / h.bias2.sqrt() * v.sqrt() * (1 - h.beta1) / h.lr
    quant._put(m, quant.quantize(now - (wanted - after) * unit, m.spec, key + 7, start=start))
    return out


def sticky(w, g, m, v, h, key, start, code_units):
    """A code does not go back to zero where |m| is below three times its mean, and m stays."""
    if not code_units:
        return update(w, g, m, v, h, key, start, code_units)
    q, old, whole = quant.dequantize(w), quant.dequantize(m), evidence(m, g, h)
    back = (old * q > 0) & (old.abs() < 3 * old.abs().mean())
    out = update(w, g, m, v, h, key, start, code_units)
    now = quant.dequantize(w)
    stay = back & (now == 0) & (q != 0)
    quant._put(w._replace(scale=None), quant.quantize(torch.where(stay, q, now), w.spec,
                                                      scale=w.scale))
    whole = torch.where(stay, whole, quant.dequantize(m))
    quant._put(m, quant.quantize(whole, m.spec, key + 1, start=start))
    return out


def attention(optimizer, group, a, b, g, clip):
    """Attention at half the rate of the MLPs; needs one call a parameter."""
    h, name = group.h, group.names[group.spans.index((a, b))]
    group.h = h._replace(lr=h.lr * (0.5 if '.attn.' in name else 1.0))
    step(optimizer, group, a, b, g, clip)
    group.h = h


def growth(run):
    """From nearly nothing to twice the batch, as many tokens in all."""
    usual_size = run.config.batch_size
    done = (run.step + 0.5) / run.config.max_iters
    run.config.batch_size = max(1, round(2 * usual_size * done))
    try:
        return forward_backward(run)
    finally:
        run.config.batch_size = usual_size


def whole(group, *args):
    init(group, *args)
    group.block = group.rows


step, init = quant.AdamW._step, quant.Group.__init__
forward_backward = train.Run.forward_backward
PATCHES = {  # idea: (where, what, by what)
    'sign': [(quant, 'direction', sign)],
    'muon': [(quant, 'direction', muon), (quant.Group, '__init__', whole)],
    'estimated': [(quant, 'direction', estimated)],
    'squared': [(quant, 'direction', squared)],
    'kept': [(quant, 'update', kept)],
    'feedback': [(quant, 'update', feedback)],
    'sticky': [(quant, 'update', sticky)],
    'attention': [(quant.AdamW, '_step', attention)],
    'growth': [(train.Run, 'forward_backward', growth)]}


@contextmanager
def trying(name):
    """Within, the idea `name` is in its place; '' is none."""
    before = [(place, what, getattr(place, what)) for place, what, _ in PATCHES.get(name, ())]
    try:
        for place, what, new in PATCHES[name] if name else ():
            setattr(place, what, new)
        yield
    finally:
        for place, what, old in before:
            setattr(place, what, old)
