"""Memory that is not there, or not to be written, is refused by every operation, not followed."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from tiny_masks import FIRST, Stack, mask_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from fastdean import ops

SPANS = torch.tensor([[0, 3], [3, 6]])


def floats(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def of_collapse():
    return {
        "features": floats(6, 4),
        "labels": torch.tensor([0, 1, 2, 0, 1, -1]),
        "weight": floats(3, 4),
        "sums": floats(3, 4),
        "counts": torch.ones(3, dtype=torch.float64),
    }


def backward(grad_loss, labels, weight, sums, counts, centre, factors, impl):
    return torch.ops.fastdean.collapse_alignment_backward(
        grad_loss, labels, weight, sums, counts, centre, factors, torch.float32, True, True, impl
    )


# Operation -> how it is called, and its tensors, of which it writes the first if any.
CALLS = {
    "accumulate_importance_": (
        ops.accumulate_importance_,
        lambda: {"acc": floats(3, 4), "x": floats(6, 4), "g": floats(6, 3), "segments": SPANS},
    ),
    "accumulate_unit_importance_": (
        ops.accumulate_unit_importance_,
        lambda: {"acc": floats(4), "a": floats(6, 4), "g": floats(6, 4), "segments": SPANS},
    ),
    "accumulate_expert_importance_": (
        ops.accumulate_expert_importance_,
        lambda: {
            "acc": floats(2, 3, 4),
            "x": floats(6, 4),
            "g": floats(6, 3),
            "segments": SPANS,
            "experts": torch.tensor([0, 1]),
        },
    ),
    "select_top": (
        lambda sums, weight, impl: ops.select_top(sums, weight, 2, 2, impl=impl),
        lambda: {"sums": floats(3, 4), "weight": floats(3, 4)},
    ),
    "select_expert_importance": (
        lambda x, g, segments, experts, sets, weight, x_rows, g_rows, batches, impl: (
            ops.select_expert_importance(
                *(x, g, segments, experts, sets, weight, [2, 1], [1, 1]),
                x_rows=x_rows,
                g_rows=g_rows,
                batches=batches,
                impl=impl,
            )
        ),
        lambda: {
            "x": floats(6, 4),
            "g": floats(6, 3),
            "segments": SPANS,
            "experts": torch.tensor([1, 0]),
            "sets": torch.tensor([0, 1]),
            "weight": floats(2, 3, 4),
            "x_rows": torch.arange(6),
            "g_rows": torch.arange(6),
            "batches": torch.tensor([0, 0]),
        },
    ),
    "select_importance": (
        lambda x, g, segments, sets, weight, batches, impl: ops.select_importance(
            x, g, segments, sets, weight, [2, 1], batches=batches, impl=impl
        ),
        lambda: {
            "x": floats(6, 4),
            "g": floats(6, 3),
            "segments": SPANS,
            "sets": torch.tensor([0, 1]),
            "weight": floats(3, 4),
            "batches": torch.tensor([0, 0]),
        },
    ),
    "gather_at": (
        lambda t, i, impl: ops.gather_at([t], [i], impl=impl),
        lambda: {"t": floats(3, 4), "i": torch.tensor([1, 5])},
    ),
    "zero_at_": (
        lambda t, i, impl: ops.zero_at_([t], [i], impl=impl),
        lambda: {"t": floats(3, 4), "i": torch.tensor([1, 5])},
    ),
    "write_at_": (
        lambda t, i, v, impl: ops.write_at_([t], [i], [v], impl=impl),
        lambda: {"t": floats(3, 4), "i": torch.tensor([1, 5]), "v": floats(2)},
    ),
    "collapse_alignment": (
        lambda impl, **given: ops.collapse_alignment(**given, impl=impl),
        of_collapse,
    ),
    "torch.ops.fastdean.collapse_alignment": (
        lambda impl, **given: torch.ops.fastdean.collapse_alignment(
            *given.values(), 1.0, "std", impl
        ),
        of_collapse,
    ),
    "torch.ops.fastdean.collapse_alignment_backward": (
        backward,
        lambda: {
            "grad_loss": floats(),
            **{name: t for name, t in of_collapse().items() if name != "features"},
            "centre": floats(4),
            "factors": floats(3, 3),
        },
    ),
}
ARGUMENTS = [(op, name) for op, (_, tensors) in CALLS.items() for name in tensors()]
WRITING = [
    "accumulate_importance_",
    "accumulate_unit_importance_",
    "accumulate_expert_importance_",
    "zero_at_",
    "write_at_",
]


def freed(tensor):
    tensor.untyped_storage().resize_(0)
    return tensor


def cut_short(tensor):
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() - 1)
    return tensor


def freed_behind_a_view(tensor):
    """Not null where it points, as the view begins far from the start."""
    whole = torch.zeros(1000 + tensor.numel(), dtype=tensor.dtype)
    view = whole[1000:].view(tensor.shape)
    whole.untyped_storage().resize_(0)
    return view


WITHOUT_MEMORY = {
    "freed": freed,
    "cut short": cut_short,
    "freed behind a view": freed_behind_a_view,
    "freed with strides": lambda t: freed(torch.stack([t, t], -1)[..., 0]),
    "functional": torch._to_functional_tensor,
}


@pytest.fixture(params=["reference", "native"])
def impl(request, extension_built):
    if request.param == "native" and not extension_built:
        pytest.skip("an install without the extension is under test")
    return request.param


def run(op, impl, **changed):
    """Calls the operation; by name where it has such an implementation."""
    call, tensors = CALLS[op]
    named = None if op in NOT_NATIVE and impl == "native" else impl
    return call(**{**tensors(), **changed}, impl=named)


NOT_NATIVE = {"accumulate_unit_importance_"}


@pytest.mark.parametrize("op, name", ARGUMENTS)
@pytest.mark.parametrize("kind", WITHOUT_MEMORY)
def test_what_holds_no_memory_is_refused(op, name, kind, impl):
    bad = WITHOUT_MEMORY[kind](CALLS[op][1]()[name].clone())
    if kind == "functional" and op.startswith(("collapse", "torch.ops")):
        # torch itself takes it off before it calls the operation.
        run(op, impl, **{name: bad})
        return
    with pytest.raises(ValueError, match=r"must hold its values in memory, got one .*; gather or"):
        run(op, impl, **{name: bad})


@pytest.mark.parametrize("op, name", ARGUMENTS)
@pytest.mark.parametrize("kind", ["fake", "of two"])
def test_subclasses_without_values_of_their_own_are_refused(op, name, kind, impl):
    good = CALLS[op][1]()[name]
    bad = FakeTensorMode().from_tensor(good) if kind == "fake" else TwoTensor(good, good.clone())
    if op.startswith(("collapse", "torch.ops")):
        # torch answers for them: with an error of its own, or by calling us with what is inside.
        with pytest.raises(AssertionError) if kind == "fake" else nullcontext():
            run(op, impl, **{name: bad})
        return
    with pytest.raises(
        TypeError, match="must be a plain tensor or parameter, got (Fake|Two)Tensor"
    ):
        run(op, impl, **{name: bad})


@pytest.mark.parametrize("op", [op for op in CALLS if "collapse" not in op])
def test_where_new_tensors_hold_nothing_no_operation_runs(op, impl):
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises((RuntimeError, TypeError), match=" must .*, got .*Fake"),
    ):
        run(op, impl)
    tensors = CALLS[op][1]()

    def inside(unused):
        run(op, impl, **tensors)
        return unused

    with pytest.raises(RuntimeError, match="must be called where new tensors hold values, got a"):
        torch.func.functionalize(inside)(torch.zeros(1))


@pytest.mark.parametrize("op", WRITING)
@pytest.mark.parametrize("mode", ["r", "c"])
def test_a_map_of_a_file_is_written_only_if_it_can_be(op, mode, impl, tmp_path):
    # Under Linux; elsewhere torch and we alike would be ended by the system.
    call, tensors = CALLS[op]
    written = next(iter(tensors()))
    kept = tensors()[written]
    kept.numpy().tofile(tmp_path / "weights")
    mapped = np.memmap(tmp_path / "weights", np.float32, mode=mode, shape=tuple(kept.shape))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        tensor = torch.from_numpy(mapped)
    if mode == "c":
        run(op, impl, **{written: tensor})
        return
    with pytest.raises(ValueError, match="must lie in memory that can be written, got read-only"):
        run(op, impl, **{written: tensor})
    assert torch.equal(tensor, kept)


@pytest.mark.parametrize("op", WRITING)
def test_elements_that_share_memory_are_not_written(op, impl):
    written, tensor = next(iter(CALLS[op][1]().items()))
    steps = (1,) * (tensor.dim() - 1) + (0,) if tensor.dim() == 1 else (1,) * tensor.dim()
    overlapping = torch.zeros(100).as_strided(tensor.shape, steps)
    with pytest.raises(ValueError, match="must have a place in memory for every element, got "):
        run(op, impl, **{written: overlapping})


def test_interleaved_strides_without_overlap_are_written(impl):
    woven = torch.zeros(12).as_strided((2, 3), (3, 2))
    acc = ops.accumulate_importance_(woven, torch.ones(6, 3), torch.ones(6, 2), SPANS, impl=impl)
    assert torch.equal(acc, torch.full((2, 3), 6.0))


@pytest.mark.parametrize("name", ["x", "g"])
def test_an_accumulator_shares_no_memory_with_what_is_added(name, impl):
    given = {"x": floats(3, 3), "g": floats(3, 3), "segments": torch.tensor([[0, 3]])}
    with pytest.raises(ValueError, match="acc must share no memory with (the inputs|g), got views"):
        ops.accumulate_importance_(given[name].t(), **given, impl=impl)


def test_an_accumulator_beside_its_inputs_in_one_buffer(impl):
    buffer = floats(4, 8)
    acc, x, g = buffer[:, :3], buffer[:, 3:6], floats(4, 4)
    expected = acc + (g.T @ x).abs()
    ops.accumulate_importance_(acc, x, g, torch.tensor([[0, 4]]), impl=impl)
    torch.testing.assert_close(buffer[:, :3], expected)


def test_values_may_be_views_of_what_is_written(impl):
    weight = torch.arange(4.0)
    other = torch.zeros(4)
    ops.write_at_([weight, other], [torch.arange(4)] * 2, [weight.flip(0), weight], impl=impl)
    assert weight.tolist() == [3.0, 2.0, 1.0, 0.0]
    assert other.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_subclasses_in_memory_lazy_copies_and_far_strides_still_work(impl):
    class Named(torch.Tensor):
        pass

    for weight in (torch.ones(4).as_subclass(Named), torch._lazy_clone(torch.ones(4))):
        ops.zero_at_([weight], [torch.tensor([1])], impl=impl)
        assert weight.tolist() == [1.0, 0.0, 1.0, 1.0]
    one = torch.ones(1).as_strided((1, 1), (2**40, 2**40))
    ops.zero_at_([one, torch.empty(0)], [torch.tensor([0]), SPANS[:0, 0]], impl=impl)
    assert float(one) == 0.0
    empty = freed(torch.ones(4))[:0]
    assert ops.gather_at([empty], [SPANS[:0, 0]], impl=impl)[0].shape == (0,)


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"labels": torch.full((6,), 3)}, ValueError, r"labels must lie in 0..2, or be -1, got 3"),
        ({"weight": floats(2, 4)}, ValueError, r"weight must be \[3, 4\], a row for each class"),
        ({"factors": floats(3, 2)}, ValueError, r"factors must be torch.float32 \[3, 3\], got"),
        ({"centre": floats(4).double()}, ValueError, "centre must be torch.float32 .*float64"),
        ({"counts": None}, TypeError, "counts must be a tensor, got NoneType"),
        (
            {"labels": torch.zeros(2, 3).long()},
            ValueError,
            r"labels must be int64 \[N\], a class",
        ),
    ],
)
def test_the_backward_operation_checks_what_it_is_given(change, error, text, impl):
    with pytest.raises(error, match=text):
        run("torch.ops.fastdean.collapse_alignment_backward", impl, **change)


@pytest.mark.parametrize(
    "decay, statistic, text",
    [(2.0, "std", "decay must be from 0 to 1"), (1.0, "max", "statistic must be one of std")],
)
def test_the_forward_operation_checks_what_it_is_given(decay, statistic, text, impl):
    given = of_collapse().values()
    with pytest.raises(ValueError, match=text):
        torch.ops.fastdean.collapse_alignment(*given, decay, statistic, impl)


def test_a_mask_names_the_parameter_whose_memory_is_gone():
    model = Stack()
    mask = mask_of(model, {FIRST: [0, 5]})
    freed(model.layers[0].weight.data)
    text = (
        f"parameter {FIRST!r} of the model must hold its values in memory, got one that needs 144"
    )
    for act in (mask.apply_, mask.restore_):
        with pytest.raises(ValueError, match=text):
            act(model)


def test_a_mask_that_was_applied_before_is_refused_by_memory_cut_short():
    model = Stack()
    mask = mask_of(model, {FIRST: [35]})
    for _ in range(2):
        with mask.applied(model):
            pass
    cut_short(model.layers[0].weight.data)
    with pytest.raises(ValueError, match=f"parameter {FIRST!r} of the model must hold its values"):
        mask.apply_(model)


def test_a_mask_is_refused_by_a_model_in_read_only_memory(tmp_path):
    model = Stack()
    mask = mask_of(model, {FIRST: [0, 5]})
    weight = model.layers[0].weight
    weight.detach().numpy().tofile(tmp_path / "weights")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        mapped = torch.from_numpy(np.memmap(tmp_path / "weights", np.float32, "r", shape=(6, 6)))
    weight.data = mapped
    with pytest.raises(ValueError, match=f"parameter {FIRST!r} of the model must lie in memory"):
        mask.apply_(model)
