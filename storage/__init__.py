"""What lies on disk.

1. files.py     whole files, locked folders, and `UserError`, the one error for people
2. dataset.py   a folder of tokens: its format, written and opened
3. addition.py  a sum as a row of tokens
4. text.py      tokenizers, documents, the split of a text
5. corpora.py   text collections too large for memory; python_source.py: the Python on this machine
6. download.py  a file from the network, whole and checked

Imports nothing of ours but itself.
"""
