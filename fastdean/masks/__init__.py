"""Masks: which weights are suppressed, applied to a model and undone, counted, stored."""

from fastdean.masks.entries import MaskEntry
from fastdean.masks.mask import NeuronMask
from fastdean.masks.summary import MaskSummary

__all__ = ["MaskEntry", "MaskSummary", "NeuronMask"]
