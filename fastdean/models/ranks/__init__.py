"""A model on several ranks, and what ranks do together."""
