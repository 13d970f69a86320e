"""
llama.cpp, by its C interface in the wheel xllamacpp: what convert/ writes is compared with it.

    python -m experiments.llamacpp out/ternary/ckpt.pt

exports a checkpoint as GGUF, in codes and as F16, and measures what llama.cpp makes of windows of
val.bin: divergence from the model here with float activations, bits per byte there and here, and
tokens of 20 files of its text. It replaces results/llamacpp.json.
"""
import argparse
import ctypes as C
import importlib.util
import json
import math
import tempfile
from dataclasses import replace
from datetime import date
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from config import fail
from convert import gguf, read_checkpoint
from data.corpus import folder_of, read_dataset
from data.tokenizer import encoding
from experiments.runs import RESULTS, machine

NOTHING = C.CFUNCTYPE(None, C.c_int, C.c_char_p, C.c_void_p)(lambda *_: None)   # of its log
F32 = 0                     # a ggml_type
BYTES = 256                 # at least the size of any struct of options
# what llama-quantize takes (tensor_type_fallback, 2026) where blocks of 256 do not divide a row
FALLBACK = {'Q4_K': 'Q5_0', 'Q3_K': 'Q4_0', 'Q2_K': 'Q4_0'}


class Options(C.Structure):
    """Options, whose fields are set by their place among the 32-bit numbers of the struct."""
    _fields_ = [('field', C.c_uint32 * (BYTES // 4))]


class Batch(C.Structure):
    _fields_ = [('n', C.c_int32), ('token', C.POINTER(C.c_int32)), ('embd', C.c_void_p),
                ('pos', C.POINTER(C.c_int32)), ('n_seq', C.POINTER(C.c_int32)),
                ('seq', C.POINTER(C.POINTER(C.c_int32))), ('logits', C.POINTER(C.c_int8))]


@lru_cache
def library():
    """The functions of libllama. ImportError without the wheel."""
    found = importlib.util.find_spec('xllamacpp')
    if not found:
        raise ImportError('No module named xllamacpp')
    importlib.import_module('xllamacpp')        # loads what the shared object needs
    lib, p = C.CDLL(f'{found.submodule_search_locations[0]}/xllamacpp.abi3.so'), C.c_void_p
    ints, text = C.POINTER(C.c_int32), C.c_char_p
    for name, result, arguments in (
            ('model_default_params', Options, ()), ('context_default_params', Options, ()),
            ('log_set', None, (p, p)),
            ('model_load_from_file', p, (text, Options)), ('init_from_model', p, (p, Options)),
            ('model_get_vocab', p, (p,)), ('vocab_n_tokens', C.c_int32, (p,)),
            ('batch_init', Batch, (C.c_int32,) * 3), ('decode', C.c_int32, (p, Batch)),
            ('get_logits', C.POINTER(C.c_float), (p,)), ('get_memory', p, (p,)),
            ('memory_clear', None, (p, C.c_bool)), ('free', None, (p,)),
            ('model_free', None, (p,)), ('set_n_threads', None, (p, C.c_int32, C.c_int32)),
            ('tokenize', C.c_int32, (p, text, C.c_int32, ints, C.c_int32, C.c_bool, C.c_bool)),
            ('detokenize', C.c_int32,
             (p, ints, C.c_int32, text, C.c_int32, C.c_bool, C.c_bool))):
        function = getattr(lib, f'llama_{name}')
        function.restype, function.argtypes = result, arguments
    lib.llama_log_set(NOTHING, None)
    lib.ggml_quantize_chunk.restype = C.c_size_t
    lib.ggml_quantize_chunk.argtypes = C.c_int, p, p, C.c_int64, C.c_int64, C.c_int64, p
    return lib


class Model:
    """A GGUF file in llama.cpp, keys and values in float32; T tokens at once at most."""

    def __init__(self, path, T):
        self.lib = library()
        self.model = self.lib.llama_model_load_from_file(
            str(path).encode(), self.lib.llama_model_default_params())
        if not self.model:
            raise ValueError(f'llama.cpp does not load {path}')
        options = self.lib.llama_context_default_params()
        options.field[0], options.field[1] = T, max(T, 512)         # n_ctx, n_batch
        options.field[26] = options.field[27] = F32                 # type_k, type_v
        self.context = self.lib.llama_init_from_model(self.model, options)
        self.lib.llama_set_n_threads(self.context, 1, 1)
        self.vocab = self.lib.llama_model_get_vocab(self.model)
        self.vocab_size = self.lib.llama_vocab_n_tokens(self.vocab)
        self.batch = self.lib.llama_batch_init(T, 0, 1)

    def close(self):
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)

    def logits(self, ids):
        """(T, vocab) of a sequence of token ids."""
        b, b.n = self.batch, len(ids)
        for i, token in enumerate(ids):
            b.token[i], b.pos[i], b.n_seq[i], b.seq[i][0], b.logits[i] = int(token), i, 1, 0, 1
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        if self.lib.llama_decode(self.context, b):
            raise ValueError('llama.cpp could not decode')
        out = self.lib.llama_get_logits(self.context)
        return np.ctypeslib.as_array(out, (len(ids), self.vocab_size)).copy()

    def encode(self, text):
        text = text.encode()
        ids = (C.c_int32 * (len(text) + 8))()
        return ids[:self.lib.llama_tokenize(self.vocab, text, len(text), ids, len(ids), False,
                                            False)]

    def decode(self, ids):
        out = C.create_string_buffer(64 * len(ids) + 64)
        ids = (C.c_int32 * len(ids))(*ids)
        n = self.lib.llama_detokenize(self.vocab, ids, len(ids), out, len(out), False, True)
        return out.raw[:n]


def rounded(w, kind):
    """w (out, in), float32, as llama.cpp's own rounding to a type, or to its FALLBACK, leaves it:
    (w^, bytes)."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
    block, _ = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    kind = GGMLQuantizationType[FALLBACK[kind] if w.shape[1] % block else kind]
    block, size = GGML_QUANT_SIZES[kind]
    w = np.ascontiguousarray(w, np.float32)
    out = np.empty((len(w), w.shape[1] // block * size), np.uint8)
    library().ggml_quantize_chunk(kind, w.ctypes.data, out.ctypes.data, 0, *w.shape, None)
    return quants.dequantize(out, kind), out.nbytes


@torch.no_grad()
def compare(path, windows=64):
    """A dict of what the head of this file says."""
    (model, tokenizer), found = read_checkpoint(path), {}
    c, n, enc = model.config, tokenizer['vocab_size'], encoding(tokenizer)
    _, val, meta = read_dataset(folder_of(c.dataset))
    starts = np.linspace(0, len(val) - c.block_size - 1, windows).astype(int)
    tokens = torch.from_numpy(np.stack([val[i:i + c.block_size + 1] for i in starts]).astype(int))
    x, y = tokens[:, :-1], tokens[:, 1:]
    bits = lambda logits: torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), y.flatten()).item() / math.log(2) / meta['bytes_per_token']
    here = bits(model(x))
    for layer in model.modules():
        if hasattr(layer, 'how'):
            layer.how = replace(layer.how, activations=None, compute='float')
        layer.kv_cache = None
    floats = model(x)[..., :n].log_softmax(-1)
    texts = enc.decode(val[:200_000].tolist()).split('<|endoftext|>')[:20]
    with tempfile.TemporaryDirectory() as folder:
        for kind in '', 'F16':
            file = Path(folder, f'{kind}.gguf')
            gguf.main([path, str(file), *[f'--type={kind}'] * bool(kind)], *gguf.COMMAND)
            there = Model(file, c.block_size)
            logits = torch.stack([torch.from_numpy(there.logits(row.tolist())) for row in x])
            found[kind or 'codes'] = {
                'megabytes': file.stat().st_size / 1e6, 'bits_per_byte': bits(logits),
                'kl': (floats.exp() * (floats - logits.log_softmax(-1))).sum(-1).mean().item(),
                'texts': len(texts),
                'tokenized_alike': sum(there.encode(t) == enc.encode_ordinary(t) for t in texts),
                'decoded': sum(there.decode(enc.encode_ordinary(t)) == t.encode() for t in texts)}
            there.close()
    return {'checkpoint': path, 'bits_per_byte': here, **found, 'date': str(date.today()),
            'machine': machine()}


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint')
    checkpoint = parser.parse_args().checkpoint
    try:
        result = compare(checkpoint)
    except ImportError as e:
        fail(f'{e}; pip install -r convert/requirements.txt')
    except ValueError as e:
        fail(e)
    print(json.dumps(result, indent=1))
    RESULTS.joinpath('llamacpp.json').write_text(json.dumps(result, indent=1) + '\n', 'utf-8')
