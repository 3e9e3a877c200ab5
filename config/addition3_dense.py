"""The dense parent of config/addition3.py: config/addition_dense.py on three-digit sums.

It sees 16,000 of them and is judged on 4,000 others.
"""

base = 'config/addition_dense.py'

dataset = 'addition3'  # python prepare_data.py addition --digits=3
block_size = 13  # `5 3 7 + 2 1 4 = ? ? ? ? ?`
max_steps = 8000  # more digits, more carries, more steps
