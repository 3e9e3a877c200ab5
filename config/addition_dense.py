"""The dense parent of config/addition.py: a GPT of 4 layers with 1 head each that adds two two-digit numbers.

It sees 8,000 of the 10,000 sums and is trained until it is ready: all 10,000 sums right, and a loss far below
the slack that its child is given. Its loss is its child's target, and a poor parent makes a lax target.
"""

dataset = 'addition'

n_layer = 4
n_head = 1
n_embd = 64
block_size = 11  # `5 3 + 2 1 = ? ? ? ? ?`
gelu = 'none'  # the exact one: on a CPU three times faster than GPT-2's approximation

batch_size = 64
ready_loss = 0.0003  # nats
weight_decay = 0.5  # without it two of six children fail: docs/addition.md has the trials
average_decay = 0.98  # the average over about 50 steps is ready long before the jumping weights are
max_steps = 4000  # 2,200 to 3,600 are the rule
learning_rate = 2e-3
min_lr = 2e-4  # who is late becomes calmer
eval_interval = 100
