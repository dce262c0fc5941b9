#!/usr/bin/env python3
"""The same as ``copd merge``."""

from _tree import run

if __name__ == "__main__":
    run("merge")
