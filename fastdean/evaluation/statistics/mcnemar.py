"""Questions answered yes or no, before and after: the change of the share of yes, paired."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastdean.evaluation.statistics.intervals import Interval, share_change_interval
from fastdean.wording.mendable import InputTypeError


def compare_yes_no(
    before: Sequence[bool | None],
    after: Sequence[bool | None],
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval of the change of the share of yes, after - before, with McNemar's exact test.

    Only the questions whose answer changed tell anything: of b that became no and c that became
    yes, the test is the two-sided binomial one of c among b + c at one half (McNemar 1947).

    Args:
        before, after: an answer to each question, in one order. A question with None in either,
            such as a verdict that could not be read, is left out of both.
        confidence, seed: as in `share_change_interval`, which gives the interval.

    Raises:
        ValueError: other numbers of questions.
        TypeError: an answer that is neither yes, no nor None.
    """
    if len(before) != len(after):
        raise ValueError(
            f"after must answer the same questions as before ({len(before)}), got {len(after)}; "
            "pair the answers by question first"
        )
    for answer in (*before, *after):
        if answer is not None and not isinstance(answer, bool | np.bool_):
            raise InputTypeError(
                f"answers must be True, False or None, got {answer!r}; compare numbers with "
                "mean_interval"
            )
    pairs = [
        float(new) - float(old)
        for old, new in zip(before, after, strict=True)
        if old is not None and new is not None
    ]
    return share_change_interval(pairs, confidence=confidence, seed=seed)
