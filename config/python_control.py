"""The control of config/python.py: the same parent trained on for the same steps on the same batches, without
gates.

A parent that could have become better makes its child's target cheap. This run says by how much: 0.012 nats
on seed 1.
"""

base = 'config/python.py'

gated = False  # and what stands there about gates is ignored
