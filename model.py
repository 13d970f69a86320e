"""
A GPT in two flavours, chosen by `config.flavour`:

    gpt2    learned positions, LayerNorm, GELU, optional biases (Radford et al. 2019)
    llama   rotary positions on interleaved pairs, RMSNorm, SwiGLU, no biases (Touvron et al.,
            arXiv 2302.13971)

Keys and values may have fewer heads than queries (`n_kv_head`: grouped-query attention, Ainslie et
al., arXiv 2305.13245), and the head is tied to the embedding or not (`tied`). All that a block
knows of quantization is `Linear`, whose `how` says what it quantizes, and the cache of keys and
values. `config` has the attributes of train.Config that are named here.
"""
import math
import re

import torch
import torch.nn as nn
import torch.nn.functional as F

from quant import (MATMULS, How, KVCache, Linear, QTensor, fake_quant, inductor, linears, matmul,
                   matmul_backward, noise_key, operands, spec)


def linear(config, n_in, n_out):
    """A block linear with the config's strategy."""
    return Linear(n_in, n_out, config.bias, How(
        config.weights, config.activations, config.gradients, config.gradients_in,
        config.backward, config.compute))


class Norm(nn.Module):
    """LayerNorm (gpt2) or RMSNorm (llama), computed in float32; in and out in x's dtype."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None
        self.rms, self.eps = config.flavour == 'llama', config.norm_eps

    def forward(self, x):
        w = self.weight
        if self.rms:
            return F.rms_norm(x.float(), w.shape, w, self.eps).to(x.dtype)
        return F.layer_norm(x.float(), w.shape, w, self.bias, self.eps).to(x.dtype)


def rope(x, cos, sin):
    """Turn each pair (x_2i, x_2i+1) of a head by the angle of its position; x (B, nh, T, hs)."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)                  # (B, nh, T, hs / 2) each
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv = config.n_head, config.n_kv_head or config.n_head
        self.kv_cache, hs = spec(config.kv_cache), config.n_embd // config.n_head
        # ValueError now, and not when it first generates, if it cannot hold tokens
        KVCache(config.kv_cache).append(*torch.zeros(2, 1, 1, 1, hs))
        # one matrix for q, k and v, in this order
        self.c_attn = linear(config, config.n_embd, (self.n_head + 2 * self.n_kv) * hs)
        self.c_proj = linear(config, config.n_embd, config.n_embd)
        self.dropout = config.dropout

    def forward(self, x, angles, cache):
        B, T, C = x.shape
        y = self.c_attn(x).view(B, T, self.n_head + 2 * self.n_kv, -1).transpose(1, 2)
        q, k, v = y.split([self.n_head, self.n_kv, self.n_kv], 1)       # (B, nh, T, hs)
        if angles is not None:
            q, k = rope(q, *angles), rope(k, *angles)
        if cache is not None:
            k, v = cache.append(k, v)                                   # all tokens so far
        elif self.kv_cache:
            # rounding has no gradient, and is taken for the identity
            k, v = ((t.float() + (fake_quant(x, self.kv_cache) - x)).to(t.dtype)
                    for t, x in ((k, k.detach().float()), (v, v.detach().float())))
        if self.n_kv < self.n_head:                 # each head of k and v serves several of q
            k, v = (t.repeat_interleave(self.n_head // self.n_kv, 1) for t in (k, v))
        # a query at t sees the keys up to t; after the prompt a cache has more keys than queries
        S, dropout = k.shape[2], self.dropout if self.training else 0.0
        mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        if x.device.type == 'cpu' and x.dtype == torch.bfloat16 and T == S and q.requires_grad:
            # there the backward of the fused attention is slower than these matmuls
            p = (q @ k.mT).float().masked_fill(~mask, -math.inf) * q.shape[-1] ** -0.5
            y = F.dropout(p.softmax(-1).to(v.dtype), dropout) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, None if T == S else mask, dropout, T == S)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C).to(x.dtype))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gated = config.flavour == 'llama'
        # a gated MLP has three matrices, not two: 8/3 n_embd, up to a multiple of 256
        usual = -(-8 * config.n_embd // 768) * 256 if self.gated else 4 * config.n_embd
        hidden = config.hidden or usual
        self.c_fc = linear(config, config.n_embd, 2 * hidden if self.gated else hidden)
        self.c_proj = linear(config, hidden, config.n_embd)

    def forward(self, x):
        x = self.c_fc(x)
        if self.gated:
            gate, up = x.chunk(2, -1)
            return self.c_proj(F.silu(gate) * up)
        return self.c_proj(F.gelu(x, approximate='tanh'))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1, self.attn = Norm(config), Attention(config)
        self.ln_2, self.mlp = Norm(config), MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, angles, cache):
        x = x + self.dropout(self.attn(self.ln_1(x), angles, cache))
        return x + self.dropout(self.mlp(self.ln_2(x)))


