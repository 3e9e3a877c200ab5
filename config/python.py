"""The claim on text, fairly: config/stdlib.py with twice the context and ten times the text to read from.

    python prepare_data.py python          once
    python train.py config/python.py       the parent first, if it is not there yet

It ends with 1 % of the edges; with --loss_slack=0.03 with 3 %, 0.003 nats or more above that target, which
four times the steps meet with 1 % (--max_steps=48000 --noise_free_steps=48000): docs/text.md.
"""

base = 'config/stdlib.py'

init_from = 'config/python_dense.py'
dataset = 'python'
noise_free_steps = 12000
max_steps = 12000
