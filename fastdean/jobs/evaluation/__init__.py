"""A model without and with a mask, measured side by side."""
