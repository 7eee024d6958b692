"""What scores are of: "weight", single weights, or "unit", whole units of the MLPs.

A neuron of the DEAN paper is one weight, so that "neuron", the earlier word for "unit", misled.
"""

from __future__ import annotations

import warnings

GRANULARITIES = ("weight", "unit")
_EARLIER = "neuron"


def checked_granularity(granularity: str) -> str:
    """The word as it is written today; ValueError for others, FutureWarning for the earlier one."""
    if granularity == _EARLIER:
        warnings.warn(
            f"granularity {_EARLIER!r} has been called 'unit' since 0.2 (2026-11-27) and goes "
            "after 2027-05-27; write 'unit'",
            FutureWarning,
            stacklevel=3,
        )
    granularity = stored_granularity(granularity)
    if granularity not in GRANULARITIES:
        raise ValueError(
            f"granularity must be one of weight, unit, got {granularity!r}; leave it out for "
            "'weight'"
        )
    return granularity


def stored_granularity(granularity: str | None) -> str:
    """The word as it is written today, of a file that may be older; None means "weight"."""
    return "unit" if granularity == _EARLIER else granularity or "weight"
