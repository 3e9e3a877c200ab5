"""The run of the lab sheets (docs/labs): one-digit addition, small enough to train in class.

As config/addition.py, with less of everything: 100 sums, 90 edges a sum, 1,500 steps. What it does on other
seeds: docs/labs/README.md.
"""

init_from = 'config/lab_dense.py'  # trained first, if it is not there yet
dataset = 'lab'  # docs/labs/1-edges.md makes it
gated = True
gate_bias = 3.0
gate_temperature = 3.0

linear_penalty_steps = 300
constraint_gates = 'deterministic'
average_decay = 0.98

loss_slack = 0.02  # nats
constraint_scale = 0.02
lambda_rate = 0.03
lambda_min = 0.2
lambda_max = 30.0
lambda_init = 4.0

batch_size = 32
max_steps = 1500
learning_rate = 2e-3
min_lr = 2e-3
warmup_steps = 50
eval_interval = 50
