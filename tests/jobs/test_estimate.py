"""`fastdean estimate`: by hand on a tiny model, and against what processes really take."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from live_bytes import LiveBytes
from torch import distributed
from transformers import AutoConfig, AutoModelForCausalLM
from two_ranks import join_group, leave_group, run_ranks
from typer.testing import CliRunner

import fastdean
from fastdean import cli
from fastdean.coupling.layers.needed_memory import ModelMemory, Rows
from fastdean.data import Example
from fastdean.jobs.estimate.job import size_in_bytes

# V, H, units, L; four heads of 8, keys and values of two.
V, H, U, L, K = 96, 32, 64, 2, 16
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": U,
    "num_hidden_layers": L,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
JOB = {"examples": 6, "tokens_per_example": 100, "tokens_per_batch": 250}
GPU = {"gpus": 1, "gpu_memory": "1GB"}


def folder_of(path, **changes):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG | changes))
    return str(path)


@pytest.fixture
def folder(tmp_path):
    return folder_of(tmp_path / "model")


def test_a_tiny_job_by_hand(folder):
    """Three batches of two examples; on a GPU, where nothing of the process is counted."""
    found = fastdean.estimate(folder, **JOB, **GPU)
    attention, mlp = 2 * H * H + 2 * H * K, 3 * H * U
    layer, outside = 4 * (attention + mlp + 2 * H), 4 * (2 * V * H + H)
    assert found.model["parameters"] * 4 == L * layer + outside
    work = found.work
    assert (work["batches_of_a_rank"], work["tokens_of_the_largest_batch"]) == (3, 200)
    assert work["target_tokens_of_the_largest_batch"] == 198
    sums = L * 4 * mlp
    # Inputs and outputs: q, k, v, o; gate, up, down.
    kept = 4 * (4 * H + 2 * (H + K) + 3 * (H + U))
    logits = 2 * 198 * V * 4
    batch = 200 * L * kept + max(logits, 200 * kept)
    # Sum, weight and index of the top 0.1 %.
    results = int(3 * L * 1e-3 * H * U * (4 + 4 + 8))
    assert found.memory["sums"] == sums and found.memory["one_batch"] == batch
    assert found.orders["batches"].peak_bytes == L * layer + outside + sums + batch + results
    # Every layer's states for 600 tokens, the gradients of one layer's, and nine hidden vectors.
    states, window = (L + 1) * 600 * H * 4, 200 * (9 * 4 * H + 2 * kept)
    assert found.memory["states"] == L * 600 * H * 4
    by_layers = found.orders["layers"]
    assert by_layers.peak_bytes == L * layer + outside + sums // L + states + window + results
    streamed = found.orders["layers, streamed"]
    assert streamed.peak_bytes == layer + outside + sums // L + states + window + results
    assert streamed.files_read_bytes == 2 * L * layer + outside
    pairs = 6 * 100 * 100 * L * H
    forward = 2 * 600 * L * (attention + mlp) + 4 * pairs
    head = 2 * V * H * 6 * 99
    assert by_layers.operations == {
        "forward": forward + head,
        "recomputed_forward": forward,
        "backward": 2 * 600 * L * (attention + mlp) + 10 * pairs + head,
        "importance": 2 * 600 * L * mlp,
    }
    assert found.orders["batches"].operations["recomputed_forward"] == 0
    assert found.orders["batches"].seconds is None
    for each in found.orders.values():
        assert sum(each.parts.values()) == each.peak_bytes and each.fits


def test_parameters_that_no_hook_scores_have_passes_of_their_own(folder):
    """Sums and a gradient each; of each example the gradient, its absolute value, the sum."""
    mlp, both, norms = (
        fastdean.estimate(folder, **JOB, **GPU, target_modules=which)
        for which in ("mlp", "mlp,input_layernorm.weight", "input_layernorm.weight")
    )
    assert both.memory["sums"] == mlp.memory["sums"] + L * H * (4 + 4)
    one, two, alone = (each.orders["batches"].operations for each in (mlp, both, norms))
    assert two["forward"] == 2 * one["forward"] and two["backward"] == 2 * one["backward"]
    assert alone["forward"] == one["forward"]
    assert alone["importance"] == 3 * 6 * L * H
    assert any(note.startswith(f"{L} parameters are scored by example") for note in both.notes)
    assert not any("by example" in note for note in mlp.notes)


def test_time_is_that_of_the_rates(folder):
    given = fastdean.estimate(folder, **JOB, **GPU, flops=1e6, bandwidth=1e12)
    each = given.orders["batches"]
    assert each.seconds == sum(each.operations.values()) / 1e6
    slow = fastdean.estimate(folder, **JOB, **GPU, flops=1e15, bandwidth=1e3)
    assert slow.orders["batches"].seconds == each.weights_read_bytes / 1e3
    here = fastdean.estimate(folder, **JOB, measure=True)
    assert here.machine["flops"] > 1e6 and here.machine["bandwidth"] > 1e6
    assert "time, at least" in str(here) and "time, at least" not in str(
        fastdean.estimate(folder, **JOB)
    )


def test_no_weight_is_read(tmp_path):
    alone, beside = folder_of(tmp_path / "a"), folder_of(tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").write_bytes(b"no checkpoint at all")
    expected = fastdean.estimate(alone, **JOB, **GPU)
    assert fastdean.estimate(beside, **JOB, **GPU) == expected


def test_ranks_divide_examples_and_states_alone(folder):
    one, two = (fastdean.estimate(folder, **JOB, **GPU | {"gpus": n}) for n in (1, 2))
    assert two.memory["states"] * 2 == one.memory["states"]
    for name in ("weights", "sums"):
        assert two.memory[name] == one.memory[name]
    assert "holds the whole model, all sums" in two.notes[0]
    assert not any("ranks" in note for note in one.notes)


def test_fsdp_divides_the_weights_but_for_one_layer_and_what_is_outside(folder, tmp_path):
    """By hand, of two ranks; while a layer is gathered, it is there twice."""
    found = fastdean.estimate(folder, **JOB, **GPU | {"gpus": 2})
    assert list(found.orders) == ["batches", "layers", "layers, streamed", "layers, sharded"]
    sharded, whole = found.orders["layers, sharded"], found.orders["layers"]
    attention, mlp = 2 * H * H + 2 * H * K, 3 * H * U
    layer, outside = 4 * (attention + mlp + 2 * H), 4 * (2 * V * H + H)
    assert sharded.parts["weights"] == (L * layer + outside) / 2
    assert sharded.parts["gathered weights"] == outside + layer
    for part in ("sums", "states", "one window", "scores kept"):
        assert sharded.parts[part] == whole.parts[part]
    assert sharded.operations == whole.operations
    # For the trial, which is of the first layer, forward and backward, half of each.
    gathered = outside + layer + 2 * L * layer
    assert sharded.received == whole.received | {"weights": gathered / 2}
    # Of few tokens the peak is where a layer is there twice, for the MLPs of which no sums are yet.
    few = {"examples": 2, "tokens_per_example": 2, "granularity": "unit"}
    at = fastdean.estimate(folder, **few, **GPU | {"gpus": 2}).orders["layers, sharded"]
    assert at.moment == f"layer {L - 1} is gathered"
    assert at.parts["gathered weights"] == outside + 2 * layer
    # Or, of a large vocabulary, where the embedding is.
    wide = folder_of(tmp_path / "wide", vocab_size=64 * V)
    at = fastdean.estimate(wide, **few, **GPU | {"gpus": 2}).orders["layers, sharded"]
    assert at.moment == "what is outside of the layers is gathered"
    assert at.parts["gathered weights"] == 2 * 4 * (2 * 64 * V * H + H)
    alone = fastdean.estimate(folder, **JOB, **GPU)
    assert "layers, sharded" not in alone.orders and not alone.orders["layers"].received


def test_tensor_parallel_divides_what_the_plan_splits(folder):
    """By hand, of four ranks that hold two models, and the first of whose ranks has no less."""
    one, found = (
        fastdean.estimate(folder, **JOB, **GPU | {"gpus": gpus}, tensor_parallel=width)
        for gpus, width in ((2, 1), (4, 2))
    )
    assert list(found.orders) == ["batches", "layers"]
    assert found.machine["ranks_of_a_model"] == 2
    assert found.model == one.model and found.targets == one.targets
    # As many models, each with half of the examples.
    assert found.work == one.work
    attention, mlp = 2 * H * H + 2 * H * K, 3 * H * U
    cut, norms = L * (attention + mlp) + 2 * V * H, (2 * L + 1) * H
    assert found.memory["weights"] == 4 * (cut / 2 + norms)
    assert found.memory["sums"] == L * 4 * mlp / 2
    batches = found.orders["batches"]
    assert batches.parts["sums"] == L * 4 * mlp / 2
    # Half of the outputs of q, k, v, gate and up; half of the inputs of o and down.
    kept = 4 * (3 * H + 2 * H + K + 3 * H + 3 * U // 2)
    logits = 2 * 198 * V // 2 * 4
    assert found.memory["one_batch"] == 200 * L * kept + max(logits, 200 * kept)
    assert batches.parts["scores kept"] == one.orders["batches"].parts["scores kept"]
    whole = one.orders["batches"].operations
    assert batches.operations == {name: number / 2 for name, number in whole.items()}
    # 300 tokens: the embedding, attention and MLP forward; q, k, v, gate and up back; the head.
    rows, targets = 300, 297
    around = 2 * rows * 4 * H * (1 + 2 * L + 5 * L)
    assert batches.received["activations"] == (around + targets * 4 * (V + 2 * H)) / 2
    again = found.orders["layers"].received["activations"] - batches.received["activations"]
    # The layers once more, and the embedding on the way to each window.
    assert again == 2 * rows * 4 * H * (2 * L + 2 * L) / 2
    assert "Each of the 2 ranks of a model has its part" in found.notes[0]
    assert "activations of other ranks" in str(found)
    # Parameters are counted of the whole model, bytes of a rank.
    head, alone = (str(each).splitlines()[1] for each in (found, one))
    assert head.count(" a rank)") == 2 and " a rank)" not in alone


def test_expert_parallel_divides_experts_alone(tmp_path):
    experts = {
        **{"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]},
        **{"num_local_experts": 4, "num_experts_per_tok": 2},
    }
    model = folder_of(tmp_path / "mixture", **experts)
    alone, cut, owned = (
        fastdean.estimate(model, **JOB, **GPU | {"gpus": 2}, **how)
        for how in ({}, {"tensor_parallel": 2}, {"tensor_parallel": 2, "expert_parallel": 2})
    )
    assert "owns whole experts" in owned.notes[0]
    for found in (cut, owned):
        assert found.memory["sums"] == alone.memory["sums"] / 2
        for kind in ("forward", "backward", "importance"):
            split, whole = (each.orders["batches"].operations[kind] for each in (found, alone))
            # Of the router every rank does all, and the others have half of the examples.
            assert whole <= split < 1.01 * whole
        assert "sums" not in found.orders["batches"].received
    cut, owned = (each.orders["batches"].received for each in (cut, owned))
    assert cut["activations"] == owned["activations"]
    # Of half of the experts, and which experts were seen.
    assert owned["candidates"] - L * 2 * 4 == (cut["candidates"] - L * 2 * 4) / 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"gpus": 4, "tensor_parallel": 3},
            "tensor_parallel must divide gpus, got 3 of 4; pass ",
        ),
        ({"tensor_parallel": 2}, "tensor_parallel must divide gpus, got 2 of 1; pass gpus=2"),
        ({"gpus": 4, "expert_parallel": 2}, "expert_parallel must be 1 or as tensor_parallel"),
        (
            {"gpus": 2, "tensor_parallel": 2, "expert_parallel": 2},
            "expert_parallel must be left out for a model without a ep_plan of its own, got Llama",
        ),
        (
            {"gpus": 8, "tensor_parallel": 8},
            "tensor_parallel must divide the heads of attention, got 8 for the ",
        ),
        ({"gpus": 10**12}, "gpus must be at most 1,000,000, got 1,000,000,000,000; no job has"),
        ({"sets": 10**9}, "examples must be at most 10,000,000 in all sets together, got "),
        ({"max_length": -1}, "max_length must be at least 2, got -1"),
    ],
)
def test_a_split_that_nobody_makes_is_refused(folder, options, text):
    with pytest.raises(ValueError, match=f"^{text}"):
        fastdean.estimate(folder, **JOB | {"gpu_memory": "1GB"} | options)


def test_a_number_that_must_be_given_is_not_none(folder):
    with pytest.raises(TypeError, match="^tensor_parallel must be an integer, got None"):
        fastdean.estimate(folder, **JOB, tensor_parallel=None)


def test_ranks_that_would_own_parts_of_experts_are_refused(tmp_path):
    experts = {
        **{"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]},
        **{"num_local_experts": 3, "num_experts_per_tok": 2},
    }
    model = folder_of(tmp_path / "mixture", **experts)
    both = {"gpus": 2, "tensor_parallel": 2, "expert_parallel": 2}
    text = "^expert_parallel must divide the number of experts, got 2 for the 3 of model.layers.0"
    with pytest.raises(ValueError, match=text):
        fastdean.estimate(model, **JOB, **GPU | both)


def log_of_received(rank):
    """A list to which this process adds the bytes of others' own that each collective gives it."""
    log = []
    all_to_all, all_gather = distributed.all_to_all_single, distributed.all_gather

    def exchanged(received, sent, own, others, **options):
        log.append(received.nbytes - own[rank] * received.element_size())
        return all_to_all(received, sent, own, others, **options)

    def gathered(received, sent, **options):
        log.append(sum(each.nbytes for each in received) - sent.nbytes)
        return all_gather(received, sent, **options)

    distributed.all_to_all_single, distributed.all_gather = exchanged, gathered
    return log


