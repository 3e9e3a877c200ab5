"""The dense parent of config/olmo_tiny.py: an OLMo 2 of the shape of config/stdlib_dense.py, on the same bytes for the same steps.

RoPE, RMSNorm behind every write and on q and k, SwiGLU, no biases: everything that is different in OLMo, small enough for a laptop.
"""

dataset = 'stdlib'
architecture = 'olmo2'

n_layer = 4
n_head = 16  # of width 8: many narrow heads, so that one edge can be kept without its neighbours
n_embd = 128
block_size = 128  # bytes: about four lines of code
dtype = 'auto'  # bfloat16 where the CPU multiplies it natively; judged in float32 always

batch_size = 16
max_steps = 15000
learning_rate = 2e-3
eval_interval = 1000
eval_batch_size = 250
eval_batches = 8  # 2,000 windows of held-out files, 256,000 bytes
