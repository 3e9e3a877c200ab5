"""A parent that has learned what it can: the model of config/stdlib_dense.py with twice the context, trained
on 41 million bytes, drawn at random from 109 million bytes of Python, to the end of its learning rate.

    python prepare_data.py python        once; needs no network: the source of the packages that you have

So it neither overfits nor has much left to learn: config/python_control.py says how much.
"""

base = 'config/stdlib_dense.py'

dataset = 'python'
block_size = 128  # bytes: about four lines of code
batch_size = 32
max_steps = 10000  # 41 million bytes
