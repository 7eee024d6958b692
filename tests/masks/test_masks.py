"""NeuronMask as a value: what it accepts, its set algebra, its numbers, its files."""

from __future__ import annotations

import re

import pytest
import torch
from tiny_masks import FIRST, SECOND, Stack, assert_bits, bits, flat, mask_of

from fastdean.files import storage
from fastdean.masks import MaskEntry, NeuronMask
from fastdean.masks import mask as masks

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.fixture
def model():
    return Stack()


@pytest.fixture
def mask(model):
    return mask_of(model, {FIRST: [0, 3, 35], SECOND: [7]})


@pytest.mark.parametrize(
    ("index", "original", "shape", "error", "text"),
    [
        ([3, 1], [1.0, 2.0], (2, 2), ValueError, "strictly ascending"),
        ([1, 1], [1.0, 2.0], (2, 2), ValueError, "strictly ascending"),
        ([1, 4], [1.0, 2.0], (2, 2), ValueError, r"within 0..3 for shape \[2, 2\], got 1..4"),
        ([-1, 1], [1.0, 2.0], (2, 2), ValueError, "within 0..3"),
        ([0], [1.0, 2.0], (2, 2), ValueError, r"one value per index \(1\), got 2"),
        ([0], [float("nan")], (2, 2), ValueError, "original must be finite"),
        ([[0]], [[1.0]], (2, 2), ValueError, "index must be 1-D and on the CPU, got 2-D"),
        ([0.5], [1.0], (2, 2), TypeError, "index must be torch.int64, got torch.float32"),
        ([0], [1], (2, 2), TypeError, "original must be .*, got torch.int64"),
    ],
)
def test_entry_is_validated(index, original, shape, error, text):
    with pytest.raises(error, match=text):
        MaskEntry(torch.tensor(index), torch.tensor(original), shape)


def test_entry_takes_tensors():
    with pytest.raises(TypeError, match="index must be a tensor, got list"):
        MaskEntry([0], torch.ones(1), (2, 2))


@pytest.mark.parametrize(
    ("scale", "error", "text"),
    [
        ("0", TypeError, "scale must be a number, got str"),
        (True, TypeError, "scale must be a number, got bool"),
        (float("inf"), ValueError, "scale must be finite, got inf"),
        (10**400, ValueError, "scale must be finite, got 1000"),
        (1e9, ValueError, "scale must keep every value finite in torch.float16"),
    ],
)
def test_scale_is_validated(scale, error, text):
    with pytest.raises(error, match=text):
        mask_of(Stack(torch.float16), {FIRST: [3]}, scale=scale)


def test_entries_are_validated():
    with pytest.raises(TypeError, match="entries must map .* to MaskEntry, got str -> Tensor"):
        NeuronMask({"a": torch.zeros(1)})


def test_negative_zero_scale_writes_positive_zeros(model):
    mask = mask_of(model, {FIRST: [0, 3]}, scale=-0.0)
    assert repr(mask).endswith("scale=0)")
    with mask.applied(model):
        assert not torch.signbit(flat(model, FIRST)[[0, 3]]).any()


def _indices(mask):
    return {name: entry.index.tolist() for name, entry in mask.entries.items()}


def test_set_algebra(model):
    left = mask_of(model, {FIRST: [0, 3, 35], SECOND: [7]})
    right = mask_of(model, {FIRST: [2, 3]})
    assert _indices(left | right) == {FIRST: [0, 2, 3, 35], SECOND: [7]}
    assert _indices(right | left) == {FIRST: [0, 2, 3, 35], SECOND: [7]}
    assert _indices(left & right) == {FIRST: [3]}
    assert _indices(left - right) == {FIRST: [0, 35], SECOND: [7]}
    assert _indices(right - left) == {FIRST: [2]}
    assert (left - right) | (left & right) == left
    assert len(left - left) == 0
    for combined in (left | right, left & right, left - right):
        before = bits(model)
        with combined.applied(model):
            pass
        assert_bits(model, before)
        assert combined.manifest["operation"] in "|&-"


@pytest.mark.parametrize("operate", ["__or__", "__and__", "__sub__"])
def test_masks_of_different_models_do_not_combine(model, operate):
    mask = mask_of(model, {FIRST: [3, 4]})
    with pytest.raises(ValueError, match="same originals .* got others in .* made on different"):
        getattr(mask, operate)(mask_of(Stack(seed=1), {FIRST: [4]}))
    with pytest.raises(ValueError, match="same scale .* got 0 and 0.5; use with_scale"):
        getattr(mask, operate)(mask.with_scale(0.5))
    with pytest.raises(ValueError, match="agree on the shape and dtype"):
        getattr(mask, operate)(mask_of(Stack(torch.float16), {FIRST: [4]}))
    assert getattr(mask, operate)(3) is NotImplemented


