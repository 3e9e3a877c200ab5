"""What stands around the loop of train.py.

1. config.py     every setting, read and checked; the runs that a command trains
2. steps.py      examples, noise, learning rate, averaged weights: functions of the step
3. judge.py      how a model is judged, and which evaluation is kept
4. handover.py   how a dense model is handed to the gates, and teaches
5. folder.py     where a run starts and goes on: its folder, its checkpoints, its parent
6. log.py        what a run writes down, and what a person sees meanwhile
7. parallel.py   devices, processes, speed; models too large for one GPU

Imports models/, fast/ and what they import, and prepare_data.
"""
