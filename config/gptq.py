# 4-bit weights by GPTQ (2210.17323), of a model that is trained:
# python train.py out/baseline/ckpt.pt config/gptq.py
ptq = 'gptq'                # or rtn, which rounds to nearest
stored = 'int4/64/mse'      # scales of the least error, weighted by the diagonal of H
sequences = 128             # to calibrate on
