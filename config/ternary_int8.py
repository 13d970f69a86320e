# ternary weights in the forward, int8 codes between steps: there is no float copy
weights = 'ternary/row/absmean'
stored = 'int8/row'
activations = 'int8/row'
adam_m = 'int8/row/stochastic'
adam_v = 'rank1'
code_lr = 0.012
beta2 = 0.999
compute = 'codes'
