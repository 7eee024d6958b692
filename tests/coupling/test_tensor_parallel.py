"""A model that tensor parallel splits over ranks is scored and masked as a whole one.

The processes are started once; each goes through all situations, and the tests read what came out.
"""

from __future__ import annotations

import traceback

import pytest
import torch
from oracle import norm_error
from tiny_data import batches, make_examples
from tiny_experts import experts_model
from tiny_masks import mask_of
from tiny_models import llama, qwen2
from two_ranks import WORLD, join_group, leave_group, run_ranks

import fastdean
from fastdean.models.identity import weights_digest

EXAMPLES = make_examples(lengths=(3, 9, 17, 4, 12))
SMALL = {"keep_top": 0.05, "tokens_per_batch": 12, "progress": False}
MODELS = {"llama": llama, "qwen2": qwen2, "mixtral": lambda: experts_model("Mixtral")}


def score(model, **options):
    return fastdean.score(model, batches(EXAMPLES, 2), **{**SMALL, **options})


def plain(name):
    return MODELS.get(name, llama)()


def loaded(folder, name):
    """As transformers splits it, by its own plan."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(tp_size=WORLD)
    return AutoModelForCausalLM.from_pretrained(folder / name, distributed_config=config)


def by_torch(model, mesh, parts=("self_attn", "mlp"), head=None):
    """As users of torch split it; the head gathers its output unless it is placed otherwise."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    gathering = ColwiseParallel(output_layouts=head or Replicate())
    parallelize_module(model.lm_head, mesh, gathering)
    for layer in model.model.layers:
        plan = {
            **{f"self_attn.{n}_proj": ColwiseParallel() for n in "qkv"},
            "self_attn.o_proj": RowwiseParallel(),
            "mlp.gate_proj": ColwiseParallel(),
            "mlp.up_proj": ColwiseParallel(),
            "mlp.down_proj": RowwiseParallel(),
        }
        plan = {name: style for name, style in plan.items() if name.startswith(tuple(parts))}
        parallelize_module(layer, mesh, plan)
    return model


def mesh_of(world=WORLD):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (world,))


# Name of a situation: the model, and how it is scored.
SITUATIONS = {
    **{name: (name, {}) for name in MODELS},
    "attention": ("qwen2", {"target_modules": "all"}),
    "replicated": ("mlp alone", {"target_modules": "all"}),
    "replicated, dense": ("mlp alone", {"target_modules": "all", "keep_top": None}),
    "dense": ("llama", {"keep_top": None}),
    "dense experts": ("mixtral", {"keep_top": None}),
    "experts as one": ("mixtral", {"expert_scope": "tensor"}),
    "signs": ("mixtral", {"signs": True}),
    "in passes": ("mixtral", {"memory_budget": 24_000}),
    "units": ("llama", {"granularity": "unit", "keep_top": None}),
    "exact": ("llama", {"deterministic": True}),
    "by torch": ("by torch", {"target_modules": "all"}),
    "layers": ("llama", {"order": "layers"}),
    "layers of experts": ("mixtral", {"order": "layers"}),
}


def described(scores):
    return {
        "values": dict(scores),
        "entries": {
            name: (entry.index, entry.sums, entry.weight, entry.fingerprint, entry.signed)
            for name, entry in scores.entries.items()
        },
        "manifest": scores.manifest,
    }


def whole_weights(model):
    """By name, gathered by the tensors themselves."""
    return {
        name: getattr(weight, "full_tensor", lambda w=weight: w)().detach().clone()
        for name, weight in model.named_parameters()
    }


def same(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in found
    )


