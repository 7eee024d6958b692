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
from tiny_models import llama, qwen2
from torch import distributed
from two_ranks import WORLD, join_group, leave_group, run_ranks

import fastdean
from fastdean.coupling.resuming import resumable
from fastdean.coupling.scoring import score_sets
from fastdean.coupling.workloads.loss_scale import LossScale
from fastdean.models.loading import stream_model
from fastdean.models.ranks import distributed as ranks_module
from fastdean.models.ranks.distributed import Ranks

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


def kept(rank, **options):
    return fastdean.score(llama(), loader(), keep_top=0.05, progress=False, **options)


def kept_by_layers(rank):
    return kept(rank, order="layers", signs=True)


def kept_experts(rank, **options):
    options = {"keep_top": 0.02, "progress": False, **options}
    return fastdean.score(experts_model("Mixtral"), loader(), **options)


def kept_experts_as_one(rank):
    options = {"memory_budget": 1 << 19, "tokens_per_batch": 32}
    return kept_experts(rank, expert_scope="tensor", order="layers", **options)


def most_kept(rank):
    """So many that it is less to send all."""
    return fastdean.score(llama(), loader(), keep_top=0.9, progress=False)


def exact(rank, **options):
    """Of which all numbers of ranks are to give the same bits."""
    sets = batches(make_examples(lengths=range(3, 24)), 3)
    options = {"deterministic": True, "progress": False, "signs": True, **options}
    return fastdean.score(llama(), sets, **options)


def exact_kept(rank):
    return exact(rank, keep_top=0.05)


def exact_by_layers(rank):
    return exact(rank, keep_top=0.05, order="layers")


def exact_half(rank):
    model = llama().half()
    return fastdean.score(model, loader(), deterministic=True, progress=False)


def exact_experts(rank):
    return kept_experts(rank, deterministic=True)


def exact_own_loss(rank):
    options = {"loss_fn": token_loss, "deterministic": True, "progress": False}
    return fastdean.score(llama(), batches(make_examples(lengths=range(3, 24)), 2), **options)


def units(rank):
    return fastdean.score(llama(), loader(), granularity="unit", progress=False)


def kept_units(rank):
    options = {"granularity": "unit", "keep_top": 0.3, "order": "layers", "progress": False}
    return fastdean.score(llama(), loader(), **options)


def by_layers(rank):
    return fastdean.score(llama(), loader(), order="layers", progress=False)


def overflowing(rank):
    """In fp16 at a scale that is too large; each example alone, so that batches are the same."""
    fitted = LossScale.fitted
    LossScale.fitted = lambda *_: LossScale(24)
    try:
        options = {"order": "layers", "tokens_per_batch": 1, "progress": False}
        return fastdean.score(llama().half(), loader(), **options)
    finally:
        LossScale.fitted = fitted


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


def with_other_budgets(rank):
    """Layer by layer a window of each rank holds what it may."""
    budget = 1 << 18 if rank else None
    return kept(rank, order="layers", memory_budget=budget)


# What the second rank is given, where the first is given nothing.
UNLIKE = {
    "keep_top": {"keep_top": 0.05},
    "target_modules": {"target_modules": ["up_proj"]},
    "granularity": {"granularity": "unit"},
    "signs": {"signs": True},
    "deterministic": {"deterministic": True},
    "order": {"order": "layers"},
    "memory_budget": {"memory_budget": 1 << 16},
}


def wider(model):
    model.config.intermediate_size *= 2
    return type(model)(model.config)


def nudged(model):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight *= 1.001
    return model


def with_another_head(model):
    """As one that was not in the checkpoint, so that every rank has drawn its own."""
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 0.02, generator=torch.Generator().manual_seed(1))
    return model


def edited(model):
    """As by a mask: a single number, which is not looked at beforehand."""
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 1] = 0
    return model


OTHER_MODELS = {
    "class": lambda model: qwen2(),
    "dtype": lambda model: model.bfloat16(),
    "shape": wider,
    "numbers in model.layers.1.mlp.up_proj.weight": nudged,
    "numbers in lm_head.weight": with_another_head,
    "bits of model.layers.1.mlp.down_proj.weight": edited,
}


def unlike(rank):
    """What is said where the second rank is given something else, by what it is."""

    def message(model, **options):
        try:
            fastdean.score(model, loader(), progress=False, **options)
        except ValueError as error:
            return str(error)
        return "nothing"

    return {
        **{name: message(llama(), **(other if rank else {})) for name, other in UNLIKE.items()},
        **{n: message(other(llama()) if rank else llama()) for n, other in OTHER_MODELS.items()},
    }


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
    with_other_budgets,
    units,
    experts,
    kept,
    kept_by_layers,
    kept_experts,
    kept_experts_as_one,
    kept_units,
    most_kept,
    exact,
    exact_kept,
    exact_by_layers,
    exact_half,
    exact_experts,
    exact_own_loss,
    by_layers,
    overflowing,
    by_example,
    by_example_and_layers,
    broken_checkpoint,
    broken_layer,
    streamed,
    broken_end,
    empty_loader,
    own_loss,
]


