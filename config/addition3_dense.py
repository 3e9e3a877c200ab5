"""The dense parent of config/addition3.py: config/addition_dense.py, on three-digit sums. It sees 16,000 of them and is judged on 4,000 others."""

dataset = 'addition3'  # python prepare_data.py addition --digits=3

n_layer = 4
n_head = 1
n_embd = 64
block_size = 13  # `5 3 7 + 2 1 4 = ? ? ? ? ?`
gelu = 'none'
init_std = 0.07

batch_size = 64
ready_loss = 0.0003  # nats
average_decay = 0.98
max_steps = 8000  # more digits, more carries, more steps
learning_rate = 2e-3
min_lr = 2e-4
eval_interval = 100
