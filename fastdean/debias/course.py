"""The course of a training: steps, rates, the order of the examples, all random seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch

from fastdean.wording.numbers import require_whole


class Purpose(IntEnum):
    """Uses of random numbers, each independent of the others."""

    ORDER = 0
    DROPOUT = 1
    MASKING = 2
    PREPARATION = 3


@dataclass(frozen=True)
class Course:
    """A function of these numbers alone, so that a checkpoint need not store it.

    Attributes:
        examples: their number; an epoch has each of them once, in an order of its own.
        steps: optimizer steps, counted from 0.
        learning_rate: the highest.
        batch_size, accumulation: examples of a forward pass; passes of a step.
        warmup: share of the steps in which the rate rises.
        seed: of everything random.
    """

    examples: int
    steps: int
    learning_rate: float
    batch_size: int
    accumulation: int
    warmup: float
    seed: int

    def rate(self, step: int) -> float:
        """Rises linearly to `learning_rate`, then falls linearly to 0 after the last step."""
        rising = math.ceil(self.warmup * self.steps)
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        return self.learning_rate * (self.steps - step) / (self.steps - rising)

    def members(self, step: int) -> list[list[int]]:
        """The examples of each forward pass of a step; the last of an epoch may have fewer."""
        per_step = self.batch_size * self.accumulation
        epoch, place = divmod(step, steps_per_epoch(self.examples, per_step))
        order = torch.randperm(self.examples, generator=self.generator(Purpose.ORDER, epoch))
        chosen = order[place * per_step : (place + 1) * per_step]
        return [group.tolist() for group in chosen.split(self.batch_size)]

    def generator(self, purpose: Purpose, *place: int) -> torch.Generator:
        """On the CPU, for one purpose and one place, such as a step and a forward pass of it."""
        return torch.Generator().manual_seed(random_seed(self.seed, purpose, *place))


def steps_per_epoch(examples: int, per_step: int) -> int:
    return math.ceil(examples / per_step)


def random_seed(seed: int, purpose: Purpose, *place: int) -> int:
    """63 bits."""
    (bits,) = np.random.SeedSequence((seed, purpose, *place)).generate_state(1, np.uint64)
    return int(bits >> np.uint64(1))


def check_course(
    *,
    steps: int | None,
    epochs: int | None,
    learning_rate: float,
    batch_size: int,
    accumulation: int,
    warmup: float,
    seed: int,
) -> None:
    """Raise ValueError for a number out of its range."""
    if steps is not None and epochs is not None:
        raise ValueError(
            f"steps and epochs must not both be given, got {steps} and {epochs}; leave one out"
        )
    check_counts(steps=steps, epochs=epochs, batch_size=batch_size, accumulation=accumulation)
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise ValueError(f"learning_rate must be finite and above 0, got {learning_rate}; try 2e-5")
    if not 0 <= warmup < 1:
        raise ValueError(
            f"warmup must be a share of the steps, at least 0 and below 1, got {warmup}; try 0.1"
        )
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}; try 0")


def check_counts(**counts: int | None) -> None:
    """Raise for what is no count, or below 1; None stands for a default."""
    for name, count in counts.items():
        if count is None:
            continue
        require_whole(name, count)
        if count < 1:
            raise ValueError(
                f"{name} must be at least 1, got {count}; leave it out for its default"
            )
