"""The dense parent of config/olmo_tiny.py: an OLMo 2 in place of config/stdlib_dense.py's GPT-2.

RoPE, RMSNorm behind every write and on q and k, SwiGLU, no biases: what is different in OLMo 2, small enough
for a laptop.
"""

base = 'config/stdlib_dense.py'

architecture = 'olmo2'
