# all at once: ternary master, 8-bit activations, gradients and Adam states, 4-bit keys and values
master = 'ternary/row/absmean/stochastic'
activations = 'int8/row'
gradients = 'int8/row/stochastic'
kv_cache = 'int4/row'
adam_m = 'int8/row'
adam_v = 'uint8/row/root4'
code_lr = 0.2
scale_lr = 0.01
threshold = 1.0
ramp = 20.0
