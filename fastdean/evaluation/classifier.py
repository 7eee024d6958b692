"""A plain classification head on a masked language model, fine-tuned with it: the loop of GLUE."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdean.models.label_shift import label_shift
from fastdean.models.model_state import evaluation_state, input_device, unwrap
from fastdean.wording.doing import titled
from fastdean.wording.mendable import StateError

_MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class HeadCourse:
    """How a head is trained: AdamW without weight decay, at a rate that falls linearly to 0.

    Attributes:
        learning_rate: the first and highest.
        max_length: tokens of a text or pair, the rest is cut off.
    """

    epochs: int = 3
    learning_rate: float = 2e-5
    batch_size: int = 32
    max_length: int = 128

    def steps(self, examples: int) -> int:
        return self.epochs * math.ceil(examples / self.batch_size)


def fine_tuned_classifier(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[tuple[str, ...]],
    targets: Sequence[float],
    *,
    labels: Sequence[str] = (),
    course: HeadCourse | None = None,
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    """A sequence classifier of transformers: a copy of the model's encoder under a new head.

    Head and encoder are trained together. `model` and the caller's random state are left as they
    are.

    Args:
        model: a masked language model, whose class of sequence classifiers transformers has.
        texts: of each example one text or a pair, at least one example.
        targets: the number of each example's label; without `labels` what is to be predicted.
        labels: their names; none: a regression by the mean squared error.
        seed: of the head's first weights, the order of the examples and dropout.

    Returns:
        The classifier in eval mode, on the model's device.

    Raises:
        ValueError: a causal model, no examples, or another number of targets.
        RuntimeError: a loss that is not finite.
    """
    course = course or HeadCourse()
    inner: Any = unwrap(model)
    if label_shift(inner) != 0:
        raise ValueError(
            f"model must be a masked language model, got the causal {type(inner).__name__}; ask "
            "it tasks of lm-eval (fastdean eval --tasks)"
        )
    if not texts or len(texts) != len(targets):
        raise ValueError(
            f"texts must be at least one and as many as targets, got {len(texts)} and "
            f"{len(targets)}; give each example its target"
        )
    device = input_device(inner)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        torch.manual_seed(seed)
        classifier = _untrained(inner, labels).to(device)
        _train(classifier.train(), tokenizer, texts, targets, course, seed, progress)
    return classifier.eval()


@torch.no_grad()
def class_logits(
    classifier: nn.Module, tokenizer: Any, texts: Sequence[tuple[str, ...]], course: HeadCourse
) -> Tensor:
    """float64 [n, labels] on the CPU; of a regression [n, 1]."""
    device = input_device(classifier)
    found = []
    encode = copy.deepcopy(tokenizer)
    with evaluation_state(classifier):
        for start in range(0, len(texts), course.batch_size):
            inputs = _inputs(encode, texts[start : start + course.batch_size], course)
            found.append(classifier(**inputs.to(device)).logits.cpu().double())
    return torch.cat(found)


def _untrained(inner: Any, labels: Sequence[str]) -> nn.Module:
    """The classifier with the model's encoder; what a masked model lacks (a pooler) is new."""
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(inner.config)
    config.num_labels = len(labels) or 1
    config.id2label = dict(enumerate(labels or ("score",)))
    config.label2id = {name: number for number, name in config.id2label.items()}
    classifier = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    # Not strict: one has a pooler and the other has not. All else has to be there.
    encoder = inner.base_model
    copied = classifier.base_model.load_state_dict(encoder.state_dict(), strict=False)
    odd = [name for name in copied.missing_keys if not name.startswith("pooler.")]
    odd += [name for name in copied.unexpected_keys if not name.startswith("pooler.")]
    if odd:
        raise ValueError(
            f"model must have the encoder of {type(classifier).__name__}, got another "
            f"{type(inner).__name__} ({odd[0]}); load it as transformers writes it"
        )
    return classifier


def _train(
    classifier: nn.Module,
    tokenizer: Any,
    texts: Sequence[tuple[str, ...]],
    targets: Sequence[float],
    course: HeadCourse,
    seed: int,
    progress: bool,
) -> None:
    from tqdm.auto import tqdm

    steps, device = course.steps(len(texts)), input_device(classifier)
    # A copy may be left with truncation and padding: saving the tokenizer would keep them.
    encode = copy.deepcopy(tokenizer)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        classifier.parameters(), lr=course.learning_rate, weight_decay=0.0
    )
    with tqdm(total=steps, desc=titled("head"), unit="step", disable=not progress) as bar:
        for step, members in enumerate(_members(len(texts), course, generator)):
            for group in optimizer.param_groups:
                group["lr"] = course.learning_rate * (1 - step / steps)
            inputs = _inputs(encode, [texts[i] for i in members], course).to(device)
            logits = classifier(**inputs).logits
            wanted = torch.tensor([targets[i] for i in members], device=logits.device)
            if logits.shape[1] == 1:
                loss = nn.functional.mse_loss(logits[:, 0], wanted.to(logits))
            else:
                loss = nn.functional.cross_entropy(logits, wanted.long())
            if not math.isfinite(loss.item()):
                raise StateError(
                    f"loss must be finite, got {loss.item()} in step {step + 1} of a head; lower "
                    "its learning_rate"
                )
            loss.backward()
            nn.utils.clip_grad_norm_(classifier.parameters(), _MAX_GRADIENT_NORM)
            optimizer.step()
            # Inside of the caller's autocast, of the weights before the step.
            torch.clear_autocast_cache()
            optimizer.zero_grad()
            bar.update()


def _members(
    examples: int, course: HeadCourse, generator: torch.Generator
) -> Iterator[Sequence[int]]:
    """The examples of each step; every epoch has all of them, in an order of its own."""
    for _ in range(course.epochs):
        order = torch.randperm(examples, generator=generator)
        yield from (group.tolist() for group in order.split(course.batch_size))


def _inputs(encode: Any, texts: Sequence[tuple[str, ...]], course: HeadCourse) -> Any:
    columns = [list(column) for column in zip(*texts, strict=True)]
    return encode(
        *columns,
        truncation=True,
        max_length=course.max_length,
        padding=True,
        return_tensors="pt",
    )
