"""The dense parent of config/addition.py: a GPT of 4 layers with 1 head each that adds two two-digit numbers.

It sees 8,000 of the 10,000 sums and gets all 10,000 right. Train it well: its loss is its child's target, and a poor parent
makes a lax target.
"""

dataset = 'addition'

n_layer = 4
n_head = 1
n_embd = 64
block_size = 11  # `5 3 + 2 1 = ? ? ? ? ?`

batch_size = 128
max_steps = 2000
learning_rate = 1e-3
eval_interval = 200
