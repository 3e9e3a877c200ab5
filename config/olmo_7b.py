"""OLMo 7B with LoRA, as config/olmo_1b.py: the paper's largest. Every GPU holds a part of the frozen model.

    python prepare_data.py dolma --shards=12
    torchrun --nproc_per_node=8 train.py config/olmo_7b.py            eight GPUs of 80 GB, half full; `python olmo.py plan --model=7b` says of what

Other models of 7 billion: --init_from=allenai/OLMo-7B-0424-hf (clipped q, k and v), allenai/OLMo-2-1124-7B or allenai/Olmo-3-1025-7B (the last two with
--dataset=dolma-olmo2). Larger ones, or smaller GPUs: --recompute_activations=True --micro_batch_size=4 keeps less and computes a third more. Nobody here has run it.
"""

init_from = 'allenai/OLMo-7B-hf'  # downloaded; read by every process, tensor by tensor
dataset = 'dolma'
block_size = 512
gated = True
dtype = 'auto'
parallel = 'fsdp'
base_dtype = 'bfloat16'  # frozen weights in half precision; adapters in full

lora_rank = 64
lora_alpha = 128.0
lora_targets = 'all'

# The gates. OLMo has no key biases to fold a shift into, so every head gets a number of its own (handover.py). At 512 tokens an even attention
# weight is 0.002 to 0.004: what is far below that may start shut.
gate_bias = 3.0
open_above = 0.0003
linear_penalty_steps = 0
distill_weight = 1.0  # the teacher is the same model with its adapters switched off: a forward pass, no memory
loss_slack = 0.01
constraint_paired = True
constraint_interval = 16
constraint_scale = 0.01
lambda_init = 0.1
lambda_min = 0.01
lambda_max = 0.1
noise_free_steps = 3000

batch_size = 256
micro_batch_size = 8
max_steps = 6000  # 0.8 billion tokens
learning_rate = 1e-4
min_lr = 1e-5
warmup_steps = 300
beta2 = 0.95
eval_interval = 500
eval_batch_size = 4
eval_batches = 64  # 256 windows, 131,072 held-out tokens
