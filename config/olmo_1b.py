"""OLMo 1B with LoRA on a sample of Dolma, of which it has seen much: the paper's first step beyond GPT-2.

    pip install -r requirements-olmo.txt && pip install datasets
    python prepare_data.py dolma --shards=12                  once: 2 GB to download, 1 billion tokens
    torchrun --nproc_per_node=8 train.py config/olmo_1b.py    eight GPUs; one: `python train.py ...`

docs/olmo.md has a table of what it takes in memory and time.

--init_from=allenai/OLMo-2-0425-1B with --dataset=dolma-olmo2 (prepare_data.py dolma --tokenizer=olmo2) is
OLMo 2. Nobody here has run it: no number in this file is measured.
"""

init_from = 'allenai/OLMo-1B-hf'  # downloaded; or its folder on a machine without network
dataset = 'dolma'
# of the model's 2,048: no weight depends on it, and attention's share of the work stays small
block_size = 512
gated = True
dtype = 'auto'  # bfloat16

lora_rank = 64
# q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj: what is not read any more has to be made up
# for elsewhere. Of OLMo 2 the norms, too
lora_targets = 'all'

# The gates. OLMo has no key biases to fold a shift into, so every head gets a number of its own
# (handover.py). At 512 tokens an even attention
# weight is 0.002 to 0.004: what is far below that may start shut.
gate_bias = 3.0
open_above = 0.0003
linear_penalty_steps = 0
# the teacher is the same model with its adapters switched off: a forward pass, no memory
distill_weight = 1.0
loss_slack = 0.01
constraint_paired = True
constraint_gates = 'deterministic'  # paper: 'sampled'. As it is judged
constraint_interval = 16
constraint_scale = 0.02
peak_slack = 0.03  # this and lambda as in config/gpt2.py
lambda_rate = 0.02
lambda_init = 0.3
lambda_min = 0.001
lambda_max = 1000.0
noise_free_steps = 5000

# 256 x 512 tokens per step, as in config/gpt2.py; 10,000 steps are 1.3 billion tokens
batch_size = 256
micro_batch_size = 8
max_steps = 10000
learning_rate = 2e-4  # of adapters; Hu et al. use 2e-4 for GPT-2 and GPT-3
min_lr = 1e-5
warmup_steps = 300
eval_interval = 500
eval_batch_size = 8
eval_batches = 64  # 512 windows, 262,144 held-out tokens
