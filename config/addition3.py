"""The main job with three digits: every setting is that of config/addition.py, where it is explained."""

init_from = 'config/addition3_dense.py'
dataset = 'addition3'
gated = True
gate_bias = 3.0
gate_temperature = 3.0

linear_penalty_steps = 330
cycle_steps = 1000
constraint_gates = 'deterministic'
average_decay = 0.99

loss_slack = 0.001
constraint_scale = 0.001
lambda_rate = 0.03
lambda_min = 0.2
lambda_max = 4.0
repair_lambda_max = 30.0
lambda_init = 4.0

batch_size = 32
max_steps = 9000
learning_rate = 1.5e-3
min_lr = 1.5e-3
warmup_steps = 50
eval_interval = 100
