"""
What each strategy costs in quality, part 1: paper 1 (2407.11722) and the strongest ways to 4 bits.

    python -m experiments.pretraining                   the small model, 3 seeds, two hours
    python -m experiments.pretraining --size=default    larger; --size=gpt2 on a GPU

Trains every row with equal data and steps, decides the claims below, looks into the trained
models, and writes experiments/results/pretraining-<size>.jsonl (one line a run; finished ones are
skipped), -analysis.json, .md and two .png.
"""
import argparse
import json
import math
import os
import statistics

import torch

from experiments.runs import (RESULTS, ROOT, SIZES, Job, arguments, claim_lines, compare,
                              decide, load, losses, run_all, table)
from model import GPT
from quant import (How, Linear, Optimizer, bytes_held, dequantize, fake_quant, health, quantize,
                   rtn_)
from train import parse, pick_dtype

# every row trains by the rates best for the baseline; experiments/direct.py has the tries. The
# small ones are so many that they have fewer steps than there
RATES = {'small': ['--learning_rate=1.5e-3', '--embedding_lr=12e-3', '--beta2=.95',
                   '--max_iters=256'],
         'default': [],
         'large': ['--learning_rate=1e-3', '--embedding_lr=4e-3'],
         'gpt2': []}


def rows():
    """{section: {name: keys for train.py}}; most rows are named by their keys."""
    weights = [f'weights={grid}/{group}' for grid in ('int8', 'int4', 'int3', 'int2')
               for group in ('tensor', 'row', '32')]
    weights += [f'weights=ternary/{group}/absmean' for group in ('tensor', 'row', '32')]
    activations = [f'activations={grid}/{group}' for grid in ('int8', 'int4')   # row: per token
                   for group in ('row', 'row/asymmetric', 'tensor', 'column')]
    gradients = [f'gradients={grid}/row/{rounding} gradients_in={where}'
                 for grid in ('int8', 'int4')
                 for rounding in ('nearest', 'stochastic') for where in ('dw', 'dx', 'both')]
    meanings = {f'W8A8, {name}': f'weights=int8/row activations=int8/row gradients=int8/row {how}'
                for name, how in (('g^ in both, straight-through', 'gradients_in=both'),
                                  ('g^ in dw, full x and w', 'gradients_in=dw backward=full'),
                                  ('g^ in dx, full x and w', 'gradients_in=dx backward=full'))}
    states = ['adam_m=int8/row', 'adam_m=int4/row', 'adam_v=uint8/row', 'adam_v=uint8/64/root4',
              'adam_v=uint4/64/root4', 'config/adam8.py', 'config/adam4.py',
              'config/adam8.py beta2=0.999', 'config/adam4.py beta2=0.999',
              'beta2=0.999', 'adam_v=uint8/tensor beta2=0.999',     # the betas of paper 1
              'adam_v=uint8/64/root4 beta2=0.999']
    together = ['config/w8a8.py', 'config/w8a8.py compute=float',       # not codes multiplied
                'config/w8a8g8.py', 'config/w8a8g8.py compute=float',
                'config/w8a8g8.py backward=requantize', 'weights=mxfp8 activations=mxfp8',
                'weights=mxfp8 activations=mxfp8 gradients=mxfp8 backward=requantize',
                'config/everything.py embedding_lr=96e-3']       # best for direct ternary
    forward = {f'W4A4 {how}': f'weights={how} activations={how}' for how in (
        'int4/row', 'int4/row/mse', 'int4/row/hadamard', 'int4/row/hadamard/mse', 'int4/32',
        'int4/32/hadamard', 'mxfp4', 'nvfp4', 'mxfp4/hadamard', 'nvfp4/mse')}
    three = {f'W4A4 {how}, G4 {g}':
             f'weights={how} activations={how} gradients={g} backward=requantize' for how, g in (
                 ('int4/row', 'int4/row'), ('int4/row', 'int4/row/stochastic'),
                 ('int4/row/hadamard/mse', 'int4/row/hadamard/stochastic'),
                 ('int4/32/hadamard', 'int4/32/hadamard/stochastic'),
                 ('mxfp4/hadamard', 'mxfp4/hadamard/stochastic'), ('nvfp4', 'nvfp4/stochastic'),
                 ('nvfp4/mse', 'nvfp4/hadamard/stochastic'))}
    named = {'Reference': [BASE], 'Weights': weights, 'Activations': activations,
             'Gradients': gradients, 'Optimizer states': states,
             'Keys and values': ['kv_cache=int8/row', 'kv_cache=int4/row'], 'Together': together}
    return {**{section: dict(zip(names, names)) for section, names in named.items()},
            'Three meanings of quantized gradients': meanings, 'Four bits forward': forward,
            'Four bits in all three matmuls': three}


