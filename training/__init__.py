"""What stands around the loop of train.py.

1. settings.py   every setting; configure.py reads and checks them
2. run.py        a run while it trains: models, optimizer, state; judge.py: what happens at every evaluation
3. batches.py    examples and noise as functions of (seed, step)
4. evaluate.py   how a model is judged; verdict.py: what became of a run
5. parents.py    where a run starts, and whose loss it is to keep; handover.py: how a dense model is handed to
                 the gates; distillation.py: what it teaches
6. folder.py     a run that cannot be lost; progress.py and flow.py: what a person sees meanwhile;
                 steplog.py: what is measured at every step
7. average.py    the moving average of the weights
8. hardware.py   devices, processes, speed; sharding.py: models too large for one GPU

Imports models/, fast/ and what they import, and prepare_data.
"""
