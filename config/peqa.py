# only the scales of a quantized model are tuned, its codes stay (PEQA, Kim et al., 2305.14152):
# python train.py out/baseline/ckpt.pt config/gptq.py --stored=int2/64/mse      and then:
# python train.py out/baseline-gptq/ckpt.pt config/peqa.py
init_from = 'checkpoint'
optimizer = 'scales'
scale_lr = 1e-2
learning_rate = 0.0     # embeddings and norms stay, too
embedding_lr = 0.0      # learning_rate
code_lr = 0.0
adam_m = ''
adam_v = ''
sequences = 128
max_iters = 40          # of 8 sequences
warmup_iters = 4
weight_decay = 0.0
