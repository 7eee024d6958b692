"""Fused experts scored: against autograd on the models' own implementations, family by family."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from live_bytes import LiveBytes
from oracle import example_loss, norm_error, top_k
from tiny_data import batches, make_examples
from tiny_experts import CHOSEN, EXPERTS, FAMILIES, experts_model, own_importance
from tiny_models import llama
from torch.nn import functional

import fastdean
from fastdean.coupling.passes import trial
from fastdean.coupling.resuming import resumable
from fastdean.coupling.sums.accumulators import all_sums_bytes, split_by_memory, sums_bytes
from fastdean.coupling.targets.finding import find_targets
from fastdean.data.batching import default_tokens_per_batch
from fastdean.models.batch_size import _stacks_of
from fastdean.models.experts import products as expert_products
from fastdean.models.experts.fused import fused_experts
from fastdean.models.experts.products import NAME, listening_to_experts
from fastdean.wording.mendable import StateError

# Ordinary; transposed with biases, interleaved and clamped; rows by expert; without a gate.
QUICK = ("Qwen2Moe", "GptOss", "Llama4Text", "NemotronH")
DOWN = "model.layers.1.mlp.experts.down_proj"


def scored(model, seed=0, size=3, **options):
    return fastdean.score(model, batches(make_examples(seed), size), progress=False, **options)


def experts_of(scores):
    return [name for name, entry in scores.entries.items() if entry.num_experts]


def require_exact(family, order):
    model, examples = experts_model(family), make_examples()
    scores = scored(model, order=order, target_modules="all")
    assert experts_of(scores)
    expected = own_importance(model, examples, list(scores))
    for name in scores:
        assert scores[name].shape == model.get_parameter(name).shape
        assert norm_error(scores[name], expected[name]) < 1e-5, name


@pytest.mark.parametrize("order", ["batches", "layers"])
@pytest.mark.parametrize("family", QUICK)
def test_scores_equal_autograd_on_the_models_own_experts(family, order):
    require_exact(family, order)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["batches", "layers"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in QUICK])
def test_scores_of_the_other_families(family, order):
    require_exact(family, order)


@pytest.mark.parametrize("order", ["batches", "layers"])
def test_a_configuration_that_asks_for_the_loss_of_the_routers(order):
    model = experts_model("Mixtral")
    expected = scored(model, order="batches")
    model.config.output_router_logits = True
    found = scored(model, order=order)
    assert model.config.output_router_logits
    for name in expected:
        assert norm_error(found[name], expected[name]) < 1e-6, name


def test_names_by_suffix_and_the_model_as_it_was():
    model = experts_model("Qwen2Moe")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    own = model.config._experts_implementation
    scores = scored(model, target_modules=["experts.gate_up_proj"])
    assert list(scores) == [f"model.layers.{i}.mlp.experts.gate_up_proj" for i in (0, 1)]
    assert model.config._experts_implementation == own != NAME
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_grouping_of_examples_does_not_matter():
    model = experts_model("GptOss")
    whole, alone = scored(model, size=6), scored(model, size=1, tokens_per_batch=1)
    for name in whole:
        assert norm_error(alone[name], whole[name].double()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = experts_model("Mixtral").to(dtype)
    expected = own_importance(model, make_examples(), list(scores := scored(model)))
    for name in scores:
        assert norm_error(scores[name], expected[name]) < 0.1


# Selection: expert by expert, or the tensor as one.


@pytest.mark.parametrize("order", ["batches", "layers"])
def test_keep_top_keeps_of_each_expert_or_of_the_tensor(order):
    model = experts_model("Qwen2Moe")
    dense = scored(model)[DOWN]
    k = int(0.01 * dense[0].numel())
    by_expert = scored(model, keep_top=0.01, order=order)
    expected = [e * dense[0].numel() + i for e in range(EXPERTS) for i in top_k(dense[e], k)]
    assert by_expert.index(DOWN).tolist() == expected
    of_tensor = scored(model, keep_top=0.01, order=order, expert_scope="tensor")
    assert of_tensor.index(DOWN).tolist() == top_k(dense, int(0.01 * dense.numel()))
    assert of_tensor.manifest["expert_scope"] == of_tensor.expert_scope == "tensor"
    with pytest.raises(ValueError, match="expert_scope must be 'tensor', by which these scores"):
        of_tensor.scoped("expert")
    with pytest.raises(ValueError, match="must share one expert_scope, got 'expert' and 'tensor'"):
        fastdean.couple(by_expert, of_tensor)


def test_scores_on_disk_keep_their_scope(tmp_path):
    scores = scored(experts_model("Qwen2Moe"), keep_top=0.01, expert_scope="tensor")
    scores.save_pretrained(tmp_path / "scores")
    read = fastdean.Scores.from_pretrained(tmp_path / "scores")
    assert read.expert_scope == "tensor"
    assert torch.equal(read[DOWN], scores[DOWN])
    assert read.select(DOWN, 3).tolist() == scores.select(DOWN, 3).tolist()


def test_coupled_entries_of_experts_are_masked_and_undone():
    model = experts_model("Qwen2Moe")
    fair, priv, general = (scored(model, seed) for seed in range(3))
    mask = fastdean.couple(fair, priv, general=general, ratio=0.05)
    weight = model.get_parameter(DOWN)
    size = weight[0].numel()
    k = int(0.05 * size)
    tops = [
        [set(top_k(each[DOWN][e], k)) for e in range(EXPERTS)] for each in (fair, priv, general)
    ]
    expected = [
        e * size + i
        for e, (a, b, c) in enumerate(zip(*tops, strict=True))
        for i in sorted((a & b) - c)
    ]
    assert mask.entries[DOWN].index.tolist() == expected
    before = weight.clone()
    with mask.applied(model):
        assert not weight.flatten()[expected].any()
        assert (weight != before).sum() == len(expected)
    assert torch.equal(weight, before)
    of_tensor = fastdean.couple(fair, priv, ratio=0.05, expert_scope="tensor")
    row = next(row for row in of_tensor.table if row["name"] == DOWN)
    assert row["first"] == int(0.05 * weight.numel()) and row["first"] != EXPERTS * k


def test_random_entries_are_drawn_in_the_experts_that_the_paper_selects_from():
    model = experts_model("Qwen2Moe")
    fair, priv = scored(model, 0), scored(model, 1)
    size = model.get_parameter(DOWN)[0].numel()

    def by_expert(rule):
        mask = fastdean.couple(fair, priv, ratio=0.05, rule=rule)
        return (mask.entries[DOWN].index // size).bincount(minlength=EXPERTS).tolist()

    assert by_expert("random") == by_expert("paper")


def test_experts_that_no_token_reached_are_named(caplog):
    model = experts_model("Qwen2Moe")
    ids = torch.tensor([[5, 6]])
    with caplog.at_level(logging.WARNING, logger="fastdean"):
        scores = fastdean.score(model, [{"input_ids": ids, "labels": ids}], progress=False)
    # One target, the second token; of the first the last layer's experts see no gradient.
    unseen = scores.manifest["unseen_experts"]
    assert len(unseen[DOWN]) >= EXPERTS - 2 * CHOSEN
    for name, experts in unseen.items():
        assert [e for e in range(EXPERTS) if not scores[name][e].any()] == experts
        assert not set((scores.select(name, 5) // scores[name][0].numel()).tolist()) & set(experts)
    number = sum(map(len, unseen.values()))
    said = f"{number} of {4 * EXPERTS} experts' weights"
    # A tensor of stacked experts is one matrix, as is each of a shared expert's three.
    assert repr(scores).startswith("Scores(10 matrices, ") and f", {said} unseen" in repr(scores)
    assert any(r.getMessage().startswith(f"{said} got no gradient") for r in caplog.records)


# Memory: the experts of one tensor in several passes, several ranks, a job that goes on.


def least_by_layers(model, **options):
    """The budget that the refusal of a smaller one names: one expert, and what a window holds."""
    with pytest.raises(ValueError, match="memory_budget must be at least ") as caught:
        scored(model, order="layers", memory_budget=8, **options)
    return int(re.search(r"at least ([\d,]+)", str(caught.value))[1].replace(",", ""))


SPARSE = {"keep_top": 0.02}


@pytest.fixture
def one_thread():
    """Of several, products of another size may round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "order, options",
    [
        ("batches", {}),
        *((order, SPARSE) for order in ("batches", "layers")),
        *((order, SPARSE | {"scope": "tensor"}) for order in ("batches", "layers")),
    ],
)
def test_experts_are_scored_in_parts_where_memory_is_short(order, options, one_thread):
    model = experts_model("Qwen2Moe")
    options = {"expert_scope": options.get("scope", "expert"), "keep_top": options.get("keep_top")}
    whole = scored(model, order=order, **options)
    experts = find_targets(model, ["experts.gate_up_proj"])
    least = max(sums_bytes(target, "weight") for target in experts)
    budget = least * 3 // EXPERTS
    if order == "layers":
        budget = least_by_layers(model, **options)
    in_parts = scored(model, order=order, memory_budget=budget, **options)
    for name in whole:
        assert torch.equal(in_parts[name], whole[name])
        if whole.is_sparse:
            assert torch.equal(in_parts.index(name), whole.index(name))
        assert in_parts.entries[name].fingerprint == whole.entries[name].fingerprint
    groups = split_by_memory(experts, all_sums_bytes("weight"), least * 3 // EXPERTS)
    parts = [(target.part, target.layer_index) for group in groups for target in group]
    assert parts == [(part, i) for i in (0, 1) for part in ((0, 3), (3, 5))]
    with pytest.raises(ValueError, match="memory_budget must hold the sums of at least one matrix"):
        scored(model, order="batches", memory_budget=least // EXPERTS - 1)


@pytest.mark.parametrize("family", ["Mixtral", "DeepseekV3"])
def test_deterministic_bits_depend_on_no_order_and_no_budget(family, monkeypatch):
    """The model's own implementation rounds otherwise than ours, which stands in for it."""
    model, own_forward = experts_model(family), expert_products._own_forward

    def another(module):
        return lambda *args: own_forward(module)(*args) * (1 + 2**-20)

    monkeypatch.setattr(expert_products, "_own_forward", another)
    expected = scored(model, order="batches", deterministic=True)
    for order, budget in (("batches", 1 << 19), ("layers", None), ("layers", 1 << 20)):
        found = scored(model, order=order, memory_budget=budget, deterministic=True)
        for name, value in expected.items():
            assert torch.equal(found[name], value), (order, budget, name)


# The context in which experts run through what hands over their products.


def _experts(model):
    return [module for module in model.modules() if fused_experts(module)]


def silent(leaf, x, product, routing):
    return product


@pytest.mark.parametrize("family", ["Mixtral", "Llama4Text"])
def test_blocks_end_in_any_order_and_after_exceptions(family):
    model = experts_model(family)
    modules, ids = _experts(model), torch.tensor([[5, 6, 7]])
    own = model.config._experts_implementation
    expected = model(ids).logits
    first, second = (listening_to_experts(dict.fromkeys(modules, silent)) for _ in range(2))
    first.__enter__()
    second.__enter__()
    assert torch.allclose(model(ids).logits, expected, atol=1e-5)
    first.__exit__(None, None, None)
    assert torch.allclose(model(ids).logits, expected, atol=1e-5)
    second.__exit__(None, None, None)

    def failing(*_):
        raise KeyError("of the listener")

    with pytest.raises(KeyError), listening_to_experts({modules[1]: failing}):
        model(ids)
    assert model.config._experts_implementation == own
    assert not any("forward" in vars(module) for module in modules)
    assert torch.equal(model(ids).logits, expected)


def test_experts_that_compute_something_else_are_refused():
    model = experts_model("Llama4Text")
    for module in _experts(model):
        module.act_fn = torch.nn.SiLU()
        module.forward = lambda x, own=module.forward: own(2 * x)
    with pytest.raises(StateError, match="Llama4TextExperts must compute act"):
        scored(model)


# The trial, expert by expert.


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_the_trial_never_has_a_gradient_of_the_whole_stack(family, monkeypatch):
    model = experts_model(family, num_local_experts=256, intermediate_size=64)
    peaks, try_out = [], trial._try_out

    def counted(*args):
        with LiveBytes() as live:
            found = try_out(*args)
        peaks.append(live.peak)
        return found

    monkeypatch.setattr(trial, "_try_out", counted)
    scored(model, keep_top=0.01)
    assert peaks and max(peaks) < min(model.get_parameter(DOWN).nbytes, 2 << 20)


@pytest.mark.parametrize("kind", ["product", "gradient"])
def test_one_wrong_expert_of_many_is_refused(kind, monkeypatch):
    model, products = experts_model("Mixtral", num_local_experts=16), expert_products._products

    def wrong(x, matrix, sizes):
        one = max(range(len(sizes)), key=sizes.__getitem__)

        def changed(expert):
            own = matrix(expert)
            if expert != one:
                return own
            # The gradient alone is another.
            return 2 * own if kind == "product" else 2 * own - own.detach()

        return products(x, changed, sizes)

    monkeypatch.setattr(expert_products, "_products", wrong)
    said = "must compute act" if kind == "product" else "must get the gradient of its weight"
    with pytest.raises(StateError, match=said):
        scored(model)


def test_a_stack_that_is_used_beside_its_experts_is_refused():
    model = experts_model("Mixtral")
    mlp = model.model.layers[1].mlp
    mlp.register_forward_hook(lambda m, args, out: out + m.experts.down_proj.mean())
    with pytest.raises(StateError, match="experts.down_proj must get the gradient of its weight"):
        scored(model)


@pytest.mark.parametrize("family", ["Mixtral", "Llama4Text"])
def test_offloaded_experts(family):
    from accelerate import cpu_offload

    model = experts_model(family)
    expected = scored(model)
    for module in _experts(model):
        cpu_offload(module, execution_device="cpu")
    hooked = [module.forward for module in _experts(model)]
    offloaded = scored(model)
    for name in expected:
        assert norm_error(offloaded[name], expected[name].double()) < 1e-6
    assert [module.forward for module in _experts(model)] == hooked
    assert all(parameter.is_meta for parameter in _experts(model)[0].parameters())


def test_a_job_in_parts_goes_on_where_it_was(tmp_path, monkeypatch):
    model = experts_model("Mixtral")
    expected = scored(model, order="layers", keep_top=0.02)
    budget = least_by_layers(model, keep_top=0.02)
    options = {"order": "layers", "keep_top": 0.02, "memory_budget": budget}
    with monkeypatch.context() as patch:
        reached, steps = resumable.Resumable.reached, []

        def stopping(self, step):
            reached(self, step)
            steps.append(step)
            if len(steps) == 5:
                raise KeyboardInterrupt

        patch.setattr(resumable.Resumable, "reached", stopping)
        with pytest.raises(KeyboardInterrupt):
            scored(model, resume=tmp_path / "job", **options)
    found = scored(model, resume=tmp_path / "job", **options)
    for name in expected:
        assert torch.equal(found.index(name), expected.index(name))
        assert torch.equal(found[name], expected[name])
    assert found.expert_load == expected.expert_load != []


@pytest.mark.parametrize("order", ["batches", "layers"])
def test_signs_of_experts(order):
    model = experts_model("Qwen2Moe")
    signs = scored(model, order=order, signs=True).signs(DOWN)
    model.set_experts_implementation("eager")
    weight = model.get_parameter(DOWN)
    total = torch.zeros_like(weight)
    for ids, labels in make_examples():
        total += torch.autograd.grad(example_loss(model, ids, labels, 1), weight)[0]
    expected = (total * weight).sign()
    clear = (total * weight).abs() > 1e-6 * (total * weight).abs().max()
    assert torch.equal(signs[clear], expected[clear].to(torch.int8))


# Quantised experts.


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_experts_of_eight_bits_are_refused_by_name(dtype):
    model = experts_model("Qwen2Moe")
    for module in _experts(model):
        for leaf in ("gate_up_proj", "down_proj"):
            weight = getattr(module, leaf).detach().to(dtype)
            setattr(module, leaf, torch.nn.Parameter(weight, requires_grad=False))
    said = rf"16 bits or more, got {dtype} in model.layers.0.mlp.experts.gate_up_proj; load it wi"
    with pytest.raises(ValueError, match=said):
        scored(model)


@pytest.mark.parametrize("target_modules", ["mlp", "all", "mlp,q_proj"])
def test_packed_experts_beside_plain_ones_are_refused_by_name(target_modules):
    """Two values in a byte: no shape that anybody here can run."""
    model = experts_model("Qwen2Moe")
    for module in _experts(model):
        for leaf in ("gate_up_proj", "down_proj"):
            packed = getattr(module, leaf).detach()[..., ::2].to(torch.uint8)
            setattr(module, leaf, torch.nn.Parameter(packed, requires_grad=False))
    said = (
        r"torch.uint8 in model.layers.0.mlp.experts.gate_up_proj; load it without quantisation, or"
    )
    with pytest.raises(ValueError, match=said):
        find_targets(model, target_modules)
    assert find_targets(model, ["q_proj"]) and find_targets(model, "self_attn")


def test_a_packed_linear_whose_weight_is_a_buffer_is_refused_by_name():
    model = llama()

    class Packed(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.register_buffer("qweight", linear.weight.detach().to(torch.int32))

    mlp = model.model.layers[1].mlp
    mlp.up_proj = Packed(mlp.up_proj)
    with pytest.raises(ValueError, match=r"torch.int32 in model.layers.1.mlp.up_proj.qweight"):
        find_targets(model, "mlp")


# The products: into one tensor, with the bits of a Linear layer's.


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_products_are_those_of_linear_layers(dtype, transposed):
    generator = torch.Generator().manual_seed(0)
    sizes = [3, 0, 1, 7]
    stack = torch.randn((4, 6, 5), generator=generator).to(dtype)
    stored = stack.mT.contiguous().mT if transposed else stack
    x, g = (torch.randn((11, n), generator=generator).to(dtype) for n in (5, 6))
    asked = [each.clone().requires_grad_(True) for each in stored.unbind(0)]

    def both(products):
        rows = x.clone().requires_grad_(True)
        y = products(rows)
        given = torch.autograd.grad(y, [rows, *(asked[e] for e in (0, 2, 3))], g)
        return [y.detach(), *given]

    def linear(rows):
        parts = zip(rows.split(sizes), asked, strict=True)
        return torch.cat([functional.linear(part, each) for part, each in parts])

    ours = both(lambda rows: expert_products._products(rows, asked.__getitem__, sizes))
    for found, expected in zip(ours, both(linear), strict=True):
        if dtype == torch.bfloat16:
            # A few rows are computed among others, which may round otherwise.
            torch.testing.assert_close(found, expected)
        else:
            assert torch.equal(found, expected)


def test_products_under_autocast_are_in_its_dtype():
    x, weight = torch.randn(3, 5), torch.randn(6, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y = expert_products._products(x, lambda expert: weight, [3])
        assert y.dtype == torch.bfloat16 and torch.equal(y, functional.linear(x, weight))


def test_rows_go_to_their_experts_and_gradients_back():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((5, 4), generator=generator, requires_grad=True)
    order = torch.randperm(15, generator=generator)
    place = order.argsort()
    g = torch.randn((15, 4), generator=generator)
    rows = expert_products._Gathered.apply(x, order, place, 3)
    assert torch.equal(rows, x[order // 3])
    (found,) = torch.autograd.grad(rows, x, g)
    (expected,) = torch.autograd.grad(x[order // 3], x, g)
    torch.testing.assert_close(found, expected)
    back = expert_products._Gathered.apply(rows.detach(), place, order, 1)
    assert torch.equal(back, x.detach().repeat_interleave(3, 0))


def test_the_trial_differentiates_by_few_experts(monkeypatch):
    model, asked = experts_model("Mixtral", num_local_experts=16), set()
    products = expert_products._products

    def counted(x, matrix, sizes):
        asked.add(sum(matrix(e).requires_grad for e, size in enumerate(sizes) if size))
        return products(x, matrix, sizes)

    monkeypatch.setattr(expert_products, "_products", counted)
    scored(model)
    assert max(asked) == 4


# Batches: as large as the weights of a mixture warrant, with the same result.


@pytest.mark.parametrize(
    "stacks, tokens",
    [
        ([], 512),
        # Each token goes through all: as of so many matrices.
        ([(4, 4, 1024, 1024)], 512),
        ([(8, 4, 1024, 1024)], 912),
        ([(64, 8, 1024, 1024)], 2048),
        # Of a wider mixture, through which little goes of a batch at a time, no fewer.
        ([(4, 4, 64, 32)], 432),
    ],
)
def test_batches_are_larger_for_mixtures(stacks, tokens):
    assert default_tokens_per_batch(torch.device("cpu"), [(1024, 1024)], stacks) == tokens
    assert default_tokens_per_batch(torch.device("cuda"), [(1024, 1024)], stacks) == 2048


@pytest.mark.parametrize("family, chosen", [("Qwen2Moe", 2), ("GptOss", 2), ("Llama4Text", 5)])
def test_the_experts_that_a_token_goes_through_are_counted(family, chosen):
    stacks = list(_stacks_of(experts_model(family)))
    hidden, units = 32, 40 if family != "Qwen2Moe" else 24
    of_layer = [(EXPERTS, chosen, 2 * units, hidden), (EXPERTS, chosen, hidden, units)]
    assert stacks == 2 * of_layer
