"""config/olmo_tiny.py with adapters instead of weights, as OLMo 1B and 7B are trained (config/olmo_1b.py).

Adapters learn more slowly than weights: they get half as many steps again, a higher learning rate, and the
embedding has one, too.
"""

base = 'config/olmo_tiny.py'

lora_rank = 32  # of 64
# the norms, too: those of q and k decide how large scores are (lora.py). And the embedding
lora_targets = 'all,embed_tokens'

noise_free_steps = 12000
max_steps = 12000  # config/olmo_tiny.py: 8,000
learning_rate = 1.5e-3  # config/olmo_tiny.py: 1e-3
