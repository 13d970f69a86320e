# all three matmuls on 4 bits: rotated blocks of 32, stochastic gradients (Quartet, 2505.14669,
# has them in mxfp4)
weights = 'int4/32/hadamard'
activations = 'int4/32/hadamard'
gradients = 'int4/32/hadamard/stochastic'
backward = 'requantize'
