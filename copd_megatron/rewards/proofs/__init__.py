"""Checks proofs that a model wrote, with a proof assistant in the sandbox.

A proof is checked in three runs, each in a sandbox of its own that gets nothing but the files named here:

1. ``CopdGiven`` is the sample's: definitions, and the statement under a name. It fails only where the sample
   itself is wrong.
2. ``CopdCandidate`` is the statement again, with the proof that the model wrote.
3. ``CopdCheck`` is ours. It loads the two compiled files into a fresh process and asks whether the theorem
   of the second proves the statement of the first, and on which axioms it rests.

So nothing that the model wrote stands in a file that decides, and the statement is read before any of it is
seen. What is refused before anything runs (``coq_script.py``, ``lean_words.py``) is the second line of
defence. The third is a kernel that checks the compiled candidate again: ``coqchk``, and for Lean the program
that ``COPD_LEAN_CHECKER`` names.

``statement.py`` reads a sample; ``coq.py`` and ``lean.py`` build the files and judge. ``compiler.py`` runs
them, and keeps compiled statements for further responses to the same prompt.
"""

from copd_megatron.rewards.proofs.statement import Assistant, RejectedError, Statement, read_statement

__all__ = ["Assistant", "RejectedError", "Statement", "read_statement"]
