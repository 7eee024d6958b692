"""The operations by themselves: cases at a model's sizes, contenders, timing and records.

Named after what is measured, and not `kernels`, which is the name of a package that transformers
looks for.
"""
