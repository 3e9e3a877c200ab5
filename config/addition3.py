"""The main job with three digits: config/addition.py on other sums.

    python prepare_data.py addition --digits=3          once
    python train.py config/addition3.py
"""

base = 'config/addition.py'

init_from = 'config/addition3_dense.py'
dataset = 'addition3'
