"""lm-eval's model with a mask: importing this file registers it as "fastdean".

    lm_eval.simple_evaluate("fastdean", "pretrained=Qwen/Qwen2-7B-Instruct,mask=run/mask", ...)

It is lm-eval's own `hf` model, with all of its arguments, and the mask applied once it is loaded.
Needs lm-eval (`pip install 'lm-eval[hf]'`); `import fastdean` does not import this.
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from fastdean.masks import NeuronMask

NAME = "fastdean"


@register_model(NAME)
class MaskedLM(HFLM):
    """`HFLM` with a mask.

    Args:
        pretrained: as in `HFLM`: a folder, a hub id, or a model.
        mask: see `NeuronMask.from_pretrained`; None: the model as it is.
        device: None: the GPU when there is one.
        options: as in `HFLM`.
    Raises:
        ValueError, RuntimeError: as `HFLM` and `NeuronMask.apply_`.
    """

    def __init__(
        self,
        pretrained: Any,
        mask: str | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        # Before the model, whose weights take long to read.
        found = None if mask is None else NeuronMask.from_pretrained(mask)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(pretrained=pretrained, device=device, **options)
        if found is not None:
            found.apply_(self.model)
        self._masked_weights = 0 if found is None else len(found)

    def get_model_info(self) -> dict[str, Any]:
        """As `HFLM`, and how many weights the mask edits."""
        return {**super().get_model_info(), "fastdean_masked_weights": self._masked_weights}
