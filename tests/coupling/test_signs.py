"""Signs of effects: against autograd in float64, through files, and in what `couple` selects."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_data import batches, make_examples
from tiny_models import MODELS, gpt2, llama

import fastdean
from fastdean import native
from fastdean.coupling.results.score_entry import ScoreEntry
from fastdean.coupling.results.scores import Scores
from fastdean.coupling.selection.agreement import Agreement
from fastdean.coupling.sums import held_pairs, holding
from fastdean.coupling.sums.signed_sums import add_signed_, add_signed_units_
from fastdean.ops.reference import accumulate_importance_

WIDE = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "vocab_size": 96}


def wide(family):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    own = {"num_key_value_heads": 2, "head_dim": 16} if family == "llama" else {"n_inner": 256}
    sizes = WIDE | own | {"num_hidden_layers": 2, "bos_token_id": 1, "eos_token_id": 2}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval().float()


def score(model, seed=0, lengths=(3, 9, 5, 2), **options):
    loader = batches(make_examples(seed, lengths=lengths), 4)
    options = {"progress": False, "target_modules": "all", "signs": True, **options}
    return fastdean.score(model, loader, **options)


def exact_sums(model, names, seed=0, lengths=(3, 9, 5, 2), shift=1):
    """sum over examples of dL/dW, in float64."""
    model = copy.deepcopy(model).double()
    weights = {name: model.get_parameter(name) for name in names}
    totals = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for ids, labels in make_examples(seed, lengths=lengths):
        logits = model(input_ids=ids[None]).logits[0]
        kept = labels[shift:] != -100
        loss = torch.nn.functional.cross_entropy(
            logits[: len(ids) - shift][kept], labels[shift:][kept]
        )
        gradients = torch.autograd.grad(loss, list(weights.values()))
        for name, gradient in zip(weights, gradients, strict=True):
            totals[name] += gradient
    return totals


def assert_exact(scores, expected):
    for name, entry in scores.entries.items():
        want = expected[name]
        if entry.index is not None:
            want = want.flatten()[entry.index]
        off = (entry.signed.double() - want).norm()
        assert off <= 1e-5 * expected[name].abs().max() * max(1, want.numel()) ** 0.5, name
        assert bool((entry.signed.abs() <= entry.sums * (1 + 1e-5)).all())


@pytest.mark.parametrize("order", ["batches", "layers"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "bert"])
def test_signed_sums_are_the_gradients_that_autograd_adds_up_in_float64(name, order):
    model = MODELS[name]()
    found = score(model, order=order, tokens_per_batch=12)
    assert_exact(found, exact_sums(model, list(found)))
    # Sparse scores hold them at their entries.
    few = score(model, order=order, keep_top=0.01)
    assert all(few.entries[each].index is not None for each in few)
    assert_exact(few, exact_sums(model, list(few)))


@pytest.mark.skipif(native.status().state != "available", reason="nothing is held without it")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_signed_sums_of_what_windows_hold(family, monkeypatch):
    monkeypatch.setattr(holding, "_SMALL_SUMS_BYTES", 0)
    model = wide(family)
    options = {"keep_top": 1e-3, "order": "layers", "tokens_per_batch": 12}
    found = score(model, **options)
    assert found.manifest["order"]["matrices"]["held"] >= 4
    assert_exact(found, exact_sums(model, list(found)))
    plain = score(model, signs=False, **options)
    for name in plain:
        assert torch.equal(plain.index(name), found.index(name))
        assert torch.equal(plain.entries[name].sums, found.entries[name].sums)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_signed_sums_against_a_loop(dtype):
    generator = torch.Generator().manual_seed(1)
    x, g = (torch.randn(11, n, generator=generator).to(dtype) for n in (5, 7))
    segments = torch.tensor([[1, 4], [4, 4], [4, 6], [8, 11]])
    expected = sum(g[a:b].double().T @ x[a:b].double() for a, b in segments.tolist())
    acc = torch.ones(7, 5)
    add_signed_(acc, x, g, segments)
    torch.testing.assert_close(acc.double() - 1, expected, rtol=1e-5, atol=1e-5)
    units, a = torch.zeros(5), x
    add_signed_units_(units, a, x.flip(0), segments)
    products = a.double() * x.flip(0).double()
    by_hand = sum(products[s:e].sum(0) for s, e in segments.tolist())
    torch.testing.assert_close(units.double(), by_hand, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", ["batches", "layers"])
def test_zeroing_a_weight_of_a_positive_sign_lowers_the_loss(order):
    model = llama().double().float()
    scores = score(model, order=order)
    name = next(name for name in scores if "down_proj" in name)
    weight = model.get_parameter(name)

    def loss():
        total = 0.0
        for ids, labels in make_examples(0, lengths=(3, 9, 5, 2)):
            logits = model(input_ids=ids[None]).logits[0]
            kept = labels[1:] != -100
            total += torch.nn.functional.cross_entropy(logits[:-1][kept], labels[1:][kept]).double()
        return float(total)

    gains = (scores.entries[name].signed * weight.detach()).flatten()
    signs = scores.signs(name)
    assert signs.dtype == torch.int8 and signs.shape == weight.shape
    with torch.no_grad():
        before = loss()
        for place, sign in ((int(gains.argmax()), 1), (int(gains.argmin()), -1)):
            assert int(signs.flatten()[place]) == sign
            kept = weight.view(-1)[place].clone()
            weight.view(-1)[place] = 0
            assert (before - loss()) * sign > 0
            weight.view(-1)[place] = kept


@pytest.mark.parametrize("order", ["batches", "layers"])
def test_units_have_signs(order):
    found = score(gpt2(), granularity="unit", target_modules="mlp", order=order)
    for name, entry in found.entries.items():
        assert found.signs(name).shape == found[name].shape
        assert bool((entry.signed.abs() <= entry.sums * (1 + 1e-5) + 1e-12).all())
        assert torch.equal(found.signs(name), entry.signed.sign().to(torch.int8))


def test_budgets_count_sums_and_signed_sums():
    model = llama()
    sizes = [32 * 64 * 4, 2 * 32 * 64 * 4]
    for signs, needed in zip((False, True), sizes, strict=True):
        options = {"target_modules": "mlp", "signs": signs, "order": "batches"}
        with pytest.raises(ValueError, match=rf"memory_budget must hold .* {needed:,} bytes"):
            score(model, memory_budget=needed - 1, **options)
        split = score(model, memory_budget=needed, **options)
        whole = score(model, **options)
        for name in whole:
            assert torch.equal(split.entries[name].sums, whole.entries[name].sums)
            if signs:
                assert torch.equal(split.entries[name].signed, whole.entries[name].signed)


@pytest.mark.parametrize("keep_top", [None, 0.01])
def test_files_hold_signs_and_folders_without_them_are_read(tmp_path, keep_top):
    model = llama()
    scores = score(model, keep_top=keep_top)
    scores.save_pretrained(tmp_path / "signed")
    found = Scores.from_pretrained(tmp_path / "signed")
    assert found.has_signs
    for name in scores:
        assert torch.equal(found.entries[name].signed, scores.entries[name].signed)
        assert torch.equal(found.signs(name), scores.signs(name))
    score(model, keep_top=keep_top, signs=False).save_pretrained(tmp_path / "plain")
    assert '"signs"' not in (tmp_path / "plain" / "fastdean_config.json").read_text("utf-8")
    plain = Scores.from_pretrained(tmp_path / "plain")
    assert not plain.has_signs
    with pytest.raises(ValueError, match="scores must have signs, got none for .*; score again w"):
        plain.signs(next(iter(plain)))


def test_sums_of_two_runs_and_fewer_entries_keep_signs():
    model = llama()
    one, other = score(model), score(model, 5)
    both, name = one + other, next(iter(one))
    assert torch.equal(
        both.entries[name].signed, one.entries[name].signed + other.entries[name].signed
    )
    few = both.keep(0.01)
    assert torch.equal(few.signs(name), both.signs(name).flatten()[few.index(name)])
    assert not (one + score(model, 5, signs=False)).has_signs


def test_a_job_that_goes_on_has_its_signs(tmp_path, monkeypatch):
    from fastdean.coupling.resuming import resumable

    options = {"order": "layers", "keep_top": 0.01, "tokens_per_batch": 12}
    expected, reached = score(llama(), **options), resumable.Resumable.reached

    def stopping(self, step):
        reached(self, step)
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(resumable.Resumable, "reached", stopping)
        with pytest.raises(KeyboardInterrupt):
            score(llama(), resume=tmp_path / "job", **options)
    with pytest.raises(ValueError, match="one that differs in .*signs; choose another folder"):
        score(llama(), resume=tmp_path / "job", **{**options, "signs": False})
    found = score(llama(), resume=tmp_path / "job", **options)
    for name in expected:
        assert torch.equal(found.entries[name].signed, expected.entries[name].signed)


def hand_made(sums, signed, weight=None, keep=None):
    """Scores of one matrix [1, n]."""
    sums, signed = (torch.tensor([each], dtype=torch.float32) for each in (sums, signed))
    weight = torch.ones_like(sums) if weight is None else torch.tensor([weight])
    entry = ScoreEntry.of(sums, weight, signed=signed)
    scores = Scores({"layers.0.w.weight": entry}, granularity="weight", num_examples=1)
    return scores if keep is None else scores.keep(keep)


@pytest.mark.parametrize("keep", [None, 0.9])
def test_same_and_opposite_divide_the_coupled_entries(keep):
    weight = [1.0, -1.0, 1.0, -1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    first = hand_made(
        [9, 8, 7, 6, 5, 4, 3, 0, 0, 0], [1, 1, -1, 1, 0, 2, -2, 0, 0, 0], weight, keep
    )
    second = hand_made(
        [9, 8, 7, 6, 5, 0, 0, 4, 3, 1], [1, 1, 1, -1, 1, 0, 0, 1, 1, 1], weight, keep
    )
    # Of both the top 5, whose signs are + - - - 0 and + - + + +.
    masks = {
        signs: fastdean.couple(first, second, ratio=0.5, signs=signs)
        for signs in ("any", "same", "opposite")
    }
    indices = {signs: mask.entries["layers.0.w.weight"].index for signs, mask in masks.items()}
    assert {signs: index.tolist() for signs, index in indices.items()} == {
        "any": [0, 1, 2, 3, 4],
        "same": [0, 1],
        "opposite": [2, 3, 4],
    }
    for signs, mask in masks.items():
        (row,) = mask.table
        assert (row["same"], row["opposite"]) == (2, 3)
        # One + in five, and four in five.
        assert row["same_by_chance"] == pytest.approx(5 * (0.2 * 0.8 + 0.8 * 0.2))
        assert mask.summary().total["same"] == 2 and "same by chance" in str(mask.summary())
        assert mask.manifest.get("signs", "any") == signs


def test_a_mask_with_signs_comes_back_from_its_folder(tmp_path):
    scores = hand_made([3, 2, 1], [1, -1, 1])
    mask = fastdean.couple(scores, hand_made([3, 2, 1], [1, 1, 1]), ratio=1.0, signs="same")
    mask.save_pretrained(tmp_path / "mask")
    found = fastdean.NeuronMask.from_pretrained(tmp_path / "mask")
    assert found.table == mask.table and found.manifest["signs"] == "same"


def test_random_draws_as_many_as_there_are_of_these_signs():
    first, second = hand_made([9, 8, 7, 1], [1, 1, -1, 1]), hand_made([9, 8, 7, 1], [1, 1, 1, 1])
    options = {"ratio": 0.75, "rule": "random"}
    assert len(fastdean.couple(first, second, signs="same", **options)) == 2
    assert len(fastdean.couple(first, second, signs="opposite", **options)) == 1
    assert len(fastdean.couple(first, second, **options)) == 3


def test_what_cannot_be_chosen_by_signs_is_refused():
    signed, plain = hand_made([2, 1], [1, 1]), hand_made([2, 1], [1, 1])
    plain.entries = {
        name: ScoreEntry.of(entry.sums, entry.weight) for name, entry in plain.entries.items()
    }
    with pytest.raises(ValueError, match="^signs must be one of any, same, opposite, got 'both'"):
        fastdean.couple(signed, signed, ratio=1.0, signs="both")
    text = "^signs must be 'any' for scores without signs, got 'same' and none in the second "
    with pytest.raises(ValueError, match=text + "scores; score both with signs=True"):
        fastdean.couple(signed, plain, ratio=1.0, signs="same")
    for rule in ("released", "union", "first", "second"):
        with pytest.raises(ValueError, match=f"^signs must be 'any' with rule '{rule}', which"):
            fastdean.couple(signed, signed, ratio=1.0, signs="same", rule=rule)
    assert "same" not in fastdean.couple(signed, plain, ratio=1.0).table[0]


def test_agreement_of_empty_sets_is_none():
    scores, none = hand_made([2, 1], [1, 1]), torch.empty(0, dtype=torch.int64)
    found = Agreement.of("layers.0.w.weight", scores, scores, (none, none))
    assert found.counts() == {"same": 0, "opposite": 0, "same_by_chance": 0.0}


def test_held_pairs_that_are_summed_after_all_have_signs():
    from test_holding import Case

    case = Case(signs=True)
    held = case.held(tokens=9)
    for (x, g), segments in zip(case.batches, case.segments, strict=True):
        held.add_(x, g, segments)
    entry = held.entry(case.weight)
    assert isinstance(held, held_pairs.HeldPairs) and entry.index is None
    dense = torch.zeros(40, 30)
    total = torch.zeros(40, 30, dtype=torch.float64)
    for (x, g), segments in zip(case.batches, case.segments, strict=True):
        accumulate_importance_(dense, x, g, segments)
        total += sum(g[a:b].double().T @ x[a:b].double() for a, b in segments.tolist())
    torch.testing.assert_close(entry.sums, dense, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entry.signed.double(), total, rtol=1e-5, atol=1e-5)
