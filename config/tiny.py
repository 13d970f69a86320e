# size: .33M parameters, .26M of them in the blocks, with 6 tokens to each; two minutes on a core.
# In longer runs, tiny differences grow. Full precision on seed 2 (experiments/results/tries.jsonl):
# with embedding_lr 48e-3 and learning_rate 1.5, 3, 6, 12e-3 it ends at 3.544, 3.436, 3.475, 3.779;
# with 96e-3 and 6e-3 at 3.444; with 6, 12e-3 and 3e-3 at 3.786, 3.659
n_embd = 64
n_head = 4
max_iters = 800
learning_rate = 3e-3
embedding_lr = 48e-3
eval_interval = 800
final_tokens = 524288
