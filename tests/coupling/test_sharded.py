"""A model that FSDP2 shards over ranks is scored and masked as a whole one, and stays sharded.

The processes are started once; each goes through all situations, and the tests read what came out.
"""

from __future__ import annotations

import itertools
import traceback
from dataclasses import replace

import pytest
import torch
from oracle import norm_error
from safetensors.torch import save_model
from tiny_data import batches, make_examples
from tiny_experts import experts_model
from tiny_masks import mask_of
from tiny_models import llama, qwen2
from torch import nn
from torch.utils._pytree import tree_map_only
from two_ranks import WORLD, join_group, leave_group, run_ranks

import fastdean
from fastdean.coupling import tried_sets
from fastdean.coupling.layers.by_layers import Sweep
from fastdean.coupling.resuming.resumable import Resumable
from fastdean.coupling.workloads.loss_scale import LossScale
from fastdean.models.identity import weights_digest
from fastdean.models.ranks.sharded import units_of
from fastdean.models.ranks.shards import shard_fault

EXAMPLES = make_examples(lengths=(3, 9, 17, 4, 12))
# Small batches, of which one rank has more than the other.
SMALL = {"keep_top": 0.05, "tokens_per_batch": 12, "progress": False}
MODELS = {"llama": llama, "qwen2": qwen2, "mixtral": lambda: experts_model("Mixtral")}


def loader(examples=EXAMPLES):
    return batches(examples, 2)


def sharded(model, **options):
    """As users do it: each layer, then the model."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return model


def in_small_units(model):
    """As accelerate and transformers do it, with parts of layers by themselves too."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer.mlp)
        fully_shard(layer)
    fully_shard(model.model.embed_tokens)
    fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False)
    fully_shard(model)
    return model


def in_pairs(model):
    """Layers that share a unit, whose hooks FSDP wraps."""
    from torch.distributed.fsdp import fully_shard

    fully_shard(list(model.model.layers))
    return fully_shard(model)


def as_one_unit(model):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model)


def of_two_kinds():
    model = llama()
    model.model.layers[1].mlp.act_fn = nn.GELU()
    return model


def token_loss(outputs, batch):
    log_probs = outputs.logits[:, :-1].log_softmax(-1)
    labels = batch["labels"][:, 1:]
    taken = -log_probs.gather(2, labels.clamp_min(0).unsqueeze(2)).squeeze(2)
    return (taken * (labels != -100)).sum(1)


def kept(model):
    return fastdean.score(model, loader(), **SMALL)


def dense(model):
    return fastdean.score(model, loader(), **{**SMALL, "keep_top": None})


def attention(model):
    return fastdean.score(model, loader(), target_modules="all", **SMALL)


def one_example(model):
    return fastdean.score(model, loader(EXAMPLES[:1]), **SMALL)


def in_passes(model):
    # The whole model does not go by layers of itself.
    return fastdean.score(model, loader(), order="layers", memory_budget=150_000, **SMALL)


def units(model):
    return fastdean.score(model, loader(), granularity="unit", **{**SMALL, "keep_top": None})


def own_loss(model):
    options = {"keep_top": 0.05, "progress": False}
    return fastdean.score(model, loader(), loss_fn=token_loss, **options)


def exact(model):
    return fastdean.score(model, loader(), deterministic=True, signs=True, **SMALL)


# Name of a situation: how the model is sharded, the model, how it is scored.
SITUATIONS = {
    "llama": (sharded, llama, kept),
    "qwen2": (sharded, qwen2, attention),
    "mixtral": (sharded, MODELS["mixtral"], kept),
    "dense": (sharded, llama, dense),
    "layers of two kinds": (sharded, of_two_kinds, kept),
    "small units": (in_small_units, llama, kept),
    "one unit": (as_one_unit, llama, kept),
    "one example": (sharded, llama, one_example),
    "in passes": (sharded, MODELS["mixtral"], in_passes),
    "units": (sharded, llama, units),
    "own loss": (sharded, llama, own_loss),
    "exact": (sharded, llama, exact),
}


