# size: 1.2M parameters, 1M of them in the blocks, with 5 tokens to each; four minutes on a core
n_embd = 128
n_head = 2
