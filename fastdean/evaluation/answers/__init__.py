"""What a model answers: from a model in memory, or from a server."""