def described(scores):
    return {
        "values": dict(scores),
        "entries": {
            name: (entry.index, entry.sums, entry.weight, entry.fingerprint)
            for name, entry in scores.entries.items()
        },
        "data": scores.manifest["data"],
        "order": scores.manifest["order"]["by"],
    }


def whole_weights(model):
    """By name, gathered by the tensors themselves."""
    for unit in units_of(model).values():
        unit.reshard()
    return {
        name: getattr(weight, "full_tensor", lambda w=weight: w)().detach().clone()
        for name, weight in model.named_parameters()
    }


def same(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(found[name].view(torch.uint8), expected[name].view(torch.uint8))
        for name in found
    )


def message_of(call, *arguments, **options):
    try:
        call(*arguments, **options)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def state_of(model):
    """What a job must leave as it was."""
    return [
        [(name, id(weight), weight.requires_grad) for name, weight in model.named_parameters()],
        [
            (list(m._forward_pre_hooks.items()), list(m._forward_hooks.items()), m.training)
            for m in model.modules()
        ],
        ["forward" in vars(module) for module in model.modules()],
    ]


def step(model):
    ids = EXAMPLES[2][0][None]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def gradients(model):
    return {name: weight.grad.full_tensor() for name, weight in model.named_parameters()}


def in_training(rank):
    """A model in the middle of a training, with hooks of a user's."""
    models, seen = [], []
    for scored in (True, False):
        model = sharded(llama()).train()
        model.lm_head.weight.requires_grad_(False)
        model.model.layers[0].register_forward_hook(lambda *given: seen.append(1))
        model.model.layers[0].register_forward_pre_hook(lambda *given: seen.append(0), prepend=True)
        model.lm_head.weight.requires_grad_(True)
        step(model)
        # Of these two, the gradients of the second wait in the weights that were gathered for it.
        model.set_requires_gradient_sync(False)
        step(model)
        model.set_requires_gradient_sync(True)
        whole_weights(model)
        before = state_of(model)
        if scored:
            scores = kept(model)
            is_left = state_of(model) == before
            ran = seen.count(0) > 3 and seen.count(1) > 3
        step(model)
        models.append(gradients(model))
    return {
        "left": is_left,
        "gradients": same(*models),
        "hooks ran": ran,
        "scores": described(scores),
    }


def after_forward(rank):
    """The root keeps its weights after a pass, and one that breaks off leaves more gathered."""
    model = sharded(llama(), reshard_after_forward=False)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        model(input_ids=EXAMPLES[0][0][None])
        found = [described(kept(model))]

        def broken(*given):
            raise OSError("of the user's")

        handle = model.model.layers[1].mlp.register_forward_hook(broken)
        message_of(model, input_ids=EXAMPLES[0][0][None])
        handle.remove()
    # To the parameters themselves, and not to what was gathered of them.
    mask, plain = mask_of(llama(), PLACES), llama()
    with mask.applied(model), mask.applied(plain):
        edited = {name: weight.full_tensor().detach() for name, weight in weights.items()}
        is_edited = same(edited, whole_weights(plain))
    return [*found, described(kept(model)), is_edited]


def failing(rank, error):
    model, backward = sharded(llama()), Sweep._backward_of_batch
    before = state_of(model)

    def broken(sweep, replay, k, b, *arguments, **options):
        if rank == 1 and k == 0:
            raise error("of rank 1")
        return backward(sweep, replay, k, b, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sweep, "_backward_of_batch", broken)
        said = message_of(kept, model)
    return {
        "said": said,
        "left": state_of(model) == before and gathered_bytes(model) == 0,
        "scores": described(kept(model)),
    }


def gathered_bytes(model):
    """Of weights that FSDP has whole in memory, by the storages that it keeps for them."""
    states = {unit._get_fsdp_state() for unit in units_of(model).values()}
    weights = [w for s in states for group in s._fsdp_param_groups for w in group.fsdp_params]
    outputs = [tensor for weight in weights for tensor in weight.all_gather_outputs]
    return sum(tensor.untyped_storage().nbytes() for tensor in outputs)


