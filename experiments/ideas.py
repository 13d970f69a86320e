"""
Ideas for the direct update that quant.py does not have: each a few lines, put in its place for one
run by the argument --idea=NAME of an experiment; experiments/direct.py does so.

    sign       r = sign(m), as in Lion (Chen et al., arXiv 2302.06675)
    muon       r = U V^T of m, of rms 1: Muon (Jordan et al., 2024)
    kept       m stays where a code changed, instead of becoming zero
    feedback   what rounding left over goes into m: ECO (Nikdan et al., arXiv 2601.22101). m is
               then also a low-bit residual, so that the weight is in effect a latent of more bits
    sticky     hysteresis: from -1 or 1 back to 0 only on strong evidence
    attention  a rate of their own for its matrices
    rate       what cools down is code_lr, as all other rates do, and the threshold stays
"""
from contextlib import contextmanager

import torch

import quant
from quant import (GRIDS, Rates, dequantize, encode, grouped, levels, moments, pack, put, quantize,
                   round_to, stream)


def direct_step(idea):
    """quant.direct_step, and in it an idea that changes what a step does to codes and m."""
    def step(w, g, m, v, s_moments, h, h_s, key):
        h, h_s, s = Rates(*h.unbind()), Rates(*h_s.unbind()), w.spec
        g, q, m_old = h.clip * g.float(), levels(w), dequantize(m)      # (out, in) all
        m_new, v_new, r = moments(g, m, v, h, stream(key, 2))
        if idea == 'sign':
            r = m_new.sign()
        elif idea == 'muon':
            r = orthogonal(m_new)
        wanted = q - h.lr * s.top * r
        new = round_to(wanted, s, key)
        if idea == 'sticky':
            weak = (m_old * q > 0) & (m_old.abs() < 3 * m_old.abs().mean())
            new = torch.where(weak & (new == 0), q, new)
        moved = new != q
        if idea != 'kept':
            m_new = torch.where(moved & (h.tau > 0), 0.0, m_new)
        if idea == 'feedback':
            # m gives (1 - beta1) of itself at a step, in units of c sqrt(v) / lr
            unit = h.bias1 / h.bias2.sqrt() * dequantize(v_new).sqrt() * (1 - h.beta1)
            left = wanted.clamp(GRIDS[s.grid].low, GRIDS[s.grid].high) - new
            m_new = m_new - left * unit / (h.lr * s.top)

        slope = grouped(g * q, s).sum(s.axis, keepdim=True) * w.scale
        m_s, v_s = s_moments
        m_s.lerp_(slope, 1 - h_s.beta1)
        v_s.lerp_(slope ** 2, 1 - h_s.beta2)
        r_s = m_s / h_s.bias1 / ((v_s / h_s.bias2).sqrt() + 1e-18)
        w.scale.mul_((-h_s.lr * r_s).exp())
        w.codes.copy_(pack(encode(new, s), s))
        put(m, quantize(m_new, m.spec, stream(key, 1)))
        put(v, v_new)
        return moved.sum()

    return step


def orthogonal(m):
    """U V^T of m = U S V^T, of rms 1, by five steps of Newton-Schulz."""
    x = m if m.shape[0] <= m.shape[1] else m.T
    x = x / (x.norm() + 1e-30)
    for _ in range(5):
        y = x @ x.T
        x = 3.4445 * x + (-4.775 * y + 2.0315 * y @ y) @ x
    x = x * max(x.shape) ** 0.5
    return x if m.shape[0] <= m.shape[1] else x.T


def attention(optimizer, name):
    """Attention at half the rate of the MLPs."""
    rates = optimizer.rates
    if '.attn.' in name:
        half = Rates(*rates['direct'].unbind())
        optimizer.rates = {**rates, 'direct': torch.stack(half._replace(lr=half.lr / 2))}
    apply(optimizer, name)
    optimizer.rates = rates


def rate(optimizer, schedule=1.0, clip=1.0):
    """Cool down by the rate of codes, not by their threshold."""
    begin(optimizer, schedule, clip)
    h = Rates(*optimizer.rates['direct'].unbind())
    cold = h._replace(lr=h.lr * schedule, tau=h.tau * max(schedule, 1e-9) ** (1 / 16))
    optimizer.rates['direct'] = torch.stack(cold)


apply, begin = quant.Optimizer.apply, quant.Optimizer.begin
PATCHES = {  # idea: (where, what, by what)
    **{idea: (quant, 'direct_step', direct_step(idea)) for idea in (
        'sign', 'muon', 'kept', 'feedback', 'sticky')},
    'attention': (quant.Optimizer, 'apply', attention),
    'rate': (quant.Optimizer, 'begin', rate)}


@contextmanager
def trying(name):
    """Within, the idea `name` is in its place; '' is none."""
    if not name:
        yield
        return
    place, what, new = PATCHES[name]
    old = getattr(place, what)
    setattr(place, what, new)
    try:
        yield
    finally:
        setattr(place, what, old)
