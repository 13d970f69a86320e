# quantization-aware fine-tuning (Xu et al., 2410.14570) of a model that is trained: two and a half
# epochs of 128 sequences, 4-bit weights in the forward; 2 bits want a learning_rate of 3e-4, and
# SmolLM2 in 3 and 2 bits 1e-3 at least (but see peqa.py)
# python train.py out/baseline/ckpt.pt config/qaft.py            and then, to pack them:
# python train.py out/baseline-qaft/ckpt.pt --ptq=rtn --stored=int4/64 --out_dir=out/baseline-int4
init_from = 'checkpoint'
weights = 'int4/64'
sequences = 128
max_iters = 40      # of 8 sequences
learning_rate = 3e-5
embedding_lr = 0.0  # learning_rate
warmup_iters = 4
weight_decay = 0.0
beta2 = 0.999