def in_memory(model):
    """The most bytes of whole weights while anything is computed, and which weights come in."""
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    most, came = [0], []
    names = {weight: name for name, weight in model.named_parameters()}
    linear, unshard = torch.nn.functional.linear, FSDPParamGroup.unshard

    def measured(*arguments):
        most[0] = max(most[0], gathered_bytes(model))
        return linear(*arguments)

    def noted(group, *arguments, **options):
        # Whoever asks for it: FSDP's own hooks do, for every call of a module.
        came.append(names[group.fsdp_params[0].sharded_param].partition(".self_attn")[0])
        return unshard(group, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", measured)
        patch.setattr(FSDPParamGroup, "unshard", noted)
        kept(model)
    return {"most": most[0], "came": came, "left": gathered_bytes(model)}


def in_bf16(rank):
    """Layers whose weights are fp32 and compute in bf16, in a model of fp32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    def rounding(model):
        dtypes = {"param_dtype": torch.bfloat16, "output_dtype": torch.float32}
        for layer in model.model.layers:
            fully_shard(layer, mp_policy=MixedPrecisionPolicy(**dtypes))
        return fully_shard(model)

    return {
        name: described(score(rounding(llama())))
        for name, score in (("dense", dense), ("kept", kept))
    }


def in_fp16(rank):
    """At scales that are far from those of the model's gradients: the trial runs one layer."""
    found, find = {}, tried_sets.find_scorable
    for exponent in (-20, 40):
        with pytest.MonkeyPatch.context() as patch:
            off = LossScale(exponent)
            patch.setattr(
                tried_sets, "find_scorable", lambda *args, off=off: replace(find(*args), scale=off)
            )
            found[exponent] = described(dense(sharded(llama().half())))
    return found


def digests(rank):
    return [weights_digest(sharded(make())) for make in (llama, MODELS["mixtral"])]


def tensor_parallel(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("dp", "tp"))
    parallelize_module(model.model.layers[0].mlp.up_proj, mesh["tp"], ColwiseParallel())
    return model, mesh


def refused(rank):
    from torch.distributed.device_mesh import init_device_mesh

    parts = init_device_mesh("cpu", (WORLD, 1), mesh_dim_names=("a", "b"))
    both, mesh = tensor_parallel(llama())
    sharded(both, mesh=mesh["dp"])
    models = {"part of the ranks": sharded(llama(), mesh=parts["b"])}
    mask = mask_of(llama(), {UP: [0]})
    model = sharded(llama())
    return {
        **{f"score, {name}": message_of(kept, each) for name, each in models.items()},
        **{f"mask, {name}": message_of(mask.apply_, each) for name, each in models.items()},
        "strided": shard_fault(both.get_parameter(UP), WORLD),
        "batches": message_of(fastdean.score, model, loader(), order="batches", keep_top=0.1),
        "resume": message_of(fastdean.score, model, loader(), resume="job"),
        "unit weights": message_of(
            fastdean.couple, *[units(model)] * 2, ratio=0.1, model=model, unit_weights="all"
        ),
    }


UP, DOWN = (f"model.layers.{k}.mlp.{name}_proj.weight" for k, name in ((0, "up"), (1, "down")))
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
EXPERTS = "model.layers.1.mlp.experts.gate_up_proj"
# Flat indices on both sides of every border between ranks.
PLACES = {UP: [0, 5, 1023, 1024, 2047], DOWN: [31, 1024], HEAD: [1, 3071], TABLE: [1535, 1536]}


def logits(model):
    with torch.no_grad():
        return model(input_ids=EXAMPLES[2][0][None], use_cache=False).logits


def masked(shard, make, places):
    """A mask on a whole and on a sharded model, and what is the same afterwards."""
    plain, model = make(), shard(make())
    mask, inner = mask_of(plain, places), mask_of(plain, places, scale=0.5)
    original = whole_weights(plain)
    # Some weights stay gathered after a pass, and the edit must reach the next one all the same.
    logits(model)
    mask.apply_(model), mask.apply_(plain), mask.apply_(model)
    checks = {"applied": same(whole_weights(model), whole_weights(plain))}
    checks["logits"] = norm_error(logits(model), logits(plain)) < 1e-5
    checks["active"] = message_of(inner.apply_, model) == "nothing"
    checks["order"] = "reverse order" in message_of(mask.restore_, model)
    inner.restore_(model)
    checks["nested"] = same(whole_weights(model), whole_weights(plain))
    mask.restore_(model)
    checks["restored"] = same(whole_weights(model), original)
    with mask.applied(model):
        checks["inside"] = same(whole_weights(model), whole_weights(plain))
    try:
        with mask.applied(model):
            raise OSError("of the user's")
    except OSError:
        checks["undone"] = same(whole_weights(model), original)
    return checks


def by_columns(model):
    from torch.distributed.tensor import Shard

    def along(weight):
        return Shard(1) if weight.dim() == 2 else None

    return sharded(model, shard_placement_fn=along)


MASKED = {
    "small units": (in_small_units, llama, PLACES),
    "columns": (by_columns, llama, PLACES),
    "tied": (sharded, qwen2, {TABLE: [1535, 1536], UP: [1023]}),
    "experts": (sharded, MODELS["mixtral"], {EXPERTS: [0, 2560 * 3 - 1, 2560 * 3, 12799]}),
}


def saved(rank):
    """What a user saves of an edited model, and an edited model that is loaded."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    mask, plain, model = mask_of(llama(), PLACES), llama(), sharded(llama())
    mask.apply_(plain)
    with mask.applied(model):
        options = StateDictOptions(full_state_dict=True)
        state = get_model_state_dict(model, options=options)
    expected, original = whole_weights(plain), whole_weights(llama())
    checks = {"saved": same({name: state[name] for name in expected}, expected)}
    loaded = llama()
    loaded.load_state_dict(plain.state_dict())
    # One holds the values from the start, the other was edited before it was sharded.
    for name, edited in (("loaded", sharded(loaded)), ("sharded later", sharded(plain))):
        with mask.applied(edited):
            pass
        checks[f"{name} stays"] = same(whole_weights(edited), expected)
        mask.restore_(edited)
        checks[f"{name} restored"] = same(whole_weights(edited), original)
    return checks


def changed_on_one(rank):
    """Weights of one rank's are not the mask's: nobody writes."""
    model = sharded(llama())
    places = {UP: [0, 2047], DOWN: [5]}
    mask = mask_of(llama(), places)
    with torch.no_grad():
        own = model.get_parameter(UP).to_local()
        own[-1, -1] += rank
    before = whole_weights(model)
    said = [message_of(mask.apply_, model)]
    left = same(whole_weights(model), before)
    mask = mask_of_weights(before, places)
    mask.apply_(model)
    with torch.no_grad():
        own[-1, -1] += rank
    applied = whole_weights(model)
    said.append(message_of(mask.restore_, model))
    return {
        "said": said,
        "left": left and same(whole_weights(model), applied),
    }


def mask_of_weights(weights, places):
    entries = {
        name: fastdean.masks.MaskEntry(
            torch.tensor(index), weights[name].flatten()[index], tuple(weights[name].shape)
        )
        for name, index in places.items()
    }
    return fastdean.NeuronMask(entries)


def resumed(rank, folder):
    """A job that stops when one rank has noted a layer as done and the other one has not."""
    model, write, steps, said = sharded(llama()), Resumable._write, [], []

    def noted(self, step, *arguments, **options):
        if rank == 1 and step == 2 and not said:
            raise OSError("disk of rank 1")
        write(self, step, *arguments, **options)
        steps.append(step)

    with pytest.MonkeyPatch.context() as patch:
        options = {**SMALL, "resume": folder / "job"}
        patch.setattr(Resumable, "_write", noted)
        said += [message_of(fastdean.score, model, loader(), **options)]
        steps.clear()
        scores = fastdean.score(model, loader(), **options)
    return {"said": said[0], "steps": steps, "scores": described(scores)}


def coupled(rank):
    """From scores to an edit of the model that was scored."""
    model = sharded(llama())
    found = {}
    for name, score in (("weights", kept), ("units", units)):
        scores = score(model)
        given = model if name == "units" else None
        mask = fastdean.couple(scores, scores, ratio=0.04, model=given)
        mask.apply_(model)
        found[name] = {
            "entries": {name: (e.index, e.original) for name, e in mask.entries.items()},
            "weights": whole_weights(model),
        }
        mask.restore_(model)
    return found


CHECKS = {
    "in training": in_training,
    "after forward": after_forward,
    "failing": lambda rank: failing(rank, OSError),
    "interrupted": lambda rank: failing(rank, KeyboardInterrupt),
    "in memory": lambda rank: [in_memory(each(llama())) for each in (sharded, in_pairs)],
    "in bf16": in_bf16,
    "in fp16": in_fp16,
    "digests": digests,
    "refused": refused,
    "masked": lambda rank: {name: masked(*how) for name, how in MASKED.items()},
    "saved": saved,
    "changed on one": changed_on_one,
    "coupled": coupled,
}


def worker(rank, folder):
    join_group(rank, folder)
    found = {}
    for name, (shard, make, score) in SITUATIONS.items():
        try:
            found[name] = described(score(shard(make())))
        except Exception:
            found[name] = traceback.format_exc()
    for name, check in {**CHECKS, "resumed": lambda rank: resumed(rank, folder)}.items():
        try:
            found[name] = check(rank)
        except Exception:
            found[name] = traceback.format_exc()
    leave_group(rank, folder, found)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank found in each situation."""
    return run_ranks(worker, tmp_path_factory.mktemp("ranks"))


def require_same(result, alone, *, exact=False):
    assert not isinstance(result, str), result
    assert result["order"] == "layers"
    assert result["data"] == alone.manifest["data"]
    assert list(result["values"]) == list(alone)
    for name, entry in alone.entries.items():
        index, sums, weight, fingerprint = result["entries"][name]
        assert norm_error(sums, entry.sums) < 1e-6
        assert (index is None) == (entry.index is None)
        assert index is None or torch.equal(index, entry.index)
        # The weight is the whole one's, bit for bit.
        assert fingerprint == entry.fingerprint
        assert entry.unit_axis is not None or torch.equal(weight, entry.weight)
        assert not exact or torch.equal(sums, entry.sums)


@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_sharded_model_has_the_scores_of_a_whole_one(found, situation):
    _, make, score = SITUATIONS[situation]
    alone = score(make())
    for rank in range(WORLD):
        require_same(found[rank][situation], alone, exact=situation == "exact")


def test_a_training_goes_on_as_if_nobody_had_scored(found):
    for rank in range(WORLD):
        result = found[rank]["in training"]
        assert not isinstance(result, str), result
        assert result["left"] and result["gradients"] and result["hooks ran"]
        require_same(result["scores"], kept(llama()))


def test_weights_that_are_gathered_already_are_sharded_first(found):
    for rank in range(WORLD):
        result = found[rank]["after forward"]
        assert not isinstance(result, str), result
        *scores, is_edited = result
        assert is_edited
        for each in scores:
            require_same(each, kept(llama()))


@pytest.mark.parametrize(
    "how, error", [("failing", "OSError"), ("interrupted", "KeyboardInterrupt")]
)
def test_a_rank_that_fails_ends_all_and_leaves_the_model_sharded(found, how, error):
    for rank in range(WORLD):
        result = found[rank][how]
        assert not isinstance(result, str), result
        assert result["left"]
        require_same(result["scores"], kept(llama()))
    assert found[1][how]["said"] == f"{error}: of rank 1"
    assert "got 1 of 2 that failed" in found[0][how]["said"]


def test_a_job_goes_on_from_where_all_ranks_have_been(found):
    alone = found[0]["llama"]["entries"]
    for rank in range(WORLD):
        result = found[rank]["resumed"]
        assert not isinstance(result, str), result
        assert ("disk of rank 1" if rank else "1 of 2 that failed") in result["said"]
        # The second layer forward was through on rank 0 alone, and both begin it again.
        assert result["steps"] == [2, 3, 4, 5]
        for name, (index, sums, weight, _) in result["scores"]["entries"].items():
            assert torch.equal(index, alone[name][0])
            assert torch.equal(sums, alone[name][1]) and torch.equal(weight, alone[name][2])


def test_no_more_than_one_layer_is_whole_at_a_time(found):
    model = llama()
    layer = sum(weight.nbytes for weight in model.model.layers[0].parameters())
    outside = sum(weight.nbytes for weight in model.parameters()) - 2 * layer
    for rank in range(WORLD):
        result = found[rank]["in memory"]
        assert not isinstance(result, str), result
        alone, in_pairs = result
        # What is gathered is padded to as many rows on each rank; here they are as many.
        assert alone["most"] == outside + layer
        assert in_pairs["most"] == outside + 2 * layer
        first, second, rest = "model.layers.0", "model.layers.1", "model.embed_tokens.weight"
        # Tried on the first layer; then forward and backward. Around it is the rest of the model.
        assert alone["came"] == [rest, first, first, second, second, first]
        assert in_pairs["came"] == [rest, first, first, first, first, first]
        assert alone["left"] == in_pairs["left"] == 0


def in_dtype(dtype, tree):
    return tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, tree)


