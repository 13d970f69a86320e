# direct ternary training (paper 2, 2412.04787, but a code moves when what its gradients add up to is
# a level, and scales learn): packed ternary codes are the only weights there are. What a step adds
# is a few of the 127 codes of adam_m: it is rounded by chance
stored = 'ternary/row/absmean'
activations = 'int8/row'
adam_m = 'int8/row/stochastic'
adam_v = 'rank1'
beta2 = 0.999
code_lr = 0.08
init_gain = 0.7
compute = 'codes'
