"""A model that tensor parallel splits and FSDP2 shards is scored and masked as a whole one.

Four ranks, of which two hold a model together. The processes are started once for each test.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from test_tensor_parallel import (
    IN_TEAMS,
    MODELS,
    attempt,
    described,
    masked,
    message_of,
    narrow,
    of_transformers,
    owned,
    require_masked,
    require_same,
    same,
    score,
    scored,
    whole_weights,
)
from tiny_masks import mask_of
from tiny_models import llama
from tiny_split import by_torch
from two_ranks import join_group, leave_group, run_ranks

import fastdean
from fastdean.coupling.resuming.resumable import Resumable
from fastdean.models.ranks.shards import own_places

RANKS = 4


def in_two_ways(model, mesh, split=by_torch, **options):
    """As torchtitan and transformers do it: the plan first, then each layer, then the model."""
    from torch.distributed.fsdp import fully_shard

    split(model, mesh["tp"])
    across = mesh[tuple(name for name in mesh.mesh_dim_names if name != "tp")]
    for layer in model.model.layers:
        fully_shard(layer, mesh=across, **options)
    return fully_shard(model, mesh=across, **options)


def mesh_of(*sizes, names=("dp", "tp")):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def chunk(places, parts, number):
    chunks = places.chunk(parts)
    return chunks[number] if number < len(chunks) else places[:0]


def test_blocks_lie_where_fsdp_puts_them():
    """On every rank of meshes of up to 18, also of axes that they do not share evenly."""
    for number, dp, tp in itertools.product(range(1, 18), (1, 2, 3, 6), (2, 3)):
        for rank in range(dp * tp):
            of_dp, of_tp = divmod(rank, tp)
            split = chunk(torch.arange(number), tp, of_tp)
            found = own_places(number, [dp, tp], [tp, 1], [of_dp, of_tp])
            assert torch.equal(found, chunk(split, dp, of_dp))
            # Two matrices that are packed into one, of each of which a rank has a part.
            halves = torch.arange(2 * number).chunk(2)
            split = torch.cat([chunk(half, tp, of_tp) for half in halves])
            assert torch.equal(own_places(2 * number, [tp], [2], [of_tp]), split)
            if dp > 1:
                found = own_places(2 * number, [dp, tp], [tp, 2], [of_dp, of_tp])
                assert torch.equal(found, chunk(split, dp, of_dp))


def two_by_two(rank, folder):
    join_group(rank, folder, world=RANKS)
    model = in_two_ways(llama(), mesh_of(2, 2))
    scores = score(model)
    mask = fastdean.couple(scores, scores, ratio=0.04)
    mask.apply_(model)
    edited = whole_weights(model)
    mask.restore_(model)
    found = {"scores": described(scores), "edited": edited, "restored": whole_weights(model)}
    leave_group(rank, folder, found)


def test_a_model_on_a_mesh_of_two_dimensions_is_scored_and_masked_as_a_whole_one(tmp_path):
    ranks = run_ranks(two_by_two, tmp_path, world=RANKS)
    model = llama()
    alone = score(model)
    original = whole_weights(model)
    fastdean.couple(alone, alone, ratio=0.04).apply_(model)
    for found in ranks:
        require_same(found["scores"], alone)
        assert found["scores"]["manifest"]["order"]["by"] == "layers"
        assert same(found["edited"], whole_weights(model))
        assert same(found["restored"], original)


WAYS = {
    **IN_TEAMS,
    "units": {"granularity": "unit", "keep_top": None},
    "in passes": {"order": "layers", "memory_budget": 150_000},
}
SPLIT = {name: (make, of_transformers) for name, make in MODELS.items()} | {
    "by torch": (llama, by_torch),
    "narrow": (narrow, of_transformers),
}


def ways_of(name):
    left_out = {"mixtral": "units", "narrow": "in passes"}.get(name)
    return {of: options for of, options in WAYS.items() if of != left_out}


def every_way(rank, folder):
    join_group(rank, folder, world=RANKS)
    mesh, found = mesh_of(2, 2), {}
    for name, (make, split) in SPLIT.items():
        model = in_two_ways(make(), mesh, split)
        found[name] = {
            **{of: attempt(scored, model, options) for of, options in ways_of(name).items()},
            "masked": attempt(masked, model, make),
        }
    leave_group(rank, folder, found)


@pytest.mark.slow
def test_models_and_ways_to_score_them(tmp_path):
    ranks = run_ranks(every_way, tmp_path, world=RANKS)
    for name, (make, _) in SPLIT.items():
        alone = {of: score(make(), **options) for of, options in ways_of(name).items()}
        for found in ranks:
            for of, scores in alone.items():
                require_same(found[name][of], scores)
            require_masked(found[name]["masked"])


def loaded(folder, name, **options):
    """As transformers does both, by its own plans."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(**options)
    return AutoModelForCausalLM.from_pretrained(folder / name, distributed_config=config).eval()


