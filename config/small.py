# size: 1M parameters, 0.8M of them in the blocks; four minutes on a core, 6 tokens to each of those
n_embd = 128
n_head = 2
