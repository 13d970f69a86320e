"""
GPT-2, or any other GPT2LMHeadModel of transformers, as a checkpoint for train.py:

    pip install -r convert/requirements.txt
    python -m convert.hf gpt2 out/gpt2/ckpt.pt      a name on the Hugging Face hub, or a folder
    python data/text/prepare.py MY_TEXTS/ --vocab=out/gpt2/ckpt.pt --out=data/mine
    python train.py out/gpt2/ckpt.pt config/gptq.py --dataset=mine
"""
import logging
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from tiktoken_ext.openai_public import r50k_pat_str

from config import fail, save
from data.tokenizer import encoding, gpt2_tokenizer, tokenizer_dict
from model import GPT
from train import Config

NEEDED = {'model_type': 'gpt2', 'activation_function': 'gelu_new', 'scale_attn_weights': True,
          'scale_attn_by_inverse_layer_idx': False, 'add_cross_attention': False}


def load_theirs(name):
    """The GPT2LMHeadModel called `name`, and its tokenizer's dict. ValueError if not like ours."""
    from transformers import AutoConfig, AutoTokenizer, GPT2LMHeadModel
    config = AutoConfig.from_pretrained(name)
    for key, value in NEEDED.items():
        if getattr(config, key, None) != value:
            raise ValueError(f'its {key} is {getattr(config, key, None)}, and model.py has only '
                             f'{value}')
    tokenizer = to_tokenizer(AutoTokenizer.from_pretrained(name), config.vocab_size)
    theirs, info = GPT2LMHeadModel.from_pretrained(name, output_loading_info=True)
    if info['missing_keys']:                    # transformers would draw them at random
        raise ValueError(f"it has no weights {', '.join(sorted(info['missing_keys'])[:3])}")
    return theirs, tokenizer


def to_tokenizer(theirs, vocab_size):
    """The dict of data/tokenizer.py for a BPE of GPT-2's make: bytes, then merges in their order,
    then special tokens. GPT-2's own where there is none, ValueError for others."""
    vocab, special = theirs.get_vocab(), theirs.get_added_vocab()
    if len(vocab) <= 256 and vocab_size == 50257:
        return gpt2_tokenizer()
    if len(vocab) > vocab_size:
        raise ValueError(f'its tokenizer has {len(vocab)} tokens, and the model {vocab_size}')
    # a character stands for a byte; those one could not see are the characters from 256 on
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    byte = {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}
    ranks = sorted(vocab.keys() - special.keys(), key=vocab.get)
    if byte.keys() <= vocab.keys() and all(byte.keys() >= set(token) for token in ranks):
        ours = tokenizer_dict('gpt2', r50k_pat_str, [bytes(map(byte.get, t)) for t in ranks],
                              *sorted(special, key=special.get))
        # other patterns and orders exist; do both agree on this file, and on ça, 你好 and 🙂?
        text = Path(__file__).read_text(encoding='utf-8')
        ids = theirs.encode(text, add_special_tokens=False)
        if ours['special'] == special and encoding(ours).encode_ordinary(text) == ids:
            return ours
    raise ValueError("it has no tokenizer, or not one of GPT-2's make")


@torch.no_grad()
def convert(theirs, tokenizer):
    """The checkpoint of a GPT2LMHeadModel, as train.py writes them."""
    c, n = theirs.config, tokenizer['vocab_size']
    config = Config(flavour='gpt2', bias=True, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd,
                    hidden=c.n_inner or 0, block_size=c.n_positions, dataset='openwebtext',
                    norm_eps=c.layer_norm_epsilon, tied=c.tie_word_embeddings)
    weights, have = GPT(config, -(-n // 64) * 64).state_dict(), theirs.state_dict()
    for key, w in weights.items():
        t = have[key if key == 'lm_head.weight' else f'transformer.{key}'].float()
        if key.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight')):
            t = t.T                                         # stored as (in, out)
        if key in ('wte.weight', 'lm_head.weight'):         # (n, C), ours is padded
            # GPT-2's logits lie far below 0, where padding would win. The mean row's logit is
            # their mean, and e^mean is at most the mean of e^logit, so it gets next to nothing
            t = t[:n]
            w[n:] = t.mean(0)
        w[:len(t)] = t
    return {'config': asdict(config), 'sha256': '', 'tokenizer': tokenizer, 'iter': 0, 'tokens': 0,
            'seconds': 0.0, 'losses': [], 'model': weights, 'optimizer': None}


def main(argv):
    if len(argv) != 2 or argv[0].startswith('-'):
        fail('give a model and a file to write: python -m convert.hf gpt2 out/gpt2/ckpt.pt')
    name, path = argv
    if os.path.exists(path):
        fail(f'{path} exists: write to another file, or remove it')
    try:
        theirs, tokenizer = load_theirs(name)
        checkpoint = convert(theirs, tokenizer)
    except ImportError as e:
        fail(f'{e}; pip install -r convert/requirements.txt')
    except Exception as e:      # damaged files, no network, ..: it may raise anything at all
        fail(f'cannot convert {name}: {e}')
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    save(path, checkpoint)
    size = sum(p.numel() for p in theirs.parameters())
    print(f'{path}: {size / 1e6:.2f}M parameters; evaluate it, on data in its tokens: python '
          f'train.py {path} --eval_only=True --dataset=..')


if __name__ == '__main__':
    logging.disable(logging.WARNING)            # transformers warns of what is checked here
    main(sys.argv[1:])
