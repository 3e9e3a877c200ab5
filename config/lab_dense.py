"""The dense parent of config/lab.py: a GPT of 2 layers with 1 head each that adds two digits.

It sees 90 of the 100 sums. Of the 10 that are held out it sees the mirror image: 3+8, but not 8+3. So it can
get them right, if it learns that the order does not matter. It is ready with all 100 sums right.
"""

dataset = 'lab'  # docs/labs/1-edges.md makes it

n_layer = 2
n_head = 1
n_embd = 48
block_size = 9  # `5 + 3 = ? ? ? ? ?`
gelu = 'none'

batch_size = 32
ready_loss = 0.01  # nats; half the slack of the child
weight_decay = 0.5
average_decay = 0.98
max_steps = 3000  # 600 to 3,000 where it gets there; on some seeds it does not: docs/labs/README.md
learning_rate = 2e-3
min_lr = 2e-3
eval_interval = 100
