# all at once: ternary weights, 8-bit activations, gradients and states, 4-bit keys and values
stored = 'ternary/row/absmean'
activations = 'int8/row'
gradients = 'int8/row/stochastic'
kv_cache = 'int4/row'
adam_m = 'int8/row/stochastic'
adam_v = 'uint8/row/root4'
beta2 = 0.999
code_lr = 0.08
init_gain = 0.7
backward = 'fold'
compute = 'codes'
