"""Prompts answered, and answers judged."""
