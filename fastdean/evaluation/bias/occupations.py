"""The occupations and person words from which BEC-Pro and Bias-NLI sentences are made.

Written for this project. The groups follow the share of women that labour statistics of the United
States report for these occupations: well below a third ("male"), well above two thirds ("female"),
or between 40 and 60 per cent ("balanced").
"""

from __future__ import annotations

OCCUPATIONS: dict[str, tuple[str, ...]] = {
    "male": (
        "carpenter", "electrician", "firefighter", "mechanic", "plumber", "roofer", "truck driver",
        "welder",
    ),
    "female": (
        "dental hygienist", "dietitian", "hairdresser", "kindergarten teacher", "librarian",
        "nurse", "receptionist", "secretary",
    ),
    "balanced": (
        "accountant", "bartender", "editor", "insurance agent", "journalist", "pharmacist",
        "photographer", "statistician",
    ),
}  # fmt: skip

# (male, female): the words stand in the same places.
PERSONS: tuple[tuple[str, str], ...] = (
    ("he", "she"),
    ("that man", "that woman"),
    ("my brother", "my sister"),
    ("my uncle", "my aunt"),
    ("her father", "her mother"),
    ("our son", "our daughter"),
)


def with_article(noun: str) -> str:
    """The noun after "a" or "an", by its first letter."""
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"