# ------------------------------------------------------------------------------------------------
# the head and its loss, whose logits never exist as a whole

def cross_entropy(x, w, targets, how, key, weight):
    """Sum over tokens of L = -log softmax(x^ (w^)^T)[target]; dL/dx and dL/dw, times `weight`.

    x (n, in), w (vocab, in), targets (n,). weight None: no gradients. In float32 but for matmuls:

        L = logsumexp(z) - z[target],    dL/dz = softmax(z) - onehot(target),    z = x^ (w^)^T"""
    full = QTensor(x), QTensor(w)
    seen = operands(*full, how, key)
    z = matmul(*seen, how.compute == 'codes', x.dtype).float()              # (n, vocab)
    log_sum, targets = z.logsumexp(1, keepdim=True), targets.unsqueeze(1)
    loss = (log_sum - z.gather(1, targets)).sum()
    if weight is None:
        return loss, None, None
    onehot = targets == torch.arange(z.shape[1], device=z.device)
    g = (weight * ((z - log_sum).exp() - onehot.float())).to(x.dtype)
    return loss, *matmul_backward(g, *(full if how.backward == 'full' else seen), how, key)


class CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of x (N, in), w (vocab, in), targets (N,), a chunk of tokens at a time:
    the logits of a chunk and their gradients are freed before those of the next are computed. Only
    dx and dw are kept. A chunk has its own noise, and where tokens share a scale, it is that of the
    chunk, which is larger on a GPU."""

    @staticmethod
    def forward(ctx, x, w, targets, key, how, chunk, training):
        N, about = len(x), 2 ** 28 if x.is_cuda else 2 ** 20               # elements of logits
        chunks = math.ceil(N * len(w) / about)
        n = math.ceil(N / chunks / 128) * 128                   # blocks of up to 128 tokens fit
        loss, dx, dw = 0.0, [], None
        for i, (x_i, t_i) in enumerate(zip(x.split(n), targets.split(n))):
            l_i, dx_i, dw_i = chunk(x_i, w, t_i, how, key + i, 1 / N if training else None)
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
        return dx * g, dw * g, *[None] * 5


class Head(Linear):
    """A Linear without bias, to the vocabulary. Its weight stays in full precision."""
    def __init__(self, n_in, vocab_size, how):
        super().__init__(n_in, vocab_size, how=how)
        self.chunk = cross_entropy

    def loss(self, x, targets):
        """Mean cross-entropy of the logits with targets (...), all of which count."""
        return CrossEntropy.apply(x.flatten(0, -2), self.weight, targets.flatten(), self.key,
                                  self.how, self.chunk, torch.is_grad_enabled())


class GPT(nn.Module):
    """logits (B, T, vocab) or loss of token ids (B, T). Activations have the dtype `self.dtype`.
    Raises ValueError for a shape that does not fit."""

    def __init__(self, config, vocab_size):
        super().__init__()
        if config.flavour not in ('gpt2', 'llama'):
            raise ValueError(f"flavour = '{config.flavour}': use gpt2 or llama")
        hs, rest = divmod(config.n_embd, config.n_head)
        if rest or config.n_head % (config.n_kv_head or config.n_head):
            raise ValueError(f'n_head = {config.n_head} must divide n_embd = {config.n_embd}, and '
                             f'n_kv_head = {config.n_kv_head} must divide n_head')
        if config.flavour == 'llama' and (config.bias or hs % 2):
            raise ValueError('flavour llama has no bias and needs an even head size')
        self.config, self.block_size, self.dtype = config, config.block_size, torch.float32
        self.wte = nn.Embedding(vocab_size, config.n_embd)
        gpt2 = config.flavour == 'gpt2'
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if gpt2 else None
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = Norm(config)
        if config.flavour == 'llama':
            angle = torch.outer(torch.arange(config.block_size).float(),
                                config.rope_theta ** (-torch.arange(0, hs, 2).float() / hs))
            self.register_buffer('cos', angle.cos(), persistent=False)          # (T, hs / 2)
            self.register_buffer('sin', angle.sin(), persistent=False)
        how = self.h[0].mlp.c_fc.how if config.quantize_head else How()
        for name, layer in linears(self).items() if config.keep else ():
            layer.keep = bool(re.search(config.keep, name.removesuffix('.weight')))
            layer.how = How() if layer.keep else layer.how
        self._init_weights()
        self.lm_head = Head(config.n_embd, vocab_size, how)
        if config.tied:
            self.lm_head.weight = self.wte.weight       # one parameter, and it stays so

    def _init_weights(self):
        """N(0, .02^2); block linears N(0, init_gain^2 / fan_in), which follows the width. If
        init_gain is 0, all have .02^2, those into the residual stream .02^2 / 2L, as in GPT-2."""
        gain, residual = self.config.init_gain, 0.02 / math.sqrt(2 * len(self.h))
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Embedding):
                nn.init.normal_(layer.weight, std=0.02)
            elif isinstance(layer, Linear):
                std = residual if name.endswith('c_proj') else 0.02
                nn.init.normal_(layer.weight, std=gain / layer.weight.shape[1] ** 0.5 or std)

    def compile(self):
        """torch.compile a block, once for all of them, and the loss, in place."""
        codes = self.config.compute == 'codes'
        options = inductor(MATMULS, self.wte.weight.is_cuda) if codes else None
        for block in self.h:
            block.compile(options=options)
        self.lm_head.chunk = torch.compile(self.lm_head.chunk, options=options)

    def set_noise(self, *numbers):
        """Give every Linear its key for stochastic rounding, a function of (seed, step, ..)."""
        layers = [m for m in self.modules() if isinstance(m, Linear)]
        keys = torch.tensor([noise_key(*numbers, i) for i in range(len(layers))],
                            dtype=torch.int32).to(self.wte.weight.device)       # one copy for all
        for layer, key in zip(layers, keys):
            layer.key = key

    def embed(self, idx, start=0):
        """What blocks take: x (B, T, C), the first token at `start`, and the angles of rope."""
        end = start + idx.shape[1]
        if end > self.block_size:
            raise ValueError(f'{end} tokens do not fit into block_size = {self.block_size}')
        x = self.wte(idx)
        if self.wpe is not None:
            x = x + self.wpe.weight[start:end]
        x = F.dropout(x, self.config.dropout, self.training).to(self.dtype)
        return x, (self.cos[start:end], self.sin[start:end]) if self.wpe is None else None

    def forward(self, idx, targets=None, caches=None):
        x, angles = self.embed(idx, len(caches[0]) if caches else 0)            # (B, T, C)
        for i, block in enumerate(self.h):
            x = block(x, angles, caches[i] if caches else None)
        x = self.ln_f(x[:, [-1]] if caches else x)              # generation needs only the last
        if targets is None:
            return self.lm_head(x).float()                                      # (B, T, vocab)
        return self.lm_head.loss(x, targets)

    @torch.no_grad()
    def generate(self, idx, n, temperature=0.8, top_k=200, generator=None):
        """Yield n tokens, (B, 1) each, that continue idx (B, T): drawn from softmax(logits /
        temperature) of the top_k (0: of all). Keys and values are stored as config.kv_cache
        says; at block_size tokens, they begin anew with the last block_size / 2 of them."""
        caches, new = None, None
        for _ in range(n):
            full = caches and len(caches[0]) == self.block_size
            if not caches or full:
                caches = [KVCache(self.config.kv_cache) for _ in self.h]
                new = idx[:, -max(1, self.block_size // 2) if full else -self.block_size:]
            logits = self(new, caches=caches)[:, -1]                            # (B, vocab)
            k = (top_k if temperature else 1) or logits.shape[-1]   # not more, where bfloat16 ties
            logits, ids = logits.topk(min(k, logits.shape[-1]))
            p = (logits / max(temperature, 1e-5)).softmax(-1)                   # (B, k)
            new = ids.gather(1, torch.multinomial(p, 1, generator=generator))
            idx = torch.cat((idx, new), 1)
            yield new
