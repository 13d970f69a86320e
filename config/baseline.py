# full precision: float32 weights and AdamW states, the yardstick of all others. These are the
# defaults, so it undoes nothing that is given before it
weights = ''
