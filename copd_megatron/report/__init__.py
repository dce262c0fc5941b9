"""What is told of a run.

``history.py`` reads a run back. ``page.py`` is the page of one run or several: ``panels.py`` says which
curves it has, ``drawing.py`` draws them, ``scores.py`` is its table, ``thumbnails.py`` has the prompts'
pictures. ``curves.py`` is the single picture, ``behaviour.py`` the lines in the terminal,
``merge_distance.py`` how far branches moved.
"""
