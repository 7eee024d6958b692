"""Toggling a mask again and again, on a model that may have changed meanwhile."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
from tiny_masks import FIRST, SECOND, Stack, assert_bits, bits, flat, mask_of
from torch import nn

from fastdean.masks import NeuronMask


@pytest.fixture
def model():
    return Stack()


@pytest.fixture
def mask(model):
    """A mask that was applied and restored before."""
    mask = mask_of(model, {FIRST: [0, 3, 35], SECOND: [7]}, scale=0.5)
    with mask.applied(model):
        pass
    return mask


def _toggles(model, mask):
    """Every way to toggle does what it should, seen through the parameters' names."""
    before = bits(model)
    places = {name: entry.index for name, entry in mask.entries.items()}
    named = dict(model.named_parameters(remove_duplicate=False))
    originals = {n: named[n].detach().reshape(-1)[i].clone() for n, i in places.items()}
    for _ in range(2):
        mask.apply_(model)
        for name, index in places.items():
            found = named[name].detach().reshape(-1)[index]
            assert torch.equal(found, originals[name] * mask.scale)
        mask.restore_(model)
        assert_bits(model, before)
        with mask.applied(model):
            assert torch.equal(
                named[FIRST].detach().reshape(-1)[places[FIRST]], originals[FIRST] * mask.scale
            )
        assert_bits(model, before)


def _moved(model):
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def _laid_out_otherwise(model):
    weight = model.layers[0].weight
    weight.data = weight.data.t().contiguous().t()


def _into_a_larger_tensor(model):
    larger = torch.zeros(8, 9)
    larger[1:7, 2:8] = model.layers[0].weight.data
    model.layers[0].weight.data = larger[1:7, 2:8]


def _converted_and_back(model):
    model.double().float()


def _another_parameter(model):
    model.layers[1].weight = nn.Parameter(model.layers[1].weight.data)


def _another_module(model):
    model.layers[1] = copy.deepcopy(model.layers[1])


def _wrapped(model):
    model.layers[0] = torch.compile(model.layers[0], backend="eager")


@pytest.mark.parametrize(
    "change",
    [
        _moved,
        _laid_out_otherwise,
        _into_a_larger_tensor,
        _converted_and_back,
        _another_parameter,
        _another_module,
    ],
)
def test_a_model_that_has_moved_is_edited_where_it_is(model, mask, change):
    before = bits(model)
    old = model.layers[0].weight.data
    change(model)
    _toggles(model, mask)
    mask.apply_(model)
    if model.layers[0].weight.data_ptr() != old.data_ptr():
        assert torch.equal(old, Stack().layers[0].weight)
    change(model)
    mask.restore_(model)
    assert_bits(model, before)


def test_a_wrapped_layer_is_found(model, mask):
    _wrapped(model)
    mask.apply_(model)
    assert flat(model.layers[0]._orig_mod, "weight")[3] == flat(Stack(), FIRST)[3] * 0.5
    mask.restore_(model)
    assert torch.equal(model.layers[0]._orig_mod.weight, Stack().layers[0].weight)


@pytest.mark.parametrize("when", ["restored", "applied"])
def test_memory_that_was_freed_is_not_touched(model, mask, when):
    if when == "applied":
        mask.apply_(model)
    old = model.layers[0].weight.data
    kept = old.clone()
    model.layers[0].weight.data = torch.full((6, 6), 3.0)
    with pytest.raises((ValueError, RuntimeError), match=f"masked weights of '{FIRST}'"):
        (mask.restore_ if when == "applied" else mask.apply_)(model)
    assert torch.equal(old, kept)
    assert model.layers[0].weight.eq(3).all()


def test_a_layer_taken_out_of_the_list_is_missed(model, mask):
    del model.layers[0]
    first = model.layers[0].weight.detach().clone()
    with pytest.raises(ValueError, match=f"must have a parameter '{SECOND}', got none"):
        mask.apply_(model)
    assert torch.equal(model.layers[0].weight, first)


def test_a_parameter_that_became_none_is_missed(model, mask):
    model.layers[1].weight = None
    with pytest.raises(ValueError, match=f"must have a parameter '{SECOND}', got none"):
        mask.apply_(model)


@pytest.mark.parametrize("value", [9.0, float("nan")])
def test_a_changed_weight_is_seen_and_nothing_is_written(model, mask, value):
    model.layers[1].weight.data[1, 1] = value
    before = bits(model)
    with pytest.raises(ValueError, match=rf"others at 1 of 1 masked weights of '{SECOND}'"):
        mask.apply_(model)
    assert_bits(model, before)
    model.layers[1].weight.data[1, 1] = flat(Stack(), SECOND)[7]
    mask.apply_(model)
    model.layers[1].weight.data[1, 1] = value
    changed = bits(model)
    with pytest.raises(RuntimeError, match=rf"1 of 1 masked weights of '{SECOND}' changed since"):
        mask.restore_(model)
    assert_bits(model, changed)


def test_tying_and_untying_is_seen(model):
    model.layers[1].weight = model.layers[0].weight
    both = mask_of(model, {FIRST: [1, 3], SECOND: [3, 5]}, scale=0.5)
    _toggles(model, both)
    model.layers[1].weight = nn.Parameter(model.layers[0].weight.data.clone())
    _toggles(model, both)
    both.apply_(model)
    assert flat(model, FIRST)[5] == flat(Stack(), FIRST)[5]
    both.restore_(model)
    model.layers[1].weight = nn.Parameter(model.layers[0].weight.data)
    _toggles(model, both)


