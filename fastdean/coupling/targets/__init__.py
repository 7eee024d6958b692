"""What of a model is to be scored: found, counted, and a unit's weights."""
