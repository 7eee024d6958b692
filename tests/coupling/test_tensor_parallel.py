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
from tiny_split import by_torch
from two_ranks import WORLD, join_group, leave_group, run_ranks

import fastdean
from fastdean.coupling.layers.states import States
from fastdean.coupling.resuming import resumable
from fastdean.coupling.resuming.resumable import Resumable
from fastdean.models.identity import weights_digest

EXAMPLES = make_examples(lengths=(3, 9, 17, 4, 12))
SMALL = {"keep_top": 0.05, "tokens_per_batch": 12, "progress": False}


def owned():
    """As many experts on each of two ranks."""
    return experts_model("Mixtral", num_local_experts=4)


def narrow(units=7):
    """Units that four ranks do not share evenly."""
    config = llama().config
    config.intermediate_size = units
    torch.manual_seed(0)
    return type(llama())(config).eval()


def phi3():
    """Packed projections, whose output is gathered."""
    from transformers import Phi3Config, Phi3ForCausalLM

    sizes = llama().config.to_dict()
    taken = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    heads = (
        "num_attention_heads",
        "num_key_value_heads",
        "pad_token_id",
        "max_position_embeddings",
    )
    config = Phi3Config(**{name: sizes[name] for name in (*taken, *heads)})
    torch.manual_seed(0)
    return Phi3ForCausalLM(config).eval()


MODELS = {"llama": llama, "qwen2": qwen2, "mixtral": lambda: experts_model("Mixtral")}
# Norms of the heads that a rank has; latent attention, with shared experts.
FURTHER_MODELS = {
    "phi3": phi3,
    "qwen3": lambda: experts_model("Qwen3Moe"),
    "deepseek": lambda: experts_model("DeepseekV3"),
}


def score(model, **options):
    return fastdean.score(model, batches(EXAMPLES, 2), **{**SMALL, **options})


OTHERS = {"by torch": llama, "mlp alone": llama, "owners": owned, "sent": owned, "narrow": narrow}


def plain(name):
    return (MODELS | FURTHER_MODELS | OTHERS)[name]()


