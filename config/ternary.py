# direct ternary training (paper 2, 2412.04787, but a code moves once its gradients have added up
# to a level, and scales learn): packed ternary codes are the only weights there are. adam_m
# holds those sums; a step adds about ten of their 127 levels, and less than one at the end, so it
# rounds stochastically
stored = 'ternary/row/absmean'
activations = 'int8/row'
adam_m = 'int8/row/stochastic'
adam_v = 'rank1'
beta2 = 0.999
code_lr = 0.08
init_gain = 0.7
compute = 'codes'
