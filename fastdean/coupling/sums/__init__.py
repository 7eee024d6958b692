"""Importance summed over examples, over ranks, and its top entries."""
