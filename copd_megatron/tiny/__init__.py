"""The tiny base models of the CPU quickstart: what they consist of, what they have seen, how they are made.

``recipe.py`` (``vl_recipe.py`` for the vision-language model) holds everything that determines a model and
its domains; ``demonstrations.py`` writes what the warm-up imitates; ``tokenizer.py`` and ``warm_up.py`` are
the byte-level tokenizer and the supervised stage, which know nothing about the tasks; ``base.py`` combines
them and caches the result; ``tasks`` generates the data. ``tools/make_tiny_base.py`` is the command.

Why the base is made this way: in fifty steps, reinforcement learning teaches a model of a million parameters
few new skills, but it readily changes *which* of its skills the model uses. So the warm-up has two parts.
First the model learns to work step by step (``<think>...</think>``); then it mostly sees answers without
steps, like a model that was pretrained on careful texts and then tuned on hasty ones. Working step by step
stays far more accurate, but answering immediately becomes the habit. The base therefore solves some tasks of
each domain, and the rewards make it work step by step. There is no hidden help: gold answers come from
reasoning-gym or from what was drawn, every demonstration is correct, and no validation task is among them.
"""
