"""
A model of transformers is the same function here, or is refused in a line.

    python -m pytest -q convert
"""
import json
import math

import pytest
import torch

from convert import hf
from data.tokenizer import encoding
from model import GPT
from train import Config


@pytest.fixture
def theirs(tmp_path):
    """A random GPT2LMHeadModel with a tokenizer of a few merges, in a folder; (model, folder)."""
    transformers = pytest.importorskip('transformers')
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    merges = ['t h', 'th e', 'i n', 'Ġ the', 'r e', 'e r']
    words = [*bytes_to_unicode().values(), *(m.replace(' ', '') for m in merges), '<|endoftext|>']
    vocab = {word: i for i, word in enumerate(words)}
    (tmp_path / 'vocab.json').write_text(json.dumps(vocab), encoding='utf-8')
    (tmp_path / 'merges.txt').write_text('\n'.join(['#version: 0.2', *merges]), encoding='utf-8')
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=len(vocab), n_positions=32, n_embd=64, n_layer=2, n_head=2, n_inner=96,
        layer_norm_epsilon=1e-3, bos_token_id=262, eos_token_id=262)).eval()
    for p in model.parameters():                # biases and gains that do something
        p.data += 0.02 * torch.randn_like(p)
    model.save_pretrained(tmp_path)
    return model, tmp_path


def test_a_gpt2_of_transformers_is_the_same_function_here(theirs, tmp_path):
    theirs, folder = theirs
    hf.main([str(folder), str(tmp_path / 'ckpt.pt')])
    found = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
    ours = GPT(Config(**found['config']), 320)                          # 263, a multiple of 64
    ours.load_state_dict(found['model'])
    x = torch.randint(263, (2, 32), generator=torch.Generator().manual_seed(1))
    logits = ours.eval()(x)
    assert torch.allclose(logits[..., :263], theirs(x).logits, atol=1e-4)
    # padding: e^logit is no more than the mean of the others', by Jensen
    mean = logits[..., :263].logsumexp(-1, keepdim=True) - math.log(263)
    assert (logits[..., 263:] <= mean + 1e-5).all()
    assert encoding(found['tokenizer']).encode_ordinary('rein the') == [260, 258, 259]
    assert found['tokenizer']['special'] == {'<|endoftext|>': 262}


@pytest.mark.parametrize('file, change, says', [
    *(('config.json', lambda text, new=new: json.dumps(json.loads(text) | new), says)
      for new, says in (({'activation_function': 'relu'}, 'function is relu'),
                        ({'n_layer': 3}, 'no weights'), ({'model_type': 'gpt_neo'}, 'gpt_neo'),
                        ({'scale_attn_by_inverse_layer_idx': True}, 'inverse_layer'),
                        ({'vocab_size': 200}, '263 tokens'))),
    ('merges.txt', lambda text: '\n'.join(text.split('\n')[::-1]), 'no tokenizer')])
def test_a_model_of_transformers_that_is_not_like_ours(file, change, says, theirs, tmp_path):
    _, folder = theirs
    path = folder / file
    path.write_text(change(path.read_text(encoding='utf-8')), encoding='utf-8')
    with pytest.raises(SystemExit, match=says):
        hf.main([str(folder), str(tmp_path / 'ckpt.pt')])
    assert not (tmp_path / 'ckpt.pt').exists()
    with pytest.raises(SystemExit, match='exists'):
        hf.main([str(folder), str(path)])
