"""
How the figures of this folder look: one style, and the same colour and marker for a method in each.

Whoever draws imports `pyplot` from here, inside the function, since training needs no matplotlib.
"""
import matplotlib

matplotlib.use('Agg')           # a file, no screen
from matplotlib import pyplot   # noqa: E402

# colours that are also told apart by those who see fewer (Okabe & Ito, 2008; a darker yellow)
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PINK, YELLOW = (
    '#000000', '#e69f00', '#56b4e9', '#009e73', '#0072b2', '#d55e00', '#cc79a7', '#d6c71f')
METHODS = {name: dict(color=color, marker=marker) for name, color, marker in (
    ('AdamW', BLACK, 's'), ('float32 AdamW', BLACK, 's'), ('AdamW, half the rate', '0.3', '*'),
    ('AdamW without momentum', '0.55', 'd'), ('Muon', SKY, '>'),
    ('BitNet, one scale per tensor', ORANGE, '^'), ('BitNet, per-row scales', RED, 'v'),
    ('BitNet without momentum', RED, 'v'), ('BitNet with Muon', YELLOW, '<'),
    ('direct ternary', BLUE, 'o'), ('direct int4', SKY, 'p'), ('direct int8', GREEN, 'P'),
    ('int8 codes, ternary forward', GREEN, 'D'), ('bfloat16 without momentum', PINK, 'X'),
    ('float32', BLACK, 's'), ('bfloat16', PINK, 'X'), ('w8a8 + adam8', ORANGE, '^'),
    ('ternary', BLUE, 'o'), ('RTN', ORANGE, '^'), ('GPTQ', GREEN, 'P'), ('QAFT', BLUE, 'o'),
    ('QAFT from GPTQ', SKY, 'p'), ('QAFT with a teacher', PINK, 'X'),
    ('scales of GPTQ', RED, 'v'), ('random', '0.6', 'd'))}

pyplot.rcParams.update({
    'axes.prop_cycle': matplotlib.cycler(
        color=[BLUE, RED, GREEN, PINK, ORANGE, SKY, BLACK, '0.6']),
    'axes.grid': True, 'grid.alpha': 0.3, 'axes.spines.top': False, 'axes.spines.right': False,
    'font.size': 9, 'legend.fontsize': 8, 'legend.frameon': False, 'lines.markersize': 4,
    'figure.constrained_layout.use': True, 'savefig.dpi': 150})