def test_equality(model, mask):
    assert mask == NeuronMask(mask.entries, manifest={"rule": "other"})
    assert mask != mask.with_scale(0.5)
    assert mask.with_scale(0.5).with_scale(0) == mask
    assert mask != mask_of(Stack(seed=1), {FIRST: [0, 3, 35], SECOND: [7]})
    assert mask != mask_of(model, {FIRST: [0, 3, 35]})
    assert mask != mask_of(model, {FIRST: [0, 3, 34], SECOND: [7]})
    assert mask != "mask"


def _row(name, layer, module, **counts):
    row = {"numel": 36, "k": 4, "first": 4, "second": 4, "coupled": 3, "removed": 1, "kept": 2}
    return {"name": name, "layer": layer, "module": module, **row, **counts}


@pytest.fixture
def table():
    return [
        _row(FIRST, 0, "mlp.up_proj", kept=3, coupled=5, removed=2),
        _row("layers.0.other", 0, "mlp.down_proj", kept=0),
        _row(SECOND, 1, "mlp.up_proj", kept=1),
    ]


def test_repr_and_size(mask, table):
    assert repr(mask) == "NeuronMask(4 weights in 2 matrices, scale=0)"
    mask = NeuronMask(
        mask.entries, scale=0.5, table=table, manifest={"rule": "paper", "ratio": 1e-5}
    )
    assert repr(mask) == (
        "NeuronMask(4 weights in 2 of 3 matrices, scale=0.5, rule='paper', ratio=1e-05)"
    )
    assert len(mask) == 4
    assert mask.names == [FIRST, SECOND]
    assert mask.nbytes == 4 * (8 + 4)


def test_summary_counts_by_layer_and_module(mask, table):
    summary = NeuronMask(mask.entries, table=table).with_scale(0.5).summary()
    sums = ("matrices", "first", "second", "coupled", "removed", "kept")
    assert [(row["layer"], *(row[key] for key in sums)) for row in summary.rows] == [
        (0, 2, 8, 8, 8, 3, 3),
        (1, 1, 4, 4, 3, 1, 1),
    ]
    assert [(row["module"], row["matrices"], row["kept"]) for row in summary.modules] == [
        ("mlp.up_proj", 2, 4),
        ("mlp.down_proj", 1, 0),
    ]
    assert [summary.total[key] for key in sums] == [3, 12, 12, 11, 4, 4]
    lines = str(summary).splitlines()
    assert [line.split() for line in lines] == [
        ["layer", "matrices", "first", "second", "coupled", "spared", "scaled"],
        ["0", "2", "8", "8", "8", "3", "3"],
        ["1", "1", "4", "4", "3", "1", "1"],
        ["total", "3", "12", "12", "11", "4", "4"],
    ]
    assert len({len(line) for line in lines}) == 1
    zeroed = str(NeuronMask(mask.entries, table=table).summary()).splitlines()[0].split()
    assert zeroed[-2:] == ["spared", "zeroed"]


def test_summary_without_a_table_knows_only_what_is_kept(mask):
    summary = mask.summary()
    assert [(row["layer"], row["kept"], row["coupled"]) for row in summary.rows] == [
        (0, 3, None),
        (1, 1, None),
    ]
    assert str(summary).splitlines()[-1].split() == ["total", "2", "-", "-", "-", "-", "4"]
    entry = MaskEntry(torch.tensor([0]), torch.ones(1), (2, 2))
    names = ["model.layers.12.mlp.down_proj.weight", "lm_head.weight"]
    rows = NeuronMask(dict.fromkeys(names, entry)).summary()
    assert [row["layer"] for row in rows.rows] == [12, None]
    assert [row["module"] for row in rows.modules] == ["mlp.down_proj", "lm_head"]


def test_table_must_agree_with_the_entries(mask, table):
    with pytest.raises(ValueError, match="kept=9 for 'layers.0.weight', which has 3 weights"):
        NeuronMask(mask.entries, table=[{**table[0], "kept": 9}, *table[1:]])
    with pytest.raises(ValueError, match="a row without 'kept'"):
        NeuronMask(mask.entries, table=[{k: v for k, v in table[0].items() if k != "kept"}])
    with pytest.raises(ValueError, match="one for every entry, got 2 rows of 2 names"):
        NeuronMask(mask.entries, table=table[:2])
    with pytest.raises(ValueError, match="exactly one row per matrix"):
        NeuronMask(mask.entries, table=[*table, table[0]])


