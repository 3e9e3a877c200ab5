"""config/stdlib.py with another architecture: a small OLMo 2 of Python code, then its sparse child, all
weights trained. docs/olmo.md has what came out.
"""

base = 'config/stdlib.py'

init_from = 'config/olmo_tiny_dense.py'  # trained first, if it is not there yet
