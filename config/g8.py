# paper 1 (2407.11722): 8-bit output gradients, one scale per token, in dx and dw; nearest rounding hurts,
# most gradients are far below the largest, so they are rounded stochastically here
gradients = 'int8/row/stochastic'
