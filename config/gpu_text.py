"""config/stdlib.py at the next size, in minutes on one large GPU: 12 layers, GPT-2's tokens, 512 of context.

    python train.py config/gpu_text_dense.py         the parent; its docstring says how the data is made
    python train.py config/gpu_text.py               its sparse child
    python train.py config/gpu_text_control.py       the control: the parent trained on, without gates
    python analyze.py circuit out/gpu_text_dense out/gpu_text --task=docstring

So few steps are a rehearsal of a long run, not its result: --max_steps, with --noise_free_steps at three
quarters of it.
"""

init_from = 'config/gpu_text_dense.py'
dataset = 'text-gpt2'
gated = True
dtype = 'auto'

gate_bias = 3.0
# at 512 tokens an even attention weight is 0.002 to 0.004: as in config/stdlib.py, what is below starts shut
open_above = 0.002
distill_weight = 1.0

loss_slack = 0.0  # nats: no worse than the parent at all
constraint_paired = True
constraint_interval = 4
constraint_scale = 0.01
lambda_rate = 0.05  # few steps: so that 100 of them can move lambda by a factor of 3
# a constraint older than config/stdlib.py's, like that of config/olmo_tiny.py
lambda_init = 0.1
lambda_min = 0.02
lambda_max = 0.2

linear_penalty_steps = 0
noise_free_steps = 675
batch_size = 32
max_steps = 900
learning_rate = 1e-3
min_lr = 5e-5
warmup_steps = 30
beta2 = 0.95
eval_interval = 225
eval_batch_size = 32
eval_batches = 8  # 256 windows of held-out files, 131,072 tokens, the same for parent, control and child
