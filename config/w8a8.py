# paper 1 (2407.11722): 8-bit weights and activations
weights = 'int8/row'
activations = 'int8/row'
compute = 'codes'
