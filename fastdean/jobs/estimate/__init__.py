"""What a scoring will need, before any weight is read."""
