"""The gate without T x T matrices: what gate.py's formula computes, in less memory and time.

Read gate.py first; nothing here says what is computed, only how. Then, in this order:

1. noise.py    the gates' noise as a function of (seed, edge), so that it can be made again in the backward
   pass
2. tiled.py    for CPUs: a strip of queries at a time, with the whole derivation of the gradient
3. kernels.py  for GPUs: the same in Triton
4. attention.py `attention`: the formula, or one of these as an operator of torch, whichever is fastest

Imports gate.py alone.
"""
