"""The control of config/gpu_text.py: the same parent trained on for the same steps on the same batches, without gates.

A parent that could have become better makes its child's target cheap. This run says by how much.
"""

init_from = 'config/gpu_text_dense.py'
dataset = 'text-gpt2'
dtype = 'auto'

batch_size = 32
max_steps = 900
learning_rate = 1e-3
min_lr = 5e-5
warmup_steps = 30
beta2 = 0.95
eval_interval = 450
eval_batch_size = 32
eval_batches = 8  # 256 windows of held-out files, 131,072 tokens, the same for parent, control and child
