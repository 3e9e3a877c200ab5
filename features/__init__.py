"""Features in place of MLPs, and what made a model say something.

1. transcoder.py         features in place of MLPs
2. attribution_graph.py  features and heads that made a model say something; influence.py: which matter
3. interventions.py      do they, in the real model?

Imports circuits/ and what that imports; draws nothing. The commands: analysis/transcode.py, graphs.py.
"""
