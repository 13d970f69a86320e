# direct 4-bit training (paper 2, 2412.04787): int4 codes are the only weights; what is
# too little to move one is gathered in adam_m
stored = 'int4/row'
activations = 'int8/row'
adam_m = 'int8/row/stochastic'
adam_v = 'rank1'
code_lr = 0.024
beta2 = 0.999
compute = 'codes'