def received_in_a_team(rank, folder, model, world, jobs):
    """What the collectives of ours give a rank, of a model that its own plan splits over two."""
    from torch.distributed.device_mesh import init_device_mesh
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    join_group(rank, folder, world)
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))["tp"]
    torch.manual_seed(0)
    subject = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).eval()
    plan = subject._expand_parallel_plan(dict(subject.tp_plan))
    subject = apply_tensor_parallelism(subject, mesh, plan)
    held = sum(
        weight.to_local().nbytes for weight in subject.parameters() if hasattr(weight, "to_local")
    )
    log = log_of_received(rank)
    found = [held + sum(p.nbytes for p in subject.parameters() if not hasattr(p, "to_local"))]
    for options in jobs:
        log.clear()
        ids = torch.arange(3, 23)
        fastdean.score(subject, [Example(ids, ids)] * 4, progress=False, **options)
        found.append(sum(log))
    leave_group(rank, folder, found)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_what_ranks_of_a_split_model_hold_and_are_sent_is_what_is_said(folder, tmp_path, world):
    jobs = [{"keep_top": 0.25}, {"keep_top": 0.25, "target_modules": "all"}, {}]
    worker = partial(received_in_a_team, model=folder, world=world, jobs=jobs)
    for held, *taken in run_ranks(worker, tmp_path, world):
        for options, received in zip(jobs, taken, strict=True):
            asked = {"keep_top": 1} | options
            found = fastdean.estimate(
                folder,
                **{"examples": 4, "tokens_per_example": 20, **asked, "tensor_parallel": 2},
                **GPU | {"gpus": world},
            )
            assert held == found.memory["weights"]
            said = found.orders["batches"].received
            # Beside these what ranks tell each other of batches, losses and fingerprints.
            parts = sum(said.get(kind, 0) for kind in ("sums", "candidates"))
            assert parts <= received < 1.1 * parts + 4000, (options, said)


