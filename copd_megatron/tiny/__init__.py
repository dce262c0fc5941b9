"""The tiny base model of the CPU quickstart: what it is made of, what it has been shown, how it is made.

``recipe.py`` says all that determines the model and its two domains, in one place; ``demonstrations.py``
writes what the warm-up imitates; ``tokenizer.py`` and ``warm_up.py`` are the byte-level tokenizer and the
supervised stage, neither of which knows about the tasks; ``base.py`` puts them together and caches the
result. ``tools/make_tiny_base.py`` is the command.

Why it is made as it is. Reinforcement learning teaches a model of a million parameters few new skills in
fifty steps, but it readily changes *which* of its skills the model uses. So the warm-up has two parts: the
model first learns to work step by step (``<think>...</think>``), then it is shown mostly answers without
work, as a model is that was pretrained on careful texts and then tuned on hasty ones. Working stays far more
accurate, answering at once becomes the habit: the base solves some tasks of each domain, and the rewards
tell it to work. Nothing is hidden in it: gold answers are reasoning-gym's or what was drawn, every
demonstration is correct, and no validation task is among them.
"""
