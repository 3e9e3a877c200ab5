"""A small OLMo 2 of Python code, sparse at the loss of its dense parent, all weights trained:
config/stdlib.py with another architecture, in less time.
"""

base = 'config/stdlib.py'

init_from = 'config/olmo_tiny_dense.py'  # trained first, if it is not there yet
lambda_max = 0.3  # with config/stdlib.py's 0.2 an OLMo of that size ended 0.002 nats above its target
noise_free_steps = 9000
max_steps = 12000  # of 8 x 64 bytes: as much text as the parent saw
eval_interval = 1000
