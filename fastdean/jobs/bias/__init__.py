"""Bias measures of a job: which are asked for, their figures, and what changed."""
