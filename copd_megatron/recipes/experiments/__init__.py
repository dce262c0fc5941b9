"""Experiments: chains of runs, such as experts first, then distillation, then evaluation.

Each is a small file with a function ``EXPERIMENT`` that turns one configuration into tasks. What starts them
(``launchers/nemo_experiment.py``) has neither torch nor an engine, so nothing here imports them.
"""
