"""What stands around the loop of train.py.

1. settings.py   every setting; configure.py reads and checks them
2. batches.py    examples and noise as functions of (seed, step)
3. evaluate.py   how a model is judged; verdict.py: what became of a run
4. parents.py    where a run starts, and whose loss it is to keep; handover.py: how a dense model is handed to the gates
5. folder.py     a run that cannot be lost; progress.py and flow.py: what a person sees meanwhile
6. average.py    the moving average of the weights
7. hardware.py   devices, processes, speed; sharding.py: models too large for one GPU

Imports models/ and what that imports, and prepare_data.
"""
