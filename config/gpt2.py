# size: GPT-2 124M. 0.5M tokens per step on one GPU; with torchrun divide grad_accum
flavour = 'gpt2'
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
dataset = 'openwebtext'
batch_size = 32
grad_accum = 16
learning_rate = 18e-4           # 6e-4 at this width, see base_width
embedding_lr = 6e-4
beta2 = 0.95
init_gain = 0.0         # as GPT-2
warmup_iters = 1000
max_iters = 100000
eval_interval = 1000
