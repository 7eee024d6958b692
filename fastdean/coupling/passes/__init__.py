"""Batches forward and backward through the whole model, and what hooks capture of them."""
