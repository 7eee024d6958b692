"""`score` against plain autograd on one tiny model: one example, one backward pass, in float64.

Nothing of FastDEAN is in the plain loop. A class is exact where every matrix is within 1e-5, by
norm, in both orders and with both groups of targets; where fp32 itself is further off (the same
loop in fp32), within twice of that.
"""

from __future__ import annotations

import copy
import inspect
import logging
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import fastdean
from benchmarks.architectures.classes import Listed, listed
from benchmarks.architectures.tiny import SPECIAL, tiny_model
from fastdean.wording.log import logger

LENGTHS = (3, 13, 9, 5)
ORDERS = ("batches", "layers")
CASES = [(modules, order) for modules in ("mlp", "all") for order in ORDERS]
_TOLERANCE = 1e-5
# A model that fp32 computes worse than this tells nothing: another seed is tried.
_SOUND = 1e-4
_SEEDS = 4
IGNORE = -100


def outcome_of(name: str) -> dict[str, Any]:
    """What comes of the class: see `page.py` for what the entries mean."""
    logger.setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found: Listed = listed()[name]
    result: dict[str, Any] = {"class": found.class_name}
    for seed in range(_SEEDS):
        try:
            model = tiny_model(found, seed)
            examples = _examples(model, found.kind, seed)
            plain = _PlainLoop(model, examples, found.kind)
            plain.try_out()
        except Exception as error:
            return result | {"not built": _one_line(error)}
        if plain.dtype != torch.float64:
            result["loop"] = "fp32"
        cases: dict[str, str] = {}
        for modules, order in CASES:
            cases[f"{modules} {order}"] = _case(model, examples, plain, modules, order, result)
        if all(each.startswith("refused") for each in cases.values()):
            # Whether what neither group holds can be scored all the same.
            for order in ORDERS:
                cases[f"by name {order}"] = _case(model, examples, plain, ".*", order, result)
        if "unsound" not in cases.values():
            return result | {"cases": cases}
    return result | {"not built": "fp32 autograd is itself off from float64 with every seed tried"}


def _case(
    model: nn.Module,
    examples: Sequence[dict[str, Tensor]],
    plain: _PlainLoop,
    modules: str,
    order: str,
    result: dict[str, Any],
) -> str:
    """ "exact", "refused: ...", "wrong: ...", "failed: ...", or "unsound"."""
    options: dict[str, Any] = {"target_modules": modules, "order": order, "progress": False}
    if plain.own_loss:
        options["loss_fn"] = lambda outputs, batch: _loss(outputs, batch["labels"], 0)
    before, scores, said = _state(model), None, ""
    try:
        scores = fastdean.score(model, examples, **options)
    except Exception as error:
        # Of a refusal its reason: what to do about it, with names to choose from, is not held to.
        refusal = f"refused: {str(error).partition(';')[0]}"
        said = refusal if _is_ours(error) else f"failed: {_one_line(error)}"
    if _state(model) != before:
        return "failed: the model was not left as it was"
    if scores is None:
        return said
    if modules == "all" and order == "batches":
        result["left"] = _left(scores.manifest["coverage"])
    worst, where = 0.0, ""
    for name in scores:
        off = _off(scores[name], plain.importance(name))
        if not off <= worst:
            worst, where = off, name
    if worst <= _TOLERANCE:
        return "exact"
    fp32 = max(plain.fp32_off(name) for name in scores)
    if not fp32 <= _SOUND:
        return "unsound"
    if _off(scores[where], plain.importance(where)) <= 2 * fp32:
        return "exact"
    return f"wrong: {where} is {worst:.1e} off, fp32 itself {fp32:.1e}"


def _left(coverage: dict[str, Any]) -> dict[str, int]:
    """Group of the layers' parameters -> how many of these "all" does not score."""
    groups = coverage["groups"].items()
    return {
        name: missing
        for name, group in groups
        if (missing := group["parameters"] + group["unscorable"] - group["scored_parameters"]) > 0
    }


