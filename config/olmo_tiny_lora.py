"""config/olmo_tiny.py with adapters instead of weights, as OLMo 1B and 7B are trained (config/olmo_1b.py).

Adapters learn more slowly than weights: they get a third more steps, a higher learning rate, a higher lambda_max, and the embedding has one, too.
"""

init_from = 'config/olmo_tiny_dense.py'  # trained first, if it is not there yet
dataset = 'stdlib'
gated = True
dtype = 'auto'

gate_bias = 3.0
open_above = 0.01  # paper: nothing of the kind. Edges with an attention weight above this start open, by a number for each head (handover.py)
lora_rank = 32  # of 64
lora_alpha = 64.0
lora_targets = 'all,embed_tokens'  # the norms, too: those of q and k decide how large scores are (lora.py). And the embedding

distill_weight = 1.0  # the dense model that sets the target teaches, too

loss_slack = 0.0  # nats: no worse than the parent at all
constraint_gates = 'deterministic'  # paper: 'sampled'. What counts in the end are deterministic gates
constraint_paired = True  # parent and child on the same batch: a batch's luck is larger than what is to be seen
constraint_scale = 0.01  # nats
lambda_init = 0.1
lambda_min = 0.02
lambda_max = 0.4  # config/olmo_tiny.py: 0.3. A nat has to be worth more where less is learned

linear_penalty_steps = 0  # the paper's penalty alone: text needs thousands of edges, and the linear one charges them for being certain
noise_free_steps = 12000  # paper: 0. Trained as it is judged: in trials a third fewer edges at the same loss
batch_size = 8
max_steps = 16000  # config/olmo_tiny.py: 12,000
learning_rate = 1.5e-3  # config/olmo_tiny.py: 1e-3
min_lr = 5e-5
eval_interval = 1000
eval_batch_size = 20
eval_batches = 50  # 1,000 windows of held-out files, the same for parent and child; small batches of T x T matrices stay in the cache