BASE = 'config/baseline.py'
G = 'gradients={}/row/{} gradients_in=both'.format
# the rows of config/w4a4.py and of config/w4a4g4.py, which was the best by the first seed
W4A4 = 'W4A4 int4/row/hadamard/mse'
W4A4G4 = 'W4A4 int4/32/hadamard, G4 int4/32/hadamard/stochastic'
CLAIMS = [  # (of the paper, what it says, a, '<=' or '>=', percent, b): loss(a) against loss(b)
    ('1', '8-bit weights match the baseline, per row', 'weights=int8/row', '<=', 1, BASE),
    ('1', '8-bit weights do so per tensor', 'weights=int8/tensor', '<=', 1, BASE),
    ('1', '4-bit weights are worse', 'weights=int4/row', '>=', 0, BASE),
    ('1', 'one scale per tensor is worst', 'weights=int4/tensor', '>=', 0, 'weights=int4/row'),
    ('2', '8-bit activations are close, per token', 'activations=int8/row', '<=', 1, BASE),
    ('2', '4-bit activations are not', 'activations=int4/row', '>=', 1, BASE),
    ('3', '8-bit gradients, to nearest, hurt', G('int8', 'nearest'), '>=', 0, BASE),
    ('3', '4 bits more', G('int4', 'nearest'), '>=', 1, G('int8', 'nearest')),
    ('ours', 'stochastic rounding repairs 8 bits', G('int8', 'stochastic'), '<=', 1, BASE),
    ('4', '8-bit m is free', 'adam_m=int8/row', '<=', 1, BASE),
    ('4', '4-bit m is free', 'adam_m=int4/row', '<=', 1, BASE),
    # with the paper's own scale and betas: added after the claim below had come out at +.12 %
    ('4', 'linear 8-bit v blows up', 'adam_v=uint8/tensor beta2=0.999', '>=', 5, 'beta2=0.999'),
    ('4', 'also per row and with betas (.9, .95)', 'adam_v=uint8/row', '>=', 5, BASE),
    ('ours', '8-bit v by its fourth root is free', 'adam_v=uint8/64/root4', '<=', 1, BASE),
    ('ours', '4-bit v by its fourth root is free', 'adam_v=uint4/64/root4', '<=', 1, BASE),
    ('5', 'W8A8 keeps quality', 'config/w8a8.py', '<=', 1, BASE),
    ('5', 'W8A8G8 is harder', 'config/w8a8g8.py', '>=', 0, 'config/w8a8.py'),
    ('ours', 'multiplying codes changes nothing', 'config/w8a8.py', '<=', 0.5,
     'config/w8a8.py compute=float'),
    ('ours', 'nor does it backwards', 'config/w8a8g8.py', '<=', 0.5,
     'config/w8a8g8.py compute=float'),
    ('ours', 'config/w4a4.py within 2 %', W4A4, '<=', 2, BASE),
    ('ours', 'which beats plain absmax', W4A4, '<=', 0, 'W4A4 int4/row'),
    ('ours', 'config/w4a4g4.py within 4 %', W4A4G4, '<=', 4, BASE),
    ('ours', 'which beats plain absmax', W4A4G4, '<=', 0, 'W4A4 int4/row, G4 int4/row')]

TERNARY = 'weights=ternary/row/absmean'
TOKENS = 8192       # of validation data, to look at trained models with
KEPT = [BASE, 'weights=int8/row', 'weights=int4/row', 'weights=int3/row', TERNARY]


# ------------------------------------------------------------------------------------------------
# looking into trained models

