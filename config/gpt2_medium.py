# size: GPT-2 350M. 0.5M tokens per step on one GPU; with torchrun divide grad_accum
flavour = 'gpt2'
n_layer = 24
n_head = 16
n_embd = 1024
block_size = 1024
dataset = 'openwebtext'
batch_size = 16
grad_accum = 32
learning_rate = 12e-4           # 3e-4 at this width, see base_width
embedding_lr = 3e-4
beta2 = 0.95
init_gain = 0.0         # as GPT-2
warmup_iters = 1000
max_iters = 100000
eval_interval = 1000