def received_by_a_rank(rank, folder, model, jobs):
    """What the collectives of a scoring give a rank that is others' own, of each job."""
    join_group(rank, folder)
    log = log_of_received(rank)
    found = []
    for options in jobs:
        log.clear()
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(model)
        subject = AutoModelForCausalLM.from_config(config).eval()
        ids = torch.arange(3, 23)
        examples = [Example(ids, ids)] * 4
        fastdean.score(subject, examples, progress=False, **options)
        found.append(sum(log))
    leave_group(rank, folder, found)


def test_what_ranks_receive_is_what_they_are_sent(folder, tmp_path):
    """Sums of others once for the top entries, with theirs; of dense sums and units twice."""
    jobs = [
        {"keep_top": 0.01, "order": "batches"},
        {"keep_top": 0.01, "order": "layers", "deterministic": True},
        {"order": "layers"},
        {"granularity": "unit", "order": "batches"},
    ]
    worker = partial(received_by_a_rank, model=folder, jobs=jobs)
    taken = run_ranks(worker, tmp_path)
    for options, of_rank_0, of_rank_1 in zip(jobs, *taken, strict=True):
        asked = {"keep_top": 1} | {k: v for k, v in options.items() if k != "order"}
        order = options["order"]
        estimate = fastdean.estimate(
            folder, examples=4, tokens_per_example=20, **asked, **GPU | {"gpus": 2}
        )
        assert sum(estimate.orders[order].received.values()) == of_rank_0 == of_rank_1, options


