# The main job: shut every attention edge that two-digit addition can do without.
# Each line below a "paper:" comment is an improvement of ours; put the paper's value there, or on the command line, to go back.

init_from = 'config/addition_dense.py'  # trained first, if it is not there yet
dataset = 'addition'
gated = True
gate_bias = 3.0

# paper: 0. A penalty that does not saturate clears away wide-open edges that do nothing; then the paper's takes over.
linear_penalty_steps = 1500
# paper: 'sampled'. What counts in the end are deterministic gates.
constraint_gates = 'deterministic'
# paper: 1.0. The hardest 5 % of the digits of a batch, so that one wrong sum cannot hide behind 127 right ones.
constraint_tail = 0.05

loss_slack = 0.001  # nats
constraint_scale = 0.02  # nats
lambda_rate = 0.03
lambda_min = 0.2
lambda_max = 2.0

batch_size = 128
max_steps = 2500
learning_rate = 2e-3
