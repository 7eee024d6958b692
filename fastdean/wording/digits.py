"""Numbers that are read together, with enough digits to differ."""

from __future__ import annotations

import math

_MOST = 12


def apart(*values: float, least: int = 4, sign: bool = False) -> list[str]:
    """The values with `least` significant digits, or more if two of them would look the same.

    Numbers up to 1e9 are written out and not as powers of ten.

    Args:
        sign: write the sign of positive ones as well.
    """
    for digits in range(least, _MOST + 1):
        written = [_written(value, digits, "+" if sign else "") for value in values]
        if len({*written}) == len({*values}):
            break
    return written


def _written(value: float, digits: int, sign: str) -> str:
    if math.isfinite(value) and 10**digits <= abs(value) < 1e9:
        return f"{value:{sign}.0f}"
    return f"{value:{sign}.{digits}g}"
