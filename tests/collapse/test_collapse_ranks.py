"""Two processes under DistributedDataParallel train as one process with both batches does.

The processes are started once; each trains in every situation, and the tests read what came out.
"""

from __future__ import annotations

import pytest
import torch
from regularized import BATCHES, JOINED, STRENGTH, require_same_training, trained
from tiny_classes import IDS, gradients, some_classes
from tiny_models import llama
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from two_ranks import WORLD, join_group, leave_group, run_ranks

from fastdean import CollapseRegularizer
from fastdean.models.ranks import attendance
from fastdean.wording.mendable import StateError

DETACHED = {
    "cumulative": {},
    "window": {"mode": "window", "decay": 0.5},
    "batch": {"mode": "batch"},
}
LIVE = {
    f"live {name}": {"detach_features": False, "statistic": "mean", **DETACHED[name]}
    for name in ("window", "batch")
}
SITUATIONS = {**DETACHED, **LIVE}


def on_rank(rank, options):
    model = llama().double()
    # Averaging divides the sum of the ranks' losses by their number.
    options = {"wrapped": DistributedDataParallel(model), "scale": WORLD / 50, "options": options}
    return trained(model, BATCHES[rank], **options)


def alone(options):
    return trained(llama().double(), JOINED, options)


def by_items(rank):
    """The model's own loss, over the items of both ranks, as the Trainer calls for it."""
    model = llama().double().train()
    CollapseRegularizer(model, some_classes(), STRENGTH, **LIVE["live batch"])
    wrapped = DistributedDataParallel(model)
    items = sum(int((step[0]["labels"][:, 1:] != -100).sum()) for step in BATCHES)
    (wrapped(**BATCHES[rank][0], num_items_in_batch=items).loss * WORLD).backward()
    return gradients(model)


def bf16(rank):
    model = llama().bfloat16().train()
    regularizer = CollapseRegularizer(model, some_classes(), STRENGTH, **LIVE["live batch"])
    model(**BATCHES[rank][0]).loss.backward()
    return regularizer.value


def without_words(rank):
    """One rank has no listed word at all, and in the second batch neither has one."""
    model = llama().double().train()
    regularizer = CollapseRegularizer(model, some_classes(), STRENGTH, **LIVE["live batch"])
    empty = torch.full((1, 6), 3)
    model(input_ids=BATCHES[0][0]["input_ids"] if rank else empty)
    first = regularizer.term().item()
    model(input_ids=empty)
    return first, regularizer.term().item()


def made_in_another_way(rank):
    """On the second rank; what is said there and on the first one."""
    options = {
        "classes": {"classes": some_classes((5, 9, 61))},
        "as many classes": {"classes": some_classes((*IDS[1:], 61))},
        "strength": {"strength": 2.0},
        "mode": {"mode": "window"},
        "gradient of the features": {},
        "step": {},
    }
    said = {}
    for name, other in options.items():
        live = LIVE["live batch"] if "gradient" in name else {}
        made = {"classes": some_classes(), "strength": STRENGTH, **live}
        model = llama().double().train()
        regularizer = CollapseRegularizer(model, **made | (other if rank else {}))
        if rank and name == "step":
            regularizer.step = 3
        elif rank and live:
            model.model.requires_grad_(False)
        try:
            model(**BATCHES[rank][0])
        except ValueError as error:
            said[name] = str(error)
    return said


def on_one_rank_alone(rank):
    """What is said there; the other rank waits in a collective of its own."""
    said = {}
    waited, attendance.group_timeout = attendance.group_timeout, lambda: 1.0
    for name in ("whole", "sharded"):
        model = llama().train()
        if name == "sharded":
            fully_shard(model)
        if rank == 0:
            try:
                CollapseRegularizer(model, some_classes(), STRENGTH)
                model(**BATCHES[rank][0])
            except StateError as error:
                said[name] = str(error)
        distributed.barrier()
    attendance.group_timeout = waited
    return said


def worker(rank, folder):
    join_group(rank, folder)
    found = {name: on_rank(rank, options) for name, options in SITUATIONS.items()}
    for situation in (made_in_another_way, on_one_rank_alone, by_items, bf16, without_words):
        found[situation.__name__] = situation(rank)
    leave_group(rank, folder, found)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank found in each situation."""
    return run_ranks(worker, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("situation", SITUATIONS)
def test_two_ranks_train_as_one_does(found, situation):
    expected = alone(SITUATIONS[situation])
    for rank in range(WORLD):
        require_same_training(found[rank][situation], expected)


def test_both_ranks_hold_the_same_statistics_to_the_bit(found):
    for situation in SITUATIONS:
        for first, second in zip(*(found[rank][situation][0] for rank in (0, 1)), strict=True):
            assert torch.equal(first["sums"], second["sums"])


def test_the_ranks_terms_come_to_one_where_the_items_are_shared_unevenly(found):
    model = llama().double().train()
    CollapseRegularizer(model, some_classes(), STRENGTH, **LIVE["live batch"])
    steps = [batches[0] for batches in BATCHES]
    items = [int((step["labels"][:, 1:] != -100).sum()) for step in steps]
    assert items[0] != items[1]
    model(**{name: torch.cat([step[name] for step in steps]) for name in steps[0]}).loss.backward()
    for rank in range(WORLD):
        # The model computes its loss, and so the gradient, in fp32.
        torch.testing.assert_close(found[rank]["by_items"], gradients(model), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "name, text",
    [
        ("classes", "classes on all ranks, got [[5], [9], [12]"),
        ("as many classes", "classes on all ranks, got [[5], [9], [12]"),
        ("strength", "strength on all ranks, got 10.0 on rank 0 and 2.0 on rank 1; make it, and"),
        ("mode", "mode on all ranks, got cumulative on rank 0 and window on rank 1"),
        ("gradient of the features", "features on all ranks, got True on rank 0 and False on rank"),
        ("step", "step on all ranks, got 0 on rank 0 and 3 on rank 1"),
    ],
)
def test_regularisers_that_were_made_in_unlike_ways_are_refused_on_all_ranks(found, name, text):
    for rank in range(WORLD):
        assert text in found[rank]["made_in_another_way"].get(name, "nothing")


@pytest.mark.parametrize("model", ["whole", "sharded"])
def test_a_rank_without_a_regulariser_is_named(found, model):
    """By those with one, which would wait with it in unlike collectives."""
    said = found[0]["on_one_rank_alone"][model]
    assert "the regulariser must be there on every rank, got none on rank 1 of 2" in said
    assert "make a CollapseRegularizer on each" in said


def test_half_precision_travels(found):
    assert found[0]["bf16"] == found[1]["bf16"] > 0


def test_a_rank_without_listed_words_waits_for_nobody(found):
    model = llama().double().train()
    regularizer = CollapseRegularizer(model, some_classes(), STRENGTH, **LIVE["live batch"])
    model(input_ids=BATCHES[0][0]["input_ids"])
    expected = regularizer.term().item()
    for rank in range(WORLD):
        first, second = found[rank]["without_words"]
        assert first == pytest.approx(expected, rel=1e-10)
        # No class at all: nothing to spread, whatever the statistic.
        assert second == 0
