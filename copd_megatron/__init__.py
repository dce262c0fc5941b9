"""copd-megatron: co-evolving policy distillation on Megatron-Core and vLLM.

Read in this order: ``train.py`` (the loop, as in the paper's Algorithm 1), ``records.py`` (what travels
between its stages), ``opd/graph.py`` (who teaches whom), then whichever room you need:

``config``       the run's settings, typed and checked, importable without torch
``topology``     ranks carved into branch worlds, the router group, collectives that name who hangs
``data``         prompts from webdataset shards, in an order that (seed, epoch) determines
``rollout``      vLLM in process: samples and their log-probabilities
``rewards``      verifiers
``opd``          distillation graph, exchange plan, router, teacher scoring, behaviour metrics
``advantages``, ``losses``   pure functions: GRPO, OPD
``policy``       the Megatron-Core actor
``weight_sync``  live Megatron shards to vLLM shards
``merge``        branches to one model
``metrics``      typed reductions, reports
"""

__version__ = "0.1.0"
