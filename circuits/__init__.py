"""Which parts of a model carry a task.

1. tasks.py        pairs of prompts: clean and corrupted; prompts.py writes them
2. graph.py        the model as a graph of components
3. patching.py     a forward pass in which every read and write can be changed
4. attribution.py  scores of its edges, and what a circuit explains
5. compare.py      dense against sparse
6. induction.py    which heads copy

Imports gate, models/ and storage/; draws nothing.
"""
