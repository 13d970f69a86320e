"""
Folders of transformers, LlamaForCausalLM and GPT2LMHeadModel: a checkpoint out, a model in.

    pip install -r convert/requirements.txt
    python -m convert.hf out/ternary/ckpt.pt out/folder
    python -m convert.hf out/bitnet/ckpt.pt out/folder --type=bitnet
    python -m convert.hf gpt2 out/gpt2/ckpt.pt              a name on the hub, or a folder
    python data/text/prepare.py MY_TEXTS/ --tokenizer=out/gpt2/ckpt.pt --out=data/mine
    python train.py out/gpt2/ckpt.pt config/gptq.py --dataset=mine

Out go floats, float32 or --type=bfloat16. Packed, for flavour llama: --type=bitnet, ternary with a
scale for each tensor, and --type=compressed-tensors, int4 or int8 with one for each row; both are
for models whose activations are int8/row.
"""
import logging
import sys
from pathlib import Path

import torch

from convert import PATTERNS, exported, imported, integers, main, tokenizer_of, words_of
from data.tokenizer import encoding
from model import GPT
from quant import dequantize, levels, spec
from train import Config

NAMES = {'llama': {
    'wte': 'model.embed_tokens', 'ln_f': 'model.norm', 'lm_head': 'lm_head',
    'attn.c_attn': ' '.join(f'model.layers.{{0}}.self_attn.{x}_proj' for x in 'qkv'),
    'mlp.c_fc': 'model.layers.{0}.mlp.gate_proj model.layers.{0}.mlp.up_proj',
    **{ours: f'model.layers.{{}}.{theirs}' for ours, theirs in (
        ('ln_1', 'input_layernorm'), ('ln_2', 'post_attention_layernorm'),
        ('attn.c_proj', 'self_attn.o_proj'), ('mlp.c_proj', 'mlp.down_proj'))}}, 'gpt2': {
    'lm_head': 'lm_head', **{name: f'transformer.{name}' for name in ('wte', 'wpe', 'ln_f')},
    **{name: f'transformer.h.{{}}.{name}' for name in (
        'ln_1', 'attn.c_attn', 'attn.c_proj', 'ln_2', 'mlp.c_fc', 'mlp.c_proj')}}}
# what their configs call it: ours
KEYS = {'hidden_size': 'n_embd', 'num_hidden_layers': 'n_layer', 'num_attention_heads': 'n_head',
        'max_position_embeddings': 'block_size', 'tie_word_embeddings': 'tied'}
KEYS = {'gpt2': KEYS | {'n_inner': 'hidden', 'layer_norm_epsilon': 'norm_eps'},
        'llama': KEYS | {'intermediate_size': 'hidden', 'num_key_value_heads': 'n_kv_head',
                         'rms_norm_eps': 'norm_eps'}}
TYPES = 'float32', 'bfloat16', 'bitnet', 'compressed-tensors'


