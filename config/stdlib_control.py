"""The control of config/stdlib.py: the same parent trained on for the same steps on the same batches, without gates.

A parent that could have become better makes its child's target cheap. This run says by how much.
"""

init_from = 'config/stdlib_dense.py'
dataset = 'stdlib'
dtype = 'auto'

batch_size = 8
max_steps = 24000
learning_rate = 1e-3
min_lr = 5e-5
eval_interval = 2000
eval_batch_size = 20
eval_batches = 50  # 1,000 windows of held-out files, the same for parent, control and child; small batches of T x T matrices stay in the cache