def loaded(folder, name, **options):
    """As transformers splits it, by its own plan."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(tp_size=WORLD, **options)
    return AutoModelForCausalLM.from_pretrained(folder / name, distributed_config=config)


def mesh_of(world=WORLD):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (world,))


# Name of a situation: the model, and how it is scored.
SITUATIONS = {
    "llama": ("llama", {}),
    "mixtral": ("mixtral", {"signs": True}),
    "replicated": ("mlp alone", {"target_modules": "all"}),
    "by torch": ("by torch", {"target_modules": "all"}),
    "owners": ("owners", {}),
    "layers of owners": ("owners", {"order": "layers"}),
}
FURTHER = {
    "qwen2": ("qwen2", {"target_modules": "all"}),
    "phi3": ("phi3", {"target_modules": "all"}),
    "qwen3": ("qwen3", {"target_modules": "all"}),
    "deepseek": ("deepseek", {}),
    "replicated, dense": ("mlp alone", {"target_modules": "all", "keep_top": None}),
    "dense": ("llama", {"keep_top": None}),
    "dense experts": ("mixtral", {"keep_top": None}),
    "experts as one": ("mixtral", {"expert_scope": "tensor"}),
    "in passes": ("mixtral", {"memory_budget": 24_000}),
    "units": ("llama", {"granularity": "unit", "keep_top": None}),
    "exact": ("llama", {"deterministic": True}),
    "tokens are sent": ("sent", {}),
    "owners, dense": ("owners", {"keep_top": None, "signs": True}),
    "owners, as one": ("owners", {"expert_scope": "tensor"}),
    "layers": ("llama", {"order": "layers"}),
    "layers in passes": ("mixtral", {"order": "layers", "memory_budget": 150_000}),
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
    of_split, of_whole = score(model), score(plain)
    mask = fastdean.couple(of_split, of_split, ratio=0.04, model=model)
    expected = fastdean.couple(of_whole, of_whole, ratio=0.04)
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
        "resume": message_of(score, llama_, resume="job", keep_top=None),
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


def resumed(rank, folder, model, other):
    """A job that stops in the second layer, of whose batches rank 0 has noted more than rank 1."""
    done, said = Resumable.batch_done, []

    def stopping(job, step, batches):
        done(job, step, batches)
        if (step, batches) == (1, 2):
            raise OSError("disk of all")

    options = {"resume": folder / "job", "signs": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resumable, "_SECONDS", 1e9 if rank else -1.0)
        patch.setattr(Resumable, "write_down", lambda job: None) if rank else None
        patch.setattr(Resumable, "batch_done", stopping)
        said.append(message_of(score, model, **options))
    said += [message_of(score, each, **options) for each in other]
    ran, keep = [], States.keep

    def kept(states, layer, batch, returned):
        ran.append((layer, batch))
        keep(states, layer, batch, returned)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(States, "keep", kept)
        scores = score(model, **options)
    undisturbed = score(model, order="layers", signs=True)
    return {
        **{"said": said, "ran": ran, "left": (folder / "job").exists()},
        **{"scores": described(scores), "undisturbed": described(undisturbed)},
    }


def scored(model, options):
    return described(score(model, **options))


def attempt(call, *arguments):
    try:
        return call(*arguments)
    except Exception:
        return traceback.format_exc()


def split_models(folder):
    models = {name: loaded(folder, name) for name in MODELS}
    models["owners"] = loaded(folder, "owners", ep_size=WORLD)
    models["by torch"] = by_torch(llama(), mesh_of())
    models["mlp alone"] = by_torch(llama(), mesh_of(), ["mlp"])
    return models


def worker(rank, folder):
    join_group(rank, folder)
    models = split_models(folder)
    found = {name: attempt(scored, models[of], how) for name, (of, how) in SITUATIONS.items()}
    found["masked"] = {"mixtral": attempt(masked, models["mixtral"], MODELS["mixtral"])}
    found["refused"] = attempt(refused, models)
    other = [llama(), by_torch(llama(), mesh_of(), ["mlp"])]
    found["resumed"] = attempt(resumed, rank, folder, models["by torch"], other)
    leave_group(rank, folder, found)


def further(rank, folder):
    join_group(rank, folder)
    models = split_models(folder) | {name: loaded(folder, name) for name in FURTHER_MODELS}
    models["sent"] = loaded(folder, "owners", ep_size=WORLD, ep_implementation="all_to_all")
    found = {name: attempt(scored, models[of], how) for name, (of, how) in FURTHER.items()}
    makes = {"llama": llama, "phi3": phi3, "owners": owned}
    found["masked"] = {name: attempt(masked, models[name], make) for name, make in makes.items()}
    leave_group(rank, folder, found)


def saved_models(folder):
    for name in (*MODELS, *FURTHER_MODELS, "owners"):
        plain(name).save_pretrained(folder / name)


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


def require_masked(result):
    assert not isinstance(result, str), result
    assert result == dict.fromkeys(result, True)


@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_split_model_has_the_scores_of_a_whole_one(found, situation):
    model, options = SITUATIONS[situation]
    alone = score(plain(model), **options)
    for rank in range(WORLD):
        require_same(found[rank][situation], alone)


def test_a_mask_edits_a_split_model_as_a_whole_one(found):
    for rank in range(WORLD):
        require_masked(found[rank]["masked"]["mixtral"])


def test_a_job_goes_on_from_the_batch_that_both_ranks_have_been_through(found):
    for rank in range(WORLD):
        result = found[rank]["resumed"]
        assert not isinstance(result, str), result
        stopped, whole, otherwise = result["said"]
        assert stopped == "OSError: disk of all"
        assert "resume must be a folder of this job" in whole
        assert "differs in how tensor parallel splits it, ranks that hold a model tog" in whole
        assert "differs in how tensor parallel splits it;" in otherwise
        # Rank 0 has noted two batches of the second layer, rank 1 none. The last is rehearsed.
        batches = max(batch for _, batch in result["ran"])
        assert result["ran"] == [(1, batch) for batch in range(batches + 1)] and batches > 2
        assert not result["left"]
        for name, entry in result["undisturbed"]["entries"].items():
            for one, other in zip(result["scores"]["entries"][name], entry, strict=True):
                assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


@pytest.mark.slow
def test_other_models_and_ways_to_score_them(tmp_path):
    saved_models(tmp_path)
    ranks = run_ranks(further, tmp_path)
    for name, (model, options) in FURTHER.items():
        alone = score(plain(model), **options)
        for found in ranks:
            require_same(found[name], alone)
    for found in ranks:
        for result in found["masked"].values():
            require_masked(result)


@pytest.mark.parametrize(
    "how, text",
    [
        ("parameters", "ValueError: target_modules must match matrices of Linear layers or exper"),
        ("resume", "ValueError: keep_top must be given with resume for a model that tensor par"),
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


def of_transformers(model, mesh, parts="model.layers"):
    """The layers split as transformers does it on loading, over a mesh of one's own."""
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    plan = model._expand_parallel_plan(dict(model.tp_plan))
    plan = {name: style for name, style in plan.items() if parts in name}
    return apply_tensor_parallelism(model, mesh, plan)


def four_ranks(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh

    join_group(rank, folder, world=4)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))["tp"]
    models = {name: (of_transformers(make(), mesh), make) for name, make in MODELS.items()}
    models["by torch"] = by_torch(llama(), mesh), llama
    # The last rank has a smaller block than the others.
    models["narrow"] = of_transformers(narrow(), mesh_of(4), "mlp"), narrow
    found = {}
    for name, (model, make) in models.items():
        found[name] = {
            **{of: attempt(scored, model, options) for of, options in IN_TEAMS.items()},
            "masked": attempt(masked, model, make),
        }
    uneven, _ = models["narrow"]
    empty = of_transformers(narrow(6), mesh_of(4), "mlp")
    found["refused"] = [
        message_of(score, uneven, memory_budget=10_000),
        message_of(score, empty),
    ]
    leave_group(rank, folder, found)


IN_TEAMS = {
    "kept": {},
    "dense": {"keep_top": None, "target_modules": "all"},
    "exact": {"deterministic": True, "signs": True},
    "layers": {"order": "layers"},
}


@pytest.mark.slow
def test_teams_of_ranks_share_the_examples(tmp_path):
    """Four ranks hold a model twice."""
    ranks = run_ranks(four_ranks, tmp_path, world=4)
    refused = [found.pop("refused") for found in ranks]
    for budget, _ in refused:
        assert "memory_budget must be left out where tensor parallel splits weights une" in budget
    assert "got one with nothing of model.layers.0.mlp.gate_proj.weight" in refused[3][1]
    assert "got 1 of 4 that failed" in refused[0][1]
    for name in ranks[0]:
        alone = {of: score(plain(name), **options) for of, options in IN_TEAMS.items()}
        for found in ranks:
            for of, scores in alone.items():
                require_same(found[name][of], scores)
            require_masked(found[name]["masked"])
