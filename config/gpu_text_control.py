"""The control of config/gpu_text.py: the same parent trained on for the same steps on the same batches,
without gates.

A parent that could have become better makes its child's target cheap. This run says by how much.
"""

base = 'config/gpu_text.py'

gated = False  # and what stands there about gates is ignored
eval_interval = 450
