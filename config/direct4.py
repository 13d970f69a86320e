# direct 4-bit training (paper 2, 2412.04787): int4 codes are the only weights, moved by
# stochastic rounding
stored = 'int4/row/stochastic'
activations = 'int8/row'
adam_m = 'int8/row'
adam_v = 'rank1'
code_lr = 2.75e-3
beta2 = 0.999
compute = 'codes'
