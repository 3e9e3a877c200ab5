"""What stands around the loop of train.py.

1. config.py     every setting, read and checked
2. steps.py      examples, noise, learning rate, averaged weights: functions of the step
3. judge.py      how a model is judged, and which evaluation is kept
4. parents.py    where a run starts; handover.py: how a dense model is handed to the gates, and teaches
5. folder.py     a run that cannot be lost: whose folder it is, checkpoints, where it goes on
6. log.py        what a run writes down, and what a person sees meanwhile
7. parallel.py   devices, processes, speed; sharding.py: models too large for one GPU

Imports models/, fast/ and what they import, and prepare_data.
"""
