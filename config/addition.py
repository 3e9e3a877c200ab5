"""The main job: shut every attention edge that two-digit addition can do without.

Two phases take turns, nine times. In the first a penalty that does not saturate clears edges away at a low
price of a nat, and overshoots; in the second, under the paper's penalty, a high price wins back what was
needed. What comes back is often a smaller circuit than what went. Where we depart from the paper a comment
says so; put the paper's value there, or on the command line, to go back. How these values were found, and how
often they work: docs/addition.md.
"""

init_from = 'config/addition_dense.py'  # trained first, if it is not there yet
dataset = 'addition'
gated = True
gate_bias = 3.0
gate_temperature = 3.0  # paper: 1. A shut edge hears from further away that it is missed

linear_penalty_steps = 330  # paper: 0. The first phase of every cycle
cycle_steps = 1000  # paper: 0
constraint_gates = 'deterministic'  # paper: 'sampled'. What counts in the end are deterministic gates
# paper: 0. Training jumps about; the average of its weights is measured, judged and kept
average_decay = 0.99

loss_slack = 0.001  # nats
constraint_scale = 0.001  # nats; loss_slack, so that lambda can fall as fast as it rises
lambda_rate = 0.03  # from cap to floor in 100 measurements, 400 steps
lambda_min = 0.2
lambda_max = 4.0  # of the first phase: low, so that edges go
repair_lambda_max = 30.0  # paper: 0, one cap. Of the second phase: high, so that needed ones come back
lambda_init = 4.0  # strict from the start: the loss jumps when the gates begin to sample

batch_size = 32
max_steps = 9000
learning_rate = 1.5e-3
min_lr = 1.5e-3  # constant: circuits are found, lost and found smaller until the end
warmup_steps = 50
eval_interval = 100
