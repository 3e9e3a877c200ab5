"""A small OLMo 2 of Python code, sparse at the loss of its dense parent, all weights trained: config/stdlib.py with another architecture, in less time.

What the settings mean, and why they are what they are, is said there; a comment says what is different.
"""

init_from = 'config/olmo_tiny_dense.py'  # trained first, if it is not there yet
dataset = 'stdlib'
gated = True
dtype = 'auto'

gate_bias = 3.0
open_above = 0.01  # paper: nothing of the kind. Edges with an attention weight above this start open, by a number for each head (handover.py)
distill_weight = 1.0  # the dense model that sets the target teaches, too

loss_slack = 0.0  # nats: no worse than the parent at all
constraint_gates = 'deterministic'  # paper: 'sampled'. What counts in the end are deterministic gates
constraint_paired = True  # parent and child on the same batch: a batch's luck is larger than what is to be seen
constraint_scale = 0.01  # nats
lambda_init = 0.1
lambda_min = 0.02
lambda_max = 0.3  # low: most of the run gets rid of edges at this price, lambda at its cap; the loss comes back as the learning rate falls. (config/stdlib.py: 0.2. With it an OLMo of that size ended 0.002 nats above its target)

linear_penalty_steps = 0  # the paper's penalty alone: text needs thousands of edges, and the linear one charges them for being certain
noise_free_steps = 9000  # paper: 0. Trained as it is judged: in trials a third fewer edges at the same loss
batch_size = 8
max_steps = 12000  # of 8 x 64 bytes: as much text as the parent saw
learning_rate = 1e-3
min_lr = 5e-5
eval_interval = 1000
eval_batch_size = 20
eval_batches = 50  # 1,000 windows of held-out files, the same for parent and child; small batches of T x T matrices stay in the cache
