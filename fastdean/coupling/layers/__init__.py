"""The other order: all batches through one decoder layer before the next."""
