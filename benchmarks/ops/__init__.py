"""The operations by themselves: cases at a model's sizes, and who computes them."""
