"""The main job: shut every attention edge that two-digit addition can do without.

Where we depart from the paper a comment says so; put the paper's value there, or on the command line, to go back.
"""

init_from = 'config/addition_dense.py'  # trained first, if it is not there yet
dataset = 'addition'
gated = True
gate_bias = 3.0

linear_penalty_steps = 3000  # paper: 0. A penalty that does not saturate clears away wide-open edges that do nothing; then the paper's
constraint_gates = 'deterministic'  # paper: 'sampled'. What counts in the end are deterministic gates

loss_slack = 0.001  # nats
constraint_scale = 0.001  # nats; loss_slack, so that lambda can fall as fast as it rises
lambda_rate = 0.03  # from cap to floor in 100 measurements, 400 steps
lambda_min = 0.2
lambda_max = 4.0  # higher is safer and slower, lower is faster and riskier
lambda_init = 4.0  # strict from the start: the loss jumps when the gates begin to sample

batch_size = 128
max_steps = 4500
learning_rate = 1e-3
eval_interval = 150
