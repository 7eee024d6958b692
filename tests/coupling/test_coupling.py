"""`couple`: the rules against their definitions on toy sets, selection limits, controls, units."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_score import batches, make_examples
from tiny_models import MODELS

import fastdean
from fastdean.coupling.results.score_entry import ScoreEntry
from fastdean.coupling.results.scores import Scores
from fastdean.coupling.selection.rules import RULES
from fastdean.coupling.selection.top_entries import count, smallest_ratio
from fastdean.coupling.sets import overlap
from fastdean.masks import NeuronMask


def scores_from(lists, numel=24, name="layers.0.mlp.up.weight", keep=None, weight=None):
    """Scores of one matrix whose top-k set is exactly `lists`."""
    sums = torch.full((numel,), 1e-6)
    sums[torch.tensor(lists)] = 1.0
    weight = torch.ones(numel) if weight is None else weight
    entry = ScoreEntry.of(sums.reshape(4, -1), weight.reshape(4, -1))
    scores = Scores({name: entry}, granularity="weight", num_examples=1)
    return scores if keep is None else scores.keep(keep)


A, B, G = [2, 5, 9, 14], [3, 5, 14, 20], [5, 20]
RATIO = (4.5 / 24, 4.5 / 24, 2.5 / 24)


def selected(mask):
    return [i for entry in mask.entries.values() for i in entry.index.tolist()]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("paper", [14]),
        ("released", [2, 9]),
        ("first", [2, 9, 14]),
        ("second", [3, 14]),
        ("union", [2, 3, 9, 14]),
    ],
)
def test_rules_on_the_toy_case(rule, expected):
    mask = fastdean.couple(
        scores_from(A), scores_from(B), general=scores_from(G), ratio=RATIO, rule=rule
    )
    assert selected(mask) == expected


def test_the_name_of_a_model_and_what_overlap_spares():
    with pytest.raises(TypeError, match=r"got str 'folder'; load it first .*fastdean patch"):
        fastdean.couple(scores_from(A), scores_from(B), ratio=RATIO, model="folder")
    several = [scores_from(G), scores_from([14])]
    (row,) = overlap(scores_from(A), scores_from(B), general=several, ratios=[4.5 / 24])
    mask = fastdean.couple(scores_from(A), scores_from(B), general=several, ratio=4.5 / 24)
    assert (row["coupled"], row["kept"]) == (2, len(mask)) and len(mask) == 0


def test_released_takes_from_the_first_list():
    mask = fastdean.couple(
        scores_from(B), scores_from(A), general=scores_from(G), ratio=RATIO, rule="released"
    )
    assert selected(mask) == [3, 14]


def test_released_refuses_lists_of_unequal_length():
    with pytest.raises(ValueError, match="equally many entries"):
        fastdean.couple(
            scores_from(A), scores_from(B), ratio=(4.5 / 24, 3.5 / 24, 0.1), rule="released"
        )


def test_random_is_seeded_as_large_as_paper_and_outside_general():
    def draw(seed):
        mask = fastdean.couple(
            scores_from(A),
            scores_from(A),
            general=scores_from(G),
            ratio=RATIO,
            rule="random",
            seed=seed,
        )
        return selected(mask)

    draws = [draw(seed) for seed in range(40)]
    assert draws[0] == draw(0)
    assert all(len(set(d)) == 3 and not set(d) & set(G) for d in draws)
    assert set().union(*draws) == set(range(24)) - set(G)


def test_several_general_sets_are_all_spared():
    mask = fastdean.couple(
        scores_from(A),
        scores_from(A),
        general=[scores_from([5]), scores_from([14])],
        ratio=(4.5 / 24, 4.5 / 24, 1.5 / 24),
    )
    assert selected(mask) == [2, 9]


def test_summary_counts_candidates_coupled_removed_kept():
    mask = fastdean.couple(scores_from(A), scores_from(B), general=scores_from(G), ratio=RATIO)
    (row,) = mask.table
    assert (row["layer"], row["module"]) == (0, "mlp.up")
    assert [row[k] for k in ("first", "second", "coupled", "removed", "kept")] == [4, 4, 2, 1, 1]


def test_ratio_that_selects_nothing_names_the_smallest_that_would():
    with pytest.raises(ValueError, match=r"smallest that would is 0\.042, or set min_k=1"):
        fastdean.couple(scores_from(A), scores_from(B), ratio=0.01)
    mask = fastdean.couple(scores_from([5]), scores_from([5]), ratio=0.01, min_k=1)
    assert selected(mask) == [5]


def test_a_ratio_of_the_whole_model_is_not_mended_by_min_k():
    with pytest.raises(ValueError, match=r"the 24 of all matrices; .* would is 0\.042$"):
        fastdean.couple(scores_from(A), scores_from(B), ratio=0.01, scope="model")


def test_the_smallest_ratio_selects_one_entry_and_nothing_shorter_does():
    for largest in [*range(1, 3000), 4096 * 11008, 151936 * 8192]:
        ratio = smallest_ratio(largest)
        shown = f"{ratio:g}"
        assert count(largest, float(shown), 0) == 1
        mantissa, exponent = f"{ratio:.1e}".split("e")
        below = float(f"{float(mantissa) - 0.1:.1f}e{exponent}")
        assert count(largest, below, 0) == 0, (largest, ratio)


def test_only_positive_entries_are_selected():
    weight = torch.ones(24)
    weight[A[0]] = 0.0
    mask = fastdean.couple(scores_from(A, weight=weight), scores_from(A, weight=weight), ratio=1.0)
    assert selected(mask) == [i for i in range(24) if i != A[0]]


def test_ties_go_to_the_lowest_index_of_the_earliest_matrix():
    entries = {
        f"layers.{i}.mlp.up.weight": ScoreEntry.of(torch.ones(2, 5), torch.ones(2, 5))
        for i in range(2)
    }
    scores = Scores(entries, granularity="weight", num_examples=3)
    per_matrix = fastdean.couple(scores, scores, ratio=0.3)
    assert [e.index.tolist() for e in per_matrix.entries.values()] == [[0, 1, 2], [0, 1, 2]]
    whole = fastdean.couple(scores, scores, ratio=0.6, scope="model")
    assert [e.index.tolist() for e in whole.entries.values()] == [list(range(10)), [0, 1]]


def test_sparse_scores_give_the_dense_mask_and_refuse_what_they_cannot():
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(24, generator=generator)

    def random_scores(seed):
        sums = torch.rand(4, 6, generator=torch.Generator().manual_seed(seed))
        entry = ScoreEntry.of(sums, weight.reshape(4, 6))
        return Scores({"layers.0.mlp.up.weight": entry}, granularity="weight", num_examples=2)

    dense = [random_scores(seed) for seed in range(3)]
    sparse = [scores.keep(0.5) for scores in dense]
    for rule in ("paper", "released", "union", "random"):
        args = dict(ratio=0.4, rule=rule)
        expected = fastdean.couple(*dense[:2], general=dense[2], **args)
        got = fastdean.couple(
            *sparse[:2],
            general=sparse[2],
            model=_Holder(weight) if rule == "random" else None,
            **args,
        )
        assert got == expected
    with pytest.raises(ValueError, match="score again with a larger keep_top"):
        fastdean.couple(*sparse[:2], ratio=0.8)
    with pytest.raises(ValueError, match="scope='model' must have dense scores"):
        fastdean.couple(*sparse[:2], ratio=0.4, scope="model")


@pytest.mark.gpu
@pytest.mark.parametrize("keep", [None, 0.5])
@pytest.mark.parametrize("rule", RULES)
def test_scores_on_several_devices_give_the_mask_of_those_on_one(rule, keep):
    def moved(scores, device):
        entries = {
            name: replace(
                entry,
                **{
                    part: getattr(entry, part).to(device)
                    for part in ("sums", "weight", "index")
                    if getattr(entry, part) is not None
                },
            )
            for name, entry in scores.entries.items()
        }
        return Scores(entries, granularity="weight", num_examples=1, keep_top=scores.keep_top)

    weight = torch.randn(24, generator=torch.Generator().manual_seed(1))
    scores = [scores_from(lists, weight=weight, keep=keep) for lists in (A, B, G)]
    model = _Holder(weight)
    for scope in ("matrix", "model") if keep is None else ("matrix",):
        options = {"ratio": 0.2 if rule == "released" else RATIO, "rule": rule, "scope": scope}
        expected = fastdean.couple(*scores[:2], general=scores[2], model=model, **options)
        for devices in (("cuda", "cuda", "cuda"), ("cuda", "cpu", "cuda"), ("cpu", "cuda", "cpu")):
            first, second, general = map(moved, scores, devices)
            index = first.select(next(iter(first)), 3)
            assert index.device.type == devices[0]
            mask = fastdean.couple(first, second, general=general, model=model, **options)
            assert mask == expected and mask.table == expected.table


def test_random_on_sparse_scores_asks_for_the_model_where_a_drawn_weight_is_not_held():
    dense = scores_from(A)
    sparse = dense.keep(0.2)

    def draw(scores, seed, model=None):
        mask = fastdean.couple(scores, scores, ratio=0.15, rule="random", seed=seed, model=model)
        return set(selected(mask))

    held = set(sparse.index("layers.0.mlp.up.weight").tolist())
    seed = next(seed for seed in range(100) if draw(dense, seed) - held)
    with pytest.raises(ValueError, match="pass model="):
        draw(sparse, seed)
    assert draw(sparse, seed, _Holder(torch.ones(24))) == draw(dense, seed)


class _Holder(torch.nn.Module):
    """A model with one parameter under the name the toy scores use."""

    def __init__(self, weight):
        super().__init__()
        up = torch.nn.Module()
        up.weight = torch.nn.Parameter(weight.reshape(4, -1).clone())
        layer = torch.nn.Module()
        layer.mlp = torch.nn.Module()
        layer.mlp.up = up
        self.layers = torch.nn.ModuleList([layer])


def test_a_model_without_the_weights_is_refused():
    with pytest.raises(
        ValueError, match=r"was scored, got one without layers\.0\.mlp\.up\.weight; "
    ):
        fastdean.couple(scores_from(A), scores_from(B), ratio=0.5, model=torch.nn.Linear(2, 2))


@pytest.mark.parametrize("granularity", ["weight", "unit"])
def test_offloaded_weights_give_the_mask_of_those_in_memory(granularity):
    from accelerate import cpu_offload

    def coupled(scores, model):
        return fastdean.couple(scores, scores, ratio=0.1, rule="random", seed=1, model=model)

    model, other = MODELS["llama"](), MODELS["llama"](seed=1)
    scores = fastdean.score(
        model, batches(make_examples(), 4), granularity=granularity, keep_top=0.2, progress=False
    )
    expected = coupled(scores, model)
    for offloaded in (model, other):
        cpu_offload(offloaded, execution_device=torch.device("cpu"))
    assert model.get_parameter(next(iter(scores))).is_meta
    assert coupled(scores, model) == expected and len(expected) > 0
    with pytest.raises(ValueError, match="model must be the one that was scored, got other values"):
        coupled(scores, other)


def test_a_model_that_was_never_loaded_is_refused():
    scores = scores_from(A)
    with pytest.raises(
        ValueError, match="must have weights, got meta tensors without an offload hook; load it"
    ):
        fastdean.couple(scores, scores, ratio=0.2, model=_Holder(torch.ones(24)).to("meta"))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"ratio": 0}, "ratio must be one number above 0"),
        ({"ratio": (0.1, 0.2)}, "ratio must be one number above 0"),
        ({"ratio": float("nan")}, "ratio must be one number above 0"),
        ({"ratio": True}, "ratio must be one number above 0"),
        ({"ratio": "0.5"}, "ratio must be one number above 0"),
        ({"ratio": torch.tensor(0.5)}, "ratio must be one number above 0"),
        ({"ratio": 0.5, "rule": "both"}, "rule must be one of paper, released"),
        ({"ratio": 0.5, "scope": "layer"}, "scope must be 'matrix' or 'model'"),
        ({"ratio": 0.5, "min_k": -1}, "min_k must be at least 0"),
        ({"ratio": "0.1"}, "ratio must be one number above 0 .* got '0.1'; give it as a number"),
        ({"ratio": True}, "ratio must be one number above 0 .* got True; give it as a number"),
    ],
)
def test_bad_arguments_name_themselves(kwargs, message):
    with pytest.raises(ValueError, match=message):
        fastdean.couple(scores_from(A), scores_from(B), **kwargs)


@pytest.mark.parametrize("name", ["min_k", "seed"])
@pytest.mark.parametrize("value", [True, 1.0, "1"])
def test_min_k_and_seed_must_be_integers(name, value):
    with pytest.raises(TypeError, match=f"{name} must be an integer, got {value!r}; give an int"):
        fastdean.couple(scores_from(A), scores_from(B), ratio=0.5, **{name: value})


@pytest.mark.parametrize("ratio", [0, -0.1, 1.1, float("nan"), True, "0.5"])
def test_overlap_refuses_ratios_out_of_range(ratio):
    with pytest.raises(ValueError, match="ratios must be numbers above 0 and at most 1, got "):
        overlap(scores_from(A), scores_from(B), ratios=[0.5, ratio])


def test_overlap_refuses_scores_of_other_matrices():
    with pytest.raises(ValueError, match="scores must cover the same matrices"):
        overlap(scores_from(A), scores_from(B, name="layers.1.mlp.up.weight"), ratios=[0.5])


def test_scores_of_different_models_are_refused():
    other = scores_from(B, weight=torch.full((24,), 2.0))
    with pytest.raises(ValueError, match="must belong to the same weights"):
        fastdean.couple(scores_from(A), other, ratio=0.5)
    with pytest.raises(TypeError, match="couple takes Scores, got dict"):
        fastdean.couple(scores_from(A), {}, ratio=0.5)


def test_a_nan_score_names_its_matrix():
    bad = scores_from(A)
    bad.entries["layers.0.mlp.up.weight"].sums[1, 1] = float("nan")
    with pytest.raises(
        ValueError, match=r"scores of layers\.0\.mlp\.up\.weight: importance must be finite"
    ):
        fastdean.couple(bad, scores_from(B), ratio=0.5)


def test_weights_changed_since_scoring_are_noticed():
    weight = torch.ones(24)
    first = scores_from(A, weight=weight)
    weight[3] = 0.0
    with pytest.raises(RuntimeError, match="has changed since it was scored"):
        fastdean.couple(first, first, ratio=0.5)


def _unit_scores(model, seed):
    loader = batches(make_examples(seed), 3)
    return fastdean.score(model, loader, granularity="unit", progress=False)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_unit_mask_takes_the_units_out_of_the_function(name, tmp_path):
    model = MODELS[name]()
    first, second = _unit_scores(model, 1), _unit_scores(model, 2)
    mask = fastdean.couple(first, second, ratio=0.1)
    coupled = {
        n: sorted({*first.select(n, 6).tolist()} & {*second.select(n, 6).tolist()}) for n in first
    }
    assert sum(map(len, coupled.values())) > 0

    def silenced(units):
        def hook(module, args):
            inputs = args[0].clone()
            inputs[..., units] = 0.0
            return (inputs,)

        return hook

    input_ids = make_examples(3)[2][0][None]
    with torch.no_grad():
        unedited = model(input_ids).logits
        handles = [
            model.get_submodule(n.removesuffix(".weight")).register_forward_pre_hook(
                silenced(units)
            )
            for n, units in coupled.items()
        ]
        expected = model(input_ids).logits
        for handle in handles:
            handle.remove()
        with mask.applied(model):
            edited = model(input_ids).logits
        restored = model(input_ids).logits
    assert torch.equal(edited, expected)
    assert not torch.equal(edited, unedited)
    assert torch.equal(restored, unedited)

    kept = {row["name"]: (row["kept"], row["weights"]) for row in mask.table}
    assert kept == {n: (len(units), 32 * len(units)) for n, units in coupled.items()}
    units = sum(map(len, coupled.values()))
    assert repr(mask).startswith(f"NeuronMask({units} units ({32 * units} weights) in ")
    loaded = NeuronMask.from_pretrained(mask.save_pretrained(tmp_path / "mask"))
    assert (loaded, repr(loaded)) == (mask, repr(mask))
    caption, head, *_, total = str(loaded.summary()).splitlines()
    assert caption.startswith("counted in units")
    assert head.split()[-2:] == ["zeroed", "weights"]
    assert total.split()[-2:] == [str(units), str(32 * units)]
