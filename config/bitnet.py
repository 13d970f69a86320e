# BitNet b1.58 (2402.17764): ternary weights, 8-bit activations, float32 weights between steps
weights = 'ternary/tensor/absmean'
activations = 'int8/row'
