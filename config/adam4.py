# paper 1 (2407.11722): 4-bit AdamW states, one byte for m and v together
adam_m = 'int4/64/sqrt'
adam_v = 'uint4/64/root4'
