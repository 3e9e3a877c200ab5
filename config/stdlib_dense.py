"""The dense parent of config/stdlib.py: a small GPT that reads and writes Python, byte by byte.

Trained on 8 million bytes, drawn at random from the 11 million of the standard library of your own Python;
whole files are held out. config/stdlib_control.py shows what more steps would have brought.
"""

dataset = 'stdlib'

n_layer = 4
n_head = 8  # of width 8: many narrow heads, so that one edge can be kept without its neighbours
n_embd = 64
block_size = 64  # bytes: about two lines of code
dtype = 'auto'  # bfloat16 where the CPU multiplies it natively; judged in float32 always

batch_size = 16
max_steps = 8000  # 8 million bytes
learning_rate = 3e-3
eval_interval = 1000
eval_batch_size = 250
eval_batches = 8  # 2,000 windows of held-out files, 128,000 bytes
