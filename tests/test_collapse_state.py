"""The state of the collapse-alignment loss takes batches in where it lies, and nobody notices."""

from __future__ import annotations

import copy
import functools
import pickle
import threading

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import fastdean
from fastdean.ops import collapse_alignment
from fastdean.ops.ownership import held_alone, nobody_looks_on

ROWS, CLASSES, COLUMNS = 90, 40, 1100
MODES = ("cumulative", "window", "batch")


@pytest.fixture(autouse=True)
def compiled(extension_built):
    if not extension_built:
        pytest.skip("an install without the extension is under test")


def batch(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    # From -1, and the last classes in no batch.
    labels = torch.randint(-1, CLASSES - 5, (ROWS,), generator=generator)
    return features.to(dtype), labels


def weight_of(dtype=torch.float32):
    generator = torch.Generator().manual_seed(99)
    weight = torch.randn(CLASSES, COLUMNS, generator=generator, dtype=torch.float64)
    return weight.to(dtype).requires_grad_()


def new_state(mode="cumulative", dtype=torch.float32):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return fastdean.CollapseState(CLASSES, COLUMNS, mode=mode, dtype=wide)


def step(state, weight, seed=1, **options):
    options = {"impl": "native", **options}
    features, labels = batch(seed, weight.dtype)
    return fastdean.collapse_alignment_loss(features, labels, weight, state, **options)


def functional_step(sums, counts, weight, seed, decay):
    features, labels = batch(seed, weight.dtype)
    return collapse_alignment(features, labels, weight, sums, counts, decay=decay, impl="native")


def place(state):
    """Where the sums lie; asking holds nothing."""
    return state.sums.data_ptr()


def values(state):
    return state.sums.clone(), state.counts.clone()


def same(found, expected):
    return all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_a_state_in_place_is_the_functional_one_bit_for_bit(mode, dtype):
    weight, state = weight_of(dtype), new_state(mode, dtype)
    sums, counts = values(state)
    where = place(state)
    for seed in range(4):
        loss = step(state, weight, seed)
        expected, sums, counts = functional_step(sums, counts, weight, seed, state.decay)
        assert same((loss, state.sums, state.counts), (expected, sums, counts))
        assert same(torch.autograd.grad(loss, weight), torch.autograd.grad(expected, weight))
        assert place(state) == where


@pytest.mark.parametrize("mode", MODES)
def test_sums_of_a_class_without_a_count_are_those_of_the_functional_form(mode):
    # As a state has them that somebody put together by hand.
    weight, state = weight_of(), new_state(mode)
    state.load_state_dict({**state.state_dict(), "sums": torch.ones(CLASSES, COLUMNS)})
    sums, counts = values(state)
    step(state, weight)
    expected = functional_step(sums, counts, weight, 1, state.decay)[1:]
    assert same(values(state), expected)


def test_threads_change_no_bit_of_a_state_in_place():
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            weight, state = weight_of(), new_state("window")
            losses = [step(state, weight, seed).detach() for seed in range(3)]
            found.append([*losses, *values(state)])
    finally:
        torch.set_num_threads(before)
    assert same(found[1], found[0]) and same(found[2], found[0])


# What somebody holds of a state, and how it tells all sums.
HELD = {
    "the state dict": (lambda state: state.state_dict(), lambda held: held["sums"]),
    "all rows": (lambda state: list(state.sums), torch.stack),
    "an array": (lambda state: state.sums.numpy(), torch.from_numpy),
    "the storage": (
        lambda state: state.sums.untyped_storage(),
        lambda held: torch.empty(0).set_(held, 0, (CLASSES, COLUMNS)),
    ),
    "a copy": (copy.copy, lambda held: held.sums),
}


@pytest.mark.parametrize("hold, sums_of", HELD.values(), ids=HELD)
def test_what_somebody_holds_of_a_state_is_never_written(hold, sums_of):
    weight, state = weight_of(), new_state()
    step(state, weight).backward()
    sums, where = state.sums.clone(), place(state)
    held = hold(state)
    step(state, weight, 2)
    assert place(state) != where
    assert torch.equal(sums_of(held), sums)
    del held
    where = place(state)
    step(state, weight, 3)
    assert place(state) == where


def test_a_state_that_was_put_back_goes_on_as_if_nothing_had_happened():
    weight, state = weight_of(), new_state("window")
    step(state, weight)
    before = state.state_dict()
    first = step(state, weight, 2).detach()
    state.load_state_dict(before)
    assert torch.equal(step(state, weight, 2), first)


def test_tensors_given_to_a_state_stay_the_givers():
    weight, state = weight_of(), new_state()
    sums, counts = torch.ones(CLASSES, COLUMNS), torch.ones(CLASSES, dtype=torch.float64)
    state.sums, state.counts = sums, counts
    assert state.sums is sums and state.counts is counts
    for seed in range(2):
        step(state, weight, seed)
    assert bool((sums == 1).all()) and bool((counts == 1).all())


def test_copies_and_pickles_of_a_state_go_their_own_ways():
    weight, state = weight_of(), new_state()
    step(state, weight)
    others = [copy.copy(state), copy.deepcopy(state), pickle.loads(pickle.dumps(state))]
    before = values(state)
    step(state, weight, 2)
    assert all(same(values(other), before) for other in others)
    for other in others:
        step(other, weight, 2)
        assert same(values(other), values(state))


def test_a_copy_does_not_write_what_was_copied_with_it():
    """Copies keep that two of the copied things are one tensor."""
    weight, state = weight_of(), new_state()
    step(state, weight)
    other, sums = copy.deepcopy((state, state.sums))
    before = sums.clone()
    step(other, weight, 2)
    assert torch.equal(sums, before)


def test_a_state_that_another_process_has_is_never_written():
    """A state sent to another process shares its memory from then on."""
    from multiprocessing.reduction import ForkingPickler

    import torch.multiprocessing  # noqa: F401  it tells the pickler how tensors are sent

    weight, state = weight_of(), new_state()
    step(state, weight)
    received = pickle.loads(ForkingPickler.dumps(state))
    before = values(state)
    step(received, weight, 2)
    assert same(values(state), before)
    where = place(state)
    step(state, weight, 3)
    assert place(state) != where


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)], ids=["first first", "last first"])
def test_losses_that_share_a_state_keep_the_gradients_of_their_steps(order):
    weight = weight_of()
    alone, together = new_state(), new_state()
    expected = [torch.autograd.grad(step(alone, weight, s), weight)[0] for s in range(3)]
    losses = [step(together, weight, seed) for seed in range(3)]
    for place_ in order:
        (found,) = torch.autograd.grad(losses[place_], weight)
        assert torch.equal(found, expected[place_])
    assert same(values(alone), values(together))


