"""A pytest plugin for rehearsals: Triton 3.6's interpreter under NumPy 2.5, which no longer turns
an array of one element into a number by itself."""

from __future__ import annotations

import os

# Triton reads this as it is imported.
os.environ["TRITON_INTERPRET"] = "1"

from triton.runtime import interpreter

_patch_tensor = interpreter._patch_lang_tensor


def _patch_tensor_and_index(tensor, scope) -> None:
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_tensor_and_index
