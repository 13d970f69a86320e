"""
Ideas for the direct update that quant.py does not have: each a few lines, put in its place for one
run by --idea=NAME among the arguments of a Job, as direct.py and bits.py do. ptq.py adds `teacher`.

    nothing    e is not kept: a step is rounded stochastically to whole levels (2412.04787)
    half       a code moves at half a level, like a latent weight that is rounded (BitNet): it is
               then as near to its old place as to its new one
    emptied    e becomes zero where a code at its end cannot move
    sign       e gathers lr Qp sign(g), as in signSGD (Bernstein et al., arXiv 1802.04434)
    root       code_lr falls as the root of the schedule, and what noise moves as the schedule
    attention  half the rate for its matrices
"""
from contextlib import contextmanager

import torch

import quant
from quant import (GRIDS, Rates, dequantize, encode, levels, put, quantize, scale_step,
                   second_moment, stream, uniform)


def direct_step(idea):
    """quant.direct_step, and in it an idea that changes what a step does to codes and e."""
    def step(w, g, e, v, m_s, v_s, h, h_s, key):
        scale_step(w, g, m_s, v_s, h_s, key)
        h, s = Rates(*h.unbind()), w.spec
        g, q = h.clip * g.float(), levels(w)                            # (out, in) both
        root, v_new = second_moment(g, v, h, stream(key, 2))
        if idea == 'sign':
            root = torch.where(g == 0, 1.0, g.abs())
        e_new = dequantize(e) + h.lr * s.top * g / root
        whole = e_new.round() if idea == 'half' else e_new.trunc()
        if idea == 'nothing':
            low = e_new.floor()
            whole = low + (uniform(e_new, key) < e_new - low).float()
        new = (q - whole).clamp(GRIDS[s.grid].low, GRIDS[s.grid].high)
        e_new = (e_new + new - q).clamp(-1, 1)
        if idea == 'nothing':
            e_new = torch.zeros_like(e_new)
        elif idea == 'emptied':
            e_new = torch.where(e_new.abs() < 1, e_new, 0.0)
        w.codes.copy_(encode(new, s))
        put(e, quantize(e_new, e.spec, stream(key, 1)))
        put(v, v_new)
        return (new != q).sum(-1, dtype=torch.int32)

    return step


def attention(optimizer, name):
    """Attention at half the rate of the MLPs."""
    rates = optimizer.rates
    if '.attn.' in name:
        half = Rates(*rates['direct'].unbind())
        optimizer.rates = {**rates, 'direct': torch.stack(half._replace(lr=half.lr / 2))}
    apply(optimizer, name)
    optimizer.rates = rates


def root(optimizer, schedule=1.0, clip=1.0):
    """A rate of codes that falls more slowly."""
    begin(optimizer, schedule, clip)
    h = Rates(*optimizer.rates['direct'].unbind())
    optimizer.rates['direct'] = torch.stack(h._replace(lr=h.lr / max(schedule, 1e-9) ** 0.5))


apply, begin = quant.Optimizer.apply, quant.Optimizer.begin
PATCHES = {  # idea: (where, what, by what)
    **{idea: (quant, 'direct_step', direct_step(idea)) for idea in (
        'nothing', 'half', 'emptied', 'sign')},
    'attention': (quant.Optimizer, 'apply', attention),
    'root': (quant.Optimizer, 'begin', root)}


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
