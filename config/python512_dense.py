"""The parent of config/python512.py: config/python_dense.py with four times the context, 512 bytes, and a
quarter of the windows a step, so that it sees as many bytes.
"""

base = 'config/python_dense.py'

block_size = 512
batch_size = 8
eval_batch_size = 60
eval_batches = 8  # 480 windows, 245,760 bytes
