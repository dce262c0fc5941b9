"""What models score.

``statistics.py`` holds the figures and their intervals, ``verdicts.py`` what is kept of every prompt,
``summary.py`` sums verdicts up and compares models, ``show.py`` lays that out. ``models.py`` measures for
``copd eval``; ``run.py`` and ``table.py`` are the evaluation inside a run and its table.
"""
