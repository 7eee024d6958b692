"""A mask put into a model or a checkpoint for good, with its card."""
