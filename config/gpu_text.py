"""config/stdlib.py at the next size, in minutes on one large GPU: 12 layers, GPT-2's tokens, 512 of context.

    python train.py config/gpu_text_dense.py         the parent; its docstring says how the data is made
    python train.py config/gpu_text.py               its sparse child
    python train.py config/gpu_text_control.py       the control: the parent trained on, without gates
    python analyze.py circuit out/gpu_text_dense out/gpu_text --task=docstring

So few steps are a rehearsal of a long run, not its result. For a long one: --max_steps, --noise_free_steps of
as many, and --constraint_interval and --lambda_rate of config/stdlib.py.
"""

base = 'config/stdlib.py'

init_from = 'config/gpu_text_dense.py'
dataset = 'text-gpt2'
# at 512 tokens an even attention weight is 0.002 to 0.004: what is below starts shut
open_above = 0.002

# few steps: measured twice as often, and 100 steps can move lambda by a factor of 3
constraint_interval = 4
lambda_rate = 0.05

batch_size = 32
max_steps = 900
noise_free_steps = 900
warmup_steps = 30
eval_interval = 225
eval_batch_size = 32
eval_batches = 8  # 256 windows of held-out files, 131,072 tokens, the same for parent, control and child
