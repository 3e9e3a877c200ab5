"""The dense parent of config/stdlib.py: a small GPT that reads and writes Python, byte by byte.

Trained on the standard library of the Python that runs it, 11 million bytes; whole files are held out. 31
million bytes are seen, three passes. config/stdlib_control.py shows what still more steps would have brought.
"""

dataset = 'stdlib'

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
