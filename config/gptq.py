# post-training quantization of a checkpoint, --init_from=PATH, to 4-bit weights by GPTQ (2210.17323)
ptq = 'gptq'        # or rtn, which rounds to nearest
master = 'int4/row'
sequences = 128     # to calibrate on
