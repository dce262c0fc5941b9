"""The tiny base model of the CPU quickstart: what it is made of, what it has been shown, how it is made.

``recipe.py`` says all that determines the model and its two domains, in one place; ``demonstrations.py``
writes what the warm-up imitates; ``tokenizer.py`` and ``warm_up.py`` are the byte-level tokenizer and the
supervised stage, neither of which knows about the tasks; ``base.py`` puts them together and caches the
result. ``tools/make_tiny_base.py`` is the command.

Why it is made as it is. Reinforcement learning teaches a model of a million parameters few new skills in
fifty steps, but it readily changes *which* of its skills the model uses. So the warm-up imitates a mixed
crowd: most demonstrations answer at once, some work step by step first (``<think>...</think>``). Working
is far more accurate, answering at once is far more likely: the base solves some tasks of each domain, and
its rewards tell it to work. Nothing is hidden in it: gold answers are reasoning-gym's, every demonstration
is correct, and no validation task is among them.
"""
