# direct 8-bit training (paper 2, 2412.04787): int8 codes are the only weights; what is
# too little to move one is gathered in adam_m
stored = 'int8/row'
activations = 'int8/row'
adam_m = 'int8/row/stochastic'
adam_v = 'rank1'
code_lr = 0.012
beta2 = 0.999
compute = 'codes'
