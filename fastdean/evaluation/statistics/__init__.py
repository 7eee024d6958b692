"""Intervals, tests, and families of tests that are read together."""
