# full precision: float32 weights and AdamW states, the yardstick of all others
weights = ''