def test_blocks_have_batches_and_sums_of_their_own(folder):
    """deterministic: 16 blocks, of which a rank holds a sum at each level of their tree."""
    asked = JOB | {"examples": 32, "keep_top": 0.1}
    plain = fastdean.estimate(folder, **asked, **GPU)
    for ranks, sums in ((1, 5), (2, 4), (4, 3), (16, 1), (3, 1)):
        found = fastdean.estimate(folder, **asked, **GPU | {"gpus": ranks}, deterministic=True)
        for name, times in (("batches", sums), ("layers", sums)):
            assert found.orders[name].parts["sums"] == times * plain.orders[name].parts["sums"]
        blocks = 16 // ranks if ranks != 3 else 1
        # Two examples a block are one batch; eleven of a rank of three are six.
        assert found.work["batches_of_a_rank"] == (blocks if ranks != 3 else 6)
    dense = fastdean.estimate(folder, **asked | {"keep_top": 1}, **GPU, deterministic=True)
    every = dense.memory["sums"]
    assert dense.orders["batches"].parts["sums"] == every + 4 * every
    assert dense.orders["layers"].parts["sums"] == every + 4 * every // L
    with pytest.raises(ValueError, match="memory_budget must hold the sums of at least one"):
        least = 4 * H * U
        fastdean.estimate(folder, **asked, **GPU, deterministic=True, memory_budget=least)


