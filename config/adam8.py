# paper 1 (2407.11722): 8-bit AdamW states, v by its fourth root: linear codes
# round it to zero
adam_m = 'int8/64/sqrt'
adam_v = 'uint8/64/root4'
