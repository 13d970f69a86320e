"""
Losses of runs side by side, over the tokens they have seen (pip install matplotlib):

    python -m experiments.curve out/*/log.jsonl [--out=curves.png]

A faint line is the training loss, smoothed over log lines, and a line with dots the validation
loss; a run that was quantized without training is a dashed line. Only losses on the same data
compare: where runs differ in that, the legend says which data. Below is what rounding did at the
last evaluation to weights and activations of each layer, as the ratio of signal to noise: the
lower, the more a layer suffers.
"""
import json
import os
import sys
from pathlib import Path

MARKS = {'activations': 'o', 'weights': 'x'}


def read(path):
    """(folder, sha256 of the data, [(tokens, loss)] of train, the same of val, last val loss,
    {tensor: {layer: dB}})."""
    with open(path, encoding='utf-8') as f:
        head, *log = (json.loads(line) for line in f if line.endswith('\n'))   # a whole line
    if 'config' not in head:
        raise ValueError('its first line has no config')
    curves, last, ratios = {'train_loss': [], 'val_loss': []}, None, {}
    for line in log:
        last, ratios = line.get('val_loss', last), {} if 'health' in line else ratios
        for layer, seen in line.get('health', {}).items():
            for kind in MARKS:
                if isinstance(seen.get(kind), float):      # None: nothing was lost
                    ratios.setdefault(kind, {})[layer] = seen[kind]
        for key in curves.keys() & line.keys() if 'done' not in line else ():
            curves[key].append((line['tokens'], line[key]))
    return (os.path.dirname(os.path.abspath(path)), head['sha256'], *curves.values(), last,
            ratios)


def smooth(points, keep=0.8):
    """(x, y) -> (x, mean of y so far, in which a point counts `keep` times the one after it)."""
    total = weight = 0.0
    for x, y in points:
        total, weight = keep * total + y, keep * weight + 1
        yield x, total / weight


def draw(runs, path):
    """The picture of what `read` gave."""
    from matplotlib import ticker
    from experiments.figures import pyplot
    layers = list(dict.fromkeys(layer for *_, ratios in runs for kind in ratios.values()
                                for layer in kind))
    fig, panels = pyplot.subplots(1 + bool(layers), figsize=(10, 5.5 + 3.5 * bool(layers)),
                                  squeeze=False)
    ax = panels[0, 0]
    names = [os.path.basename(folder) for folder, *_ in runs]
    seen = []                                       # losses that must be within the picture
    for i, (folder, sha256, train, val, last, ratios) in enumerate(runs):
        label = names[i] if names.count(names[i]) == 1 else os.path.relpath(folder)
        label += f'  {last:.3f}' if last else ''
        label += f'  (data {sha256[:6]})' if len({run[1] for run in runs}) > 1 else ''
        # up to eight colours that one can tell apart, or as many as there are runs
        colour = f'C{i}' if len(runs) <= 8 else pyplot.get_cmap('turbo')((i + 0.5) / len(runs))
        train = list(smooth(train))
        if last and not train and not val:
            ax.axhline(last, linestyle='--', color=colour, label=label)
        else:
            ax.plot(*zip(*train or [(0, None)]), alpha=0.4, linewidth=1, color=colour)
            ax.plot(*zip(*val or [(0, None)]), 'o-', color=colour, label=label)
        for kind, found in ratios.items():
            panels[1, 0].plot([layers.index(layer) for layer in found], [*found.values()],
                              MARKS[kind], color=colour)
        # without the first fall from log(vocabulary), which would take up most of it
        seen += [y for _, y in val + train[len(train) // 4:]] + [last] * bool(last)
    ax.plot([], alpha=0.4, linewidth=1, color='black', label='training, smoothed')
    if seen:
        ax.set_ylim(min(seen) - 0.05, max(seen) + 0.05)
    ax.set(xlabel='tokens seen', ylabel='loss (nats per token)')
    ax.xaxis.set_major_formatter(ticker.EngFormatter())                 # 1.5 M
    ax.set_xlim(left=0)
    if layers:
        panels[1, 0].set_xticks(range(len(layers)), layers, rotation=90, fontsize=7)
        panels[1, 0].set(ylabel='signal to noise of rounding, dB')
        for kind in [kind for kind in MARKS if any(kind in ratios for *_, ratios in runs)]:
            panels[1, 0].plot([], MARKS[kind], color='black', label=kind)
        panels[1, 0].legend(fontsize=8)
    fig.legend(*ax.get_legend_handles_labels(), loc='outside right upper',
               title='run and its last validation loss')
    fig.savefig(path)


def main(argv):
    out, runs = 'curves.png', []
    if {'-h', '--help'} & {*argv}:
        return print(__doc__)
    for path in argv:
        if path.startswith('--out='):
            out = path[6:]
            if not Path(out).suffix:
                raise SystemExit(f'error: --out={out}: give a name that ends in .png, .svg or .pdf')
            continue
        try:
            runs.append(read(path))
        except OSError as e:
            raise SystemExit(f'error: cannot read {path}: {e.strerror}') from None
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise SystemExit(f'error: {path} is not the log of a run: {e!r}') from None
    if not runs:
        raise SystemExit('error: give logs: python -m experiments.curve out/*/log.jsonl')
    try:
        draw(runs, out)
    except ImportError as e:
        raise SystemExit(f'error: {e}: pip install matplotlib') from None
    except (OSError, ValueError) as e:      # a folder that is not there, an unknown format
        raise SystemExit(f'error: cannot write {out}: {e}') from None
    print(f'wrote {out}')


if __name__ == '__main__':
    main(sys.argv[1:])
