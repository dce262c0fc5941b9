#!/usr/bin/env python3
"""The same as ``copd checkpoint to-megatron``."""

from _tree import run

if __name__ == "__main__":
    run("checkpoint", "to-megatron")
