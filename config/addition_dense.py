# The dense parent of config/addition.py: a 4-layer, 1-head GPT that adds two two-digit numbers.
# It sees 8,000 of the 10,000 sums and gets all 10,000 right.

dataset = 'addition'

n_layer = 4
n_head = 1
n_embd = 64
block_size = 11  # `5 3 + 2 1 = ? ? ? ? ?`

batch_size = 128
max_steps = 1500
learning_rate = 1e-3
warmup_steps = 100
