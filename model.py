"""
A GPT in two flavours, chosen by `config.flavour`:

    gpt2    learned positions, LayerNorm, GELU, optional biases (Radford et al. 2019)
    llama   rotary positions on interleaved pairs, RMSNorm, SwiGLU, no biases (Touvron et al.,
            arXiv 2302.13971)

The head is tied to the embedding in both. All that this file knows of quantization is `Linear`,
whose strings say what it quantizes, and the cache of keys and values. `config` is any object with
the attributes of train.Config that are named here.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from quant import TUNED, KVCache, Linear, StraightThrough, noise_key, quantize, spec


def linear(config, n_in, n_out, parts=1):
    """A block linear with the config's strategy; parts is how many equal projections it fuses."""
    return Linear(n_in, n_out, config.bias, config.weights, config.activations, config.gradients,
                  config.gradients_in, config.backward, config.compute, parts)


class Norm(nn.Module):
    """LayerNorm (gpt2) or RMSNorm (llama), computed in float32; in and out in x's dtype."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None
        self.rms = config.flavour == 'llama'

    def forward(self, x):
        if self.rms:
            return F.rms_norm(x.float(), self.weight.shape, self.weight, 1e-5).to(x.dtype)
        return F.layer_norm(x.float(), self.weight.shape, self.weight, self.bias, 1e-5).to(x.dtype)


def rope(x, cos, sin):
    """Turn each pair (x_2i, x_2i+1) of a head by the angle of its position; x (B, nh, T, hs)."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)                  # (B, nh, T, hs / 2) each
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.kv_cache = config.n_head, spec(config.kv_cache)
        head = torch.zeros(1, config.n_embd // config.n_head)
        quantize(head, self.kv_cache)                   # ValueError now if a block does not divide
        if self.kv_cache and self.kv_cache.rounding == 'stochastic':
            raise ValueError('kv_cache: a token is rounded once and then read at every step; use '
                             'nearest')
        self.c_attn = linear(config, config.n_embd, 3 * config.n_embd, parts=3)
        self.c_proj = linear(config, config.n_embd, config.n_embd)
        self.dropout = config.dropout

    def forward(self, x, angles, cache):
        B, T, C = x.shape
        q, k, v = (y.view(B, T, self.n_head, -1).transpose(1, 2)       # (B, nh, T, hs)
                   for y in self.c_attn(x).chunk(3, -1))
        if x.device.type == 'cpu':                  # there bfloat16 is no faster, or even slower
            q, k, v = q.float(), k.float(), v.float()
        if angles is not None:
            q, k = rope(q, *angles), rope(k, *angles)
        if cache is not None:
            k, v = cache.append(k, v)                                   # all tokens so far
        elif self.kv_cache:
            k, v = StraightThrough.apply(k, self.kv_cache), StraightThrough.apply(v, self.kv_cache)
        # a query at t sees the keys up to t; with a cache there are more keys than queries
        mask = torch.ones(T, k.shape[2], dtype=torch.bool, device=x.device).tril(k.shape[2] - T) \
            if T < k.shape[2] else None
        y = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0,
                                           is_causal=mask is None)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C).to(x.dtype))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gated = config.flavour == 'llama'
        # a gated MLP has three matrices, not two: 8/3 n_embd, up to a multiple of 256
        usual = -(-8 * config.n_embd // 768) * 256 if self.gated else 4 * config.n_embd
        hidden, parts = config.hidden or usual, 2 if self.gated else 1
        self.c_fc = linear(config, config.n_embd, parts * hidden, parts)
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


class GPT(nn.Module):
    """logits (B, T, vocab) or loss of token ids (B, T). Activations have the dtype `self.dtype`.

    Raises ValueError for a shape that does not fit."""

    def __init__(self, config, vocab_size):
        super().__init__()
        if config.flavour not in ('gpt2', 'llama'):
            raise ValueError(f"flavour = '{config.flavour}': use gpt2 or llama")
        if config.n_embd % config.n_head:
            raise ValueError(f'n_head = {config.n_head} does not divide n_embd = {config.n_embd}')
        if config.flavour == 'llama' and (config.bias or config.n_embd // config.n_head % 2):
            raise ValueError('flavour llama has no bias and heads of an even size')
        self.config, self.block_size, self.dtype = config, config.block_size, torch.float32
        self.wte = nn.Embedding(vocab_size, config.n_embd)
        self.wpe = None
        if config.flavour == 'gpt2':
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = Norm(config)
        if config.flavour == 'llama':
            hs = config.n_embd // config.n_head
            angle = torch.outer(torch.arange(config.block_size).float(),
                                config.rope_theta ** (-torch.arange(0, hs, 2).float() / hs))
            self.register_buffer('cos', angle.cos(), persistent=False)          # (T, hs / 2)
            self.register_buffer('sin', angle.sin(), persistent=False)
        self._init_weights()
        self.lm_head = linear(config, config.n_embd, vocab_size) if config.quantize_head else \
            Linear(config.n_embd, vocab_size)
        self.lm_head.bias = None
        self.lm_head.weight = self.wte.weight      # tied, and stays so: one parameter

    def _init_weights(self):
        """N(0, .02), the projections into the residual stream by sqrt(2 L) less, as GPT-2; with
        init_gain > 0 block linears get N(0, init_gain^2 / fan_in) instead of .02."""
        nn.init.normal_(self.wte.weight, std=0.02)
        if self.wpe is not None:
            nn.init.normal_(self.wpe.weight, std=0.02)
        for name, layer in self.h.named_modules():
            if isinstance(layer, Linear):
                gain = self.config.init_gain
                std = gain / math.sqrt(layer.weight.shape[1]) if gain else 0.02
                if name.endswith('c_proj') and not gain:
                    std = std / math.sqrt(2 * len(self.h))
                nn.init.normal_(layer.weight, std=std)

    @classmethod
    def from_pretrained(cls, config, vocab_size, name='gpt2'):
        """GPT-2's weights, by transformers: gpt2, gpt2-medium, gpt2-large, gpt2-xl or a folder.

        Raises ValueError when the config is of another shape, ImportError without transformers,
        OSError when the model is neither here nor to be had."""
        from transformers import GPT2LMHeadModel
        hf = GPT2LMHeadModel.from_pretrained(name)
        n_layer, n_head, n_embd = hf.config.n_layer, hf.config.n_head, hf.config.n_embd
        shape = {'flavour': 'gpt2', 'bias': True, 'n_layer': n_layer, 'n_head': n_head,
                 'n_embd': n_embd, 'hidden': 0}
        wrong = [f'{k} = {v}' for k, v in shape.items() if getattr(config, k) != v]
        most = hf.config.n_positions
        if wrong or config.block_size > most or vocab_size < hf.config.vocab_size:
            raise ValueError(f'{name} needs ' + ', '.join(wrong + [f'block_size up to {most}'])
                             + ' and data in its tokens (prepare.py --vocab=gpt2)')
        model = cls(config, vocab_size)
        ours = model.state_dict()
        for key, w in hf.transformer.state_dict().items():
            if key.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight')):
                w = w.T                                         # stored as (in, out)
            if key in ours:                                     # not old versions' causal mask
                ours[key][:len(w)] = w[:len(ours[key])]         # wte is padded, wpe may be cut
        model.load_state_dict(ours)
        return model

    def compile(self):
        """torch.compile a block, once for all of them, and the loss, in place."""
        options = None
        if self.config.compute == 'int8' and self.wte.weight.is_cuda:
            options = TUNED
        for block in self.h:
            block.compile(options=options)
        self.lm_head.cross_entropy = torch.compile(self.lm_head.cross_entropy, options=options)

    def set_noise(self, *numbers):
        """Give every Linear its key for stochastic rounding, a function of (seed, step, ..)."""
        for i, layer in enumerate(m for m in self.modules() if isinstance(m, Linear)):
            layer.key.fill_(noise_key(*numbers, i))

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
        start = 0 if caches is None or caches[0].k is None else caches[0].k.codes.shape[2]
        x, angles = self.embed(idx, start)                                      # (B, T, C)
        for i, block in enumerate(self.h):
            x = block(x, angles, None if caches is None else caches[i])
        x = self.ln_f(x)
        if caches is not None:
            x = x[:, [-1]]                                                      # all we need
        if targets is None:
            return self.lm_head(x).float()                                      # (B, T, vocab)
        return self.lm_head.loss(x, targets)

    @torch.no_grad()
    def generate(self, idx, n, temperature=0.8, top_k=200, generator=None):
        """Continue idx (B, T) by n tokens, drawn from softmax(logits / temperature) of the top_k.

        Keys and values are stored by config.kv_cache. When block_size is reached, the cache is
        filled anew from the last half of the text."""
        caches, new = None, None
        for _ in range(n):
            full = caches is not None and caches[0].k.codes.shape[2] == self.block_size
            if caches is None or full:
                caches = [KVCache(self.config.kv_cache) for _ in self.h]
                new = idx[:, -max(1, self.block_size // 2) if full else -self.block_size:]
            logits = self(new, caches=caches)[:, -1] / max(temperature, 1e-5)   # (B, vocab)
            if top_k:
                least = logits.topk(min(top_k, logits.shape[-1])).values[:, [-1]]
                logits = logits.masked_fill(logits < least, -math.inf)
            new = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            idx = torch.cat((idx, new), 1)
        return idx
