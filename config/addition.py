# The main job: shut every attention edge that two-digit addition can do without.
init_from = 'config/addition_dense.py'  # trained first, if it is not there yet
dataset = 'addition'
gated = True

gate_bias = 3.0
gate_linear_penalty = True
loss_slack = 0.001
constraint_tail = 0.05
constraint_scale = 0.02
lambda_max = 10.0

batch_size = 128
max_steps = 4000
learning_rate = 1e-3
