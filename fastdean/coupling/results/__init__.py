"""What `score()` returns: the scores of each matrix, and where they come from."""
