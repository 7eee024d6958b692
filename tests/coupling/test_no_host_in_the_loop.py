"""While `score` runs over its batches, the host does not wait for the device."""

from __future__ import annotations

import warnings
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from device_reads import DeviceReads
from device_waits import device_waits
from tiny_data import batches, make_examples
from tiny_models import MODELS

import fastdean
from fastdean.coupling import scoring_job
from fastdean.coupling.passes import by_batches
from fastdean.coupling.sums import accumulators
from fastdean.coupling.targets.finding import find_targets
from fastdean.coupling.workloads import loss_check
from fastdean.data import batching
from fastdean.data.batching import Batch, plan_batches
from fastdean.data.examples import Example
from fastdean.models.forward import target_log_likelihood

EXAMPLES = 6
CHECK = ("to", "tolist")  # what looking at the losses of one batch takes


def llama_of(layers):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**{**tiny_models._DECODER, "num_hidden_layers": layers})
    return LlamaForCausalLM(config).eval()


def token_losses(outputs, batch):
    logits, targets = outputs.logits[:, :-1], batch["input_ids"][:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.mT, targets, reduction="none")
    return losses.mean(1)


@pytest.fixture
def watched(monkeypatch):
    """`watched(model, **options) -> DeviceReads`: a run of score, watched while it passes."""

    def run(model, examples=None, size=1, **options):
        reads = DeviceReads()
        real_to, real_send, real_pass = Batch.to, batching.send, by_batches.run_pass

        def send(tensor, device):
            moved = real_send(tensor, device).clone()
            reads.mark([moved])
            return moved

        def to(batch, device):
            moved = real_to(batch, device)
            parts = {name: getattr(moved, name) for name in batching._READ_ON_THE_DEVICE}
            parts = {k: part.clone() for k, part in parts.items() if part is not None}
            reads.mark(parts.values())
            return replace(moved, **parts)

        def run_pass(*args):
            with reads:
                return real_pass(*args)

        monkeypatch.setattr(Batch, "to", to)
        monkeypatch.setattr("fastdean.coupling.workloads.custom_loss.send", send)
        monkeypatch.setattr(scoring_job, "run_pass", run_pass)
        reads.mark([*model.parameters(), *model.buffers()])
        examples = make_examples() if examples is None else examples
        fastdean.score(model, batches(examples, size), progress=False, **options)
        return reads

    return run


def operations(reads):
    return Counter(read.operation for read in reads)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"granularity": "unit"}, {"target_modules": "all"}, {"loss_fn": token_losses}],
    ids=["weights", "units", "all modules", "loss_fn"],
)
def test_one_look_at_the_losses_of_each_batch_and_nothing_else(watched, layers, options):
    batched = {} if "loss_fn" in options else {"tokens_per_batch": 1}
    reads = watched(llama_of(layers), **batched, **options)
    ours = reads.by("fastdean")
    assert operations(ours) == dict.fromkeys(CHECK, EXAMPLES)
    # What the model does on its own account is once per forward pass, not once per layer.
    assert len(reads.reads) - len(ours) <= 2 * EXAMPLES, reads.reads


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_packed_or_padded(watched, name):
    reads = watched(MODELS[name](), size=3)
    assert operations(reads.by("fastdean")) == dict.fromkeys(CHECK, 1)


def test_an_overflow_in_fp16_is_looked_for_once_at_the_end(watched):
    reads = watched(llama_of(2).half(), tokens_per_batch=1)
    ours = operations(reads.by("fastdean"))
    assert ours == {"to": EXAMPLES, "tolist": EXAMPLES + 1}


