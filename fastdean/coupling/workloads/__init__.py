"""The examples of a loader in batches, and the loss of each."""