def test_what_computes_in_bf16_is_scored_with_the_weights_in_fp32(found):
    plain, rounded = llama(), llama()
    for layer in rounded.model.layers:
        layer.bfloat16()
        layer.register_forward_pre_hook(
            lambda module, *given: in_dtype(torch.bfloat16, given), with_kwargs=True
        )
        layer.register_forward_hook(lambda module, args, made: in_dtype(torch.float32, made))
    alone = dense(rounded)
    for rank in range(WORLD):
        result = found[rank]["in bf16"]
        assert not isinstance(result, str), result
        for name, entry in alone.entries.items():
            _, sums, weight, _ = result["dense"]["entries"][name]
            # Batches are others, and so is the rounding.
            assert norm_error(sums, entry.sums) < 0.02
            assert torch.equal(weight, plain.get_parameter(name).detach())
            index, _, of_top, _ = result["kept"]["entries"][name]
            assert torch.equal(of_top, weight.flatten()[index])


def test_the_scale_in_fp16_is_fitted_to_the_whole_model(found):
    alone = dense(llama().half())
    for rank in range(WORLD):
        result = found[rank]["in fp16"]
        assert not isinstance(result, str), result
        for exponent, name in itertools.product(result, alone.entries):
            _, sums, _, _ = result[exponent]["entries"][name]
            assert norm_error(sums, alone.entries[name].sums) < 4e-3, (exponent, name)


