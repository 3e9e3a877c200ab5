"""The dense parent of config/olmo_tiny.py: an OLMo 2 on the bytes of config/stdlib_dense.py, half as wide,
with half the context, for minutes.

RoPE, RMSNorm behind every write and on q and k, SwiGLU, no biases: what is different in OLMo 2, small enough
for a laptop. --architecture=gpt2 makes the GPT-2 of the same shape, which README.md compares it with.
"""

dataset = 'stdlib'
architecture = 'olmo2'

n_layer = 4
n_head = 8  # of width 8: many narrow heads, so that one edge can be kept without its neighbours
n_embd = 64
block_size = 64  # bytes: about two lines of code
dtype = 'auto'  # bfloat16 where the CPU multiplies it natively; judged in float32 always

batch_size = 16
max_steps = 6000
learning_rate = 3e-3
eval_interval = 1000
eval_batch_size = 250
eval_batches = 8  # 2,000 windows of held-out files, 128,000 bytes
