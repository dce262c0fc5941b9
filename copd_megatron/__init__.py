"""copd-megatron: co-evolving policy distillation on Megatron-Core and vLLM.

Start with ``train.py``, the loop of the paper's Algorithm 1, and ``records.py``, what travels between its
stages. ``README.md`` beside this file is the map: the rooms, what each may import, the path of a prompt
through them, and where each line and equation of the paper is.
"""

__version__ = "0.1.0"
