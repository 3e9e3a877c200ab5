"""The main job: shut every attention edge that two-digit addition can do without.

In its first 1,500 steps a penalty that does not saturate pulls at wide-open edges as well; then the paper's
penalty has the last word, while the learning rate comes down. Where we depart from the paper a comment says
so; put the paper's value there, or on the command line, to go back. How these values were found, and how
often they work: docs/addition.md.
"""

init_from = 'config/addition_dense.py'  # trained first, if it is not there yet
dataset = 'addition'
gated = True
gate_bias = 3.0
gate_temperature = 3.0  # paper: 1. A shut edge hears from further away that it is missed

linear_penalty_steps = 1500  # paper: 0
constraint_gates = 'deterministic'  # paper: 'sampled'. What counts in the end are deterministic gates
# paper: 0. Training jumps about; the average of its weights is measured, judged and kept
average_decay = 0.99

loss_slack = 0.001  # nats
constraint_scale = 0.001  # nats; loss_slack, so that lambda can fall as fast as it rises
lambda_rate = 0.03  # from cap to floor in 100 measurements, 400 steps
lambda_min = 1.0  # below it an edge that one sum in a hundred needs is cheaper to lose than to keep
# strict from the start, for the loss jumps when the gates begin to sample. It may rise above this only when
# the penalty is no longer linear: then a high price of a nat wins back what was cut too far
lambda_init = 10.0
lambda_max = 30.0

batch_size = 32
max_steps = 5000
patience = 1500  # most runs win nothing behind step 3,000
learning_rate = 2e-3
warmup_steps = 50
eval_interval = 100
