"""A plugin of pytest for rehearsals: Triton 3.6's interpreter under NumPy 2.5.

Where there is a GPU nothing is interpreted. Without one the tests run Triton's kernels in Python,
and NumPy 2.5 no longer turns an array of one element into a number by itself.
"""

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
