# paper 1 (2407.11722): 8-bit output gradients, one scale per token, in dx and dw; stochastic, so
# that small ones count in the mean, where rounding to nearest makes them zero
gradients = 'int8/row/stochastic'
