"""Reading what a model wrote without ever evaluating it.

Python's own parser gives the syntax tree (``syntax.py``, with bounds on length and nodes); each reader then
walks the tree and accepts a short list of node types: ``literals.py`` lists of strings and numbers,
``arithmetic.py`` exact sums and products, ``symbolic.py`` formulas as sympy objects. Whatever else the text
holds (a name, a call, an attribute, a comprehension) raises ``NotUnderstoodError``; nothing in it runs.
"""
