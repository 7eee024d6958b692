"""What is said where an argument should be a number and is none, such as "16GB"."""

from __future__ import annotations

import operator
from typing import Any

from fastdean.wording.mendable import InputTypeError


def require_whole(name: str, value: Any, expected: str = "an integer") -> None:
    """Raise TypeError unless `value` is an integer, of Python, NumPy or torch; a bool is none."""
    try:
        operator.index(value)
        is_whole = not isinstance(value, bool)
    except TypeError:
        is_whole = False
    if not is_whole:
        raise InputTypeError(f"{name} must be {expected}, got {value!r:.40}; give an integer")


def require_flag(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is True or False: the text "no" would be taken for True."""
    if not isinstance(value, bool):
        raise InputTypeError(f"{name} must be True or False, got {value!r:.40}; give one of them")


def require_real(name: str, value: Any, expected: str = "a number") -> None:
    """Raise TypeError unless `value` is a number, also one of NumPy or torch; a bool is none."""
    try:
        float(value)
        is_real = not isinstance(value, bool | str | bytes)
    except (TypeError, ValueError, RuntimeError):  # torch raises the last for several numbers
        is_real = False
    if not is_real:
        raise InputTypeError(f"{name} must be {expected}, got {value!r:.40}; give a number")


def require_seed(seed: Any) -> None:
    """Raise TypeError or ValueError unless it begins the draws of NumPy and of torch."""
    require_whole("seed", seed)
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be from 0 to 2**63 - 1, got {seed}; any of these will do")
