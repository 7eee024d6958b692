"""A model: loaded, entered, told from others, and run."""

from __future__ import annotations

from fastdean.models.loading import load_model, load_tokenizer

__all__ = ["load_model", "load_tokenizer"]
