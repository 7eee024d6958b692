"""The sign-flip permutation test: could the mean of n paired differences be chance?

If nothing changed, every pattern of signs is as likely as the one observed (Fisher 1935). The
p-value is the share of patterns whose mean is at least as far from zero. The test assumes
independent differences that are symmetric about zero when nothing changed, and no other shape.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastdean.wording.numbers import require_seed

EXACT = "exact binomial"
ALL_PATTERNS_UP_TO = 16
DRAWS = 100_000
# From here on the patterns of a random group take the place of the draws, whose time grows with n:
# a second here.
GROUP_FROM = 5_000
# Signs that generate a group: 2^17 patterns, more than there are draws.
_GENERATORS = 17
# Signs held at a time; part of what a seed means, as each chunk draws its own bytes.
_SIGNS_PER_CHUNK = 4_000_000
# Of the sum of magnitudes: the same numbers summed in another order are the same sum.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class SignFlips:
    """The outcome of the test.

    p_value: two-sided. Of all patterns a share; of draws (1 + as extreme) / (1 + draws), which is
        never zero (Phipson & Smyth 2010).
    least_p: the smallest p-value that n differences can have at all.
    method: "sign-flip, all 2^n patterns", "sign-flip, N draws", "sign-flip, a random group of N
        patterns", or `EXACT` where all differences
        that are not zero have one size, so that only the number of positive signs counts. For
        pairs of yes and no that is McNemar's exact test.
    """

    p_value: float
    least_p: float
    method: str


def sign_flip_test(differences: np.ndarray, *, seed: int = 0) -> SignFlips:
    """Test float64 [n] `differences` against a mean of zero; n may be 0.

    All patterns count where at most `ALL_PATTERNS_UP_TO` differences are not zero, otherwise
    `DRAWS` random ones of `seed`; from `GROUP_FROM` on those of a random group of patterns. Zeros
    have no sign.

    A group holds every product of `_GENERATORS` random patterns, that of none included, which is
    the pattern observed. Whatever the group, the share of its patterns that are as extreme is an
    exact p-value, as that of all patterns is (Hemerik & Goeman 2018). Any two of its
    patterns are independent, so that the share is as near to that of all 2^n as that of as many
    draws. Time and memory are those of n numbers and of the group.
    """
    require_seed(seed)
    changed = differences[differences != 0]
    sizes = np.abs(changed)
    least = min(1.0, 2.0 ** (1 - len(differences)))
    if not len(changed) or (sizes == sizes[0]).all():
        p = _binomial_p(int((changed > 0).sum()), len(changed))
        return SignFlips(p, least, EXACT)
    # Sizes of one are as safe from overflow as any.
    changed = changed / sizes.max()
    bound = abs(float(changed.sum())) - _ROUNDING * float(np.abs(changed).sum())
    if len(changed) <= ALL_PATTERNS_UP_TO:
        extreme = np.abs(_all_sums(changed)) >= bound
        return SignFlips(float(extreme.mean()), least, f"sign-flip, all 2^{len(changed)} patterns")
    if len(changed) >= GROUP_FROM:
        extreme = np.abs(_group_sums(changed, seed, _GENERATORS)) >= bound
        told = f"sign-flip, a random group of {len(extreme):,} patterns"
        return SignFlips(float(extreme.mean()), 1.0 / len(extreme), told)
    p = (1 + _extreme_draws(changed, bound, seed)) / (1 + DRAWS)
    return SignFlips(p, 1.0 / (1 + DRAWS), f"sign-flip, {DRAWS:,} draws")


def _binomial_p(positive: int, changed: int) -> float:
    """Two-sided, of as many positive signs among so many fair ones."""
    from scipy.special import bdtr

    fewer = min(positive, changed - positive)
    return min(1.0, 2.0 * float(bdtr(fewer, changed, 0.5))) if changed else 1.0


def _all_sums(changed: np.ndarray) -> np.ndarray:
    """The sum under every pattern that keeps the first sign; the others are their negatives."""
    sums = changed[:1]
    for value in changed[1:]:
        sums = np.concatenate([sums + value, sums - value])
    return sums


def _group_sums(changed: np.ndarray, seed: int, generators: int) -> np.ndarray:
    """The sum under each pattern of a random group, float64 [2^generators]; as observed first.

    Equivalent, with `signs` [generators, n] of -1 and 1:

        [signs[list(chosen)].prod(axis=0) @ changed for chosen in subsets of the generators]

    A generator is a bit of each difference's code. Differences of one code keep together under all
    patterns, and the Walsh-Hadamard transform of the sums by code has all signed sums.
    """
    size = 1 << generators
    codes = np.random.default_rng(seed).integers(0, size, size=len(changed), dtype=np.int32)
    sums = np.bincount(codes, weights=changed, minlength=size)
    for bit in range(generators):
        pairs = sums.reshape(-1, 2, 1 << bit)
        sums = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1)
    return sums.reshape(size)


def _extreme_draws(changed: np.ndarray, bound: float, seed: int) -> int:
    generator = np.random.default_rng(seed)
    n, total = len(changed), float(changed.sum())
    rows_per_chunk = max(1, _SIGNS_PER_CHUNK // n)
    extreme = 0
    for start in range(0, DRAWS, rows_per_chunk):
        rows = min(rows_per_chunk, DRAWS - start)
        packed = generator.integers(0, 256, size=(rows, -(-n // 8)), dtype=np.uint8)
        positive = np.unpackbits(packed, axis=1, count=n).astype(np.float64)
        extreme += int((np.abs(2.0 * (positive @ changed) - total) >= bound).sum())
    return extreme
