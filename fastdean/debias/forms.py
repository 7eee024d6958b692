"""The two forms of a loss whose paper and released code differ."""

from __future__ import annotations

from typing import Literal

Form = Literal["published", "paper"]
FORMS: tuple[Form, ...] = ("published", "paper")
WITH_FORMS = frozenset({"mabel", "adept"})


def require_form(form: str, method: str | None = None) -> Form:
    """The form; ValueError for an unknown one, or for one that `method` does not have."""
    if form not in FORMS:
        raise ValueError(f"form must be 'published' or 'paper', got {form!r}")
    if form != "published" and method is not None and method not in WITH_FORMS:
        raise ValueError(
            f"form must be 'published' for method {method!r}, got {form!r}; only "
            f"{' and '.join(sorted(WITH_FORMS))} have two"
        )
    return form
