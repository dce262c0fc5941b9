"""Metrics: collected anywhere, reduced once per step, written to files and shown.

``reduction``     typed collector; one sum and one max all-reduce per step
``writers``       ``metrics.jsonl`` and TensorBoard
``wandb_writer``, ``prometheus``   the same metrics for Weights & Biases and Prometheus
``console``       one live line per branch
``rank_log``      log lines that name branch and rank; the logs of all ranks merged into one
``timeline``      what every rank did when, as a Chrome trace
``profiler``      windows of torch's profiler and CUDA memory snapshots
``step_clock``    what each rank's seconds went into
``phase_memory``  memory used in each phase of a step
``packages``      checks that optional packages are installed

Metric names are paths: ``<branch>/train/reward``, ``<branch>/timing/generation_seconds``, and across branches
``copd/overlap@10/text-image``. ``timing/<part>_seconds`` are means over the branch's ranks, which add up to
``timing/step_seconds``; ``timing/slowest/<part>_seconds`` is the largest of any rank; what is sampled for
whom stands below ``timing/generation_seconds``.
"""
