"""OLMo 7B with LoRA, as config/olmo_1b.py: the paper's largest. Every GPU holds a part of the frozen model.

    python prepare_data.py dolma --shards=12
    torchrun --nproc_per_node=8 train.py config/olmo_7b.py        eight GPUs of 80 GB, half full: docs/olmo.md

Other models of 7 billion: --init_from=allenai/OLMo-7B-0424-hf (clipped q, k and v), allenai/OLMo-2-1124-7B or
allenai/Olmo-3-1025-7B (the last two with --dataset=dolma-olmo2). Larger ones, or smaller GPUs:
--recompute_activations=True --micro_batch_size=4 keeps less and computes a third more. Nobody here has run
it.
"""

base = 'config/olmo_1b.py'

init_from = 'allenai/OLMo-7B-hf'  # downloaded; read by every process, tensor by tensor
parallel = 'fsdp'
base_dtype = 'bfloat16'  # frozen weights in half precision; adapters in full
noise_free_steps = 3000
max_steps = 6000  # 0.8 billion tokens
learning_rate = 1e-4
eval_batch_size = 4
eval_batches = 64  # 256 windows, 131,072 held-out tokens