def test_units_are_counted_as_units(mask, table):
    rows = [
        {**table[0], "kept": 1, "weights": 3},
        {**table[1], "weights": 0},
        {**table[2], "kept": 1, "weights": 1},
    ]
    by_unit = NeuronMask(mask.entries, table=rows, manifest={"granularity": "unit"})
    assert repr(by_unit) == "NeuronMask(2 units (4 weights) in 2 of 3 matrices, scale=0)"
    summary = by_unit.summary()
    assert summary.unit == "units"
    assert [(row["kept"], row["weights"]) for row in summary.rows] == [(1, 3), (1, 1)]
    assert str(summary).splitlines()[-1].split() == ["total", "3", "12", "12", "11", "4", "2", "4"]
    with pytest.raises(ValueError, match="got weights=2 for 'layers.0.weight', which has 3 weigh"):
        NeuronMask(mask.entries, table=[{**rows[0], "weights": 2}, *rows[1:]])
    known_weights = NeuronMask(mask.entries, manifest={"granularity": "unit"})
    assert repr(known_weights) == "NeuronMask(4 weights in 2 matrices, scale=0)"
    assert known_weights.summary().unit == "weights"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saved_mask_is_the_same_mask(tmp_path, dtype, table):
    model = Stack(dtype)
    places = {FIRST: [0, 3, 35], SECOND: [7]}
    mask = mask_of(model, places, scale=0.25, manifest={"rule": "paper"}, table=table)
    loaded = NeuronMask.from_pretrained(mask.save_pretrained(tmp_path / "mask"))
    assert loaded == mask
    assert loaded.names == mask.names
    assert loaded.manifest == mask.manifest
    assert loaded.table == mask.table
    before = bits(model)
    mask.apply_(model)
    loaded.restore_(model)
    assert_bits(model, before)


def test_saving_over_a_mask_needs_overwrite(tmp_path, mask):
    mask.save_pretrained(tmp_path / "mask")
    with pytest.raises(ValueError, match="pass overwrite=True"):
        mask.with_scale(0.5).save_pretrained(tmp_path / "mask")
    assert NeuronMask.from_pretrained(tmp_path / "mask") == mask
    mask.with_scale(0.5).save_pretrained(tmp_path / "mask", overwrite=True)
    assert NeuronMask.from_pretrained(tmp_path / "mask").scale == 0.5


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda config, tensors: config.pop("scale"), "must hold the field scale, got no such fi"),
        (lambda config, tensors: config.update(scale="x"), "scale as a finite number, got 'x';"),
        (lambda config, tensors: config.update(scale=10**400), "scale as a finite number, got 10"),
        (
            lambda config, tensors: config["shapes"].update({FIRST: [2, 2]}),
            f"must hold an entry for {FIRST!r}, got one that contradicts itself (index must be wit",
        ),
        (
            lambda config, tensors: config["shapes"].update({FIRST: [2, True]}),
            f"shapes[{FIRST!r}][1] as a whole number of at least 0, got True;",
        ),
        (
            lambda config, tensors: config["shapes"].pop(FIRST),
            f"must hold '{FIRST}.index' as a part of the mask, got another tensor;",
        ),
        (
            lambda config, tensors: tensors.pop(f"{SECOND}.original"),
            f"must hold '{SECOND}.original' as a part of the mask, got no such tensor;",
        ),
        (
            lambda config, tensors: tensors.update({f"{FIRST}.index": torch.tensor([3, 0, 35])}),
            "contradicts itself (index must be strictly ascending",
        ),
        (
            lambda config, tensors: config.update(table=[{"name": FIRST}]),
            "must hold the field table[0].layer, got no such field;",
        ),
    ],
)
def test_loading_validates_again(tmp_path, mask, damage, text):
    config, tensors = storage.read_folder(mask.save_pretrained(tmp_path / "good"), kind="mask")
    damage(config, tensors)
    storage.write_folder(tmp_path / "bad", config, tensors, kind="mask")
    with pytest.raises(ValueError, match=re.escape(text)):
        NeuronMask.from_pretrained(tmp_path / "bad")


def test_scores_are_not_a_mask(tmp_path):
    storage.write_folder(tmp_path / "s", {}, {}, kind="scores")
    with pytest.raises(ValueError, match="of kind 'mask', got .* which is of kind 'scores'"):
        NeuronMask.from_pretrained(tmp_path / "s")


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_push_sends_a_loadable_folder_and_a_card_with_a_warning(tmp_path, mask, monkeypatch, way):
    sent = {}

    def push_folder(path, repo_id, *, commit_message, card_text, private=None, token=None):
        sent.update(mask=NeuronMask.from_pretrained(path), repo_id=repo_id, card=card_text)
        return "address"

    monkeypatch.setattr(masks.storage, "push_folder", push_folder)
    if way == "push_to_hub":
        assert mask.push_to_hub("me/mask", private=True) == "address"
    else:
        mask.save_pretrained(tmp_path / "mask", push_to_hub=True, repo_id="me/mask")
    assert sent["mask"] == mask
    assert sent["repo_id"] == "me/mask"
    assert "Content warning" in sent["card"]
    assert 'from_pretrained("me/mask")' in sent["card"]
    assert repr(mask) in sent["card"]
