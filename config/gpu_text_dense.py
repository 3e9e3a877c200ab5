"""The dense parent of config/gpu_text.py: a GPT of 12 layers that reads Python in GPT-2's tokens, trained for
a minute on one large GPU.

    python prepare_data.py text --tokenizer=gpt2 $(find PACKAGES -name '*.py' -size +1k -not -path '*test*' |
    sed 's/^/--file=/')       once: data/text-gpt2

PACKAGES are folders of Python code: here the standard library, numpy, sympy, networkx, matplotlib and
fontTools, 45 million bytes, 20 million tokens; whole files are held out. 39 million tokens are seen, two
passes. For less, take --dataset=stdlib-gpt2 here and in the two that follow: made on first use.
"""

dataset = 'text-gpt2'

n_layer = 12
n_head = 6  # of width 64, GPT-2's
n_embd = 384
block_size = 512
dtype = 'auto'  # bfloat16

batch_size = 64
max_steps = 1200
learning_rate = 1.5e-3
eval_interval = 600
eval_batch_size = 32
eval_batches = 8  # 256 windows of held-out files, 131,072 tokens, the same for parent, control and child