EXACT = [exact, exact_kept, exact_by_layers, exact_half, exact_experts, exact_own_loss]
NEAR = [
    uneven,
    one_example,
    kept,
    kept_by_layers,
    kept_experts,
    kept_experts_as_one,
    kept_units,
    most_kept,
]
OF_FOUR = EXACT + NEAR

SENT = {
    "all_reduce": lambda tensor, **_: tensor.nbytes,
    "all_to_all_single": lambda received, sent, own, others, **_: (
        (sum(others) - own[0]) * sent.element_size()
    ),
    "all_gather": lambda received, sent, **_: sent.nbytes,
    "broadcast_object_list": lambda objects, src: 0,
}


def sent_by(score, *arguments):
    """Name of a collective -> how often a scoring calls it, and how many bytes this rank sends."""
    log = {name: (0, 0) for name in SENT}

    def counting(name, call):
        def counted(*args, **kwargs):
            calls, sent = log[name]
            log[name] = (calls + 1, sent + SENT[name](*args, **kwargs))
            return call(*args, **kwargs)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for name in SENT:
            patch.setattr(distributed, name, counting(name, getattr(distributed, name)))
        score(*arguments)
    return log


def sent(rank):
    """By order and number of examples, what scoring with `keep_top` sends."""

    def score(order, count):
        examples = batches(make_examples(lengths=(5,) * count), 2)
        options = {"keep_top": 0.05, "order": order, "tokens_per_batch": 10, "progress": False}
        fastdean.score(llama(), examples, **options)

    return {
        order: [sent_by(score, order, count) for count in (4, 40)]
        for order in ("batches", "layers")
    }


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
    found = in_situations(SITUATIONS, rank)
    found["unlike"] = unlike(rank)
    found["sent"] = sent(rank)
    found["resumed"] = resumed(rank, folder)
    found["told"] = told(rank)
    found["folder"] = str(folder)
    leave_group(rank, folder, found)


def one_of_four(rank, folder):
    join_group(rank, folder, 4)
    leave_group(rank, folder, in_situations(OF_FOUR, rank))


def told(rank):
    """The log lines on ranks, of a rank that listens to all of them."""
    lines, logger = [], logging.getLogger("fastdean")
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.append(record.getMessage())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        one_example(rank)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return [line for line in lines if "ranks" in line]


