"""Metrics: collected anywhere, reduced once a step, written and shown.

``reduction``  typed collector; one sum and one max all-reduce a step
``writers``    ``metrics.jsonl`` and TensorBoard
``console``    one live line a branch
``table``      the evaluation table, models x domains
``report``     a finished run: behaviour lines and plots

Names are paths: ``<branch>/train/reward``, ``<branch>/timing/generation_seconds``, and across branches
``copd/overlap@10/text-image``.
"""
