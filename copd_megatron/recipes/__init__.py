"""What a step consists of, and chains of runs. ``README.md`` beside this file shows how to write a recipe."""
