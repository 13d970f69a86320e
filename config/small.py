# size: 1M parameters, four minutes on a core; 5 tokens to a weight of the blocks
n_embd = 128
