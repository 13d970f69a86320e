# 4-bit weights by GPTQ (2210.17323), of a checkpoint that is trained, --init_from=PATH
ptq = 'gptq'        # or rtn, which rounds to nearest
master = 'int4/row/mse'
sequences = 128     # to calibrate on
