"""config/gpt2.py by the paper's rules: one constant gate bias, no teacher, gates sampled to the last step,
one target all along. Nobody here has run it.
"""

base = 'config/gpt2.py'

open_above = 0.0
distill_weight = 0.0
constraint_gates = 'sampled'
constraint_paired = False
peak_slack = 0.0
noise_free_steps = 0
