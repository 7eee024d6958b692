"""What fastdean takes: `python -m benchmarks`, from the root of a checkout."""
