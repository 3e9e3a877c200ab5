"""A parent that has learned what it can: a small GPT that reads Python, byte by byte, from 109 million bytes.

    python prepare_data.py python        once; needs no network: the source of the packages that you have

Half as wide as config/stdlib_dense.py and trained on ten times the text, none of it twice, to the end of its
learning rate. So it neither overfits nor has much left to learn: config/python_control.py says how much.
"""

dataset = 'python'

n_layer = 4
n_head = 8  # of width 8: many narrow heads, so that one edge can be kept without its neighbours
n_embd = 64
block_size = 128  # bytes: about four lines of code
dtype = 'auto'  # bfloat16 where the CPU multiplies it natively; judged in float32 always
init_std = 0.07

batch_size = 32
max_steps = 10000  # 41 million bytes
learning_rate = 3e-3
eval_interval = 1000
eval_batch_size = 250
eval_batches = 8  # 2,000 windows of held-out files, 256,000 bytes
