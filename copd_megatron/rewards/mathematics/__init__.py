r"""Mathematical answers, read strictly and compared as mathematics.

``extract.py`` takes the answer out of a response; ``notation.py`` folds LaTeX, Unicode and plain text into
one notation; ``shapes.py`` reads its structure (numbers with units, lists, sets, intervals, matrices,
equations); ``scalars.py`` compares single expressions, with math-verify's LaTeX parser; ``compare.py``
compares structures.

Every reader takes the whole text or refuses it: a remainder that nobody has read ("4" of ``4\sqrt(2)``) is
how wrong answers get rewarded.
"""
