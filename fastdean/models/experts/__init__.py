"""Fused experts: found, run so that both of their products are seen, and found in files."""
