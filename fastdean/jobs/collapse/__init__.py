"""The second method's jobs: neural collapse measured, and a model trained to be less biased."""
