"""The two forms of a loss whose paper and released code differ."""

from __future__ import annotations

from typing import Literal

Form = Literal["published", "paper"]
FORMS: tuple[Form, ...] = ("published", "paper")
# Of the others, code and paper agree in what is trained with here.
WITH_FORMS = frozenset({"mabel", "adept"})


def require_form(form: str, method: str | None = None) -> Form:
    """The form: "published", of the released code, or "paper".

    Args:
        method: of `fine_tune`, or None: one that has both.
    Raises:
        ValueError: an unknown form, or "paper" for a method with one form.
    """
    if form not in FORMS:
        raise ValueError(f"form must be 'published' or 'paper', got {form!r}")
    if form != "published" and method is not None and method not in WITH_FORMS:
        raise ValueError(
            f"form must be 'published' for method {method!r}, got {form!r}; only "
            f"{' and '.join(sorted(WITH_FORMS))} have two"
        )
    return form
