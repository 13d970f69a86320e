# 4-bit weights and activations: rotated, so that no outlier takes the scale of all others, and
# clipped where the error is least (as in QuEST, 2502.05003)
weights = 'int4/row/hadamard/mse'
activations = 'int4/row/hadamard/mse'
compute = 'codes'
