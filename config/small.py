# size: 1.2M parameters, 1M of them in the blocks; four minutes on a core, 5 tokens to each of those
n_embd = 128
n_head = 2