def packed(name, q, kind):
    """{name: tensor} of a weight as packed codes. ValueError where it is not of that kind."""
    grid, base = integers(q), name.removesuffix('.weight')
    good = ('ternary/tensor',) if kind == 'bitnet' else ('int4/row', 'int8/row')
    s = q.spec
    said = '/'.join(str(word) for word in (s.grid, s.group, s.map, s.sign, s.rotation)
                    if word not in ('linear', 'symmetric', '')) if s else 'in full precision'
    if said not in good:
        raise ValueError(f'{name} is {said}, not for --type={kind}: use {" or ".join(good)}')
    codes = levels(q).int()
    rows, columns = codes.shape
    if rows % 4 if kind == 'bitnet' else columns % (32 // grid.bits):
        raise ValueError(f'{name} is {rows} x {columns}, which --type={kind} cannot pack')
    if kind == 'bitnet':                # a byte has codes of four rows, a quarter of all apart
        four = (codes + 1).view(4, -1, columns) << 2 * torch.arange(4).view(-1, 1, 1)
        return {name: four.sum(0).to(torch.uint8), f'{base}.weight_scale': 1 / q.scale.view(1)}
    if grid.bits == 8:
        return {name: codes.to(torch.int8), f'{name}_scale': q.scale}
    words = ((codes + 8).view(rows, -1, 8) << 4 * torch.arange(8)).sum(-1)
    return {f'{name}_packed': words.to(torch.int32), f'{name}_scale': q.scale,
            f'{name}_shape': torch.tensor(codes.shape)}


def write(model, tokenizer, folder, kind='float32'):
    """A checkpoint as a folder that AutoModelForCausalLM and AutoTokenizer load."""
    from safetensors.torch import save_file
    from transformers import AutoConfig
    c, n, out, quantization = model.config, tokenizer['vocab_size'], {}, {}
    llama, is_packed = c.flavour == 'llama', kind in TYPES[2:]
    if not llama and (is_packed or c.n_kv_head not in (0, c.n_head)):
        raise ValueError('flavour gpt2 goes out as floats, and without grouped heads')
    if is_packed and spec(c.activations) != spec('int8/row'):
        raise ValueError(f'--type={kind} is for models of activations = int8/row')
    dtype = torch.float32 if is_packed else getattr(torch, kind)
    for name, q in exported(model, NAMES[c.flavour], n).items():
        if is_packed and '_proj' in name:
            out |= packed(name, q, kind)
            bits = integers(q).bits
        else:                           # linear layers of GPT-2 are (in, out) there
            w = dequantize(q, dtype)
            out[name] = (w.T if '.c_' in name and w.dim() > 1 else w).contiguous()
    if kind == 'compressed-tensors':
        codes = dict(type='int', symmetric=True, dynamic=False, strategy='channel', num_bits=bits)
        tokens = codes | dict(num_bits=8, strategy='token', dynamic=True)
        layout = {'format': 'int-quantized' if bits == 8 else 'pack-quantized'}
        quantization = {'quantization_status': 'compressed', 'ignore': ['lm_head'], **layout,
                        'config_groups': {'group_0': layout | {
                            'targets': ['Linear'], 'weights': codes, 'input_activations': tokens}}}
    if is_packed:
        quantization = {'quantization_config': {'quant_method': kind, **quantization}}
    end = [*tokenizer['special'].values(), 0][0]
    ours = vars(c) | {'hidden': model.h[0].mlp.c_proj.weight.shape[1], 'tied': 'lm_head.weight'
                      not in out, 'n_kv_head': c.n_kv_head or c.n_head}
    rope = {'rope_parameters': {'rope_type': 'default', 'rope_theta': c.rope_theta}}
    AutoConfig.for_model(
        c.flavour, architectures=['LlamaForCausalLM' if llama else 'GPT2LMHeadModel'],
        vocab_size=n, dtype=dtype, bos_token_id=end, eos_token_id=end, **quantization,
        **{theirs: ours[key] for theirs, key in KEYS[c.flavour].items()},
        **(rope if llama else {})).save_pretrained(folder)
    save_file(out, f'{folder}/model.safetensors', metadata={'format': 'pt'})
    write_tokenizer(tokenizer, folder)


def write_tokenizer(tokenizer, folder):
    """What AutoTokenizer needs, tokenizer.json and a file beside it."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words, merges = words_of(tokenizer)
    special = [*tokenizer['special'], None][0]
    out = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges,
                               ignore_merges=True))     # a word that is a token is not merged
    out.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(tokenizer['pattern']), 'isolated'),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    out.decoder = decoders.ByteLevel()
    out.add_special_tokens([AddedToken(name, special=True) for name in tokenizer['special']])
    PreTrainedTokenizerFast(tokenizer_object=out, clean_up_tokenization_spaces=False,
                            bos_token=special, eos_token=special).save_pretrained(folder)


def read(name):
    """The checkpoint of a model of transformers. ValueError if it is not like ours."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    c, tokenizer = AutoConfig.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    if c.model_type not in NAMES or len(tokenizer) > c.vocab_size:
        raise ValueError(f'model.py has {" and ".join(NAMES)}, with rows for all tokens; this is '
                         f'{c.model_type}, with {c.vocab_size} of {len(tokenizer)}')
    ours = read_tokenizer(tokenizer)    # it is small, weights are not
    if lost := tokenizer('')['input_ids']:
        print(f'note: it adds {tokenizer.decode(lost)} to every text, which train.py leaves out')
    theirs, info = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True)
    for key in sorted(info['missing_keys'] | info['unexpected_keys']):
        # transformers would draw it at random, or leave it out
        raise ValueError(f'its weights do not fit its config: {key}')
    rope = getattr(c, 'rope_parameters', None) or vars(Config)
    config = Config(flavour=c.model_type, bias=c.model_type == 'gpt2', dataset='openwebtext',
                    rope_theta=float(rope['rope_theta']),
                    **{ours: getattr(c, key) or type(getattr(Config, ours))()
                       for key, ours in KEYS[c.model_type].items()})
    weights = {key: w.T if '.c_' in key and w.dim() > 1 else w
               for key, w in theirs.state_dict().items()
               if not (config.tied and key == 'lm_head.weight')}
    checkpoint = imported(config, ours, NAMES[c.model_type], weights)
    # activations, rope, attention: whatever its config says, it must be the same function
    model = GPT(config, len(checkpoint['model']['wte.weight'])).eval()
    model.load_state_dict(checkpoint['model'])
    idx = torch.arange(min(config.block_size, 512))[None] % len(tokenizer)
    with torch.no_grad():
        a, b = (logits[..., :len(tokenizer)]        # without the padding of either
                for logits in (model(idx), theirs.eval().float()(idx).logits))
    if not (b - a).norm() < 1e-5 * b.norm():
        raise ValueError('model.py makes something else of its weights: its config asks for '
                         'more than model.py has')
    return checkpoint


def read_tokenizer(theirs):
    """The dict of a tokenizer of transformers, if it is byte-level BPE and cuts text in a way that
    is known: both agree then on each of its words alone and on this file, for which here are
    ça, 你好, it's 1234, ½, é, ﬁ, 🙂\t, a  1 and

1.
    """
    vocab, text = theirs.get_vocab(), Path(__file__).read_text(encoding='utf-8')
    words = sorted(vocab, key=vocab.get)
    special = {i for i, token in theirs.added_tokens_decoder.items() if token.special}
    alone = [theirs.convert_tokens_to_string([word]) for word in words
             if vocab[word] not in special]
    texts = [text, *(word for word in alone if '\ufffd' not in word)]      # whole characters
    ids = theirs(texts, add_special_tokens=False)['input_ids']
    normal = theirs.is_fast and not theirs.backend_tokenizer.normalizer
    known = PATTERNS.values() if normal and [*range(len(words))] == sorted(vocab.values()) else ()
    for pattern in known:
        ours = tokenizer_of(words, theirs.get_added_vocab(), pattern, theirs.eos_token_id)
        if encoding(ours).encode_ordinary_batch(texts) == ids:
            return ours
    raise ValueError("it has no tokenizer, or not a byte-level BPE that cuts text as "
                     f'{", ".join(PATTERNS)} do, and does nothing else to it')


COMMAND = 'convert.hf out/bitnet/ckpt.pt out/folder', TYPES, write, read
if __name__ == '__main__':
    logging.disable(logging.WARNING)            # transformers warns of what is checked here
    main(sys.argv[1:], *COMMAND)
