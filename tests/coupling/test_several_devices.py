"""Tensors of several devices in one call: each device's share, one call each, all or nothing.

Two devices are played by one: what sorts tensors by their device is made to see two, and of a model
on two no operation may mix what lies on one with what lies on the other.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pretended_devices import Devices
from tiny_data import batches, make_examples
from tiny_experts import experts_model
from tiny_masks import FIRST, SECOND, Stack, assert_bits, bits, flat, mask_of
from tiny_models import llama

import fastdean
from fastdean.models.attention.segment_products import Segments
from fastdean.ops import _dispatch, gather_at, mask, write_at_, zero_at_

# Equal in type, so that the CPU's implementations run, and different as keys.
DEVICES = torch.device("cpu"), torch.device("cpu", 0)
INDICES = [torch.tensor(each) for each in ([1], [0, 2], [3, 4], [], [5])]


@pytest.fixture(params=["reference", "native"])
def impl(request, extension_built):
    if request.param == "native" and not extension_built:
        pytest.skip("an install without the extension is under test")
    return request.param


@pytest.fixture
def two_devices(monkeypatch):
    """Tensors lie on two devices in turn."""

    def in_turn(tensors):
        groups = {}
        for position in range(len(tensors)):
            groups.setdefault(DEVICES[position % 2], []).append(position)
        return groups

    monkeypatch.setattr(mask, "_by_device", in_turn)


@pytest.fixture
def calls(monkeypatch):
    """[(device, addresses of its tensors)] of every call of an implementation."""
    made, right = [], _dispatch.choose

    def choose(op, device, impl=None):
        choice = right(op, device, impl)

        def noted(tensors, *others):
            made.append((device, [tensor.data_ptr() for tensor in tensors]))
            return choice.callable(tensors, *others)

        return replace(choice, callable=noted)

    monkeypatch.setattr(_dispatch, "choose", choose)
    return made


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.bfloat16)
    return [torch.randn(3, 2, generator=generator).to(dtype) for dtype in dtypes]


def indices():
    return [index.long() for index in INDICES]


def expected(tensors):
    return [tensor.flatten()[index] for tensor, index in zip(tensors, indices(), strict=True)]


def one_call_each(tensors):
    addresses = [tensor.data_ptr() for tensor in tensors]
    return [(DEVICES[0], addresses[0::2]), (DEVICES[1], addresses[1::2])]


def same(left, right):
    return all(torch.equal(*pair) for pair in zip(left, right, strict=True))


def test_tensors_are_sorted_by_the_device_they_lie_on():
    devices = ["cpu", "meta", "cpu", "meta", "meta"]
    groups = mask._by_device([torch.empty(1, device=device) for device in devices])
    assert groups == {torch.device("cpu"): [0, 2], torch.device("meta"): [1, 3, 4]}


@pytest.mark.usefixtures("two_devices")
def test_what_is_gathered_comes_in_the_order_of_the_tensors(weights, impl, calls):
    assert same(gather_at(weights, indices(), impl=impl), expected(weights))
    assert calls == one_call_each(weights)


@pytest.mark.usefixtures("two_devices")
def test_every_device_is_written_in_one_call(weights, impl, calls):
    negated = [-values for values in expected(weights)]
    write_at_(weights, indices(), negated, impl=impl)
    assert same(expected(weights), negated)
    assert calls == one_call_each(weights)
    del calls[:]
    zero_at_(weights, indices(), impl=impl)
    assert not any(values.any() for values in expected(weights))
    assert calls == one_call_each(weights)
    assert all(weight.count_nonzero() for weight in weights)


@pytest.mark.usefixtures("two_devices")
def test_nothing_is_written_where_one_device_has_no_implementation(weights, monkeypatch):
    right = _dispatch.choose

    def not_on_the_second(op, device, impl=None):
        if device == DEVICES[1]:
            raise RuntimeError("not today")
        return right(op, device, impl)

    monkeypatch.setattr(_dispatch, "choose", not_on_the_second)
    before = [weight.clone() for weight in weights]
    with pytest.raises(RuntimeError, match="not today"):
        zero_at_(weights, indices())
    with pytest.raises(RuntimeError, match="not today"):
        write_at_(weights, indices(), [-values for values in expected(weights)])
    assert same(weights, before)


@pytest.mark.usefixtures("two_devices")
def test_a_mask_over_two_devices_is_applied_to_both_or_to_none():
    model = Stack()
    edit = mask_of(model, {FIRST: [0, 3, 35], SECOND: [7]}, scale=0.5)
    before = bits(model)
    for _ in range(3):
        with edit.applied(model):
            assert flat(model, SECOND)[7] == 0.5 * flat(Stack(), SECOND)[7]
            assert flat(model, FIRST)[35] == 0.5 * flat(Stack(), FIRST)[35]
        assert_bits(model, before)
    model.layers[1].weight.data[1, 1] = 9.0
    changed = bits(model)
    with pytest.raises(ValueError, match=f"others at 1 of 1 masked weights of '{SECOND}'"):
        edit.apply_(model)
    assert_bits(model, changed)


OTHERS = {"keep_top": 0.05, "tokens_per_batch": 12, "progress": False}


def mixtral():
    return experts_model("Mixtral")


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (llama, {"order": "batches"}),
        pytest.param(llama, {"order": "layers", "signs": True}, marks=pytest.mark.slow),
        pytest.param(
            llama,
            {"order": "batches", "keep_top": None, "deterministic": True},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            llama,
            {"order": "layers", "granularity": "unit", "keep_top": None},
            marks=pytest.mark.slow,
        ),
        (llama, {"order": "batches", "target_modules": "every"}),
        pytest.param(mixtral, {"order": "batches", "signs": True}, marks=pytest.mark.slow),
        (mixtral, {"order": "layers"}),
    ],
    ids=["batches", "layers", "dense", "units", "parameters", "experts", "layers of experts"],
)
def test_a_model_on_two_devices_is_scored_and_masked_on_both(make, options, monkeypatch):
    """Sums, selection and edits lie where the weight does, and come to what one device gives."""

    def score(model):
        return fastdean.score(model, batches(make_examples(), 2), **{**OTHERS, **options})

    # Whose operations are seen one by one.
    monkeypatch.setenv(_dispatch.ENVIRONMENT_VARIABLE, "reference")
    alone = score(make())
    # Kept by device, of which there is one here.
    monkeypatch.setattr(Segments, "scratch", lambda _, name, like, shape: like.new_empty(shape))
    model, devices = make(), Devices()
    with devices:
        scores = score(devices.put_model(model, ["first", "second"]))
        assert devices.mixed == []
        for name, entry in scores.entries.items():
            number = 0 if ".layers.0." in name or "embed_tokens" in name else 1
            assert devices.of(entry.sums) == ("first", "second")[number], name
        mask = fastdean.couple(scores, scores, ratio=0.04, model=model)
        mask.apply_(model)
        assert devices.mixed == []
    assert mask == fastdean.couple(alone, alone, ratio=0.04, model=make())
    for name, entry in alone.entries.items():
        assert torch.equal(scores.entries[name].sums, entry.sums)


def test_what_mixes_two_devices_is_seen():
    devices = Devices()
    one, other = torch.ones(3), torch.ones(3)
    devices.put(one, "first")
    devices.put(other, "second")
    with devices:
        half = one[:2] * 0.5
        half + torch.ones(2)
        assert devices.of(half) == "first" and devices.mixed == []
        half + other[:2]
    assert devices.mixed == ["aten.add.Tensor"]
