"""The control of config/stdlib.py: the same parent trained on for the same steps on the same batches, without gates.

A parent that could have become better makes its child's target cheap. This run says by how much.
"""

init_from = 'config/stdlib_dense.py'
dataset = 'stdlib'
dtype = 'auto'

batch_size = 16
max_steps = 12000
learning_rate = 1e-3
min_lr = 5e-5
eval_interval = 1000
eval_batch_size = 250
eval_batches = 8