def test_the_digest_is_that_of_the_whole_model(found):
    alone = [weights_digest(make()) for make in (llama, MODELS["mixtral"])]
    assert [found[rank]["digests"] for rank in range(WORLD)] == [alone] * WORLD


@pytest.mark.parametrize(
    "how, text",
    [
        ("strided", "placed as (_StridedShard(dim=0, sf=2), Shard(dim=0))"),
        ("score, part of the ranks", "on 1 of 2 ranks; load it in one process"),
        ("mask, part of the ranks", "on 1 of 2 ranks; load it in one process"),
        ("batches", "ValueError: order must be 'layers' or 'auto' for a model sharded over"),
        ("resume", "ValueError: keep_top must be given with resume for a model sharded over ranks"),
        ("unit weights", "it is sharded over ranks, and no rank has its weights to try; use unit_"),
    ],
)
def test_what_is_sharded_otherwise_is_refused_by_name(found, how, text):
    for rank in range(WORLD):
        assert not isinstance(found[rank]["refused"], str), found[rank]["refused"]
        assert text in found[rank]["refused"][how]


@pytest.mark.parametrize("how", MASKED)
def test_a_mask_edits_a_sharded_model_as_a_whole_one(found, how):
    for rank in range(WORLD):
        assert not isinstance(found[rank]["masked"], str), found[rank]["masked"]
        assert found[rank]["masked"][how] == dict.fromkeys(found[rank]["masked"][how], True)


