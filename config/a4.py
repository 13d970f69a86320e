# paper 1 (2407.11722): 4-bit activations, one scale per token; outlier channels make it unstable at size
activations = 'int4/row'
