"""A page to look into a model: `analyze.py view`.

1. page.py     the command, and the page as one file
2. data.py     what the page shows of attention, computed; features.py: of features
3. page.html   draws it; features.js: the features

Imports everything but train and analyze.
"""
