# paper 1 (2407.11722): all three matmuls on 8-bit operands; folding scales into g is ours
weights = 'int8/row'
activations = 'int8/row'
gradients = 'int8/row/stochastic'
backward = 'fold'
compute = 'codes'
