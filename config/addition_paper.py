"""config/addition.py by the paper's rules: its penalty, straight-through gradient, constraint and weights.

Ours beside it, on the same seeds: docs/addition.md.
"""

base = 'config/addition.py'

gate_temperature = 1.0
linear_penalty_steps = 0
constraint_gates = 'sampled'
average_decay = 0.0
