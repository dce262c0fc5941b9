"""Published benchmarks, from the files that their authors publish, to validation shards."""
