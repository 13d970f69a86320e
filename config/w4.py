# paper 1 (2407.11722): 4-bit weights, one scale per output channel, straight-through
weights = 'int4/row'