def message_of(call, *arguments, **options):
    try:
        call(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def logits(model):
    with torch.no_grad():
        return model(input_ids=EXAMPLES[2][0][None], use_cache=False).logits


def masked(model, make):
    """A mask of scores, on the split model and on a whole one: what is the same afterwards."""
    plain = make()
    original = whole_weights(plain)
    mask = fastdean.couple(score(model), score(model), ratio=0.04, model=model)
    expected = fastdean.couple(score(plain), score(plain), ratio=0.04)
    # On both sides of every border between ranks, and of packed matrices.
    places = {n: [0, w.numel() // 2 - 1, w.numel() // 2] for n, w in plain.named_parameters()}
    inner = mask_of(plain, places, scale=0.5)
    checks = {"masks": mask == expected, "digests": weights_digest(model) == weights_digest(plain)}
    mask.apply_(model), mask.apply_(plain)
    checks["applied"] = same(whole_weights(model), whole_weights(plain))
    checks["logits"] = norm_error(logits(model), logits(plain)) < 1e-5
    mask.restore_(model), mask.restore_(plain)
    with inner.applied(model), inner.applied(plain):
        checks["everywhere"] = same(whole_weights(model), whole_weights(plain))
    checks["restored"] = same(whole_weights(model), original)
    return checks


def refused(models):
    from torch.distributed.tensor import Shard

    llama_, mixtral = models["llama"], models["mixtral"]
    return {
        "parameters": message_of(score, llama_, target_modules=["input_layernorm.weight"]),
        "resume": message_of(score, llama_, resume="job"),
        "half": message_of(score, by_torch(llama(), mesh_of(), head=Shard(-1))),
        "fp16": message_of(score, by_torch(llama().half(), mesh_of())),
        "unit weights": message_of(
            fastdean.couple,
            *[score(llama_, granularity="unit", keep_top=None)] * 2,
            ratio=0.1,
            model=llama_,
            unit_weights="all",
        ),
        "budget": message_of(score, mixtral, memory_budget=100),
    }


def scored(model, options):
    return described(score(model, **options))


def attempt(call, *arguments):
    try:
        return call(*arguments)
    except Exception:
        return traceback.format_exc()


def worker(rank, folder):
    join_group(rank, folder)
    models = {name: loaded(folder, name) for name in MODELS}
    models["by torch"] = by_torch(llama(), mesh_of())
    models["mlp alone"] = by_torch(llama(), mesh_of(), ["mlp"])
    found = {
        name: attempt(scored, models[model], options)
        for name, (model, options) in SITUATIONS.items()
    }
    found["masked"] = {n: attempt(masked, models[n], make) for n, make in MODELS.items()}
    found["refused"] = attempt(refused, models)
    leave_group(rank, folder, found)


def saved_models(folder):
    for name, make in MODELS.items():
        make().save_pretrained(folder / name)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank found in each situation."""
    folder = tmp_path_factory.mktemp("ranks")
    saved_models(folder)
    return run_ranks(worker, folder)


def require_same(result, alone):
    assert not isinstance(result, str), result
    assert result["manifest"]["data"] == alone.manifest["data"]
    assert result["manifest"].get("expert_load") == alone.manifest.get("expert_load")
    assert list(result["values"]) == list(alone)
    for name, entry in alone.entries.items():
        index, sums, weight, fingerprint, signed = result["entries"][name]
        assert norm_error(sums, entry.sums) < 1e-5
        assert (index is None) == (entry.index is None)
        assert index is None or torch.equal(index, entry.index)
        assert fingerprint == entry.fingerprint
        assert entry.unit_axis is not None or torch.equal(weight, entry.weight)
        assert entry.signed is None or norm_error(signed, entry.signed) < 1e-5


@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_split_model_has_the_scores_of_a_whole_one(found, situation):
    model, options = SITUATIONS[situation]
    alone = score(plain(model), **options)
    for rank in range(WORLD):
        require_same(found[rank][situation], alone)


@pytest.mark.parametrize("name", MODELS)
def test_a_mask_edits_a_split_model_as_a_whole_one(found, name):
    for rank in range(WORLD):
        result = found[rank]["masked"][name]
        assert not isinstance(result, str), result
        assert result == dict.fromkeys(result, True)


@pytest.mark.parametrize(
    "how, text",
    [
        ("parameters", "ValueError: target_modules must match matrices of Linear layers or exper"),
        ("resume", "ValueError: resume must be left out for a model that tensor parallel splits"),
        ("half", "ValueError: model must return the logits of its whole vocabulary on every rank"),
        ("fp16", "ValueError: model must not compute in float16 where tensor parallel splits it"),
        ("unit weights", "it is sharded over ranks, and no rank has its weights to try; use unit_"),
        ("budget", "ValueError: memory_budget must hold the sums of at least one matrix"),
    ],
)
def test_what_a_split_model_cannot_be_is_refused_by_name(found, how, text):
    for rank in range(WORLD):
        assert not isinstance(found[rank]["refused"], str), found[rank]["refused"]
        assert text in found[rank]["refused"][how]