def test_states_go_where_there_is_room(folder):
    roomy = fastdean.estimate(folder, **JOB, **GPU).orders["layers"]
    need = roomy.peak_bytes - roomy.parts["states"]
    tight = fastdean.estimate(folder, **JOB, gpu_memory=need + 1000).orders["layers"]
    assert tight.fits and tight.peak_bytes == need + 1000
    assert tight.states["device"] == 1000
    assert sum(tight.states.values()) == sum(roomy.states.values())
    small = fastdean.estimate(folder, **JOB, gpu_memory=need // 2)
    assert not small.orders["batches"].fits
    assert str(small).startswith("Nothing fits into") or "too large" in small.verdict


def test_dense_scores_of_all_sets_stay(folder):
    dense = fastdean.estimate(folder, **JOB, **GPU, keep_top=1, sets=3)
    assert dense.orders["batches"].parts["sums"] == 3 * dense.memory["sums"]
    assert dense.orders["layers"].parts["sums"] == 3 * dense.memory["sums"]
    assert "layers, streamed" not in dense.orders
    # As `score` takes it.
    as_score = fastdean.estimate(folder, **JOB, **GPU, keep_top=None, sets=3)
    assert as_score.orders == dense.orders and as_score.notes == dense.notes


def test_float16_has_the_orders_and_sizes_of_bfloat16(folder):
    found, same = (
        fastdean.estimate(folder, **JOB, **GPU, dtype=dtype) for dtype in ("fp16", "bf16")
    )
    assert list(found.orders) == ["batches", "layers", "layers, streamed"]
    assert found.orders == same.orders and found.notes == same.notes


def test_units_and_other_dtypes(folder):
    units = fastdean.estimate(folder, **JOB, **GPU, granularity="unit", dtype="bf16")
    assert units.model["dtype"] == "bfloat16" and units.memory["sums"] == L * U * 4
    assert units.orders["batches"].operations["importance"] == 2 * 600 * L * U


def test_stacked_experts_count_as_they_are_used(tmp_path):
    config = {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
    folder = folder_of(tmp_path / "experts", **config)
    found = fastdean.estimate(folder, **JOB, **GPU, target_modules="self_attn")
    attention, router = 2 * H * H + 2 * H * K, 8 * H
    # Of eight experts a token goes through two; attention's pairs as ever.
    forward = found.orders["layers"].operations["recomputed_forward"]
    used = 2 * 3 * H * U
    assert forward == 2 * 600 * L * (attention + router + used) + 4 * 6 * 100 * 100 * L * H


@pytest.mark.parametrize("on_cpu", [False, True])
def test_the_trial_has_the_gradient_of_one_expert(on_cpu):
    memory = ModelMemory((), 0, 0, 0, 0, 2, 0, 0, 0, 0, False, 0, itemsize=2, chosen=1)
    stack, rows = torch.empty((64, 128, H), dtype=torch.bfloat16), Rows(4, 2, 4, longest=4)
    parts = memory.trial(rows, [stack], 0, on_cpu=on_cpu).parts
    # In bf16 and looked at in fp32; on a CPU each of the experts that 8 tokens reach leaves a hole.
    expected = 8 * 2 * 128 * H if on_cpu else (2 + 4) * 128 * H
    assert parts["gradients of weights"] == expected


@pytest.mark.parametrize(("units", "told"), [(512, False), (8, True)])
def test_a_share_that_is_no_percent_is_not_told(tmp_path, units, told):
    config = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    config |= {"num_local_experts": 8, "num_experts_per_tok": 1, "intermediate_size": units}
    found = fastdean.estimate(folder_of(tmp_path / "experts", **CONFIG | config), **JOB, **GPU)
    notes = [note for note in found.notes if "not scored" in note]
    assert len(notes) == told and not any(note.startswith("0%") for note in notes)
    assert all("such as model.layers.0.mlp.gate.weight" in note for note in notes)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"examples": 0}, "examples must be at least 1, got 0"),
        ({"sets": 0}, "sets must be at least 1, got 0"),
        ({"tokens_per_example": 1}, "tokens_per_example must be at least 2, got 1"),
        ({"tokens_per_batch": 0}, "tokens_per_batch must be at least 1, got 0"),
        ({"keep_top": 0}, "keep_top must be"),
        ({"granularity": "head"}, "granularity must be"),
        ({"dtype": "int4"}, "dtype must be one of"),
        ({"target_modules": "nothing_of_this"}, "target_modules must match"),
        ({"gpu_memory": "plenty"}, "gpu_memory must be a size above 0 such as 80GB, got 'plenty'"),
        ({"gpu_memory": "0GB"}, "gpu_memory must be a size above 0"),
        (
            {"gpu_memory": "80"},
            "gpu_memory must be a size with its unit, got '80', which",
        ),
        ({"gpu_memory": 141}, "gpu_memory must be a size with its unit, got '141'"),
        ({"gpus": 2}, "gpu_memory must come with gpus, got gpus=2 alone"),
        ({"flops": -1.0}, "flops must be a number above 0, got -1"),
        ({"flops": float("nan")}, "flops must be a number above 0, got nan"),
        ({"measure": True, "flops": 1e9}, "flops must be left out with measure=True"),
        ({"measure": True, **GPU}, "measure must be left out with gpu_memory"),
        ({"data": "rows.jsonl", "tokens_per_example": 9}, "tokens_per_example must be left out"),
    ],
)
def test_bad_input_is_refused_in_one_line(folder, asked, message):
    with pytest.raises(ValueError) as caught:
        fastdean.estimate(folder, **asked)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_sizes_as_people_write_them():
    sizes = {"80GB": 80e9, "16 GiB": 1 << 34, "1.5tb": 1.5e12, "1000b": 1000, "8e9": 8e9}
    assert {text: size_in_bytes(text) for text in sizes} == sizes


