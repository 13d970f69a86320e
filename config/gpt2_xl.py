# size: GPT-2 1.5B. 0.5M tokens per step on one GPU; with torchrun divide grad_accum
flavour = 'gpt2'
n_layer = 48
n_head = 25
n_embd = 1600
block_size = 1024
dataset = 'openwebtext'
batch_size = 8
grad_accum = 64
learning_rate = 12.5e-4         # 2e-4 at this width, see base_width
embedding_lr = 2e-4
beta2 = 0.95
init_gain = 0.0         # as GPT-2
warmup_iters = 1000
max_iters = 100000
eval_interval = 1000
