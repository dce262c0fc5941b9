#!/usr/bin/env python3
"""The same as ``copd data difficulty``."""

from _tree import run

if __name__ == "__main__":
    run("data", "difficulty")
