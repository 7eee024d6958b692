"""Two processes give what one gives, and fail together.

The processes are started once; each scores in every situation, and the tests read what came out.
"""

from __future__ import annotations

import logging
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from oracle import norm_error
from safetensors.torch import save_model
from tiny_data import batches, make_examples
from tiny_experts import experts_model
from tiny_models import llama
from torch import distributed
from two_ranks import WORLD, join_group, leave_group, run_ranks

import fastdean
from fastdean.coupling import resumable
from fastdean.coupling.scoring import score_sets
from fastdean.models.distributed import Ranks
from fastdean.models.loading import stream_model

EXAMPLES = make_examples(lengths=(3, 9, 17, 4, 12))


def loader(examples=EXAMPLES):
    return batches(examples, 2)


def token_loss(outputs, batch):
    log_probs = outputs.logits[:, :-1].log_softmax(-1)
    labels = batch["labels"][:, 1:]
    taken = -log_probs.gather(2, labels.clamp_min(0).unsqueeze(2)).squeeze(2)
    return (taken * (labels != -100)).sum(1)


def uneven(rank):
    return fastdean.score(llama(), loader(), progress=False)


def one_example(rank):
    return fastdean.score(llama(), loader(EXAMPLES[:1]), progress=False)


def in_passes(rank):
    options = {"memory_budget": 3 * 8192, "keep_top": 0.05}
    return fastdean.score(llama(), loader(), progress=False, **options)


def experts(rank):
    return fastdean.score(experts_model("Mixtral"), loader(), progress=False)


def units(rank):
    return fastdean.score(llama(), loader(), granularity="unit", progress=False)


def by_layers(rank):
    return fastdean.score(llama(), loader(), order="layers", progress=False)


def by_example(rank):
    return fastdean.score(llama(), loader(), target_modules="every", progress=False)


def by_example_and_layers(rank):
    """The second rank has no example, and so no gradient that says where one comes from."""
    return fastdean.score(
        llama(), loader(EXAMPLES[:1]), target_modules="every", order="layers", progress=False
    )


@contextmanager
def checkpoint():
    """A folder of this rank; `save_pretrained` writes on the first one alone."""
    with tempfile.TemporaryDirectory() as folder:
        model = llama()
        model.config.save_pretrained(folder)
        save_model(model, f"{folder}/model.safetensors", metadata={"format": "pt"})
        yield Path(folder)


def streamed(rank):
    with checkpoint() as folder:
        return fastdean.score(folder, loader(), keep_top=0.05, progress=False)


def own_loss(rank):
    return fastdean.score(llama(), loader(), loss_fn=token_loss, progress=False)


def broken_loader(rank):
    def rows():
        yield from loader()
        if rank == 1:
            raise OSError("disk of rank 1")

    return fastdean.score(llama(), rows(), progress=False)


def broken_weights(rank):
    model = llama()
    if rank == 1:
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    return fastdean.score(model, loader(), progress=False)


def other_examples(rank):
    return fastdean.score(llama(), loader(EXAMPLES[rank::WORLD]), progress=False)


def empty_loader(rank):
    return fastdean.score(llama(), [], progress=False)


def broken_checkpoint(rank):
    """Before the ranks meet for the first time."""
    with checkpoint() as folder:
        if rank == 1:
            (folder / "config.json").unlink()
        return fastdean.score(folder, loader(), keep_top=0.05, progress=False)


def broken_layer(rank):
    """Between two collectives: a window opens."""
    with checkpoint() as folder:
        stream = stream_model(str(folder))
        load = stream._load

        def failing(window, files):
            if rank == 1 and window == "model.layers.1":
                raise OSError("disk of rank 1")
            load(window, files)

        stream._load = failing
        return fastdean.score(stream, loader(), keep_top=0.05, progress=False)


def broken_end(rank):
    """Where the others are on their way to the sums of the second set."""

    def finished(name, scores):
        if rank == 1 and name == "a":
            raise OSError("disk of rank 1")

    sets = {"a": loader(), "b": loader()}
    return score_sets(llama(), sets, order="batches", finished=finished, progress=False)["b"]


# Working ones between the failing ones: a failure must leave the group in step.
SITUATIONS = [
    uneven,
    broken_loader,
    one_example,
    broken_weights,
    in_passes,
    other_examples,
    units,
    experts,
    by_layers,
    by_example,
    by_example_and_layers,
    broken_checkpoint,
    broken_layer,
    streamed,
    broken_end,
    empty_loader,
    own_loss,
]


def resumed(rank, folder):
    """A job that stops when one rank has noted a step as done and the other one has not."""
    write, steps = resumable.Resumable._write, []
    claimed, remove = resumable._claimed, resumable.remove_folder

    def failing(self, step, batches, before):
        if rank == 1 and step == 4:
            raise OSError("disk of rank 1")
        write(self, step, batches, before)

    def noted(self, step, batches, before):
        steps.append(step)
        write(self, step, batches, before)

    # Rank 0 has made the folder, and is through before the other.
    def claimed_by_0(*arguments):
        return claimed(*arguments)[0], int(rank == 0)

    def in_turn(own):
        while rank == 1 and (own.parent / "rank-0").exists():
            os.sched_yield()
        remove(own)

    options = {"order": "layers", "resume": folder / "job", "progress": False}
    try:
        resumable.Resumable._write = failing
        try:
            fastdean.score(llama(), loader(), **options)
        except Exception as error:
            message = str(error)
        left = sorted(path.name for path in (folder / "job").iterdir())
        resumable.Resumable._write = noted
        resumable._claimed, resumable.remove_folder = claimed_by_0, in_turn
        values = dict(fastdean.score(llama(), loader(), **options))
    finally:
        resumable.Resumable._write = write
        resumable._claimed, resumable.remove_folder = claimed, remove
    return {"message": message, "left": left, "steps": steps, "values": values}