def in_situations(situations, rank):
    found = {}
    for situation in situations:
        try:
            scores = situation(rank)
        except Exception as error:
            found[situation.__name__] = f"{type(error).__name__}: {error}"
        else:
            found[situation.__name__] = {
                "values": dict(scores),
                "entries": {
                    name: (entry.index, entry.sums, entry.signed, entry.unseen)
                    for name, entry in scores.entries.items()
                },
                "num_examples": scores.num_examples,
                "data": scores.manifest["data"],
                "ranks": scores.manifest["ranks"],
                "expert_load": scores.expert_load,
            }
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank found in each situation."""
    return run_ranks(worker, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(
    "situation",
    [
        *NEAR,
        in_passes,
        with_other_budgets,
        units,
        experts,
        by_layers,
        overflowing,
        by_example,
        by_example_and_layers,
        streamed,
        own_loss,
    ],
    ids=lambda s: s.__name__,
)
def test_two_ranks_give_what_one_gives(found, situation):
    assert_near(found, situation)


def assert_near(found, situation):
    alone = situation(0)
    for rank in range(len(found)):
        result = found[rank][situation.__name__]
        assert not isinstance(result, str), result
        assert result["num_examples"] == alone.num_examples
        assert result["data"] == alone.manifest["data"]
        assert (result["ranks"], alone.manifest["ranks"]) == (len(found), 1)
        assert list(result["values"]) == list(alone)
        assert result["expert_load"] == alone.expert_load
        for name, value in alone.items():
            assert norm_error(result["values"][name], value) < 1e-6
            # No two importances of these models are so near that rounding puts them in another
            # order.
            index, _, _, unseen = result["entries"][name]
            assert index is None or torch.equal(index, alone.index(name))
            assert unseen == alone.entries[name].unseen


def test_ranks_count_the_tokens_of_experts_together(found):
    """Also where each rank has the sums of its shard only."""
    for name in ("experts", "kept_experts"):
        assert found[0][name]["expert_load"] == found[1][name]["expert_load"] != []


@pytest.mark.parametrize("situation", EXACT, ids=lambda s: s.__name__)
def test_deterministic_scores_have_the_same_bits_on_two_ranks(found, situation):
    assert_exact(found, situation)


@pytest.mark.slow
def test_four_ranks_give_what_one_gives(tmp_path):
    found = run_ranks(one_of_four, tmp_path, 4)
    for situation in EXACT:
        assert_exact(found, situation)
    for situation in NEAR:
        assert_near(found, situation)


def assert_exact(found, situation):
    alone = situation(0).entries
    for rank in range(len(found)):
        of_ranks = found[rank][situation.__name__]
        assert not isinstance(of_ranks, str), of_ranks
        for name, entry in alone.items():
            expected = (entry.index, entry.sums, entry.signed)
            for one, other in zip(expected, of_ranks["entries"][name][:3], strict=True):
                assert (one is None and other is None) or torch.equal(one, other)


def test_kept_entries_are_those_of_the_dense_scores_of_the_same_ranks(found):
    """Bit for bit: the sums are the same, and ties go to the lowest index."""
    for rank in range(WORLD):
        dense, sparse = (found[rank][name]["values"] for name in ("uneven", "kept"))
        for name, (index, *_) in found[rank]["kept"]["entries"].items():
            value = dense[name].flatten()
            k = int(0.05 * value.numel())
            expected = value.argsort(descending=True, stable=True)[:k].sort().values
            assert torch.equal(index, expected)
            assert torch.equal(sparse[name], value[index])


def test_a_rank_sends_its_sums_once_and_its_candidates_whatever_the_number_of_examples(found):
    for rank in range(WORLD):
        entries = fastdean.score(llama(), loader(), progress=False).entries.values()
        sizes = [entry.numel for entry in entries]
        sums = sum(size - len(range(*Ranks(rank, WORLD).shard(size))) for size in sizes)
        candidates = sum(int(0.05 * size) for size in sizes)
        for few, many in found[rank]["sent"].values():
            assert few == many
            # A place and a sum each.
            assert few["all_to_all_single"] == (len(sizes), 4 * sums)
            assert few["all_gather"] == (len(sizes), 12 * candidates)
            calls, bytes_sent = few["all_reduce"]
            assert bytes_sent <= 16 * calls


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


@pytest.mark.parametrize("name", UNLIKE)
def test_arguments_that_differ_are_refused_on_all_ranks(found, name):
    text = f"score() must have the same {name} on all ranks, got "
    for rank in range(WORLD):
        assert found[rank]["unlike"][name].startswith(text)


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_models_that_differ_are_refused_on_all_ranks(found, name):
    """Which would be added up."""
    for rank in range(WORLD):
        assert f"model must have the same {name}" in found[rank]["unlike"][name]
        assert "; give every rank the same model" in found[rank]["unlike"][name]


def test_sums_on_the_cpu_travel_through_a_group_of_gpus(monkeypatch):
    reduced = []

    class Done:
        def wait(self, *limit):
            pass

    def all_reduce(tensor, async_op, group=None):
        assert tensor is not sums, "a group of GPUs alone takes no tensor on the CPU"
        reduced.append(tensor)
        tensor.mul_(WORLD)
        return Done()

    # The machine of this test has no GPU: float64 stands for the other device.
    monkeypatch.setattr(
        "fastdean.models.ranks.distributed._collective_device", lambda: torch.float64
    )
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


@pytest.fixture
def launched(monkeypatch):
    """A process in whose environment no launcher has written, and which has warned of none."""
    for name in ranks_module._PROCESSES:
        monkeypatch.delenv(name, raising=False)
    ranks_module._warn_once.cache_clear()
    yield monkeypatch
    ranks_module._warn_once.cache_clear()


@pytest.mark.parametrize("name", ["WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_a_job_without_a_process_group_is_warned_about_once(name, launched, caplog):
    launched.setenv("WORLD_SIZE", "1")  # torchrun, one process by each of the launcher's
    launched.setenv(name, "4")
    with caplog.at_level(logging.WARNING, logger="fastdean"):
        assert Ranks.current() == Ranks(0, 1)
        assert Ranks.current() == Ranks(0, 1)
    assert caplog.text.count(f"{name} is 4 but torch.distributed is not initialised") == 1
    assert "start the processes with torchrun" in caplog.text


@pytest.mark.parametrize("value", ["1", "", "2(x3)"])
def test_a_launcher_of_one_process_is_not_warned_about(value, launched, caplog):
    launched.setenv("SLURM_NTASKS", value)
    with caplog.at_level(logging.WARNING, logger="fastdean"):
        Ranks.current()
    assert not caplog.text


def test_the_first_rank_says_on_how_many_it_scores(found):
    assert [rank["told"] for rank in found] == [["scoring on 2 ranks"], []]
    team = Ranks(1, 4, teams=((0, 1), (2, 3)))
    assert team.described() == "4 ranks, 2 of which hold a model together"
