# direct ternary training (paper 2, 2412.04787, but with steps in code units, a threshold that
# starts at two deviations of the noise and rises, a momentum ramp and learned scales): packed
# ternary codes are the only weights there are. What a step adds to m is less than half a code of
# it: m is rounded by chance
stored = 'ternary/row/absmean/stochastic'
activations = 'int8/row'
adam_m = 'int8/row/stochastic'
adam_v = 'rank1'
beta2 = 0.999
code_lr = 0.3
threshold = 2.0
ramp = 10.0
init_gain = 0.7
compute = 'codes'
