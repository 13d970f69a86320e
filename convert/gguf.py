"""
GGUF files, which llama.cpp and its kin run: a checkpoint out, a model in.

    pip install -r convert/requirements.txt
    python -m convert.gguf out/ternary/ckpt.pt ternary.gguf     [--type=TQ1_0, F16, ..]
    python -m convert.gguf MODEL.gguf out/model/ckpt.pt         of architecture llama or gpt2

Codes go out as they are, the scale of a group as that of each of its blocks, in float16: ternary
as TQ2_0, integers of 2 to 4 bits as Q4_0, of 5 to 8 as Q8_0. What none of these holds is F16, or
F32 beyond its range. Tokens of GPT-2 and Llama 3 are decoded there without a space before
punctuation.
"""
import math
import sys

import numpy as np
import torch

from convert import PATTERNS, exported, imported, integers, main, tokenizer_of, words_of
from quant import dequantize, levels
from train import Config

NAMES = {'wte': 'token_embd', 'ln_f': 'output_norm', 'lm_head': 'output',
         'ln_1': 'blk.{}.attn_norm', 'attn.c_proj': 'blk.{}.attn_output',
         'ln_2': 'blk.{}.ffn_norm', 'mlp.c_proj': 'blk.{}.ffn_down'}
NAMES = {'llama': {**NAMES, 'attn.c_attn': 'blk.{0}.attn_q blk.{0}.attn_k blk.{0}.attn_v',
                   'mlp.c_fc': 'blk.{0}.ffn_gate blk.{0}.ffn_up'},
         'gpt2': {**NAMES, 'wpe': 'position_embd', 'attn.c_attn': 'blk.{}.attn_qkv',
                  'mlp.c_fc': 'blk.{}.ffn_up'}}
KEYS = {'context_length': 'block_size', 'embedding_length': 'n_embd', 'block_count': 'n_layer',
        'feed_forward_length': 'hidden', 'attention.head_count': 'n_head',
        'attention.head_count_kv': 'n_kv_head'}
KEYS = {'gpt2': KEYS | {'attention.layer_norm_epsilon': 'norm_eps'},
        'llama': KEYS | {'attention.layer_norm_rms_epsilon': 'norm_eps',
                         'rope.freq_base': 'rope_theta'}}
# types of integers: weights in a block, their least and greatest code
BLOCKS = {'TQ2_0': (256, -1, 1), 'TQ1_0': (256, -1, 1), 'Q4_0': (32, -8, 7),
          'Q8_0': (32, -128, 127)}
FLOATS = {'F16': np.float16, 'F32': np.float32}


