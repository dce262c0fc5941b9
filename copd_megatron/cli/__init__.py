"""The ``copd`` command: one file a command, each of which defines ``command``.

``main`` runs the command line and turns errors into one message and an exit status; ``group`` holds the shape
of help and the loading of commands when they are asked for; ``parameters`` holds arguments that several
commands take.
"""