def test_an_edited_model_is_saved_and_loaded_edited(found):
    for rank in range(WORLD):
        result = found[rank]["saved"]
        assert not isinstance(result, str), result
        assert result == dict.fromkeys(result, True)


def test_other_values_on_one_rank_are_refused_on_all(found):
    for rank in range(WORLD):
        result = found[rank]["changed on one"]
        assert not isinstance(result, str), result
        assert result["left"]
        applied, restored = result["said"]
        assert "model must hold the mask's original values, got others" in applied
        assert ("1 of" in restored) and ("StateError" in restored)


@pytest.mark.parametrize("of", ["weights", "units"])
def test_scores_of_a_sharded_model_make_the_mask_of_a_whole_one(found, of):
    model = llama()
    score = {"weights": kept, "units": units}[of]
    scores = score(model)
    mask = fastdean.couple(scores, scores, ratio=0.04)
    mask.apply_(model)
    for rank in range(WORLD):
        result = found[rank]["coupled"]
        assert not isinstance(result, str), result
        entries = result[of]["entries"]
        assert entries.keys() == mask.entries.keys()
        for name, entry in mask.entries.items():
            assert torch.equal(entries[name][0], entry.index)
            assert torch.equal(entries[name][1], entry.original)
        assert same(result[of]["weights"], whole_weights(model))


