"""
How the figures of this folder look: one style, and the same colour for a method in each.

Whoever draws imports `pyplot` from here, inside the function, since training needs no matplotlib.
"""
import matplotlib

matplotlib.use('Agg')           # a file, no screen
from matplotlib import pyplot   # noqa: E402

# colours that are also told apart by those who see fewer (Okabe & Ito, 2008; a darker yellow)
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PINK, YELLOW = (
    '#000000', '#e69f00', '#56b4e9', '#009e73', '#0072b2', '#d55e00', '#cc79a7', '#d6c71f')
METHODS = {
    'AdamW': BLACK, 'float32 AdamW': BLACK, 'AdamW, half the rate': '0.3',
    'AdamW without momentum': '0.55', 'Muon': SKY,
    'BitNet, one scale per tensor': ORANGE, 'BitNet, per-row scales': RED,
    'BitNet without momentum': RED, 'BitNet with Muon': YELLOW,
    'direct ternary': BLUE, 'direct int4': SKY, 'direct int8': GREEN,
    'int8 codes, ternary forward': GREEN, 'bfloat16 without momentum': PINK, 'RTN': ORANGE,
    'GPTQ': GREEN, 'QAFT': BLUE, 'QAFT from GPTQ': SKY, 'QAFT with a teacher': PINK,
    'scales of GPTQ': RED, 'random': '0.6', 'float32': BLACK, 'bfloat16': PINK,
    'w8a8 + adam8': ORANGE, 'ternary': BLUE}

pyplot.rcParams.update({
    'axes.prop_cycle': matplotlib.cycler(
        color=[BLUE, RED, GREEN, PINK, ORANGE, SKY, BLACK, '0.6']),
    'axes.grid': True, 'grid.alpha': 0.3, 'axes.spines.top': False, 'axes.spines.right': False,
    'font.size': 9, 'legend.fontsize': 8, 'legend.frameon': False, 'lines.markersize': 4,
    'figure.constrained_layout.use': True, 'savefig.dpi': 150})
