"""The laptop experiment on text: shut the attention edges that a model of Python code can do without, at the
loss of its dense parent.

Where we depart from the paper a comment says so.
"""

init_from = 'config/stdlib_dense.py'  # trained first, if it is not there yet
dataset = 'stdlib'
gated = True
dtype = 'auto'

gate_bias = 3.0
# paper: nothing of the kind. Edges with an attention weight above this start open: no shock (handover.py)
open_above = 0.01
distill_weight = 1.0  # the dense model that sets the target teaches, too

loss_slack = 0.0  # nats: no worse than the parent at all
constraint_gates = 'deterministic'  # paper: 'sampled'. What counts in the end are deterministic gates
# parent and child on the same batch: a batch's luck is larger than what is to be seen
constraint_paired = True
constraint_scale = 0.01  # nats
lambda_init = 0.1
lambda_min = 0.02
# low: most of the run gets rid of edges at this price, lambda at its cap; the loss comes back as the learning
# rate falls
lambda_max = 0.2

# the paper's penalty alone: text needs thousands of edges, and the linear one charges them for being certain
linear_penalty_steps = 0
noise_free_steps = 18000  # paper: 0. Trained as it is judged: in trials a third fewer edges at the same loss
batch_size = 8
max_steps = 24000
learning_rate = 1e-3
min_lr = 5e-5
eval_interval = 2000
eval_batch_size = 20
# 1,000 windows of held-out files, the same for parent, control and child; small batches of T x T matrices
# stay in the cache
eval_batches = 50
