"""Procedural image and video tasks with verifiable answers.

``tasks.py`` says what a task and a family are; ``image_tasks.py`` and ``video_tasks.py`` hold the families;
``canvas.py`` draws, ``encode.py`` writes PNG and MP4, ``make.py`` writes shards. To add a family: a frozen
dataclass of settings and a function decorated ``@visual_family`` in one of the two files.
"""
