"""config/python.py at a context of 512: is the share of edges that a model needs smaller in a longer context?
Half as large, on seed 2: docs/text.md.

    python train.py config/python512.py       the parent first, if it is not there yet
"""

base = 'config/python.py'

init_from = 'config/python512_dense.py'
open_above = 0.001  # attention is spread over more keys; with 0.005 the loss begins a nat higher
batch_size = 2
eval_interval = 1000
eval_batch_size = 10
eval_batches = 25  # 250 windows, 128,000 bytes
