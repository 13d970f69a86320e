# size: LLaMA-shaped, 1.2B. 0.5M tokens per step on one GPU; with torchrun divide grad_accum
flavour = 'llama'
n_layer = 22
n_head = 16
n_embd = 2048
block_size = 2048
dataset = 'fineweb'
batch_size = 8
grad_accum = 32
learning_rate = 24e-4           # 3e-4 at this width, see base_width
embedding_lr = 3e-4
beta2 = 0.95
warmup_iters = 1000
max_iters = 20000               # 10.5B tokens, of data/fineweb/prepare.py --tokens=1e10: 5 % twice
eval_interval = 1000
