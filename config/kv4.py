# 4-bit keys and values, one scale per head and token, in training and in the cache of generation
kv_cache = 'int4/row'
