"""A model: loaded, entered, told from others, and run."""

from __future__ import annotations

from fastdean.models.loading import load_model, load_tokenizer, stream_model

__all__ = ["load_model", "load_tokenizer", "stream_model"]
