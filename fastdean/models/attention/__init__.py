"""Packed examples that attend each by itself."""
