"""The regulariser in a Hugging Face Trainer, or in one derived from it (TRL's SFTTrainer)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdean.collapse.regularizer import CollapseRegularizer
from fastdean.files.storage import read_folder, write_folder
from fastdean.wording.mendable import InputTypeError

STATE_FOLDER = "collapse_regularizer"

_KIND = "collapse"
_OVERRIDDEN = (
    "compute_loss",
    "log",
    "_save_optimizer_and_scheduler",
    "_load_optimizer_and_scheduler",
)


def trainer_class(base: type) -> type:
    """Return a subclass of a Hugging Face Trainer that also takes `regularizer=`.

    The term is added to the Trainer's loss, be it the model's, a label-smoothed one, or that of
    `compute_loss_func`. Every batch adds to the statistics; over an accumulation the terms come to
    their mean. The logged "loss" includes the term, "collapse" is `regularizer.value`. The
    schedule's steps are the optimizer's.

    Of models whose loss ignores `num_items_in_batch` although their forward has it, such as BERT,
    the Trainer sums the loss over an accumulation, so that the term is small beside it: set
    `model.accepts_loss_kwargs = False` before making the Trainer.

    Checkpoints have the statistics in the folder "collapse_regularizer", except with
    `save_only_model`; resuming restores them into a regulariser with the same options.

    Args:
        base: `transformers.Trainer` or a class derived from it.
    Returns:
        A class. Making one of it raises ValueError unless the regulariser is attached to its model;
        resuming from a checkpoint without the statistics raises ValueError.
    Raises:
        TypeError: `base` is no such class.

    Example:
        ```python
        trainer = trainer_class(Trainer)(model, args, train_dataset=rows, regularizer=regularizer)
        ```
    """
    lacking = [name for name in _OVERRIDDEN if not hasattr(base, name)]
    if not isinstance(base, type) or lacking:
        raise InputTypeError(
            "base must be transformers.Trainer or a class derived from it, got "
            f"{getattr(base, '__name__', type(base).__name__)} without {', '.join(lacking)}"
        )

    class CollapseTrainer(base):
        def __init__(self, *args: Any, regularizer: CollapseRegularizer, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if not isinstance(regularizer, CollapseRegularizer):
                kind = type(regularizer).__name__
                raise InputTypeError(f"regularizer must be a CollapseRegularizer, got {kind}")
            regularizer.require_attached_to(self.model)
            self.regularizer = regularizer

        def compute_loss(
            self,
            model: nn.Module,
            inputs: dict[str, Any],
            return_outputs: bool = False,
            num_items_in_batch: Tensor | int | None = None,
        ) -> Tensor | tuple[Tensor, Any]:
            options = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
            if not (model.training and torch.is_grad_enabled()):
                return super().compute_loss(model, inputs, **options)
            with self.regularizer.held(step=self.state.global_step):
                found = super().compute_loss(model, inputs, **options)
            term = self.regularizer.term()
            if not _divides_by_accumulation(self, num_items_in_batch):
                term = term / self.current_gradient_accumulation_steps
            if not return_outputs:
                return found + term.to(found.device)
            loss, outputs = found
            return loss + term.to(loss.device), outputs

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            # The Trainer logs "loss" only while it trains.
            if "loss" in logs and (value := self.regularizer.value) is not None:
                logs["collapse"] = value
            super().log(logs, *args, **kwargs)

        # The Trainer saves and loads with these two all of a checkpoint but the weights.
        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            super()._save_optimizer_and_scheduler(output_dir)
            if self.args.should_save:
                _write_state(self.regularizer, output_dir)

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None:
                _read_state(self.regularizer, checkpoint)

    CollapseTrainer.__name__ = CollapseTrainer.__qualname__ = f"Collapse{base.__name__}"
    return CollapseTrainer


def _divides_by_accumulation(trainer: Any, num_items_in_batch: Tensor | int | None) -> bool:
    """Whether the Trainer divides the loss of `compute_loss` by the number of accumulated batches.

    It does unless the loss is divided by all their items already.
    """
    declared = getattr(trainer, "loss_is_scaled_for_ga", None)
    if declared is not None:
        return not declared
    counted = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
    return not counted and trainer.compute_loss_func is None


def _write_state(regularizer: CollapseRegularizer, checkpoint: str | os.PathLike) -> None:
    state = regularizer.state_dict()
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    config = {name: value for name, value in state.items() if name not in tensors}
    write_folder(Path(checkpoint) / STATE_FOLDER, config, tensors, kind=_KIND, overwrite=True)


def _read_state(regularizer: CollapseRegularizer, checkpoint: str | os.PathLike) -> None:
    folder = Path(checkpoint) / STATE_FOLDER
    if not folder.is_dir():
        raise ValueError(
            f"resume_from_checkpoint must hold the statistics of the regulariser, got "
            f"{str(checkpoint)!r} without the folder {STATE_FOLDER!r}: it was written without a "
            "regulariser; resume with a Trainer of that kind, or load the model from the "
            "checkpoint and train without resume_from_checkpoint"
        )
    config, tensors = read_folder(folder, kind=_KIND)
    try:
        regularizer.load_state_dict({**config, **tensors})
    except ValueError as error:
        raise ValueError(f"{str(folder)!r}: {error}") from None
