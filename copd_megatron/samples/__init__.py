"""What the models answered: a few responses of each step, in ``samples/`` of the run directory.

``record.py`` says what is kept of a response, ``text.py`` turns its tokens into text, ``log.py`` chooses and
collects during a run, ``files.py`` writes and reads. ``copd samples`` and ``copd report`` show them.
"""
