# paper 2 as published (2412.04787): ternary codes, AdamW in weight space, scale fixed at mean|w|
stored = 'ternary/tensor/absmean/stochastic'
activations = 'int8/row'
learning_rate = 5e-4
embedding_lr = 0.0      # learning_rate
init_gain = 0.0
weight_decay = 0.01
beta2 = 0.999
eps = 1e-6
