"""What all benchmarks share: one kind of record, one way to take turns, one gate, one table."""
