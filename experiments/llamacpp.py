"""
llama.cpp, by its C interface in the wheel xllamacpp: logits of whole sequences, tokens of a text,
and its own rounding. What convert/ writes is compared with it.
"""
import ctypes as C
import importlib.util
from functools import lru_cache

import numpy as np

NOTHING = C.CFUNCTYPE(None, C.c_int, C.c_char_p, C.c_void_p)(lambda *_: None)   # of its log
F32, UNUSED = 0, 256        # ggml_type; more bytes than a struct of options has


class Options(C.Structure):
    """Options whose fields are set by their place: 32-bit numbers, the first ones of the struct."""
    _fields_ = [('field', C.c_uint32 * (UNUSED // 4))]


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
    import xllamacpp  # noqa: F401  what the shared object needs is loaded first
    lib, p = C.CDLL(f'{found.submodule_search_locations[0]}/xllamacpp.abi3.so'), C.c_void_p
    ints, text = C.POINTER(C.c_int32), C.c_char_p
    for name, result, arguments in (
            ('model_default_params', Options, ()), ('context_default_params', Options, ()),
            ('log_set', None, (p, p)),
            ('model_load_from_file', p, (text, Options)), ('init_from_model', p, (p, Options)),
            ('model_get_vocab', p, (p,)), ('vocab_n_tokens', C.c_int32, (p,)),
            ('batch_init', Batch, (C.c_int32,) * 3), ('decode', C.c_int32, (p, Batch)),
            ('get_logits', C.POINTER(C.c_float), (p,)), ('get_memory', p, (p,)),
            ('memory_clear', None, (p, C.c_bool)), ('free', None, (p,)), ('model_free', None, (p,)),
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

    def __init__(self, path, T, threads=1):
        self.lib, self.T = library(), T
        self.model = self.lib.llama_model_load_from_file(
            str(path).encode(), self.lib.llama_model_default_params())
        if not self.model:
            raise ValueError(f'llama.cpp does not load {path}')
        options = self.lib.llama_context_default_params()
        options.field[0], options.field[1] = T, max(T, 512)         # n_ctx, n_batch
        options.field[6] = options.field[7] = threads
        options.field[26] = options.field[27] = F32                 # type_k, type_v
        self.context = self.lib.llama_init_from_model(self.model, options)
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
    """w (out, in), float32, as llama.cpp's own rounding to a type leaves it: (w^, bytes). Where the
    type's blocks of 256 do not divide a row, IQ4_NL in its place, as llama-quantize has it."""
    import gguf
    kind = gguf.GGMLQuantizationType[kind]
    if w.shape[1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = gguf.GGMLQuantizationType.IQ4_NL
    size, width = gguf.GGML_QUANT_SIZES[kind]
    w = np.ascontiguousarray(w, np.float32)
    out = np.empty((len(w), w.shape[1] // size * width), np.uint8)
    library().ggml_quantize_chunk(kind, w.ctypes.data, out.ctypes.data, 0, *w.shape, None)
    return gguf.quants.dequantize(out, kind), out.nbytes