def called(*args):
    return CliRunner().invoke(cli.app, ["estimate", *map(str, args)])


def test_a_quantised_checkpoint_is_counted_as_it_is_loaded_and_said_to_be_one(tmp_path):
    asked = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    found = fastdean.estimate(folder_of(tmp_path / "model", **asked), **JOB, **GPU)
    whole = fastdean.estimate(folder_of(tmp_path / "model"), **JOB, **GPU)
    assert found.memory == whole.memory
    (told,) = [note for note in found.notes if note not in whole.notes]
    assert told.startswith("The checkpoint's weights are quantised (gptq), and counted in float32")


def test_a_configuration_that_cannot_be_read_is_refused_with_the_reason(tmp_path):
    place = folder_of(tmp_path / "model", num_hidden_layers="two")
    with pytest.raises(ValueError, match=r"field 'num_hidden_layers': .*expected int, got str"):
        fastdean.estimate(place, **JOB, **GPU)


def test_the_command_prints_a_table_or_json(folder):
    args = ("--model", folder, "--examples", 6, "--tokens-per-example", 10, "--gpu-memory", "1GB")
    result = called(*args, "--json")
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert set(printed) == {"model", "targets", "work", "machine", "memory", "orders", "notes"}
    assert list(printed["orders"]) == ["batches", "layers", "layers, streamed"]
    fields = {"order", "weights", "fits", "peak_bytes", "moment", "parts", "states", "operations"}
    fields |= {"weights_read_bytes", "files_read_bytes", "seconds", "passes", "received"}
    assert all(set(each) == fields for each in printed["orders"].values())
    assert (
        printed
        == fastdean.estimate(folder, examples=6, tokens_per_example=10, gpu_memory="1GB").to_dict()
    )
    assert result.stderr.splitlines()[0].startswith("Into 1.0 GB of GPU memory fit: ")


def test_one_of_a_thing_is_told_as_one(tmp_path):
    small = folder_of(tmp_path / "small", num_hidden_layers=1)
    asked = {"sets": 1, "examples": 1, "tokens_per_example": 100, "target_modules": "up_proj"}
    said = str(fastdean.estimate(small, **asked))
    assert "1 layer; 1 matrix scored" in said
    assert "1 x 1 example a rank, 100 tokens in 1 batch of at most 100." in said
    asked["target_modules"] = "input_layernorm.weight"
    assert "1 parameter is scored by example" in str(fastdean.estimate(small, **asked))


def test_the_disks_time_is_only_spoken_of_where_time_was_asked_for(folder):
    note = "Reading files takes the disk's time, which is in no figure."
    assert note not in fastdean.estimate(folder, **JOB).notes
    assert note in fastdean.estimate(folder, **JOB, **GPU, flops=1e12, bandwidth=1e12).notes


def test_a_configuration_that_cannot_run_is_told_by_name(tmp_path):
    odd = fastdean.estimate(folder_of(tmp_path / "odd", num_key_value_heads=3), **JOB)
    (said,) = [note for note in odd.notes if "num_key_value_heads" in note]
    assert "num_key_value_heads (3) does not divide its num_attention_heads (4)" in said
    for keys in (1, 2, 4):
        fine = fastdean.estimate(folder_of(tmp_path / "fine", num_key_value_heads=keys), **JOB)
        assert not any("num_key_value_heads" in note for note in fine.notes)
    with pytest.raises(
        ValueError, match="^model must be .*: its vocab_size must be at least 1, got 0"
    ):
        fastdean.estimate(folder_of(tmp_path / "mute", vocab_size=0), **JOB)


