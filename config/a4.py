# paper 1 (2407.11722): 4-bit activations, one scale per token; unstable at size (outliers)
activations = 'int4/row'
