"""Editing a model with a mask: exact edits, exact undoing, refusal of what is not its model."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path

import pytest
import tiny_models
import torch
from interrupts import interrupt, moments
from tiny_masks import FIRST, SECOND, Stack, assert_bits, bits, flat, mask_of
from torch import nn

from fastdean import ops
from fastdean.masks import MaskEntry, NeuronMask, edits, weights
from fastdean.native import masks as native_masks
from fastdean.ops import mask as mask_ops
from fastdean.ops import reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.fixture
def model():
    return Stack()


@pytest.fixture
def mask(model):
    return mask_of(model, {FIRST: [0, 3, 35], SECOND: [7]})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, 0.3, -1.5, 1.0])
def test_apply_writes_the_scaled_originals_and_restore_every_bit(dtype, scale):
    model = Stack(dtype)
    before = bits(model)
    mask = mask_of(model, {FIRST: [0, 3, 35], SECOND: [7]}, scale=scale)
    original = flat(model, FIRST).clone()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = original.clone()
    for i in (0, 3, 35):
        value = original[i].to(wide) * torch.tensor(scale, dtype=wide)
        expected[i] = value.to(dtype) if scale else 0.0
    assert mask.apply_(model) is model
    assert torch.equal(flat(model, FIRST), expected)
    if not scale:
        assert not torch.signbit(flat(model, FIRST)[[0, 3, 35]]).any()
    assert mask.restore_(model) is model
    assert_bits(model, before)


@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_round_trip_on_every_family(name):
    model = tiny_models.MODELS[name]()
    before = bits(model)
    weights = [n for n, p in model.named_parameters() if p.dim() == 2]
    mask = mask_of(model, {n: [1, 5, 40] for n in weights})
    with mask.applied(model) as same:
        assert same is model
        for n in weights:
            assert flat(model, n)[[1, 5, 40]].count_nonzero() == 0
            assert flat(model, n).count_nonzero() > 0.9 * flat(model, n).numel()
    assert_bits(model, before)


def test_twice_is_once(model, mask):
    before = bits(model)
    mask.apply_(model)
    edited = bits(model)
    mask.apply_(model)
    mask_of_equal_content = NeuronMask(mask.entries)
    mask_of_equal_content.apply_(model)
    assert_bits(model, edited)
    mask_of_equal_content.restore_(model)
    assert_bits(model, before)
    mask.restore_(model)
    assert_bits(model, before)


def test_applied_leaves_an_active_mask_active(model, mask):
    mask.apply_(model)
    edited = bits(model)
    with mask.applied(model):
        assert_bits(model, edited)
    assert_bits(model, edited)


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()], ids=["error", "ctrl_c"])
def test_applied_is_undone_after_an_exception(model, mask, error):
    before = bits(model)
    with pytest.raises(type(error)), mask.applied(model):
        assert flat(model, FIRST)[35] == 0
        raise error
    assert_bits(model, before)


def test_applied_accepts_a_restore_inside(model, mask):
    before = bits(model)
    with mask.applied(model):
        mask.restore_(model)
    assert_bits(model, before)


def test_overlapping_masks_undo_in_order(model):
    before = bits(model)
    outer = mask_of(model, {FIRST: [0, 3, 35]})
    inner = mask_of(model, {FIRST: [2, 3], SECOND: [1]}, scale=0.5)
    original = flat(model, FIRST).clone()
    with outer.applied(model):
        between = bits(model)
        with inner.applied(model):
            assert flat(model, FIRST)[3] == original[3] * 0.5
            assert flat(model, FIRST)[35] == 0
            with pytest.raises(RuntimeError, match=r"got NeuronMask\(3 .* while NeuronMask\(3 wei"):
                outer.restore_(model)
        assert_bits(model, between)
    assert_bits(model, before)


def test_an_inner_mask_may_bring_the_original_back_for_a_while(model):
    outer, inner = mask_of(model, {FIRST: [3, 35]}), mask_of(model, {FIRST: [3, 35]}, scale=1.0)
    before = bits(model)
    with outer.applied(model):
        edited = bits(model)
        with inner.applied(model):
            assert_bits(model, before)
        assert_bits(model, edited)
    assert_bits(model, before)


def test_a_mask_that_was_never_applied_cannot_jump_the_queue(model):
    outer = mask_of(model, {FIRST: [3]})
    outer.apply_(model)
    edited = bits(model)
    with pytest.raises(RuntimeError, match="restore that one first"):
        mask_of(Stack(), {FIRST: [3]}, scale=0.5).restore_(model)
    assert_bits(model, edited)


def test_restoring_over_changed_weights_writes_nothing(model, mask):
    mask.apply_(model)
    model.layers[0].weight.data[0, 3] = 9.0
    changed = bits(model)
    with pytest.raises(RuntimeError, match=rf"got 1 of 3 masked weights of '{FIRST}' changed"):
        mask.restore_(model)
    assert_bits(model, changed)
    with pytest.raises(RuntimeError, match="changed since"):
        mask.apply_(model)


def test_other_weights_may_change_while_applied(model, mask):
    mask.apply_(model)
    model.layers[0].weight.data[1, 1] = 9.0
    mask.restore_(model)
    assert flat(model, FIRST)[7] == 9.0
    assert flat(model, FIRST)[35] == flat(Stack(), FIRST)[35]


def test_a_clean_state_loaded_over_the_edit_is_understood(model, mask):
    clean = copy.deepcopy(model.state_dict())
    inner = mask_of(model, {FIRST: [3, 4]}, scale=0.5)
    before = bits(model)
    for _ in range(2):
        mask.apply_(model)
        inner.apply_(model)
        model.load_state_dict(clean)
        mask.restore_(model)
        assert_bits(model, before)
    with mask.applied(model):
        model.load_state_dict(clean)
    assert_bits(model, before)


def test_edited_checkpoint_can_be_restored(model, mask):
    before = bits(model)
    mask.apply_(model)
    loaded = Stack(seed=1)
    loaded.load_state_dict(model.state_dict())
    mask.restore_(loaded)
    assert_bits(loaded, before)


def test_edited_checkpoint_stays_edited_after_applied(model, mask):
    before = bits(model)
    mask.apply_(model)
    edited = bits(model)
    loaded = Stack(seed=1)
    loaded.load_state_dict(model.state_dict())
    with mask.applied(loaded):
        assert_bits(loaded, edited)
    assert_bits(loaded, edited)
    mask.apply_(loaded)
    assert_bits(loaded, edited)
    mask.restore_(loaded)
    assert_bits(loaded, before)


@pytest.mark.parametrize("act", ["apply_", "restore_"])
def test_another_model_is_refused(mask, act):
    other = Stack(seed=1)
    before = bits(other)
    error = ValueError if act == "apply_" else RuntimeError
    with pytest.raises(error, match=rf"got .* of '{FIRST}'"):
        getattr(mask, act)(other)
    assert_bits(other, before)


def test_one_differing_weight_in_the_last_matrix_is_enough_to_refuse(model, mask):
    model.layers[1].weight.data[1, 1] += 1e-6
    before = bits(model)
    with pytest.raises(
        ValueError, match=rf"others at 1 of 1 masked weights of '{SECOND}' \(in 1 of 2 matrices\)"
    ):
        mask.apply_(model)
    assert_bits(model, before)


def test_sign_of_zero_counts(model, mask):
    model.layers[0].weight.data[0, 0] = 0.0
    with pytest.raises(ValueError, match="others at 1 of 3"):
        mask.apply_(model)


def _renamed(model):
    model.layers[1] = nn.Sequential(model.layers[1])


def _reshaped(model):
    model.layers[1].weight = nn.Parameter(model.layers[1].weight.data[:5])


def _offloaded(model):
    model.layers[1].to("meta")


def _quantised(model):
    model.layers[1].weight = nn.Parameter(
        model.layers[1].weight.data.to(torch.int8), requires_grad=False
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_renamed, f"must have a parameter '{SECOND}', got none"),
        (_reshaped, r"of shape \[6, 6\], got \[5, 6\]"),
        (_offloaded, "got a meta tensor .offloaded."),
        (_quantised, "got Tensor of torch.int8 .quantised"),
    ],
    ids=["name", "shape", "meta", "quantised"],
)
def test_what_cannot_be_edited_is_named_and_nothing_is_written(model, mask, change, text):
    change(model)
    first = flat(model, FIRST).clone()
    with pytest.raises(ValueError, match=text):
        mask.apply_(model)
    assert torch.equal(flat(model, FIRST), first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_a_mask_fits_the_same_model_in_another_dtype(model, mask, dtype, scale, caplog):
    mask = mask.with_scale(scale)
    model.to(dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    mask.apply_(model)
    for name, entry in mask.entries.items():
        wide = entry.original.float().mul(scale).to(dtype)
        assert torch.equal(flat(model, name)[entry.index], wide)
    mask.restore_(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with mask.applied(model), mask.applied(model):
        assert not torch.equal(flat(model, FIRST), before[FIRST].flatten())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    # Once, however often the mask is applied.
    (told,) = [text for text in caplog.messages if "every original rounds" in text]
    assert f"made in float32 and the model is in {str(dtype).removeprefix('torch.')}" in told


def test_a_value_that_is_not_the_rounded_original_is_another_model(model, mask):
    model.bfloat16()
    place = mask.entries[FIRST].index[0]
    flat(model, FIRST)[place] = torch.nextafter(
        flat(model, FIRST)[place], torch.tensor(9.0, dtype=torch.bfloat16)
    )
    before = flat(model, FIRST).clone()
    with pytest.raises(ValueError, match="must hold the mask's original values, got others at 1 "):
        mask.apply_(model)
    assert torch.equal(flat(model, FIRST), before)


def test_tensor_subclass_is_refused(model, mask):
    class Wrapped(torch.Tensor):
        pass

    model.layers[1].weight = nn.Parameter(model.layers[1].weight.data.as_subclass(Wrapped))
    with pytest.raises(ValueError, match="got Wrapped of torch.float32"):
        mask.apply_(model)


def test_an_interrupt_while_writing_is_rolled_back(model, mask, monkeypatch):
    before = bits(model)
    real = ops.zero_at_

    def interrupted(tensors, indices, *, impl=None):
        real(tensors[:1], indices[:1])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ops, "zero_at_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            mask.apply_(model)
    assert_bits(model, before)
    with mask.applied(model):
        assert flat(model, FIRST)[35] == 0
    assert_bits(model, before)


def test_transposed_storage(model):
    weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(3))
    model.layers[0].weight = nn.Parameter(weight.t())
    mask = mask_of(model, {FIRST: [4, 13]})
    before = weight.clone()
    with mask.applied(model):
        assert model.layers[0].weight[0, 4] == 0
        assert weight[4, 0] == 0
        assert weight[1, 2] == 0
        assert (weight == 0).sum() == 2
    assert torch.equal(weight, before)


def test_view_of_a_larger_tensor(model):
    fused = torch.randn(12, 8, generator=torch.Generator().manual_seed(3))
    model.layers[0].weight = nn.Parameter(fused[:6, :6])
    model.layers[1].weight = nn.Parameter(fused[6:, 2:])
    before = fused.clone()
    mask = mask_of(model, {FIRST: [7], SECOND: [8]})
    with mask.applied(model):
        assert (fused == 0).nonzero().tolist() == [[1, 1], [7, 4]]
    assert torch.equal(fused, before)


@pytest.mark.parametrize("share", ["parameter", "storage"])
def test_tied_parameters_are_edited_once(model, share):
    weight = model.layers[0].weight
    model.layers[1].weight = weight if share == "parameter" else nn.Parameter(weight.data)
    before = bits(model)
    both = mask_of(model, {FIRST: [1, 3], SECOND: [3, 5]}, scale=0.5)
    expected = flat(model, FIRST).clone()
    expected[[1, 3, 5]] *= 0.5
    with both.applied(model):
        assert torch.equal(flat(model, FIRST), expected)
        with mask_of(Stack(), {FIRST: [3]}).applied(model):
            assert flat(model, SECOND)[3] == 0
        assert torch.equal(flat(model, SECOND), expected)
    assert_bits(model, before)


def test_nested_masks_see_each_other_through_tied_names(model):
    model.layers[1].weight = model.layers[0].weight
    first, second = mask_of(model, {FIRST: [3]}), mask_of(model, {SECOND: [3, 4]}, scale=0.5)
    before = bits(model)
    with first.applied(model), second.applied(model):
        assert flat(model, FIRST)[3] != 0
    assert_bits(model, before)


@pytest.fixture
def transposed(model):
    """The second matrix is the transpose of the first, in the same memory: 3 is 18 there."""
    model.layers[1].weight = nn.Parameter(model.layers[0].weight.data.t())
    return model


def test_one_mask_may_name_an_element_in_two_layouts(transposed):
    both = mask_of(transposed, {FIRST: [1, 3], SECOND: [5, 18]}, scale=0.5)
    before, expected = bits(transposed), flat(transposed, FIRST).clone()
    expected[[1, 3, 30]] *= 0.5
    for _ in range(2):
        with both.applied(transposed):
            assert torch.equal(flat(transposed, FIRST), expected)
            with mask_of(Stack(), {FIRST: [3]}).applied(transposed):
                assert flat(transposed, SECOND)[18] == 0
            assert torch.equal(flat(transposed, FIRST), expected)
        assert_bits(transposed, before)


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_nested_masks_see_each_other_through_a_transpose(transposed, scale):
    outer = mask_of(transposed, {FIRST: [1, 3]})
    inner = mask_of(transposed, {SECOND: [18]}, scale=scale)
    before, original = bits(transposed), flat(transposed, FIRST).clone()
    outer.apply_(transposed)
    edited = bits(transposed)
    inner.apply_(transposed)
    assert flat(transposed, FIRST)[3] == scale * original[3]
    assert flat(transposed, FIRST)[1] == 0
    inner.apply_(transposed)
    outer.apply_(transposed)
    inner.restore_(transposed)
    assert_bits(transposed, edited)
    outer.restore_(transposed)
    assert_bits(transposed, before)


def test_conversion_between_apply_and_restore(model, mask):
    before = flat(model, FIRST).clone()
    mask.apply_(model)
    model.to(torch.bfloat16)
    with pytest.raises(ValueError, match="got torch.bfloat16; .*convert it back"):
        mask.restore_(model)
    model.to(torch.float32)
    mask.restore_(model)
    assert torch.equal(flat(model, FIRST)[[0, 3, 35]], before[[0, 3, 35]])


def test_wrapped_models(model, mask):
    before = bits(model)
    compiled = torch.compile(model, backend="eager")
    mask.apply_(compiled)
    assert flat(model, FIRST)[35] == 0
    mask.restore_(model)
    with mask.applied(nn.DataParallel(model)):
        assert flat(model, FIRST)[35] == 0
    model.layers[0] = torch.compile(model.layers[0], backend="eager")
    with mask.applied(model):
        assert dict(model.named_parameters())["layers.0._orig_mod.weight"][5, 5] == 0
    model.layers[0] = model.layers[0]._orig_mod
    assert_bits(model, before)


def test_backward_over_an_edited_weight_raises(model, mask):
    loss = model(torch.randn(2, 6, requires_grad=True)).square().sum()
    mask.apply_(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_flow_through_an_edited_model(model, mask):
    with mask.applied(model):
        model(torch.ones(2, 6)).sum().backward()
    assert model.layers[0].weight.grad is not None
    assert model.layers[0].weight.requires_grad


def test_a_forgotten_model_is_freed(mask):
    model = Stack()
    mask.apply_(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_copy_of_an_edited_model_can_be_restored(model, mask):
    before = bits(model)
    mask.apply_(model)
    duplicate = copy.deepcopy(model)
    mask.restore_(duplicate)
    assert_bits(duplicate, before)
    assert flat(model, FIRST)[35] == 0


def test_empty_mask_changes_nothing(model):
    before = bits(model)
    nowhere = MaskEntry(torch.tensor([], dtype=torch.int64), torch.ones(0), (6, 6))
    mask = NeuronMask({FIRST: nowhere})
    assert len(mask) == 0
    assert mask.names == []
    with mask.applied(model):
        assert_bits(model, before)


def test_not_a_module(mask):
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
        mask.apply_("model")


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["reference", "native"])
def test_a_model_on_cuda_is_edited_as_on_the_cpu_and_restored(impl, monkeypatch):
    # For what takes no `impl`: reading and restoring.
    monkeypatch.setenv("FASTDEAN_IMPL", impl)
    expected = Stack(torch.bfloat16)
    weight = expected.layers[1].weight
    weight.data = weight.data.t().contiguous().t()
    model = copy.deepcopy(expected).cuda()
    clean = bits(expected)
    mask = mask_of(expected, {FIRST: [0, 3, 35], SECOND: [7, 8]}, scale=0.5)
    mask.apply_(expected, impl="reference")
    for _ in range(2):
        mask.apply_(model, impl=impl)
        assert_bits(copy.deepcopy(model).cpu(), bits(expected))
        mask.restore_(model)
        assert_bits(copy.deepcopy(model).cpu(), clean)


# Ctrl-C at every line of what edits a model.

EDITING = {module.__file__ for module in (edits, weights, native_masks, mask_ops, reference)}


def in_step(model, mask, original, masked):
    """The weights are all original and no mask is recorded, or all masked and it is."""
    assert torch.is_grad_enabled()
    found = bits(model)
    recorded = edits._ACTIVE.get(model, [])
    state = "masked" if recorded else "original"
    assert [each.mask for each in recorded] == ([mask] if recorded else [])
    for name, expected in (masked if recorded else original).items():
        assert torch.equal(found[name], expected), (name, state)
    return state


@pytest.mark.parametrize("times_before, impl", [(0, None), (2, None), (0, "reference")])
def test_an_interrupt_at_any_line_leaves_weights_and_record_in_step(times_before, impl):
    scale = 0.0 if impl is None else 0.5

    def fresh():
        model = Stack()
        mask = mask_of(model, {FIRST: [0, 3, 35], SECOND: [7]}, scale=scale)
        for _ in range(times_before):
            with mask.applied(model, impl=impl):
                pass
        return model, mask

    model, mask = fresh()
    original = bits(model)
    mask.apply_(model, impl=impl)
    masked = bits(model)
    states = set()
    for act in ("apply_", "restore_"):
        model, mask = fresh()
        if act == "restore_":
            mask.apply_(model, impl=impl)
        options = {"impl": impl} if act == "apply_" else {}
        found = moments(lambda: getattr(mask, act)(model, **options), EDITING)  # noqa: B023
        assert len(found) > 10
        for moment in found:
            model, mask = fresh()
            if act == "restore_":
                mask.apply_(model, impl=impl)
            interrupt(lambda: getattr(mask, act)(model, **options), EDITING, moment)  # noqa: B023
            states.add(in_step(model, mask, original, masked))
            # And nothing keeps the next from its work.
            getattr(mask, act)(model, **options)
            mask.restore_(model)
            assert_bits(model, original)
    assert states == {"original", "masked"}


@pytest.mark.parametrize("times_before, impl", [(0, None), (2, None), (0, "reference")])
def test_an_interrupt_at_any_line_of_a_block_leaves_the_originals(times_before, impl):
    def fresh():
        model = Stack()
        mask = mask_of(model, {FIRST: [0, 3, 35], SECOND: [7]})
        for _ in range(times_before):
            with mask.applied(model, impl=impl):
                pass
        return model, mask

    def block(model, mask):
        with mask.applied(model, impl=impl):
            assert int((flat(model, FIRST) == 0).sum()) == 3

    model, mask = fresh()
    original = bits(model)
    for moment in moments(lambda: block(model, mask), EDITING):
        again, other = fresh()
        interrupt(lambda: block(again, other), EDITING, moment)  # noqa: B023
        assert in_step(again, other, original, None) == "original"


def test_a_mask_applied_anew_inside_its_block_stays(model, mask):
    before = bits(model)
    with mask.applied(model):
        mask.restore_(model)
        mask.apply_(model)
    assert mask.restore_(model) is model
    assert_bits(model, before)


def test_a_model_made_in_inference_mode_is_refused_before_anything_is_written(monkeypatch):
    with torch.inference_mode():
        model = Stack()
    mask = mask_of(model, {FIRST: [0, 3]})
    for name in ("write_", "zero_"):
        monkeypatch.setattr(weights.Weights, name, None)
    text = f"parameter {FIRST!r} of the model must be a tensor that can be written in place, got "
    with pytest.raises(ValueError, match=text + "one made in inference mode, outside of it; edit"):
        mask.apply_(model)
    # One that holds the masked values has nothing written to it.
    with torch.inference_mode():
        model.layers[0].weight.data.view(-1)[[0, 3]] = 0
    mask.apply_(model)


@pytest.mark.parametrize("kind", [str, Path])
def test_the_name_of_a_model_is_not_taken_for_the_model(kind):
    mask = mask_of(tiny_models.llama(), {"model.layers.0.mlp.up_proj.weight": [1]})
    for call in (mask.apply_, mask.restore_):
        with pytest.raises(TypeError, match=r"got \w+ 'folder'; load it first .*patch"):
            call(kind("folder"))