def blocks(q, kind):
    """A QTensor (out, in) as bytes (out, bytes) of a type of integers; None if it does not fit."""
    import gguf
    grid, (size, low, high) = integers(q), BLOCKS[kind]
    group = q.spec.group if grid and isinstance(q.spec.group, int) else 0
    if not grid or grid.low < low or grid.high > high or group % size or q.codes.dim() < 2:
        return None
    codes = levels(q)
    n, width = codes.shape
    if width % size:
        return None
    # d, the scale of each block, beside its codes
    d = q.scale.reshape(len(q.scale), -1, 1).repeat_interleave(group // size or 1, 1).numpy()
    d, exact = np.broadcast_to(d, (n, width // size, 1)).astype(np.float16), d
    codes = codes.view(n, -1, size).numpy()
    off = (abs(d - exact) > 1e-3 * exact) & codes.any(-1, keepdims=True)
    if off.any():                                                       # beyond its range
        return None
    if kind[0] == 'T':                  # its d is the greatest |w| of a block, and that our scale
        w = (codes * d.astype(np.float32)).reshape(n, width)
        return gguf.quants.quantize(w, gguf.GGMLQuantizationType[kind])
    data = codes.astype(np.int8).view(np.uint8)
    if kind == 'Q4_0':
        data = data + np.uint8(8)
        data = data[..., :16] | data[..., 16:] << 4
    return np.concatenate((d.view(np.uint8), data), -1).reshape(n, -1)


def write(model, tokenizer, path, choice=''):
    """A checkpoint as a GGUF file: `choice` of the types, or the least that holds the codes."""
    import gguf
    c, n, special = model.config, tokenizer['vocab_size'], [*tokenizer['special'].values()]
    pre = {pattern: name for name, pattern in PATTERNS.items()}.get(tokenizer['pattern'])
    pre = 'qwen2' if tokenizer['tokenizer'] == 'bytes' else pre         # nothing merges
    if not pre:
        raise ValueError('llama.cpp has no pre-tokenizer like its own; prepare the data anew')
    out, (words, merges) = gguf.GGUFWriter(path, c.flavour), words_of(tokenizer)
    ours = vars(c) | {'n_kv_head': c.n_kv_head or c.n_head,
                      'hidden': model.h[0].mlp.c_proj.weight.shape[1]}
    for key, name in KEYS[c.flavour].items():
        add = out.add_float32 if isinstance(ours[name], float) else out.add_uint32
        add(f'{c.flavour}.{key}', ours[name])
    out.add_tokenizer_model('gpt2')
    out.add_tokenizer_pre(pre)
    out.add_token_list(words)
    out.add_token_types([3 if i in special else 1 for i in range(n)])           # control, normal
    out.add_token_merges([*map(' '.join, merges)] or ['ÿ ÿ'])
    out.add_bos_token_id([*special, 0][0])
    out.add_eos_token_id([*special, 0][0])
    out.add_add_bos_token(False)
    kinds = (choice or 'TQ2_0', 'Q4_0', 'Q8_0') if choice not in FLOATS else ()
    used = {*FLOATS, ''}
    for name, q in exported(model, NAMES[c.flavour], n).items():
        for kind in kinds:
            if (data := blocks(q, kind)) is not None:
                out.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
                used.add(kind)
                break
        else:
            w = dequantize(q).numpy()
            half = w.astype(FLOATS.get(choice, np.float16) if w.ndim > 1 else np.float32)
            off = np.linalg.norm(half - w) > 1e-3 * np.linalg.norm(w)   # beyond its range
            out.add_tensor(name, w if off or not np.isfinite(half).all() else half)
    if choice not in used:
        raise ValueError(f'it has no codes that --type={choice} holds: leave that out')
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def read(path):
    """The checkpoint of a GGUF file. ValueError for a model that is not like ours."""
    import gguf
    file = gguf.GGUFReader(path)
    meta = {key: field.contents() for key, field in file.fields.items()}
    flavour, pre = meta.get('general.architecture'), meta.get('tokenizer.ggml.pre')
    if flavour not in NAMES or pre not in PATTERNS or meta.get('tokenizer.ggml.model') != 'gpt2':
        raise ValueError(f'it is {flavour} with tokens of {pre}; model.py has {", ".join(NAMES)}, '
                         f'and byte-level BPE as {", ".join(PATTERNS)}')
    words, kinds, merges = (meta.get(f'tokenizer.ggml.{key}', [])
                            for key in ('tokens', 'token_type', 'merges'))
    ids = {word: i for i, word in enumerate(words)}
    # tiktoken merges by the ids of tokens, llama.cpp by a list: which must say the same
    made = [ids.get(pair.replace(' ', ''), -1) for pair in merges]
    normal = {i for i, (word, kind) in enumerate(zip(words, kinds)) if kind == 1 and len(word) > 1}
    if made != sorted(made) or {*made} - {-1} != normal or not {*kinds} <= {1, 3} or \
            not len(ids) == len(words) == len(kinds) or \
            any(value for key, value in meta.items() if 'normalizer' in key):
        raise ValueError('its tokenizer is not whole, or does more than merge pairs in the order '
                         'of its tokens')
    end = meta.get('tokenizer.ggml.eos_token_id')
    if meta.get('tokenizer.ggml.add_bos_token', pre == 'llama-bpe'):
        print('note: it adds a token before every text, which train.py leaves out')
    found, default = {}, {'attention.head_count_kv': 0, 'rope.freq_base': Config.rope_theta}
    meta = {key.removeprefix(f'{flavour}.'): value for key, value in meta.items()
            if key.startswith(f'{flavour}.')}
    for key, name in KEYS[flavour].items():
        value = found[name] = meta.pop(key, default.get(key))
        if type(value) is not type(vars(Config)[name]) or \
                not 0 < value < math.inf and (key, value) not in default.items():
            raise ValueError(f'its {key} is {value}')
    hs = found['n_embd'] // found['n_head']
    same = {'vocab_size': len(words), 'rope.dimension_count': hs, 'attention.key_length': hs,
            'attention.value_length': hs, 'attention.causal': True, 'rope.scaling.type': 'none'}
    for key, value in meta.items():     # experts, windows, scaled rope: whatever is not known
        if value != same.get(key):
            raise ValueError(f'its {key} is {value}, which model.py does not support')
    theirs = {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy())
              for t in file.tensors}
    for name in {'token_embd.weight', 'output.weight'} & theirs.keys():
        if len(theirs[name]) < len(words):
            raise ValueError(f'its {name} has {len(theirs[name])} rows for {len(words)} tokens')
    config = Config(flavour=flavour, bias=flavour == 'gpt2', tied='output.weight' not in theirs,
                    **found)
    special = {word: ids[word] for word, kind in zip(words, kinds) if kind != 1}
    tokenizer = tokenizer_of(words, special, PATTERNS[pre], end)
    return imported(config, tokenizer, NAMES[flavour], theirs)


COMMAND = 'convert.gguf out/ternary/ckpt.pt ternary.gguf', (*BLOCKS, *FLOATS), write, read
if __name__ == '__main__':
    main(sys.argv[1:], *COMMAND)
