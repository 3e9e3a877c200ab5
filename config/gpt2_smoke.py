"""config/gpt2.py in minutes on one GPU: the same path with less of everything, to see that weights, data,
memory and compiler are in order.

    python train.py config/gpt2_smoke.py
    torchrun --nproc_per_node=8 train.py config/gpt2_smoke.py --micro_batch_size=1

The text is the Python standard library in GPT-2's tokens, made on first use. Without a network, bring a
folder that transformers wrote, say --init_from=FOLDER, and bring GPT-2's vocabulary (docs/gpt2.md). Expect it
to shut most edges and not yet to meet its target: 300 steps are a rehearsal.
"""

base = 'config/gpt2.py'

dataset = 'stdlib-gpt2'
batch_size = 8
max_steps = 300
warmup_steps = 30
min_lr = 0.0
noise_free_steps = 150
eval_interval = 100
eval_batches = 4
