#!/usr/bin/env python3
"""The same as ``copd data jsonl-to-shards``."""

from _tree import run

if __name__ == "__main__":
    run("data", "jsonl-to-shards")