def look_at(job):
    """A finished run and TOKENS of validation data: (run, x, y)."""
    run = load(job)
    T = run.config.block_size
    n = max(1, TOKENS // T)
    starts = [i * (len(run.val_data) - T - 1) // n for i in range(n)]
    return run, *run.batch(run.val_data, starts)


def layers(run):
    return {name: m for name, m in run.model.h.named_modules() if isinstance(m, Linear)}


def gradients(run, x, y, **how):
    """dL/dw of every block linear, quantized as `how` says, as one list."""
    for layer in layers(run).values():
        layer.how = How(**how)
    run.model.set_noise(0)
    return torch.autograd.grad(run.model(x, y), [m.weight for m in layers(run).values()])


def cosines(run, x, y):
    """{recipe: [cos(dw, dw quantized), one per layer]}"""
    recipes = {'W8A8': {'weights': 'int8/row', 'activations': 'int8/row'},
               'G8, nearest': {'gradients': 'int8/row'},
               'G8, stochastic': {'gradients': 'int8/row/stochastic'},
               'W4A4': {'weights': 'int4/row', 'activations': 'int4/row'},
               'W4A4, hadamard, mse': {k: 'int4/row/hadamard/mse'
                                       for k in ('weights', 'activations')},
               'G4, nearest': {'gradients': 'int4/row'},
               'G4, stochastic': {'gradients': 'int4/row/stochastic'}}
    full = gradients(run, x, y)
    return {name: [torch.cosine_similarity(a.flatten(), b.flatten(), 0).item()
                   for a, b in zip(full, gradients(run, x, y, **how))]
            for name, how in recipes.items()}


def traffic(run, x, y):
    """({layer: input}, {layer: gradient of the output}), flattened to (tokens, channels)."""
    inputs, outputs, hooks = {}, {}, []
    for name, layer in layers(run).items():
        def look(layer, args, y, name=name):
            inputs[name] = args[0].detach().flatten(0, -2).float()
            y.register_hook(lambda g: outputs.update({name: g.flatten(0, -2).float()}))
        hooks.append(layer.register_forward_hook(look))
    gradients(run, x, y)
    for hook in hooks:
        hook.remove()
    return inputs, {name: outputs[name] for name in inputs}


def outliers(inputs):
    """{layer: largest |x| of each channel, in standard deviations above the mean |x|, sorted}; a
    channel beyond 6 is an outlier."""
    found = {}
    for name, x in inputs.items():
        x = x.abs()
        found[name] = ((x.amax(0) - x.mean()) / x.std()).sort(descending=True).values.tolist()
    return found


def zeros(run, x, y, outputs):
    """{spec: {layer: share of entries of g that quantizing makes zero}}; 'head' is the gradient of
    the logits, softmax - onehot."""
    with torch.no_grad():
        p = run.model(x).softmax(-1).flatten(0, 1)
    head = {'head': p - torch.nn.functional.one_hot(y.flatten(), p.shape[1])}
    return {how: {name: ((dequantize(quantize(g, how)) == 0) & (g != 0)).float().mean().item()
                  for name, g in {**outputs, **head}.items()}
            for how in ('int8/tensor', 'int8/row', 'int4/row', 'fp4/row', 'nvfp4')}


@torch.no_grad()
def sharpness(run, x, y, draws=8):
    """[[eps, mean over draws of L(w^ + eps rms(w^) n) - L(w^)]], n normal: random perturbations of
    the weights as the forward sees them."""
    run.model.eval()
    seen = {}
    for name, layer in layers(run).items():
        seen[name] = fake_quant(layer.weight, layer.how.weights).clone()
        layer.how = How(activations=layer.how.activations)

    def loss(eps, draw):
        generator = torch.Generator().manual_seed(draw)
        for name, layer in layers(run).items():
            w = seen[name]
            noise = torch.randn(w.shape, generator=generator).to(w.device)
            layer.weight.copy_(w + eps * w.square().mean().sqrt() * noise)
        return run.model(x, y).item()

    rest = loss(0.0, 0)
    return [[eps, statistics.mean(loss(eps, draw) for draw in range(draws)) - rest]
            for eps in (0.0, 0.05, 0.1, 0.2, 0.3, 0.4)]


def memory(args, vocab_size, x, y):
    """Bytes of one step by category; activations: what autograd keeps for the backward."""
    config, kept = parse(args), {}
    model = GPT(config, vocab_size).to(x.device)
    rtn_(model, config.stored)
    model.dtype = pick_dtype(config, x.device)
    optimizer = Optimizer(model, config)

    def note(t):
        storage = t.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return t

    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model(x, y).backward()
    size = bytes_held(model, optimizer)
    size.pop('linear')
    return {**size, 'activations': sum(n for at, n in kept.items() if at not in own)}


@torch.no_grad()
def post_training(run):
    """{spec: loss of a full-precision model whose weights are rounded when it is trained}"""
    found = {}
    for how in ('', 'int8/row', 'int4/row', 'int3/row', 'ternary/row/absmean'):
        for layer in layers(run).values():
            layer.how = How(weights=how)
        found[how] = run.evaluate(run.config.final_tokens, run.val_data)
    return found


def analyse(jobs, size):
    """Every analysis, as a dict for the JSON file; jobs {name: [Job, one per seed]}, size the
    arguments they have in common."""
    run, x, y = look_at(jobs[BASE][0])
    n = run.config.batch_size
    inputs, outputs = traffic(run, x, y)
    found = {'outliers': outliers(inputs), 'zeros': zeros(run, x, y, outputs),
             'cosines': cosines(run, x, y), 'layers': list(layers(run)), 'memory': {}}
    for layer in layers(run).values():
        layer.how = How('int4/row', 'int4/row')
    found['snr'] = {name.removeprefix('h.'):
                    {k: entry[k]['snr_db'] for k in ('weights', 'activations')}
                    for name, entry in health(run.model, x[:1]).items()}
    for name, text in {'float32': 'config/baseline.py dtype=float32',
                       'bfloat16': 'config/baseline.py dtype=bfloat16',
                       'W8A8 + 8-bit Adam': 'config/w8a8.py config/adam8.py',
                       'W4A4 + 4-bit Adam': 'config/w4a4.py config/adam4.py',
                       'direct ternary': 'config/ternary.py'}.items():
        found['memory'][name] = memory([*size, *arguments(text)], run.vocab_size, x[:n], y[:n])
    found['sharpness'] = {name: [sharpness(*look_at(job)) for job in jobs[name]] for name in KEPT}
    found['post_training'] = [post_training(load(job)) for job in jobs[BASE]]
    return found


# ------------------------------------------------------------------------------------------------
# what comes out

def claims(results, analysis):
    """Lines of a markdown table: each claim with its verdict and numbers."""
    lines = claim_lines(results, CLAIMS)

    def say(of, text, about, gaps, numbers):
        """A claim that the mean of gaps is above zero."""
        mean, error = statistics.mean(gaps), statistics.stdev(gaps) / len(gaps) ** 0.5
        said = decide(mean, error, len(gaps))
        lines.append(f'| {of} | {text} | {about} | **{said}** | '
                     + numbers.format(f'{mean:+.3f} ± {error:.3f}') + ', wanted > 0 |')

    for how, where in (('int8/tensor', 'head'), ('int8/row', 'head'), ('int8/tensor', 'layers')):
        values = dict(analysis['zeros'][how])
        logits = values.pop('head')
        share = logits if where == 'head' else statistics.median(values.values())
        about = 'logits' if where == 'head' else 'the median layer'
        lines.append(f'| 3 | most of a gradient becomes zero | {how}, {about} | '
                     f'**{"PASS" if share > 0.5 else "FAIL"}** | {100 * share:.1f} % zeros of one '
                     'batch, wanted > 50 % |')
    say('3', 'rounding gradients turns dw more than rounding weights and activations',
        'G8 nearest, W8A8', [b - a for a, b in zip(analysis['cosines']['G8, nearest'],
                                                   analysis['cosines']['W8A8'])],
        'cosine {} less, mean over layers')
    sharp = {name: [curve[-1][1] for curve in curves]
             for name, curves in analysis['sharpness'].items()}
    for name in ('weights=int4/row', TERNARY):
        say('5', 'low bits sit in sharper minima', f'{name}, {BASE}',
            [a - b for a, b in zip(sharp[name], sharp[BASE])], 'loss rises by {} more')
    for name in ('weights=int8/row', 'weights=int4/row', 'weights=int3/row'):
        how = name.removeprefix('weights=')
        after = {seed: found[how] / found[''] for seed, found in
                 zip(losses(results, BASE), analysis['post_training'])}
        trained = losses(results, name)
        base = losses(results, BASE)
        say('6', f'rounding after training is worse at {how[:4]}', f'rounded baseline, {name}',
            [100 * (after[s] - trained[s] / base[s]) for s in after if s in trained],
            '{} % of the loss')
    return lines


def draw_losses(results, sections, path):
    """A row a strategy: loss against the baseline, mean, standard error and single seeds."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot
    most, lines = 12, sum(map(len, sections.values())) + 2 * len(sections)
    fig, axis = pyplot.subplots(figsize=(9, 0.2 * lines), layout='constrained')
    place, ticks = 0, []
    for section in sections:
        place += 1
        axis.text(-1.9, place, section, weight='bold', va='center', fontsize=8)
        place += 1
        for name in sections[section]:
            mean, error = compare(results, name, BASE)
            base, own = losses(results, BASE), losses(results, name)
            dots = [100 * (own[s] / base[s] - 1) for s in own if s in base]
            axis.plot([min(d, most) for d in dots], [place] * len(dots), '.', color='0.7', ms=4)
            label = 'not finite' if math.isinf(mean) else f'{mean:+.0f} %' if mean > most else ''
            shown = 0 if math.isnan(error) or mean > most else error
            axis.errorbar(min(mean, most), place, xerr=shown, fmt='o', ms=4, color='C0', capsize=2)
            axis.text(most + 0.1, place, label, va='center', fontsize=7)
            ticks.append((place, name))
            place += 1
    axis.set_yticks(*zip(*ticks), fontsize=7)
    axis.set(ylim=(place, 0), xlim=(-2, most))
    axis.set_xlabel('validation loss against the full-precision baseline, %: mean and standard '
                    'error; grey: single seeds, paired', fontsize=8)
    axis.axvline(0, color='0.5', lw=1)
    axis.grid(axis='x', alpha=0.3)
    fig.savefig(path, dpi=130)


def short_names(layers):
    return [n.replace('attn.', '').replace('c_attn', 'qkv').replace('mlp.c_fc', 'fc')
            .replace('mlp.c_proj', 'down').replace('c_proj', 'out') for n in layers]


def draw_analysis(found, path):
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot
    fig, ((a, b, c), (d, e, f)) = pyplot.subplots(2, 3, figsize=(15, 8.5), layout='constrained')
    draw_layers(found, a, b, c)
    draw_models(found, d, e, f)
    fig.savefig(path, dpi=110)


def draw_layers(found, a, b, c):
    """Outliers of each layer, what 4 bits do to it, and what quantizing does to its dw."""
    for name, channels in found['outliers'].items():
        kind = name.split('.', 1)[1]
        color = {'attn.c_attn': 'C0', 'attn.c_proj': 'C1', 'mlp.c_fc': 'C2', 'mlp.c_proj': 'C3'}
        a.plot([i / len(channels) for i in range(len(channels))], channels, color=color[kind],
               label=kind if name[0] == '0' else None, alpha=0.7)
    a.axhline(6, color='0.4', ls='--')
    a.text(0.02, 2, 'dashed: outlier, 6 deviations above the mean', fontsize=8)
    a.set(title='Outlier channels of the inputs', xlabel='channels of a layer, sorted (share)',
          ylabel='largest |x|, deviations above the mean |x|', yscale='log')
    a.set_yticks([2, 5, 10, 20, 50], ['2', '5', '10', '20', '50'])
    a.minorticks_off()
    a.legend(fontsize=8)
    places = range(len(found['layers']))
    short = short_names(found['layers'])
    for k, offset in (('weights', -0.2), ('activations', 0.2)):
        b.bar([p + offset for p in places], [found['snr'][n][k] for n in found['layers']], 0.4,
              label=f'int4 {k}, one scale per row')
    b.set(title='What 4 bits do to each layer (more is better)', ylabel='signal to noise, dB')
    b.set_xticks(places, short, rotation=90, fontsize=7)
    b.set_ylim(0, 30)
    b.legend(fontsize=8)
    for name, values in found['cosines'].items():
        c.plot(places, [1 - v for v in values], 'o-', ms=3, label=name)
    c.set(title='What quantizing does to dw (less is better)',
          ylabel='1 - cosine to the full-precision gradient', yscale='log', ylim=(3e-8, 1))
    c.set_xticks(places, short, rotation=90, fontsize=7)
    c.legend(fontsize=8, ncols=2, loc='lower center')


def draw_models(found, d, e, f):
    """Gradients that become zero, sharpness, and the memory of a step."""
    short = short_names(found['layers'])
    for how, values in found['zeros'].items():
        d.plot(range(len(values)), [100 * v for v in values.values()], 'o-', ms=3, label=how)
    d.set(title='Gradients that rounding to nearest makes zero', ylabel='%')
    d.set_xticks(range(len(short) + 1), short + ['logits'], rotation=90, fontsize=7)
    d.legend(fontsize=8)
    for name, curves in found['sharpness'].items():
        eps = [p[0] for p in curves[0]]
        rises = [[curve[i][1] for curve in curves] for i in range(len(eps))]
        error = [statistics.stdev(r) / len(r) ** 0.5 if len(r) > 1 else 0 for r in rises]
        e.errorbar(eps, [statistics.mean(r) for r in rises], error, fmt='o-', ms=3, capsize=2,
                   label=name)
    e.set(title='Sharpness: loss under random weight perturbations',
          xlabel='size of the noise / rms of the weights', ylabel='rise of the loss, nats/token')
    e.legend(fontsize=8)
    names = list(found['memory'])
    for i, kind in enumerate(('weights', 'gradients', 'optimizer', 'activations')):
        values = [found['memory'][name][kind] / 1e6 for name in names]
        f.bar([place + 0.2 * (i - 1.5) for place in range(len(names))], values, 0.2, label=kind)
    f.set(title='Memory of a training step, eager', ylabel='MB, read off the storages',
          yscale='log', ylim=(0.3, 1e4))
    f.set_xticks(range(len(names)), names, rotation=20, ha='right', fontsize=8)
    f.legend(fontsize=8)


def main(options):
    sections = rows()
    size = [*SIZES[options.size], *RATES[options.size], '--eval_interval=1000',
            f'--final_tokens={2 ** 17}']
    jobs = {name: [Job(name, [*size, *arguments(text)], seed) for seed in (1, 2, 3)]
            for section in sections.values() for name, text in section.items()}
    stem = RESULTS / f'pretraining-{options.size}'
    # one seed of every row, three of those that come near the baseline, and so to each other
    path = stem.with_suffix('.jsonl')
    first = run_all(path, [job[0] for job in jobs.values()], options.jobs, KEPT)
    close = {r['name'] for r in first if abs(compare(first, r['name'], BASE)[0]) <= 5}
    close |= {name for claim in CLAIMS for name in (claim[2], claim[5])} | {*KEPT}
    more = [job for name in jobs if name in close for job in jobs[name][1:]]
    results = first + run_all(path, more, options.jobs, KEPT)
    path = stem.with_name(stem.name + '-analysis.json')
    marks = {name: [job.mark for job in jobs[name]] for name in KEPT}
    if not path.exists() or json.loads(path.read_text(encoding='utf-8')).get('marks') != marks:
        missing = [job for name in KEPT for job in jobs[name]
                   if not (job.folder / 'ckpt.pt').exists()]
        if missing:
            raise SystemExit(f'the checkpoints of {missing[0].name} are gone: remove their lines '
                             f'from {stem.name}.jsonl to train them again')
        found = {'marks': marks, **analyse(jobs, size)}
        path.write_text(json.dumps(found), encoding='utf-8')
    analysis = json.loads(path.read_text(encoding='utf-8'))
    lines = claims(results, analysis)
    for section, names in sections.items():
        lines += ['', f'**{section}**', '', *table(results, BASE, names)]
    stem.with_suffix('.md').write_text('\n'.join(lines) + '\n', encoding='utf-8')
    print('\n'.join(lines))
    draw_losses(results, sections, stem.with_suffix('.png'))
    draw_analysis(analysis, stem.with_name(stem.name + '-analysis.png'))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--size', choices=SIZES, default='small')
    parser.add_argument('--jobs', type=int, default=2, help='runs at a time, sharing the cores')
    os.chdir(ROOT)                                      # where config/ is
    main(parser.parse_args())