def test_a_budget_divides_the_sums_into_passes(folder):
    whole = fastdean.estimate(folder, **JOB, **GPU)
    matrix = 4 * H * U
    found = fastdean.estimate(folder, **JOB, **GPU, memory_budget=2 * matrix)
    by_batches, before = found.orders["batches"], whole.orders["batches"]
    # Three matrices of each of two layers, two at a time.
    assert (by_batches.passes, by_batches.parts["sums"]) == (3, 2 * matrix)
    for part, times in {"forward": 3, "backward": 3, "importance": 1}.items():
        assert by_batches.operations[part] == times * before.operations[part]
    assert by_batches.weights_read_bytes == 3 * before.weights_read_bytes
    assert before.passes == 1 and "passes" not in str(whole) and "\npasses " in str(found)
    # What a window holds of a batch is more than that.
    assert list(found.orders) == ["batches"]
    assert found.notes[0].startswith("Not layers: memory_budget must be at least ")
    least = int(found.notes[0].split("at least ")[1].split(" ")[0].replace(",", ""))
    found = fastdean.estimate(folder, **JOB, **GPU, memory_budget=least)
    by_layers, before = found.orders["layers"], whole.orders["layers"]
    assert (by_layers.passes, by_layers.parts["sums"]) == (3, matrix)
    assert by_layers.operations["recomputed_forward"] == pytest.approx(
        3 * before.operations["recomputed_forward"]
    )
    assert by_layers.operations["forward"] == before.operations["forward"]


def test_a_budget_that_holds_no_matrix_is_refused_as_score_does(folder):
    with pytest.raises(ValueError, match="memory_budget must hold the sums of at least one matrix"):
        fastdean.estimate(folder, **JOB, **GPU, memory_budget=100)
    result = called("--model", folder, "--memory-budget", 1e-7)
    assert result.exit_code == 2
    assert result.stderr.startswith("fastdean: --memory-budget must hold the sums of at least one")


def test_what_fits_barely_is_told_with_what_is_left(folder):
    roomy = fastdean.estimate(folder, **JOB, **GPU)
    assert " left" not in roomy.verdict
    peak = roomy.orders["batches"].peak_bytes
    barely = fastdean.estimate(folder, **JOB, gpu_memory=peak + 1000)
    assert "0 MB left, and it may be 10% more)" in barely.verdict
    need = roomy.orders["layers"].peak_bytes - roomy.orders["layers"].parts["states"]
    full = fastdean.estimate(folder, **JOB, gpu_memory=need + 1000)
    assert ", no room left: 0 MB of states go to host or files)" in full.verdict


def test_the_table_names_its_rows_apart_and_the_moments_of_its_columns(folder):
    lines = str(fastdean.estimate(folder, **JOB, **GPU)).splitlines()
    names = [line[:24].split("  ")[0].strip() or line[:24].strip() for line in lines[4:]]
    rows = [name for name in names if name in ("states", "all states", "sums", "weights")]
    assert len(rows) == len(set(rows)) and {"states", "all states"} <= set(rows)
    (moments,) = (line for line in lines if line.startswith("Each column has the parts of its own"))
    assert '"batches": a batch turns from forward to backward' in moments
    assert '"layers" and "layers, streamed": layer 1 backward' in moments


