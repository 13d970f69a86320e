# direct ternary training (paper 2, 2412.04787, with code-unit steps, a noise threshold and learned scales):
# the packed codes are the only weights there are
master = 'ternary/row/absmean/stochastic'
activations = 'int8/row'
adam_m = 'int8/row'
adam_v = 'factored'
code_lr = 0.2
scale_lr = 0.01
threshold = 1.0
ramp = 20.0
init_gain = 0.7
