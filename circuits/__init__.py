"""Which parts of a model carry a task.

1. tasks.py            pairs of prompts: clean and corrupted; prompts.py writes them
2. graph.py            the model as a graph of components
3. patching.py         a forward pass in which every read and write can be changed
4. attribution.py      scores of its edges, and what a circuit explains
5. attention_edges.py  the other grain: which reads one prompt needs
6. controls.py         what small circuits are worth
7. prompt_circuits.py  attention edges over many prompts
8. compare.py          dense against sparse, both grains
9. induction.py        which heads copy

Imports gate, model, models/ and storage/; prints and draws nothing.
"""
