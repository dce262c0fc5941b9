"""Checkpoints as sources and sinks of tensors under Hugging Face names.

``tensors``          what a source and a sink are
``open``             the source that a path holds, and a sink by format
``hf``               Hugging Face folders
``megatron_source``  folders in Megatron's distributed format: a branch of a checkpoint, a converted model
``megatron_sink``    the same, written
``megatron_reader``  tensors of such a folder under Megatron's names, read by range
``experts``          experts with names of their own, and stacked as a Hugging Face folder publishes them
"""