def test_a_retained_graph_gives_the_same_gradient_after_later_steps():
    weight, state = weight_of(), new_state()
    loss = step(state, weight)
    (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
    kept = first.clone()
    for seed in (2, 3):
        step(state, weight, seed).backward()
    (again,) = torch.autograd.grad(loss, weight)
    assert torch.equal(again, kept) and torch.equal(first, kept)


def test_a_gradient_that_is_kept_is_never_written_again():
    weight, state = weight_of(), new_state()
    kept = []
    for seed in range(4):
        (gradient,) = torch.autograd.grad(step(state, weight, seed), weight)
        kept.append((gradient, gradient.clone()))
    assert all(torch.equal(*pair) for pair in kept)


def test_an_exception_between_forward_and_backward_costs_the_graph_alone():
    weight, state, expected = weight_of(), new_state(), new_state()
    for seed in range(3):
        loss = step(state, weight, seed)
        try:
            raise KeyError("as a training loop may")
        except KeyError:
            del loss
        step(expected, weight, seed).backward()
    assert same(values(state), values(expected))


def test_what_hooks_of_saved_tensors_keep_is_not_written():
    weight, state = weight_of(), new_state()
    kept = []

    def pack(tensor):
        kept.append((tensor, tensor.clone()))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        step(state, weight).backward()
    for seed in (2, 3):
        step(state, weight, seed)
    assert kept and all(torch.equal(*pair) for pair in kept)


REFUSED = {
    "a label": ({"labels": torch.full((ROWS,), CLASSES)}, ValueError, "labels must lie"),
    "a statistic": ({"statistic": "var"}, ValueError, "statistic must be one of"),
    "features": ({"features": torch.zeros(ROWS, 3)}, ValueError, "features must have the"),
    "features in fp64": ({"features": torch.zeros(ROWS, COLUMNS).double()}, TypeError, "features"),
    "memory": ({"features": torch.zeros(ROWS, COLUMNS)}, ValueError, "hold its values in memory"),
    "an implementation": ({"impl": "triton"}, RuntimeError, "no Triton kernel"),
}


@pytest.mark.parametrize("changes, error, text", REFUSED.values(), ids=REFUSED)
def test_a_refused_call_leaves_a_state_in_place_as_it_is(changes, error, text):
    weight, state = weight_of(), new_state("window")
    step(state, weight).backward()
    before = values(state)
    features, labels = batch(2)
    arguments = {"features": features, "labels": labels, "weight": weight, "state": state}
    arguments |= {"impl": "native", **changes}
    if "memory" in text:
        arguments["features"].untyped_storage().resize_(0)
    with pytest.raises(error, match=text):
        fastdean.collapse_alignment_loss(**arguments)
    assert same(values(state), before)


def test_no_gradients_need_no_graph_and_leave_the_same_state():
    weight, states = weight_of(), [new_state("window") for _ in range(3)]
    for seed in range(3):
        with torch.no_grad():
            assert not step(states[0], weight, seed).requires_grad
        with torch.inference_mode():
            step(states[1], weight, seed)
        step(states[2], weight, seed)
    assert same(values(states[0]), values(states[2]))
    assert same(values(states[1]), values(states[2]))


def test_a_state_made_in_inference_mode_trains():
    weight = weight_of()
    with torch.inference_mode():
        state = new_state()
        step(state, weight)
    expected = new_state()
    step(expected, weight)
    for seed in (2, 3):
        found, right = step(state, weight, seed), step(expected, weight, seed)
        assert same(torch.autograd.grad(found, weight), torch.autograd.grad(right, weight))


def test_the_loss_can_be_changed_in_place_and_the_state_cannot_behind_the_graph():
    weight, state = weight_of(), new_state()
    loss = step(state, weight)
    loss += 1
    loss *= 2
    loss.backward()
    loss = step(state, weight, 2)
    state.sums.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_second_derivatives_are_refused():
    weight = weight_of()
    (gradient,) = torch.autograd.grad(step(new_state(), weight), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        gradient.sum().backward()


def test_compiled_and_plain_steps_take_turns_on_one_state():
    torch._dynamo.reset()
    plain = functools.partial(step, impl="native")
    compiled_step = torch.compile(
        lambda features, labels, weight, state: fastdean.collapse_alignment_loss(
            features, labels, weight, state, impl="native"
        ),
        fullgraph=True,
        backend="aot_eager",
    )
    weight, state, expected = weight_of(), new_state("window"), new_state("window")
    for seed in range(4):
        right = plain(expected, weight, seed)
        if seed % 2:
            found = compiled_step(*batch(seed), weight, state)
        else:
            found = plain(state, weight, seed)
        before = values(state)
        assert torch.equal(found, right) and same(before, values(expected))
        assert same(torch.autograd.grad(found, weight), torch.autograd.grad(right, weight))


def test_whoever_looks_on_sees_the_operation():
    class Names(TorchDispatchMode):
        seen: list = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(func.name())
            return func(*args, **(kwargs or {}))

    weight, state = weight_of(), new_state()
    with Names():
        step(state, weight).backward()
    assert "fastdean::collapse_alignment" in Names.seen
    assert "fastdean::collapse_alignment_backward" in Names.seen
    assert nobody_looks_on(weight)


def test_a_thread_that_reads_sees_no_half_of_a_step():
    # Whole numbers: after n steps every sum is n.
    weight, state = weight_of(), new_state()
    features, labels = torch.ones(CLASSES, COLUMNS), torch.arange(CLASSES)
    torn, done = [], threading.Event()

    def read():
        while not done.is_set():
            sums = state.sums
            if sums.min() != sums.max():
                torn.append(sums)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(50):
        fastdean.collapse_alignment_loss(features, labels, weight, state, impl="native")
    done.set()
    reader.join()
    assert not torn


def test_held_alone_counts_every_holder():
    tensor = torch.zeros(5)
    assert held_alone(tensor)
    view = tensor[1:]
    assert not held_alone(tensor)
    del view
    storage = tensor.untyped_storage()
    assert not held_alone(tensor)
    del storage
    assert held_alone(tensor) and not held_alone(tensor, torch.zeros(3)[1:])