def of_replicas():
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))


def loaded(folder):
    """As transformers shards it, by its own plan."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(fsdp_size=4)
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config).eval()


def four_ranks(rank, folder):
    join_group(rank, folder, world=4)
    models = {
        **{name: sharded(make()) for name, make in MODELS.items()},
        **{
            f"{name}, replicas": sharded(make(), mesh=of_replicas())
            for name, make in MODELS.items()
        },
        "llama, loaded": loaded(folder / "checkpoint"),
    }
    found = {}
    for name, model in models.items():
        plain = MODELS[name.partition(",")[0]]()
        places = {n: [0, w.numel() // 2, w.numel() - 1] for n, w in plain.named_parameters()}
        mask = mask_of(plain, places)
        found[name] = {"digest": weights_digest(model), "scores": described(kept(model))}
        with mask.applied(model), mask.applied(plain):
            found[name]["edited"] = same(whole_weights(model), whole_weights(plain))
            found[name]["logits"] = norm_error(logits(model), logits(plain)) < 1e-5
        found[name]["restored"] = same(whole_weights(model), whole_weights(plain))
    leave_group(rank, folder, found)


@pytest.mark.slow
def test_four_ranks_and_replicas_of_two(tmp_path):
    """Of five experts the last rank has none."""
    folder = tmp_path / "checkpoint"
    llama().config.save_pretrained(folder)
    save_model(llama(), f"{folder}/model.safetensors", metadata={"format": "pt"})
    ranks = run_ranks(four_ranks, tmp_path, world=4)
    assert len(ranks[0]) == 2 * len(MODELS) + 1
    for name in ranks[0]:
        make = MODELS[name.partition(",")[0]]
        alone, digest = kept(make()), weights_digest(make())
        for found in ranks:
            result = found[name]
            require_same(result["scores"], alone)
            assert result["digest"] == digest
            assert result["edited"] and result["logits"] and result["restored"]