READERS = {
    "item": lambda x: x.sum().item(),
    "if": lambda x: bool(x.sum() > 0),
    "int": lambda x: int(x.sum()),
    "tolist": lambda x: x[0].tolist(),
    "numpy": lambda x: x.detach().numpy(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "masked assignment": lambda x: x.clone().__setitem__(x > 0, x[x > 0]),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: x.abs().long().flatten().bincount(),
    "equal": lambda x: torch.equal(x, x + 1),
    "isfinite": lambda x: x.isfinite().all().item(),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_read_in_every_layer_would_be_noticed(watched, monkeypatch, reader):
    real = accumulators.accumulate_importance_

    def reading(acc, x, g, segments, **options):
        READERS[reader](x)
        return real(acc, x, g, segments, **options)

    monkeypatch.setattr(accumulators, "accumulate_importance_", reading)
    model = MODELS["llama"]()
    reads = watched(model)
    here = reads.by(__name__)
    assert len(here) >= len(find_targets(model))
    assert not set(reads.by("fastdean")) & set(here)


def test_a_read_of_the_plan_is_no_wait(watched, monkeypatch):
    real = accumulators.accumulate_importance_

    def reading(acc, x, g, segments, **options):
        assert segments.tolist() and int(segments[0, 0]) == 0 and segments.device.type == "cpu"
        return real(acc, x, g, segments, **options)

    monkeypatch.setattr(accumulators, "accumulate_importance_", reading)
    assert watched(MODELS["llama"]()).by(__name__) == []


def test_every_layer_gets_the_same_segments_object(monkeypatch):
    real, seen = accumulators.accumulate_importance_, {}

    def recording(acc, x, g, segments, **options):
        seen.setdefault(id(segments), []).append(segments)
        return real(acc, x, g, segments, **options)

    monkeypatch.setattr(accumulators, "accumulate_importance_", recording)
    model = MODELS["llama"]()
    largest = max(4 * target.module.weight.numel() for target in find_targets(model))
    options = {"tokens_per_batch": 20, "memory_budget": largest, "progress": False}
    fastdean.score(model, batches(make_examples(), 4), **options)
    assert len(seen) > 1
    assert {len(tensors) for tensors in seen.values()} == {len(find_targets(model))}


def passing(monkeypatch, model, examples, **options):
    """The order of forward passes and looks at losses while scoring: "f" and "l"."""
    events, real_pass = [], by_batches.run_pass
    look = loss_check.require_finite

    def run_pass(*args):
        handle = model.register_forward_pre_hook(lambda *args: events.append("f"))
        try:
            return real_pass(*args)
        finally:
            handle.remove()

    def looking(*losses):
        events.append("l")
        return look(*losses)

    monkeypatch.setattr(scoring_job, "run_pass", run_pass)
    monkeypatch.setattr(loss_check, "require_finite", looking)
    try:
        fastdean.score(model, batches(examples, 1), tokens_per_batch=1, progress=False, **options)
    except ValueError as error:
        events.append(str(error))
    return events


def test_losses_are_looked_at_when_the_next_batch_is_queued(monkeypatch):
    events = passing(monkeypatch, MODELS["llama"](), make_examples())
    assert events == list("ff" + "lf" * (EXAMPLES - 2) + "ll")


@pytest.mark.parametrize("bad", [0, 3, EXAMPLES - 1])
def test_a_loss_that_is_not_finite_is_named_at_most_one_batch_later(monkeypatch, bad):
    model, examples = MODELS["llama"](), make_examples()
    # The last one: the first few are those that a model is measured on.
    unused = reversed(range(3, tiny_models.VOCAB))
    token = next(t for t in unused if all(t not in ids for ids, _ in examples))
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    fastdean.score(model, batches(examples, 1), progress=False)  # what is probed once per model
    examples[bad][0][0] = token
    *events, message = passing(monkeypatch, model, examples)
    assert message.startswith(f"loss must be finite, got nan for example {bad}; ")
    assert events.count("f") == min(bad + 2, EXAMPLES)


def test_the_progress_bar_ends_at_every_example_of_every_pass(monkeypatch):
    steps, model = [], MODELS["llama"]()
    bar = SimpleNamespace(update=steps.append)
    monkeypatch.setattr(scoring_job, "_progress_bar", lambda *args: nullcontext(bar))
    largest = max(4 * target.module.weight.numel() for target in find_targets(model))
    options = {"tokens_per_batch": 20, "memory_budget": largest}
    fastdean.score(model, batches(make_examples(), 4), **options)
    assert sum(steps) == EXAMPLES * len(find_targets(model))


def planned(packed):
    examples = [Example(ids, labels) for ids, labels in make_examples()]
    return plan_batches(examples, shift=1, tokens_per_batch=30, packed=packed)


@pytest.mark.parametrize("packed", [True, False])
def test_a_batch_moves_in_one_copy(packed, monkeypatch):
    joined = []
    real = batching.send

    def send(tensor, device):
        joined.append(tensor)
        return real(tensor, device)

    monkeypatch.setattr(batching, "send", send)
    plan = planned(packed)
    for batch in plan:
        moved = batch.to("meta")
        assert moved.segments is batch.segments and moved.example_index == batch.example_index
        assert moved.model_inputs().keys() == batch.model_inputs().keys()
        assert all(value.is_meta for value in moved.model_inputs().values())
        assert moved.targets.is_meta and moved.target_rows.is_meta and moved.target_counts.is_meta
    assert len(joined) == len(plan)


@pytest.mark.parametrize("packed", [True, False])
def test_a_batch_arrives_as_it_was(packed, monkeypatch):
    monkeypatch.setattr(batching, "send", lambda tensor, device: tensor)
    for batch in planned(packed):
        moved = batch.to("meta")
        for name in batching._READ_ON_THE_DEVICE:
            before, after = getattr(batch, name), getattr(moved, name)
            assert (before is None) == (after is None)
            assert before is None or torch.equal(before, after), name


@pytest.mark.parametrize("packed", [True, False])
def test_targets_are_counted_when_batches_are_planned(packed):
    for batch in planned(packed):
        expected = [batch.target_example.tolist().count(b) for b in range(batch.num_examples)]
        assert batch.target_counts.tolist() == expected


def test_evaluation_reads_after_the_last_batch(monkeypatch):
    model, reads, forwards = MODELS["llama"](), DeviceReads(), []
    examples = [Example(ids, labels) for ids, labels in make_examples()]
    model.register_forward_hook(lambda *args: forwards.append(len(reads.by("fastdean"))))
    target_log_likelihood(model, examples[:2], progress=False)  # what is probed once per model
    forwards.clear()
    reads.mark([*model.parameters(), *model.buffers()])
    with reads:
        sums, counts = target_log_likelihood(model, examples, tokens_per_batch=1, progress=False)
    assert forwards == [0] * EXAMPLES and len(reads.by("fastdean")) >= EXAMPLES
    assert sums.isfinite().all() and counts.tolist() == [e.num_targets(1) for e in examples]


@pytest.mark.parametrize("error", [None, ValueError("of the block")], ids=str)
def test_waits_are_listed_and_the_mode_does_not_outlive_the_block(error, monkeypatch):
    modes = []

    def set_mode(mode):
        modes.append(mode)
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with nullcontext() if error is None else pytest.raises(ValueError), device_waits() as waits:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        if error is not None:
            raise error
    assert modes == ["warn", "default"]
    assert [Path(each.filename).name for each in waits] == [Path(__file__).name]


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", ["weight", "unit"])
@pytest.mark.parametrize("loss_fn", [None, token_losses])
def test_nothing_of_ours_synchronises_a_gpu(granularity, loss_fn, monkeypatch):
    model, real_pass, seen = llama_of(3).cuda(), by_batches.run_pass, []

    def run_pass(*args):
        with device_waits() as waits:
            result = real_pass(*args)
        seen.extend(waits)
        return result

    def run():
        examples = batches(make_examples(), 1)
        options = {"granularity": granularity, "loss_fn": loss_fn, "progress": False}
        fastdean.score(model, examples, tokens_per_batch=1, **options)

    run()  # kernels are compiled and loaded by the first run, which may synchronise
    monkeypatch.setattr(scoring_job, "run_pass", run_pass)
    run()
    ours = Path(fastdean.__file__).parent
    assert [w for w in seen if Path(w.filename).is_relative_to(ours)] == []
