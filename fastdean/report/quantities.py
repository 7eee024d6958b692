"""How numbers are written: one function per kind of quantity, a dash for what was not measured."""

from __future__ import annotations

import math
from numbers import Real
from typing import TypeGuard

from fastdean.files.declared import FINITE

MISSING = "–"
_MINUS = "−"


def measured(value: object) -> TypeGuard[float]:
    """Whether `value` is a finite number, and not so large that sums of such are none."""
    return _is_real(value) and not isinstance(value, bool) and abs(value) <= FINITE


def _is_real(value: object) -> TypeGuard[float]:
    """Whether it is a number of any library, with the operators of a float."""
    return isinstance(value, Real)


def decimal(value: object, digits: int = 4) -> str:
    """`digits` significant figures: 0.01234, 1,235, 5e-07."""
    if not measured(value):
        return _unmeasured(value)
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e7:
        return _short(value)
    places = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:,.{max(0, places)}f}".replace("-", _MINUS)


def signed(value: object, digits: int = 3) -> str:
    """As `decimal`, with the sign always written."""
    text = decimal(value, digits)
    return f"+{text}" if measured(value) and value > 0 else text


def count(value: object) -> str:
    """A whole number with its thousands parted; a fraction is written as `decimal` does."""
    if measured(value) and float(value).is_integer():
        return f"{int(value):,}".replace("-", _MINUS)
    return decimal(value, 3)


def plural(number: int, one: str, many: str | None = None) -> str:
    """`number` with its noun: 1 matrix, 90 matrices."""
    return f"{count(number)} {one if number == 1 else many or one + 's'}"


def ratio(value: object) -> str:
    """A fraction of a matrix in the form in which it is typed: 5e-07 is written 5e-7."""
    if not measured(value):
        return _unmeasured(value)
    if not 0 < abs(value) < 0.01:
        return _short(value)
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def percent(share: object) -> str:
    """A share of one as per cent, with three significant figures."""
    if not measured(share):
        return _unmeasured(share)
    return f"{decimal(100 * share, 3)} %"


def estimate(
    value: object, low: object, high: object, neutral: float | None = None
) -> tuple[str, str]:
    """A value and its interval in brackets, with as many decimals as the interval's width merits.

    The width keeps two significant figures. With `neutral` zero the value is a difference and has
    its sign written.
    """
    write = signed if neutral == 0 else decimal
    if not measured(low) or not measured(high) or low == high:
        ends = f"[{decimal(low)}, {decimal(high)}]" if measured(low) or measured(high) else MISSING
        return write(value), ends
    places = min(12, max(0, 1 - math.floor(math.log10(abs(high - low)))))
    low, high = (_fixed(end, places) for end in (low, high))
    sign = "+" if neutral == 0 and measured(value) and value > 0 else ""
    text = sign + _fixed(value, places) if measured(value) else _unmeasured(value)
    return text, f"[{low}, {high}]"


def _fixed(value: float, places: int) -> str:
    return f"{value:,.{places}f}".replace("-", _MINUS)


def duration(seconds: object) -> str:
    """Seconds below two minutes, then minutes, then hours."""
    if not measured(seconds):
        return _unmeasured(seconds)
    if seconds < 120:
        return f"{decimal(seconds, 3)} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def memory(size_bytes: object) -> str:
    """Bytes in binary units."""
    if not measured(size_bytes):
        return _unmeasured(size_bytes)
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def quotient(above: object, below: object) -> float | None:
    """above / below, None where either is not measured or `below` is zero."""
    if not measured(above) or not measured(below) or below == 0:
        return None
    return above / below


def _short(value: float) -> str:
    text = f"{abs(value):.3g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    return _MINUS + text if value < 0 else text


def _unmeasured(value: object) -> str:
    if _is_real(value) and abs(value) > FINITE:
        return "∞" if value > 0 else f"{_MINUS}∞"
    return MISSING
