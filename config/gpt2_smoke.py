"""config/gpt2.py in minutes on one GPU: the same path with less of everything, to see that weights, data, memory and compiler are in order.

    python train.py config/gpt2_smoke.py

The text is the Python standard library in GPT-2's tokens, made on first use. Without a network, bring a folder that transformers wrote and say
--init_from=FOLDER. Expect it to shut most edges and not yet to meet its target: 300 steps are a rehearsal.
"""

init_from = 'gpt2'
dataset = 'stdlib-gpt2'
gated = True
dtype = 'auto'

gate_bias = 3.0
open_above = 0.0003
linear_penalty_steps = 0
distill_weight = 1.0
loss_slack = 0.01
constraint_paired = True
constraint_interval = 16
constraint_scale = 0.01
lambda_init = 0.1
lambda_min = 0.01
lambda_max = 0.1
noise_free_steps = 150

batch_size = 8
micro_batch_size = 4
max_steps = 300
learning_rate = 1e-4
warmup_steps = 30
beta2 = 0.95
eval_interval = 100
eval_batch_size = 8
eval_batches = 4
