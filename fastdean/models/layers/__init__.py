"""Decoder layers: where they are, what they are made of, and run one at a time."""