def test_nested_masks_undo_in_order_however_often(model, mask):
    inner = mask_of(model, {FIRST: [2, 3], SECOND: [1]}, scale=0.0)
    before = bits(model)
    for _ in range(3):
        with mask.applied(model):
            between = bits(model)
            with inner.applied(model):
                assert flat(model, FIRST)[3] == 0
                with pytest.raises(RuntimeError, match="restore that one first"):
                    mask.restore_(model)
            assert_bits(model, between)
        with inner.applied(model):
            assert flat(model, FIRST)[35] != 0
        assert_bits(model, before)


def test_an_equal_mask_restores(model, mask):
    before = bits(model)
    for _ in range(2):
        mask.apply_(model)
        NeuronMask(mask.entries, scale=0.5).restore_(model)
        assert_bits(model, before)


def test_each_scale_is_its_own(model, mask):
    off = mask.with_scale(0.0)
    for _ in range(2):
        with mask.applied(model):
            assert flat(model, FIRST)[3] == flat(Stack(), FIRST)[3] * 0.5
        with off.applied(model):
            assert flat(model, FIRST)[3] == 0


def test_a_toggled_weight_is_a_modified_one_for_autograd(model, mask):
    x = torch.randn(2, 6, requires_grad=True)
    loss = model(x).square().sum()
    with mask.applied(model):
        pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    model(x).square().sum().backward()


def test_toggling_under_another_default_device(model, mask):
    fresh = mask_of(model, {FIRST: [0, 5], SECOND: [7]}, scale=0.0)
    for each in (mask, fresh):
        before = bits(model)
        for _ in range(2):
            with torch.device("meta"):
                each.apply_(model)
            assert float(model.get_parameter(SECOND).detach().reshape(-1)[7]) == (
                each.scale * float(each.entries[SECOND].original[0])
            )
            with torch.device("meta"):
                each.restore_(model)
            assert_bits(model, before)


def test_a_model_made_in_inference_mode_is_not_edited_outside_of_it():
    with torch.inference_mode():
        model = Stack()
        mask = mask_of(model, {FIRST: [0, 3]}, scale=0.5)
        for _ in range(2):
            with mask.applied(model):
                pass
    before = bits(model)
    with pytest.raises(ValueError, match="written in place, got one made in inference mode, outsi"):
        mask.apply_(model)
    assert_bits(model, before)


def test_toggling_inside_inference_mode(model, mask):
    with torch.inference_mode():
        _toggles(model, mask)
        made_inside = Stack()
        again = mask_of(made_inside, {FIRST: [3], SECOND: [4]}, scale=0.25)
        _toggles(made_inside, again)


def test_an_interrupt_after_writing_is_rolled_back(model, mask, monkeypatch):
    before = bits(model)

    def interrupt_once(tensors):
        patch.undo()
        raise KeyboardInterrupt

    for act in (mask.apply_, mask.restore_):
        with monkeypatch.context() as patch:
            patch.setattr("fastdean.ops.mask.note_writes", interrupt_once)
            with pytest.raises(KeyboardInterrupt):
                act(model)
        assert_bits(model, before)
        with mask.applied(model):
            assert flat(model, FIRST)[3] == flat(Stack(), FIRST)[3] * 0.5
        mask.apply_(model)
        before = bits(model)
    mask.restore_(model)
    assert_bits(model, bits(Stack()))


def test_nothing_of_a_model_or_mask_is_kept_alive():
    model = Stack()
    mask = mask_of(model, {FIRST: [3]})
    with mask.applied(model):
        pass
    replaced = weakref.ref(model.layers[1])
    model.layers[1] = nn.Linear(6, 6)
    gone = [weakref.ref(each) for each in (model, model.layers[0].weight, mask)]
    gc.collect()
    assert replaced() is None
    del model, mask
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3


def test_two_threads_toggle_two_models():
    models = [Stack(seed=seed) for seed in range(2)]
    masks = [mask_of(m, {FIRST: [0, 3, 35], SECOND: [7]}) for m in models]
    before = [bits(model) for model in models]
    failures = []

    def toggle(model, mask):
        try:
            for _ in range(200):
                with mask.applied(model):
                    assert flat(model, FIRST)[35] == 0
                assert flat(model, FIRST)[35] != 0
        except BaseException as error:
            failures.append(error)

    threads = [
        threading.Thread(target=toggle, args=each) for each in zip(models, masks, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    for model, expected in zip(models, before, strict=True):
        assert_bits(model, expected)


def test_a_model_computes_with_the_edit_inside_of_autocast(model, mask):
    """Which goes on with what it cast the weights to before, where they take a gradient."""
    x = torch.randn(3, model.layers[0].in_features)
    with torch.autocast("cpu", torch.bfloat16):
        before = model.layers[0](x)
        with mask.applied(model):
            edited = model.layers[0](x)
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                expected = model.layers[0](x)
        after = model.layers[0](x)
    assert torch.equal(edited, expected) and not torch.equal(edited, before)
    assert torch.equal(after, before)
