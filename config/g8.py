# paper 1 (2407.11722): 8-bit output gradients, one scale per token, in dx and dw; stochastic,
# since most are far below the largest and rounding to nearest makes many zero
gradients = 'int8/row/stochastic'