class _PlainLoop:
    """Importance by autograd of the model alone, computed when it is first asked for."""

    def __init__(self, model: nn.Module, examples: Sequence[dict[str, Tensor]], kind: str):
        self._model, self._examples = model, examples
        self.own_loss = bool(getattr(model.config, "is_encoder_decoder", False))
        self._shift = 0 if kind == "masked" or self.own_loss else 1
        self._known: dict[torch.dtype, dict[str, Tensor]] = {}

    def try_out(self) -> None:
        """Raise what the model itself raises.

        Some put numbers into their masks that float64 cannot take: these are compared in fp32.
        """
        for self.dtype in (torch.float64, torch.float32):
            try:
                finite = all(t.isfinite().all() for t in self._all(self.dtype).values())
            except RuntimeError:
                if self.dtype == torch.float32:
                    raise
                continue
            if finite:
                break
        else:
            raise ValueError("the gradients of the plain loop are not finite")
        # Some are changed by their first pass, whoever runs it.
        with torch.no_grad():
            self._model(**self._inputs(self._examples[0]))

    def importance(self, name: str) -> Tensor:
        return self._all(self.dtype)[name]

    def fp32_off(self, name: str) -> float:
        return _off(self._all(torch.float32)[name], self.importance(name))

    def _all(self, dtype: torch.dtype) -> dict[str, Tensor]:
        if dtype not in self._known:
            self._known[dtype] = self._computed(dtype)
        return self._known[dtype]

    def _computed(self, dtype: torch.dtype) -> dict[str, Tensor]:
        model = copy.deepcopy(self._model).to(dtype)
        for module in model.modules():
            # The grouped product of the default implementation has no float64 form.
            config = getattr(module, "config", None)
            if hasattr(config, "_experts_implementation_internal"):
                config._experts_implementation_internal = "eager"
        weights = {n: p for n, p in model.named_parameters() if p.dim() > 1 and p.requires_grad}
        sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        for example in self._examples:
            outputs = model(**self._inputs(example))
            loss = _loss(outputs, example["labels"], self._shift).sum()
            gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for name, gradient in zip(weights, gradients, strict=True):
                if gradient is not None:
                    sums[name] += gradient.abs()
        number = len(self._examples)
        return {n: sums[n] * weights[n].detach().abs() / number for n in weights}

    def _inputs(self, example: dict[str, Tensor]) -> dict[str, Any]:
        inputs: dict[str, Any] = {k: v for k, v in example.items() if k != "labels"}
        if "use_cache" in inspect.signature(self._model.forward).parameters:
            inputs["use_cache"] = False
        return inputs


def _loss(outputs: Any, labels: Tensor, shift: int) -> Tensor:
    """Mean cross-entropy over the targets of each row, [B]."""
    logits = outputs[0] if isinstance(outputs, tuple) else outputs.logits
    if shift:
        logits, labels = logits[:, :-shift], labels[:, shift:]
    kept = labels != IGNORE
    chosen = logits.double().log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1))
    return -(chosen.squeeze(-1) * kept).sum(1) / kept.sum(1)


def _examples(model: nn.Module, kind: str, seed: int) -> list[dict[str, Tensor]]:
    """Batches of one example each; the first third of one is no target."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> Tensor:
        return torch.randint(3, SPECIAL, (1, length), generator=generator)

    found = []
    for length in LENGTHS:
        ids = tokens(length)
        labels = ids.clone()
        labels[:, : max(1, length // 3)] = IGNORE
        example = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        if kind == "masked":
            example["input_ids"] = torch.where(labels == IGNORE, ids, tokens(length))
        if getattr(model.config, "is_encoder_decoder", False):
            example |= {"decoder_input_ids": tokens(length)}
        found.append(example)
    return found


def _off(value: Tensor, reference: Tensor) -> float:
    """||value - reference|| / ||reference||; infinite where only one of them is zero."""
    off, size = (value.double() - reference.double()).norm(), reference.double().norm()
    return float(off / size) if size or off else 0.0


def _state(model: nn.Module) -> Any:
    """What a scoring must leave as it was."""
    return (
        [(n, p.requires_grad, p.grad is None, p._version) for n, p in model.named_parameters()],
        [module.training for module in model.modules()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        [name for name, module in model.named_modules() if "forward" in vars(module)],
        repr(model.config),
    )


def _is_ours(error: Exception) -> bool:
    """Whether it is a refusal of FastDEAN's: raised in it, in one line that says what must be."""
    raised = traceback.extract_tb(error.__traceback__)[-1].filename
    inside = Path(fastdean.__file__).parent in Path(raised).parents
    return inside and " must " in str(error) and "\n" not in str(error)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if _is_ours(error):
        return text
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text[:200]} ({Path(last.filename).name}:{last.lineno})"