def test_rows_of_text_without_a_tokenizer_blame_the_tokenizer(folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    result = called("--model", folder, "--data", rows)
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("fastdean: --model must come with its tokenizer's files where")


def test_the_command_refuses_by_flag(folder):
    result = called("--model", folder, "--gpus", 2)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("fastdean: --gpu-memory must come with gpus")
    missing = called("--model", "./no-such-folder")
    assert missing.exit_code == 2 and len(missing.stderr.splitlines()) == 1


def test_scores_say_what_they_took(tmp_path):
    from tiny_data import batches, make_examples
    from tiny_models import llama

    scores = fastdean.score(llama(), batches(make_examples(), 4), keep_top=0.1, progress=False)
    # A process with torch loaded takes more than this.
    assert scores.manifest["costs"]["peak_memory"] > 50_000_000


# 0.5 GB of weights in fp32, so that Python and torch are no more than half of what a run takes.
_BIG = {
    "vocab_size": 24000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
_RUN = """
import json, sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM
import fastdean
from fastdean.data import Example

folder, order = sys.argv[1:]
torch.manual_seed(0)
ids = torch.randint(3, 20000, (8, 64))
examples = [Example(row, row.clone()) for row in ids]
if order == "layers, streamed":
    model, order = folder, "layers"
else:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
scores = fastdean.score(model, examples, keep_top=1e-3, order=order, progress=False)
print(json.dumps(scores.manifest["costs"]["peak_memory"]))
"""


def printed_by(*command):
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is told on Linux")
def test_what_processes_take_is_within_a_tenth(tmp_path):
    folder = folder_of(tmp_path / "big", **_BIG)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    asked = ("--examples", "8", "--tokens-per-example", "64", "--json")
    found = printed_by("-m", "fastdean", "estimate", "--model", folder, *asked)
    for name, each in found["orders"].items():
        taken = printed_by("-c", _RUN, folder, name)
        assert each["peak_bytes"] == pytest.approx(taken, rel=0.1), (name, each["parts"], taken)


# So many tokens that what layers return for them is most of what a job of the tiny model holds.
MANY = {"examples": 96, "tokens_per_example": 40, "tokens_per_batch": 80}


def held_by_a_rank(rank, folder, model, world):
    """The most bytes of tensors that a scoring made, and of them what layers returned."""
    join_group(rank, folder, world)
    torch.manual_seed(0)
    subject = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).eval()
    ids = torch.randint(3, V, (MANY["examples"], MANY["tokens_per_example"]))
    examples = [Example(row, row.clone()) for row in ids]
    options = {"keep_top": 1e-3, "order": "layers", "states": "device", "progress": False}
    with LiveBytes() as live:
        scores = fastdean.score(
            subject, examples, tokens_per_batch=MANY["tokens_per_batch"], **options
        )
    leave_group(rank, folder, (live.peak, sum(scores.manifest["order"]["states"].values())))


@pytest.mark.slow
def test_what_is_divided_falls_with_the_number_of_ranks(folder, tmp_path):
    peaks, states, expected = {}, {}, {}
    for world in (1, 2, 4):
        place = tmp_path / str(world)
        place.mkdir()
        worker = partial(held_by_a_rank, model=folder, world=world)
        found = run_ranks(worker, place, world)
        peaks[world], states[world] = (max(each) for each in zip(*found, strict=True))
        estimate = fastdean.estimate(folder, **MANY, **GPU | {"gpus": world})
        expected[world] = sum(estimate.orders["layers"].states.values())
    for world in (1, 2, 4):
        assert states[world] == pytest.approx(expected[world], rel=0.15), world
    for world in (2, 4):
        # All else is the same on any number of ranks.
        less = peaks[1] - peaks[world]
        assert less == pytest.approx(expected[1] - expected[world], rel=0.15), (world, peaks)


# 0.3 GB of weights in fp32.
_MIDDLE = {
    "vocab_size": 8000,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
_SOME = {"examples": 16, "tokens_per_example": 48, "tokens_per_batch": 192}


def told(field):
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (each for each in lines if each.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def forget_peak():
    """From here on the peak counts."""
    Path("/proc/self/clear_refs").write_text("5")


def some_rows():
    ids = torch.randint(3, 8000, (_SOME["examples"], _SOME["tokens_per_example"]))
    return [Example(row, row.clone()) for row in ids]


def scored_some(subject, order):
    options = {"keep_top": 1e-3, "order": order, "progress": False}
    fastdean.score(subject, some_rows(), tokens_per_batch=_SOME["tokens_per_batch"], **options)


def taken_by_a_rank(rank, folder, model, world):
    """The most bytes of memory that a rank took for a model and its scoring."""
    join_group(rank, folder, world)
    config = AutoConfig.from_pretrained(model)
    gc.collect()
    before = told("VmRSS")
    forget_peak()
    torch.manual_seed(0)
    scored_some(AutoModelForCausalLM.from_config(config), "batches")
    leave_group(rank, folder, told("VmHWM") - before)


def taken_of_a_sharded_model(rank, folder, model, world):
    """The same of a model that is sharded already, beside the libraries that this takes."""
    from torch.distributed.fsdp import fully_shard

    join_group(rank, folder, world)
    torch.manual_seed(0)

    def sharded(**changes):
        made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model, **changes))
        for layer in made.model.layers:
            fully_shard(layer)
        return fully_shard(made)

    scored_some(sharded(hidden_size=64, intermediate_size=96, head_dim=8), "layers")
    gc.collect()
    before = told("VmRSS")
    subject = sharded()
    forget_peak()
    scored_some(subject, "layers")
    leave_group(rank, folder, told("VmHWM") - before)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is told on Linux")
@pytest.mark.parametrize(
    ("world", "name", "taken"),
    [(world, "batches", taken_by_a_rank) for world in (1, 2, 4)]
    + [(world, "layers, sharded", taken_of_a_sharded_model) for world in (2, 4)],
)
def test_what_a_rank_takes_is_what_is_said_of_as_many_ranks(world, name, taken, tmp_path):
    model = folder_of(tmp_path / "middle", **_MIDDLE)
    found = fastdean.estimate(model, **_SOME, gpus=world, gpu_memory="80GB")
    expected = found.orders[name].peak_bytes
    for bytes_taken in run_ranks(partial(taken, model=model, world=world), tmp_path, world):
        assert bytes_taken == pytest.approx(expected, rel=0.15), (bytes_taken, expected)