LOADED = {
    "loaded": ("llama", {"tp_size": 2, "fsdp_size": 2}),
    "experts": ("mixtral", {"tp_size": 2, "fsdp_size": 2}),
    "owners": ("owners", {"tp_size": 2, "fsdp_size": 2, "ep_size": 2}),
}
MESHES = {
    "replicas": ((2, 1, 2), ("replicate", "shard", "tp")),
    "one replica": ((1, 2, 2), ("replicate", "shard", "tp")),
}


def saved(model):
    """What a user saves of an edited model."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    plain = llama()
    places = {n: [0, w.numel() // 2, w.numel() - 1] for n, w in plain.named_parameters()}
    mask = mask_of(plain, places)
    with mask.applied(model), mask.applied(plain):
        found = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        # On the first rank alone.
        return not found or same(found, plain.state_dict())


def resumed(rank, folder, model):
    """A job that stops when all but one rank have noted a step as done."""
    write, said = Resumable._write, []

    def noted(self, step, *arguments, **options):
        if rank == 1 and step == 3 and not said:
            raise OSError("disk of rank 1")
        write(self, step, *arguments, **options)

    options = {"resume": folder / "job"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Resumable, "_write", noted)
        said.append(message_of(score, model, **options))
        said.append(message_of(score, model, **options, signs=True))
        scores = scored(model, options)
    return {"said": said, "scores": scores, "left": (folder / "job").exists()}


def rounding(model, mesh):
    """Layers whose weights are fp32 and compute in bf16, in a model of fp32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    by_torch(model, mesh["tp"])
    dtypes = {"param_dtype": torch.bfloat16, "output_dtype": torch.float32}
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["dp"], mp_policy=MixedPrecisionPolicy(**dtypes))
    return fully_shard(model, mesh=mesh["dp"])


def further(rank, folder):
    join_group(rank, folder, world=RANKS)
    mesh, found = mesh_of(2, 2), {}
    for name, (of, options) in LOADED.items():
        model = loaded(folder, of, **options)
        found[name] = attempt(scored, model, {})
        found[f"{name}, masked"] = attempt(masked, model, PLAIN[of])
    for name, (sizes, names) in MESHES.items():
        model = in_two_ways(llama(), mesh_of(*sizes, names=names))
        found[name] = attempt(scored, model, {})
        found[f"{name}, masked"] = attempt(masked, model, llama)
    model = in_two_ways(llama(), mesh)
    found["saved"] = attempt(saved, model)
    found["resumed"] = attempt(resumed, rank, folder, model)
    found["in bf16"] = attempt(scored, rounding(llama(), mesh), {"keep_top": None})
    found["refused"] = {
        "fp16": message_of(score, in_two_ways(llama().half(), mesh)),
        "batches": message_of(score, model, order="batches"),
        "resume": message_of(score, model, resume="job", keep_top=None),
        "parameters": message_of(score, model, target_modules=["input_layernorm.weight"]),
        **{name: attempt(of_owners, folder, sizes) for name, sizes in OWNERS.items()},
    }
    leave_group(rank, folder, found)


# Each owner of experts has examples of its own.
OWNERS = {
    "more owners": {"tp_size": 2, "fsdp_size": 2, "ep_size": 4},
    "owners alone": {"fsdp_size": 4, "ep_size": 4},
}


def of_owners(folder, sizes):
    return message_of(score, loaded(folder, "owners", **sizes))


PLAIN = {**MODELS, "owners": owned}


@pytest.mark.slow
def test_meshes_and_what_becomes_of_a_model(tmp_path):
    for name, make in PLAIN.items():
        make().save_pretrained(tmp_path / name)
    ranks = run_ranks(further, tmp_path, world=RANKS)
    for name in [*LOADED, *MESHES]:
        alone = score(PLAIN[LOADED.get(name, ("llama",))[0]]())
        for found in ranks:
            require_same(found[name], alone)
            require_masked(found[f"{name}, masked"])
    for rank, found in enumerate(ranks):
        assert found["saved"] is True
        result = found["resumed"]
        assert not isinstance(result, str), result
        assert ("disk of rank 1" if rank == 1 else "1 of 4 that failed") in result["said"][0]
        assert "differs in signs" in result["said"][1] and not result["left"]
        require_same(result["scores"], score(llama()))
        for how, text in REFUSED.items():
            assert text in found["refused"][how], (how, found["refused"][how])
    require_of_fp32([found["in bf16"] for found in ranks])


REFUSED = {
    "fp16": "ValueError: model must not compute in float16 where tensor parallel splits it",
    "batches": "ValueError: order must be 'layers' or 'auto' for a model sharded over ranks",
    "resume": "ValueError: keep_top must be given with resume for a model sharded over ranks",
    "parameters": "ValueError: model must hold plain tensors where their own gradient is taken",
    "more owners": "ranks where each 4 hold a model together; load it in one process",
    "owners alone": "ranks where each 4 hold a model together; load it in one process",
}


def require_of_fp32(results):
    """Scores of products in bf16, with the weights before the cast."""
    plain = llama()
    for result in results:
        assert not isinstance(result, str), result
        for name, (_, _, weight, _, _) in result["entries"].items():
            assert torch.equal(weight, plain.get_parameter(name).detach())
