"""The paper's comparison at laptop scale: which recipe makes the best model of all domains, with seeds.

``setting.py`` says what is trained on what, ``arms.py`` which recipes are compared; ``runner.py`` runs them
side by side and goes on after a stop; ``scores.py`` turns rewards into figures with intervals;
``criteria.py`` decides whether a setting can tell recipes apart, ``claims.py`` which of the paper's claims
hold.
``tools/reproduce.py`` is the command, ``README.md`` the page.
"""
