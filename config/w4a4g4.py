# all three matmuls on 4 bits: rotated blocks of 32, stochastic gradients (as Quartet, 2505.14669, does
# in mxfp4)
weights = 'int4/32/hadamard'
activations = 'int4/32/hadamard'
gradients = 'int4/32/hadamard/stochastic'
backward = 'requantize'
