"""
What training costs against the size of the model and the context: python -m experiments.cost

Seconds per token and bytes per weight of the blocks, by strategy, of a gpt2 of 2 layers, as
train.py runs it on this machine. The strategies of a point take turns in one process. Writes
experiments/results/cost-<machine>.json, and cost.png from it; --plot=FILE only draws.
"""
import argparse
import json
import os
import statistics
import sys
from pathlib import Path

import torch

from experiments.bench import CUDA, free, header, our_step, take_turns, write
from experiments.runs import ROOT
from quant import bytes_held
from train import tell_system

STRATEGIES = {'float32': ['--dtype=float32'], 'bfloat16': ['--dtype=bfloat16'],
              'w8a8 + adam8': ['config/w8a8.py', 'config/adam8.py', '--dtype=bfloat16'],
              'ternary': ['config/ternary.py', '--dtype=bfloat16']}
WIDTHS, CONTEXTS = (128, 256, 512, 1024), (128, 512, 2048)


def measure():
    """The file that the points went to."""
    head, points, tokens = header(), [], 2 ** 15 if CUDA else 2 ** 11
    settings = [('width', n, n, 256) for n in WIDTHS]
    settings += [('context', n, 256, n) for n in CONTEXTS]
    for axis, value, width, context in settings:
        args = ['--flavour=gpt2', '--n_layer=2', f'--n_embd={width}', f'--block_size={context}',
                f'--batch_size={tokens // context}']
        steps = {name: our_step([*how, *args]) for name, how in STRATEGIES.items()}
        for step in steps.values():
            for _ in range(3):
                step()
        for name, samples in take_turns(steps).items():
            size = bytes_held(steps[name].model, steps[name].optimizer)['linear']
            points.append({'axis': axis, 'value': value, 'strategy': name, 'samples': len(samples),
                           'seconds_a_token': statistics.median(samples) / tokens,
                           'bytes_a_weight': size['weights'] + size['optimizer']})
            print(points[-1], file=sys.stderr)
        del steps, step
        free()
    return write('cost', {**head, 'tokens': tokens, 'points': points})


def plot(path, data):
    """Draw the points of a file to cost.png beside it."""
    from experiments.figures import METHODS, pyplot
    figure, panels = pyplot.subplots(2, 2, figsize=(9, 6.5), sharex='col', sharey='row')
    for axis, column, label in zip(('width', 'context'), panels.T,
                                   ('width (context 256)', 'context in tokens (width 256)')):
        by_name = {name: [p for p in data['points'] if (p['axis'], p['strategy']) == (axis, name)]
                   for name in STRATEGIES}
        for name, points in by_name.items():
            x, y = ([p[key] for p in points] for key in ('value', 'seconds_a_token'))
            column[0].plot(x, [1e6 * s for s in y], **METHODS[name], ms=6,
                           label=f'{name}: {points[-1]["bytes_a_weight"]:.2f}')
            if name != 'float32':
                column[1].plot(x, [s / p['seconds_a_token'] for s, p in zip(
                    y, by_name['bfloat16'])], **METHODS[name], ms=6)
        column[0].set(xscale='log', yscale='log')
        column[1].set(xlabel=label)
        column[1].set_xticks(x, map(str, x))
        for panel in column:
            panel.minorticks_off()
    times = [p['seconds_a_token'] * 1e6 for p in data['points']]
    ticks = [m * 10.0 ** e for e in range(-4, 5) for m in (1, 2, 5)]
    ticks = [t for t in ticks if min(times) / 2 < t < max(times) * 2]
    panels[0, 0].set_yticks(ticks, [f'{t:g}' for t in ticks])
    panels[0, 0].set_ylabel('microseconds a token of training')
    panels[1, 0].set_ylabel('that time against bfloat16')
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc='outside lower center', ncols=4,
                  title='bytes per weight of the blocks: weights + optimizer states')
    figure.suptitle(f'Time a token: {data["gpu"] or data["machine"]}, torch '
                    f'{data["versions"]["torch"]}, {data["date"]}')
    figure.savefig(path.with_name('cost.png'))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--plot', metavar='FILE', type=Path)
    file = parser.parse_args().plot
    if not file:
        os.chdir(ROOT)                                  # where config/ is
        tell_system()
        torch._dynamo.config.recompile_limit = 64       # several models in one process
        file = measure()
    try:
        plot(file, json.loads(file.read_text(encoding='utf-8')))
    except (OSError, ValueError, LookupError, TypeError) as e:
        parser.error(f'cannot draw {file}, which should be a result of this program: {e!r}')
