"""
Loss against the memory of training, at equal tokens: python -m experiments.memory

For 2.25, 4.5 and 9 MB of weights, optimizer states and gradients, the widest model of each recipe,
trained on the same tokens, none twice. With update_in_backward two gradients are held: the largest
of the blocks, and that of embedding and head, which comes with the loss and waits to the end.
Writes results/memory.jsonl, one line a run, .md and .png. 34 runs: about three hours on two cores;
finished ones are skipped.
"""
import statistics
from dataclasses import replace

import train
from experiments.runs import (RESULTS, Job, arguments, keys, loss_cells, losses, parser_of, report,
                              run_all)
from model import GPT
from quant import Optimizer, bytes_held, rtn_

# keys for train.py, and p: below a width of 256, rates of floats grow as (256 / width)^p. Of 0, .5
# and 1, and 1.5 where 1 was best, each recipe has the best with seed 2 at its smallest size
# (results/tries.jsonl).
# Without momentum there is no m, of embeddings neither
RECIPES = {
    'float32 AdamW': ('config/baseline.py', 0.5),
    'BitNet without momentum':
        ('config/bitnet.py weights=ternary/row/absmean beta1=0. adam_v=rank1', 1),
    'direct int8': ('config/direct8.py beta1=0.', 1),
    'bfloat16 without momentum':
        ('stored=bf16/stochastic weight_decay=0 beta1=0. adam_v=rank1', 1),
    'direct int4': ('config/direct4.py beta1=0.', 0.5),
    'direct ternary': ('config/ternary.py beta1=0.', 0.5)}
MEGABYTES, STEPS = (2.25, 4.5, 9), 2400


def model_of(args):
    """(Config, GPT) of arguments that are known to be right: to try them would take a second."""
    config = replace(train.Config(), **keys(args))
    return config, GPT(config, 1024)


def args_of(recipe, width):
    """Arguments for train.py of a recipe at a width."""
    text, power = RECIPES[recipe]
    more = max(1, 256 / width) ** power
    return arguments(
        f'{text} n_embd={width} n_head={width // 32} hidden={round(8 * width / 3 / 64) * 64} '
        f'learning_rate={1.5e-3 * more:.3g} embedding_lr={6e-3 * more:.3g} '
        f'max_iters={STEPS} update_in_backward=True')


def megabytes(args):
    """Of weights, states, the largest gradient, and beside it that of embedding and head."""
    config, model = model_of(args)
    rtn_(model, config.stored)
    size = bytes_held(model, Optimizer(model, config))
    head = model.lm_head.weight
    most = max(p.numel() for p in model.parameters() if p is not head)
    return (size['weights'] + size['optimizer'] + 4 * (head.numel() + most)) / 1e6


def jobs(seeds, most=MEGABYTES):
    """The widest of each recipe within each budget, if one fits."""
    found = []
    for recipe in RECIPES:
        sizes, width = {}, 64
        while not sizes or max(sizes.values()) <= max(most):
            sizes[width] = megabytes(args_of(recipe, width))
            width += 32
        for budget in most:
            fit = [width for width, size in sizes.items() if size <= budget]
            if fit:
                found.append((f'{recipe}, {budget} MB', args_of(recipe, max(fit))))
    return [Job(name, args, seed) for seed in seeds for name, args in found]


def draw(points, path):
    """Loss against the memory of training, and against its operations: {recipe: [(megabytes,
    operations, [losses])]}."""
    from experiments.figures import METHODS, pyplot
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.6), sharey=True)
    labels = ('MB of weights, optimizer states and gradients',
              'operations of training: 6 x parameters x tokens')
    for axis, (panel, label) in enumerate(zip(panels, labels)):
        for recipe, found in points.items():
            x, y = [p[axis] for p in found], [statistics.mean(p[2]) for p in found]
            panel.plot(x, y, **METHODS[recipe], ms=6, label=recipe)
            panel.plot(x, [p[2] for p in found], '.', color=METHODS[recipe]['color'], ms=4)
        panel.set(xscale='log', xlabel=label)
    panels[0].set_xticks(MEGABYTES, MEGABYTES)
    panels[0].minorticks_off()
    panels[0].set(ylabel='validation loss, nats/token', title='The same tokens, and memory')
    panels[1].set_title('The same runs by what they compute')
    panels[0].plot([], [], '.', color='0.4', ms=4, label='one seed')
    panels[0].legend()
    figure.savefig(path)


def main(options):
    stem, todo = RESULTS / 'memory', jobs(options.seeds)
    results = run_all(stem.with_suffix('.jsonl'), todo, options.jobs)
    points, lines = {}, ['# Loss against the memory of training', '',
                         '| recipe | MB at most | held | parameters | tokens a parameter '
                         '| val loss | train loss |',
                         '|---|---|---|---|---|---|---|']
    for recipe in RECIPES:
        for most in MEGABYTES:
            found = [*losses(results, name := f'{recipe}, {most} MB').values()]
            if found:
                args = next(job.args for job in todo if job.name == name)
                (_, model), held = model_of(args), megabytes(args)
                n, tokens = sum(p.numel() for p in model.parameters()), STEPS * 2048
                points.setdefault(recipe, []).append((held, 6 * n * tokens, found))
                lines.append(f'| {recipe} | {most} | {held:.2f} | {n / 1e6:.2f}M | '
                             f'{tokens / n:.1f} | {loss_cells(results, name)} |')
    report(stem, lines)
    draw(points, stem.with_suffix('.png'))


if __name__ == '__main__':
    main(parser_of(__doc__, [11, 12]).parse_args())
