# paper 1 (2407.11722): 8-bit weights, one scale per output channel, straight-through
weights = 'int8/row'
