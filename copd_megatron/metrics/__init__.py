"""Metrics: collected anywhere, reduced once a step, written and shown.

``reduction``  typed collector; one sum and one max all-reduce a step
``writers``    ``metrics.jsonl`` and TensorBoard
``wandb_writer``, ``prometheus``  the same, elsewhere
``console``    one live line a branch
``table``      the evaluation table, models x domains
``report``     a finished run: behaviour lines and plots
``rank_log``   log lines that name branch and rank, and many ranks' logs as one
``timeline``   what every rank did when, as a Chrome trace
``profiler``   windows of torch's profiler and of CUDA memory snapshots

Names are paths: ``<branch>/train/reward``, ``<branch>/timing/generation_seconds``, and across branches
``copd/overlap@10/text-image``.
"""