def worker(rank, folder):
    join_group(rank, folder)
    found = {}
    for situation in SITUATIONS:
        try:
            scores = situation(rank)
        except Exception as error:
            found[situation.__name__] = f"{type(error).__name__}: {error}"
        else:
            found[situation.__name__] = {
                "values": dict(scores),
                "num_examples": scores.num_examples,
                "data": scores.manifest["data"],
                "ranks": scores.manifest["ranks"],
            }
    found["resumed"] = resumed(rank, folder)
    found["folder"] = str(folder)
    leave_group(rank, folder, found)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank found in each situation."""
    return run_ranks(worker, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(
    "situation",
    [
        uneven,
        one_example,
        in_passes,
        units,
        experts,
        by_layers,
        by_example,
        by_example_and_layers,
        streamed,
        own_loss,
    ],
    ids=lambda s: s.__name__,
)
def test_two_ranks_give_what_one_gives(found, situation):
    alone = situation(0)
    for rank in range(WORLD):
        result = found[rank][situation.__name__]
        assert not isinstance(result, str), result
        assert result["num_examples"] == alone.num_examples
        assert result["data"] == alone.manifest["data"]
        assert (result["ranks"], alone.manifest["ranks"]) == (WORLD, 1)
        assert list(result["values"]) == list(alone)
        for name, value in alone.items():
            assert norm_error(result["values"][name], value) < 1e-6


def test_ranks_go_on_from_where_all_of_them_have_been(found):
    for rank in range(WORLD):
        result = found[rank]["resumed"]
        assert "disk of rank 1" in result["message"] or "1 of 2 that failed" in result["message"]
        assert result["left"] == ["rank-0", "rank-1"]
        # Forward, forward and the loss are done; the last layer backward only on rank 0.
        assert result["steps"] == [4, 5]
        for name, value in found[rank]["by_layers"]["values"].items():
            assert torch.equal(result["values"][name], value)
        assert not (Path(found[rank]["folder"]) / "job").exists()


def test_both_ranks_hold_the_same_bits(found):
    first, second = (found[rank]["uneven"]["values"] for rank in range(WORLD))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "situation, own",
    [
        ("broken_loader", "OSError: disk of rank 1"),
        ("broken_checkpoint", "ValueError: model must be a Hugging Face folder with a config.json"),
        ("broken_layer", "OSError: disk of rank 1"),
        ("broken_end", "OSError: disk of rank 1"),
        ("broken_weights", "ValueError: loss must be finite, got nan for example"),
    ],
)
def test_a_failure_on_one_rank_is_an_error_on_both(found, situation, own):
    assert found[1][situation].startswith(own)
    assert found[0][situation] == (
        "StateError: every rank must finish its part of the work, got 1 of 2 that failed; "
        "see their own messages"
    )


def test_a_failure_on_both_ranks_keeps_its_own_message(found):
    for rank in range(WORLD):
        assert found[rank]["empty_loader"].startswith("ValueError: loader must yield at least one")


def test_loaders_that_are_already_split_are_refused(found):
    for rank in range(WORLD):
        assert found[rank]["other_examples"] == (
            "ValueError: loader must give every rank the same examples, got different ones; leave "
            "out the distributed sampler, score() splits the examples itself"
        )


def test_sums_on_the_cpu_travel_through_a_group_of_gpus(monkeypatch):
    reduced = []

    def all_reduce(tensor):
        assert tensor is not sums, "a group of GPUs alone takes no tensor on the CPU"
        reduced.append(tensor)
        tensor.mul_(WORLD)

    # The machine of this test has no GPU: float64 stands for the other device.
    monkeypatch.setattr("fastdean.models.distributed._collective_device", lambda: torch.float64)
    monkeypatch.setattr(distributed, "all_reduce", all_reduce)
    sums = torch.tensor([1.0, 2.5])
    Ranks(0, WORLD).sum_([sums])
    assert len(reduced) == 1 and reduced[0].dtype == torch.float64
    assert sums.dtype == torch.float32 and sums.tolist() == [2.0, 5.0]


@pytest.mark.gpu
def test_nccl_sums_tensors_of_either_device(tmp_path):
    distributed.init_process_group(
        "nccl", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        sums = [torch.tensor([1.0, 2.5]), torch.tensor([3.0], device="cuda")]
        # Two ranks as far as `sum_` knows; the group of one gives back what it was given.
        Ranks(0, 2).sum_(sums)
        assert [value.tolist() for value in sums] == [[1.0, 2.5], [3.0]]
        assert [value.device.type for value in sums] == ["cpu", "cuda"]
    finally:
        distributed.destroy_process_group()


def test_a_job_without_a_process_group_is_warned_about(monkeypatch, caplog):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with caplog.at_level(logging.WARNING, logger="fastdean"):
        assert Ranks.current() == Ranks(0, 1)
    assert "WORLD_SIZE is 4 but torch.distributed is not initialised" in caplog.text
