# paper 1 (2407.11722): 8-bit activations, one scale per token
activations = 'int8/row'
