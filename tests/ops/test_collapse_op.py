"""The collapse-alignment loss: value, gradients, and the state it keeps."""

from __future__ import annotations

import functools
import math
import shutil
import threading

import pytest
import torch
from alignment_oracle import std_step
from budget import assert_within_budget
from device_waits import device_waits

import fastdean
from fastdean import native
from fastdean.collapse import alignment
from fastdean.native import collapse as gate
from fastdean.ops import collapse, collapse_alignment, reference

STATISTICS = ("std", "cv", "mean")
HALVES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["reference", "native"])
def impl(request, extension_built):
    if request.param == "native" and not extension_built:
        pytest.skip("an install without the extension is under test")
    return request.param


@pytest.fixture
def compiled(extension_built):
    if not extension_built:
        pytest.skip("an install without the extension is under test")


def random(*shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def some_labels(rows, classes, seed=0, share=0.7):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=generator)
    return torch.where(torch.rand(rows, generator=generator) < share, labels, -1)


def problem(rows=40, classes=7, columns=9, *, dtype=torch.float64, seed=0, share=0.7):
    """Features near a mean of their class, weights near it too: cosines neither 0 nor 1."""
    labels = some_labels(rows, classes, seed, share)
    weight = random(classes, columns, seed=seed + 1)
    noise = random(rows, columns, seed=seed + 2)
    features = 0.7 * noise + weight[labels.clamp(min=0)] + 0.5
    return features.to(dtype), labels, weight.to(dtype)


def state_for(weight, mode="cumulative", decay=None):
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return fastdean.CollapseState(*weight.shape, mode=mode, decay=decay, dtype=dtype)


def filled(state, seed=9):
    """A state with a past: some classes seen, the last one not."""
    state.sums = random(*state.sums.shape, seed=seed).to(state.sums.dtype) * 3
    state.counts = 3 + torch.arange(len(state.counts), dtype=torch.float64) % 4
    state.sums[-1], state.counts[-1] = 0, 0
    return state


def oracle(features, labels, weight, sums, counts, decay, statistic):
    """(loss, sums, counts) by loops over Python numbers."""
    features, weight = features.double().tolist(), weight.double().tolist()
    sums = [[decay * value for value in row] for row in sums.double().tolist()]
    counts = [decay * count for count in counts.tolist()]
    for row, label in zip(features, labels.tolist(), strict=True):
        if label >= 0:
            sums[label] = [a + b for a, b in zip(sums[label], row, strict=True)]
            counts[label] += 1
    for label, count in enumerate(counts):
        if decay < 1 and count < 2**-20:
            counts[label], sums[label] = 0.0, [0.0] * len(sums[label])
    state = torch.tensor(sums, dtype=torch.float64), torch.tensor(counts, dtype=torch.float64)
    seen = [c for c, count in enumerate(counts) if count > 0]
    if len(seen) < 2:
        return 0.0, *state
    means = {c: [value / counts[c] for value in sums[c]] for c in seen}
    centre = [math.fsum(column) / len(seen) for column in zip(*means.values(), strict=True)]
    cosines = [
        cosine(weight[c], [a - b for a, b in zip(means[c], centre, strict=True)]) for c in seen
    ]
    mean = math.fsum(cosines) / len(seen)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in cosines) / (len(seen) - 1))
    loss = {"std": std, "cv": std / math.sqrt(mean**2 + 1e-6), "mean": 1 - mean}[statistic]
    return loss, *state


def cosine(a, b):
    lengths = math.hypot(*a) * math.hypot(*b)
    return sum(x * y for x, y in zip(a, b, strict=True)) / lengths if lengths else 0.0


def run(impl, features, labels, weight, state, statistic="std"):
    """(loss, new sums, new counts, gradient of weight, of features); the state stays."""
    live = features.detach().requires_grad_(), weight.detach().requires_grad_()
    loss, sums, counts = collapse_alignment(
        live[0],
        labels,
        live[1],
        state.sums,
        state.counts,
        decay=state.decay,
        statistic=statistic,
        impl=impl,
    )
    grad_features, grad_weight = torch.autograd.grad(loss, live)
    return loss.detach(), sums, counts, grad_weight, grad_features


def autograd_of_the_reference(features, labels, weight, state, statistic, dtype=torch.float64):
    """The same by plain torch's own differentiation, in `dtype`."""
    live = [each.detach().to(dtype).requires_grad_() for each in (features, weight)]
    results = reference.collapse_alignment(
        live[0], labels, live[1], state.sums.to(dtype), state.counts, state.decay, statistic
    )
    grad_features, grad_weight = torch.autograd.grad(results[0], live)
    return results[0].detach(), results[1], results[2], grad_weight, grad_features


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("mode", ["cumulative", "window", "batch"])
def test_loss_and_state_are_the_oracles(impl, statistic, mode):
    features, labels, weight = problem()
    state = filled(state_for(weight, mode))
    loss, sums, counts = run(impl, features, labels, weight, state, statistic)[:3]
    exact = oracle(features, labels, weight, state.sums, state.counts, state.decay, statistic)
    assert float(loss) == pytest.approx(exact[0], rel=1e-12)
    torch.testing.assert_close(sums, exact[1], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(counts, exact[2], rtol=1e-15, atol=0)


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("mode", ["window", "batch"])
def test_gradients_are_autograds_of_the_reference(impl, statistic, mode):
    features, labels, weight = problem(rows=60)
    state = filled(state_for(weight, mode))
    found = run(impl, features, labels, weight, state, statistic)
    expected = autograd_of_the_reference(features, labels, weight, state, statistic)
    for value, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("mode", ["window", "batch"])
def test_gradcheck(impl, statistic, mode):
    features, labels, weight = problem(rows=14, classes=4, columns=5)
    state = filled(state_for(weight, mode))

    def loss(features, weight):
        return collapse_alignment(
            features,
            labels,
            weight,
            state.sums,
            state.counts,
            decay=state.decay,
            statistic=statistic,
            impl=impl,
        )[0]

    assert torch.autograd.gradcheck(loss, (features.requires_grad_(), weight.requires_grad_()))


def one_hot_construction(batches, weight):
    """The regulariser as published: one-hot labels, matmul, detached features; over batches."""
    classes = len(weight)
    sums = torch.zeros(classes, weight.shape[1], dtype=torch.float64)
    counts = torch.zeros(classes, dtype=torch.float64)
    for features, labels in batches:
        hot = torch.nn.functional.one_hot(labels + 1, classes + 1)[:, 1:].double()
        sums += hot.T @ features.detach().double()
        counts += hot.sum(0)
        seen = counts > 0
        means = sums[seen] / counts[seen].unsqueeze(1)
        centred = means - means.mean(0)
        yield torch.nn.functional.cosine_similarity(weight[seen], centred).std()


def test_loss_and_weight_gradient_are_the_published_ones(impl):
    weight = random(12, 6, seed=3).requires_grad_()
    batches = [problem(9, 12, 6, seed=seed)[:2] for seed in (10, 20, 30, 40)]
    state = state_for(weight)
    for (features, labels), published in zip(
        batches, one_hot_construction(batches, weight), strict=True
    ):
        ours = fastdean.collapse_alignment_loss(
            features.requires_grad_(), labels, weight, state, impl=impl
        )
        torch.testing.assert_close(ours, published, rtol=1e-12, atol=0)
        (expected,) = torch.autograd.grad(published, weight)
        found, none = torch.autograd.grad(ours, (weight, features), allow_unused=True)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-15)
        assert none is None


SIZES = [(1, 1, 1), (5, 2, 63), (65, 33, 123), (129, 64, 128), (257, 3, 1025), (40, 300, 17)]


@pytest.mark.parametrize("rows, classes, columns", SIZES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_and_single_precision_are_within_the_budget(impl, dtype, rows, classes, columns):
    data = problem(rows, classes, columns, dtype=dtype)
    assert_step_within_budget(impl, *data, filled(state_for(data[2], "window")), "std")


OTHER_KINDS = [
    (statistic, mode)
    for statistic in STATISTICS
    for mode in ("cumulative", "window", "batch")
    if (statistic, mode) != ("std", "window")
]


@pytest.mark.parametrize("statistic, mode", OTHER_KINDS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_statistic_and_mode_is_within_the_budget(impl, dtype, statistic, mode):
    data = problem(129, 33, 123, dtype=dtype)
    assert_step_within_budget(impl, *data, filled(state_for(data[2], mode)), statistic)


def assert_step_within_budget(impl, features, labels, weight, state, statistic):
    """Everything that `run` gives, of inputs in one precision."""
    dtype = weight.dtype
    found = run(impl, features, labels, weight, state, statistic)
    exact = autograd_of_the_reference(features, labels, weight, state, statistic)
    same = autograd_of_the_reference(features, labels, weight, state, statistic, torch.float32)
    assert [value.dtype for value in found] == [
        torch.float32,
        torch.float32,
        torch.float64,
        dtype,
        dtype,
    ]
    # The spread or the mean of cosines of size 1, or their quotient.
    assert abs(float(found[0]) - float(exact[0])) <= 16 * torch.finfo(torch.float32).eps
    assert_within_budget(found[1], same[1], exact[1])
    assert torch.equal(found[2], exact[2])
    for position in (3, 4):
        assert_within_budget(
            found[position], same[position].to(dtype), exact[position], dtype=dtype
        )


@pytest.mark.parametrize("features_dtype", HALVES, ids=str)
@pytest.mark.parametrize("weight_dtype", HALVES, ids=str)
def test_features_and_weight_may_differ_in_precision(impl, features_dtype, weight_dtype):
    features, labels, weight = problem()
    features, weight = features.to(features_dtype), weight.to(weight_dtype)
    state = filled(state_for(weight, "window"))
    loss, *_, grad_weight, grad_features = run(impl, features, labels, weight, state)
    exact = oracle(features, labels, weight, state.sums, state.counts, state.decay, "std")
    assert float(loss) == pytest.approx(exact[0], abs=2e-6)
    assert (grad_weight.dtype, grad_features.dtype) == (weight_dtype, features_dtype)


LAYOUTS = {
    "transposed": lambda x: x.T.contiguous().T,
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
    "every second column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "inner block": lambda x: torch.nn.functional.pad(x, (3, 2, 1, 1), value=7.0)[1:-1, 3:-2],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_strides_do_not_matter(impl, layout, dtype):
    features, labels, weight = problem(dtype=dtype)
    state = filled(state_for(weight, "window"))
    expected = run(impl, features, labels, weight, state)
    strided_labels = labels.repeat_interleave(2)[::2]
    found = run(impl, layout(features), strided_labels, layout(weight), state)
    for value, same in zip(found, expected, strict=True):
        # Plain torch adds the elements of a row in an order that depends on the strides.
        few_eps = 8 * torch.finfo(value.dtype).eps if impl == "reference" else 0
        torch.testing.assert_close(value, same, rtol=few_eps, atol=few_eps)


def test_unlabelled_rows_are_never_looked_at(impl):
    features, labels, weight = problem(rows=700)
    state = filled(state_for(weight, "window"))
    expected = run(impl, features, labels, weight, state)
    features[labels < 0] = float("nan")
    found = run(impl, features, labels, weight, state)
    for value, same in zip(found, expected, strict=True):
        assert torch.equal(value, same)
    assert not found[4][labels < 0].any() and found[4][labels >= 0].any()


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("labels", [[-1] * 6, [2] * 6, []], ids=["none", "one class", "no rows"])
def test_fewer_than_two_classes_give_zero_with_a_graph(impl, statistic, labels):
    labels = torch.tensor(labels, dtype=torch.int64)
    features = random(len(labels), 5, seed=1).requires_grad_()
    weight = random(4, 5, seed=2).requires_grad_()
    state = fastdean.CollapseState(4, 5, mode="batch", dtype=torch.float64)
    loss = fastdean.collapse_alignment_loss(
        features, labels, weight, state, statistic=statistic, detach_features=False, impl=impl
    )
    assert loss.item() == 0 and loss.requires_grad
    (loss + weight.sum() * 0).backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert torch.equal(features.grad, torch.zeros_like(features))


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_identical_class_means_have_no_direction(impl, statistic, dtype):
    # Thirds and sevenths: the means are equal up to rounding, and the rounding must not show.
    row = random(33, seed=4, dtype=dtype)
    labels = torch.tensor([0] * 3 + [1] * 7 + [2] * 5)
    weight = random(3, 33, seed=5, dtype=dtype)
    state = state_for(weight, "batch")
    found = run(impl, row.expand(15, 33) * 1.1, labels, weight, state, statistic)
    assert float(found[0]) == {"std": 0, "cv": 0, "mean": 1}[statistic]
    assert not found[3].any() and not found[4].any()


def test_a_mean_at_the_centre_or_a_weight_of_zero_has_a_cosine_of_zero(impl):
    features = torch.tensor([[1.0, 0], [-1, 0], [0, 0], [0, 2], [0, -2]], dtype=torch.float64)
    labels = torch.arange(5)
    weight = torch.tensor([[2.0, 0], [3, 0], [1, 1], [0, 0], [0, -3]], dtype=torch.float64)
    state = state_for(weight, "batch")
    for statistic in STATISTICS:
        loss, _, _, grad_weight, grad_features = run(
            impl, features, labels, weight, state, statistic
        )
        cosines = torch.tensor([1.0, -1, 0, 0, 1], dtype=torch.float64)
        mean, std = cosines.mean(), cosines.std()
        exact = {"std": std, "cv": std / (mean**2 + 1e-6).sqrt(), "mean": 1 - mean}[statistic]
        torch.testing.assert_close(loss, exact)
        assert grad_weight.isfinite().all() and grad_features.isfinite().all()
        assert not grad_weight[2:4].any()


POISONED = {
    "a feature": lambda features, weight: features[0].fill_(float("nan")),
    "one element of a feature": lambda features, weight: features[3, 2].fill_(float("nan")),
    "a row of weight": lambda features, weight: weight[1].fill_(float("nan")),
    "one element of weight": lambda features, weight: weight[2, 0].fill_(float("nan")),
    "weight, where no mean has a direction": lambda features, weight: (
        features.zero_(),
        weight[3, 1].fill_(float("nan")),
    ),
    "a feature, where every weight is 0": lambda features, weight: (
        weight.zero_(),
        features[0].fill_(float("nan")),
    ),
}


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("poison", POISONED.values(), ids=POISONED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_nan_in_features_or_weight_is_nan_in_loss_and_gradients(impl, poison, dtype, statistic):
    features, weight = 2 * torch.eye(4, dtype=dtype), torch.eye(4, dtype=dtype)
    poison(features, weight)
    state = state_for(weight, "batch")
    loss, *_, grad_weight, grad_features = run(
        impl, features, torch.arange(4), weight, state, statistic
    )
    assert loss.isnan()
    assert grad_weight.isnan().any() and grad_features.isnan().any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("statistic", STATISTICS)
def test_the_weight_of_a_class_not_seen_is_never_looked_at(impl, statistic, value):
    features, weight = random(4, 3, seed=1), torch.eye(3, dtype=torch.float64)
    labels = torch.tensor([0, 1, 1, 0])
    expected = run(impl, features, labels, weight, state_for(weight, "batch"), statistic)
    weight[2] = value
    found = run(impl, features, labels, weight, state_for(weight, "batch"), statistic)
    for got, same in zip(found, expected, strict=True):
        assert torch.equal(got, same)
    assert found[4].isfinite().all() and not found[3][2].any()
    if impl == "reference":
        state = state_for(weight, "batch")
        by_autograd = autograd_of_the_reference(features, labels, weight, state, statistic)
        torch.testing.assert_close(found, by_autograd)


def test_equal_cosines_have_no_spread_and_no_gradient(impl):
    weight = torch.eye(2, dtype=torch.float64)
    features = torch.tensor([[1.0, -1], [-1, 1]], dtype=torch.float64)
    state = state_for(weight, "batch")
    loss, *_, grad_weight, grad_features = run(impl, features, torch.arange(2), weight, state)
    assert float(loss) == 0
    assert not grad_weight.any() and not grad_features.any()


def test_cv_stays_defined_where_the_mean_cosine_is_zero(impl):
    weight = torch.tensor([[1.0, 0], [1, 0]], dtype=torch.float64)
    features = torch.tensor([[1.0, 0], [-1, 0]], dtype=torch.float64)
    state = state_for(weight, "batch")
    loss, *_, grad_weight, _ = run(impl, features, torch.arange(2), weight, state, "cv")
    assert float(loss) == pytest.approx(math.sqrt(2) / 1e-3)
    assert grad_weight.isfinite().all()


@pytest.mark.parametrize("live", [False, True], ids=["weight", "weight and features"])
def test_opcheck(impl, live):
    features, labels, weight = problem(rows=9, classes=4, columns=5)
    state = filled(state_for(weight, "window"))
    arguments = (labels, weight.requires_grad_(), state.sums, state.counts, 0.5, "std", impl)
    features.requires_grad_(live)
    torch.library.opcheck(collapse._forward, (features, *arguments))
    results = [each.detach() for each in collapse._forward(features, *arguments)]
    torch.library.opcheck(
        collapse.collapse_alignment_backward,
        (
            torch.ones((), dtype=torch.float64),
            labels,
            weight.detach(),
            *results[1:],
            torch.float64,
            True,
            live,
            impl,
        ),
    )


def train_step(features, labels, weight, state, impl):
    loss = fastdean.collapse_alignment_loss(
        features, labels, weight, state, detach_features=False, impl=impl
    )
    return 10 * loss


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_whole_graph_compiles_with_its_state(impl, backend):
    assert_compiled_steps_are_the_eager_ones(problem, impl, backend)


@pytest.mark.slow
# Torch's own, when it imports this compiler.
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_the_default_compiler_takes_the_whole_graph(compiled, monkeypatch, tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("needs g++, with which torch compiles for a CPU")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    small = functools.partial(problem, rows=5, classes=2, columns=3)
    assert_compiled_steps_are_the_eager_ones(small, "native", "inductor")


def assert_compiled_steps_are_the_eager_ones(make, impl, backend):
    """Three steps with one state, bit for bit; `make` is `problem` at some size."""
    torch._dynamo.reset()
    step = torch.compile(train_step, fullgraph=True, backend=backend)
    weight = make()[2].requires_grad_()
    states = state_for(weight, "window"), state_for(weight, "window")
    for seed in (1, 2, 3):
        features, labels, _ = make(seed=seed)
        features.requires_grad_()
        losses = [
            run_step(features, labels, weight, state, impl)
            for run_step, state in zip((step, train_step), states, strict=True)
        ]
        assert torch.equal(*losses)
        gradients = [torch.autograd.grad(loss, (features, weight)) for loss in losses]
        assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    assert torch.equal(states[0].sums, states[1].sums)
    assert torch.equal(states[0].counts, states[1].counts)


def test_the_default_device_does_not_matter(impl):
    features, labels, weight = problem()
    states = [filled(state_for(weight, "window")) for _ in range(2)]
    expected = run(impl, features, labels, weight, states[0])
    with torch.device("meta"):
        found = run(impl, features, labels, weight, states[1])
    for value, same in zip(found, expected, strict=True):
        assert torch.equal(value, same)


@pytest.mark.usefixtures("compiled")
def test_the_default_device_does_not_matter_to_the_extension():
    # Torch keeps it from what it calls as an operation, and the gate may be called by itself.
    features, labels, weight = problem()
    state = filled(state_for(weight, "window"))
    arguments = (features, labels, weight, state.sums, state.counts, 0.5, "std")
    ones = torch.ones((), dtype=torch.float64)
    results = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            forward = native.collapse_alignment(*arguments)
            backward = native.collapse_alignment_backward(
                ones, labels, weight, *forward[1:], torch.float64, True, True
            )
        results.append([*forward, *backward])
    for value, same in zip(*results, strict=True):
        assert torch.equal(value, same)


def integers(rows, columns, seed):
    """Whole numbers: every sum of them is exact, in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-9, 10, (rows, columns), generator=generator).float()


def test_batches_one_after_the_other_are_one_pass_over_all(impl):
    features, labels = integers(60, 8, seed=1), some_labels(60, 5)
    weight = random(5, 8, seed=2, dtype=torch.float32)
    whole, parts = state_for(weight), state_for(weight)
    expected = fastdean.collapse_alignment_loss(features, labels, weight, whole, impl=impl)
    for start in range(0, 60, 17):
        rows = slice(start, start + 17)
        loss = fastdean.collapse_alignment_loss(
            features[rows], labels[rows], weight, parts, impl=impl
        )
    assert torch.equal(loss, expected)
    assert torch.equal(parts.sums, whole.sums) and torch.equal(parts.counts, whole.counts)


def test_states_of_two_parts_add_up_to_that_of_the_whole(impl):
    features, labels = integers(60, 8, seed=1), some_labels(60, 5)
    weight = random(5, 8, seed=2, dtype=torch.float32)
    states = [state_for(weight) for _ in range(3)]
    for rows, state in zip((slice(0, 25), slice(25, 60), slice(0, 60)), states, strict=True):
        fastdean.collapse_alignment_loss(features[rows], labels[rows], weight, state, impl=impl)
    total = states[0] + states[1]
    assert torch.equal(total.sums, states[2].sums)
    assert torch.equal(total.counts, states[2].counts)
    assert total.mode == "cumulative"


def test_a_saved_state_goes_on_as_if_nothing_had_happened(impl, tmp_path):
    weight = random(5, 8, seed=2, dtype=torch.float32)
    state = state_for(weight, "window", 0.75)
    batches = [problem(20, 5, 8, seed=seed, dtype=torch.float32)[:2] for seed in (1, 2)]
    fastdean.collapse_alignment_loss(*batches[0], weight, state, impl=impl)
    torch.save(state.state_dict(), tmp_path / "state.pt")
    loaded = state_for(weight, "window", 0.75)
    loaded.load_state_dict(torch.load(tmp_path / "state.pt"))
    losses = [
        fastdean.collapse_alignment_loss(*batches[1], weight, each, impl=impl)
        for each in (state, loaded)
    ]
    assert torch.equal(*losses)
    assert torch.equal(state.sums, loaded.sums)


def test_loading_copies():
    state, other = (fastdean.CollapseState(2, 3) for _ in range(2))
    other.load_state_dict(state.state_dict())
    other.sums += 1
    assert not state.sums.any()


@pytest.mark.parametrize(
    "counts, found",
    [
        (torch.zeros(3, dtype=torch.float64), r"torch.float64 \[3\]"),
        (torch.zeros(2), r"torch.float32 \[2\]"),
        ([0.0, 0.0], r"\[0.0, 0.0\]"),
    ],
    ids=["shape", "dtype", "type"],
)
def test_counts_that_do_not_fit_are_not_loaded(counts, found):
    state = filled(fastdean.CollapseState(2, 3))
    before = state.sums.clone()
    stored = {**fastdean.CollapseState(2, 3).state_dict(), "counts": counts}
    with pytest.raises(
        ValueError, match=rf"must hold counts as .*torch.float64( \[2\])?, got {found}; save"
    ):
        state.load_state_dict(stored)
    assert torch.equal(state.sums, before)


def test_a_window_halves_and_at_last_forgets(impl):
    weight = torch.eye(3)
    state = fastdean.CollapseState(3, 3, mode="window", decay=0.5)
    nothing = torch.tensor([-1]), torch.zeros(1, 3)
    fastdean.collapse_alignment_loss(torch.eye(3), torch.arange(3), weight, state, impl=impl)
    for step in range(1, 21):
        fastdean.collapse_alignment_loss(nothing[1], nothing[0], weight, state, impl=impl)
        assert torch.equal(state.counts, torch.full((3,), 0.5**step, dtype=torch.float64))
        assert torch.equal(state.sums, 0.5**step * torch.eye(3))
    loss = fastdean.collapse_alignment_loss(nothing[1], nothing[0], weight, state, impl=impl)
    assert not state.counts.any() and not state.sums.any() and loss.item() == 0


def test_reset_and_moves_leave_an_earlier_graph_alone(impl):
    features, labels, weight = problem()
    weight.requires_grad_()
    state = state_for(weight)
    loss = fastdean.collapse_alignment_loss(features, labels, weight, state, impl=impl)
    expected = run(impl, features, labels, weight, state_for(weight))[3]
    state.reset()
    assert not state.sums.any() and not state.counts.any()
    loss.backward()
    assert torch.equal(weight.grad, expected)
    assert state.to("meta") is state
    assert state.sums.device.type == state.counts.device.type == "meta"


def test_ranks_are_summed_into_a_new_state(monkeypatch):
    own, others = (filled(fastdean.CollapseState(3, 4), seed) for seed in (1, 2))

    class TwoRanks:
        def sum_(self, tensors):
            sums, counts = tensors
            sums += others.sums
            counts += others.counts

    monkeypatch.setattr(alignment.Ranks, "current", staticmethod(TwoRanks))
    before = own.sums.clone()
    for _ in range(2):
        total = own.summed_across_ranks()
        assert torch.equal(total.sums, (own + others).sums)
        assert torch.equal(total.counts, (own + others).counts)
    assert torch.equal(own.sums, before)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [*HALVES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(500, 300, 1100), (3000, 40, 700)], ids=str)
def test_threads_do_not_change_a_bit(dtype, shape):
    features, labels, weight = problem(*shape, dtype=dtype)
    state = filled(state_for(weight, "window"))
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run("native", features, labels, weight, state))
    finally:
        torch.set_num_threads(before)
    for one, *others in zip(*results, strict=True):
        assert all(torch.equal(one, other) for other in others)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [*HALVES, torch.float64], ids=str)
def test_a_processor_without_vector_instructions_gives_the_same(monkeypatch, dtype):
    features, labels, weight = problem(200, 50, 131, dtype=dtype)
    state = filled(state_for(weight, "window"))
    expected = run("reference", features, labels, weight, state)
    take_level(monkeypatch, 0)
    found = run("native", features, labels, weight, state)
    for value, same in zip(found, expected, strict=True):
        eps = torch.finfo(value.dtype).eps
        torch.testing.assert_close(value, same, rtol=4 * eps, atol=32 * eps)


@pytest.mark.usefixtures("compiled")
def test_the_extension_names_what_it_refuses():
    features, labels, weight = problem()
    state = state_for(weight)
    arguments = (weight, state.sums, state.counts, 1.0, "std")
    with pytest.raises(IndexError, match=r"labels must lie in 0..6, or be -1, got others; check"):
        native.collapse_alignment(features, labels + 7, *arguments)
    with pytest.raises(
        TypeError, match="features, weight and sums must be .*, got float32, float64 and float64; "
    ):
        native.collapse_alignment(features.float(), labels, *arguments)


@pytest.mark.usefixtures("compiled")
def test_two_python_threads_on_two_states():
    features, labels, weight = problem(300, 40, 200, dtype=torch.float32)
    states = [state_for(weight) for _ in range(3)]

    def work(state):
        for _ in range(5):
            fastdean.collapse_alignment_loss(features, labels, weight, state, impl="native")

    work(states[2])
    workers = [threading.Thread(target=work, args=(state,)) for state in states[:2]]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(state.sums, states[2].sums) for state in states[:2])


def take_level(monkeypatch, level):
    """Run on the instruction set of this number, or the best one where the processor lacks it."""
    level = min(level, native.cpu_level())
    monkeypatch.setattr(gate, "cpu_level", lambda: level)


def every_half(dtype):
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("level", [0, 1], ids=["portable", "avx2"])
@pytest.mark.parametrize("dtype", HALVES[1:], ids=str)
def test_half_precision_is_read_exactly(monkeypatch, dtype, level):
    take_level(monkeypatch, level)
    every = every_half(dtype).unsqueeze(0)
    sums, counts = torch.zeros(1, 2**16), torch.zeros(1, dtype=torch.float64)
    weight = torch.zeros(1, 2**16)
    _, found, _ = collapse_alignment(
        every, torch.tensor([0]), weight, sums, counts, decay=0.0, impl="native"
    )
    assert torch.equal(found.nan_to_num(0.5), every.float().nan_to_num(0.5))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("level", [0, 1], ids=["portable", "avx2"])
@pytest.mark.parametrize("dtype", HALVES[1:], ids=str)
def test_gradients_in_half_precision_are_rounded_to_nearest_even(monkeypatch, dtype, level):
    take_level(monkeypatch, level)
    exact = every_half(dtype).float()
    # Every number, what lies halfway to the next, and a little beside it.
    halfway = (exact[1:] + exact[:-1]) / 2
    values = torch.cat([exact, halfway, halfway * (1 + 2**-20), halfway * (1 - 2**-20)])
    values = torch.cat([values, torch.tensor([3e38, -3e38, 65519.9, 65520.0, 1e-45])])[None]
    found, _ = native.collapse_alignment_backward(
        torch.ones(()),
        torch.tensor([0]),
        torch.zeros(values.shape, dtype=dtype),
        values,
        torch.ones(1, dtype=torch.float64),
        torch.zeros(values.shape[1]),
        torch.tensor([[1.0], [0.0], [0.0]]),
        dtype,
        True,
        False,
    )
    expected = values.to(dtype)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(0.5), expected.nan_to_num(0.5))


def test_names_of_statistics_are_the_same_everywhere():
    assert collapse.STATISTICS == STATISTICS


def call(**changes):
    arguments = {
        "features": torch.zeros(4, 3),
        "labels": torch.zeros(4, dtype=torch.int64),
        "weight": torch.zeros(2, 3),
        "state": fastdean.CollapseState(2, 3),
        **changes,
    }
    return fastdean.collapse_alignment_loss(**arguments)


@pytest.mark.parametrize(
    "changes, error, text",
    [
        ({"features": torch.zeros(2, 2, 3)}, ValueError, r"features must be \[N, D\], got \[2, 2"),
        ({"features": torch.zeros(4, 5)}, ValueError, "features must have the 3 columns of the"),
        ({"features": torch.zeros(4, 3).double()}, TypeError, "or all float64, got torch.float64"),
        ({"features": torch.zeros(4, 3).int()}, TypeError, "must be float32, bfloat16 or float16"),
        ({"labels": torch.zeros(3).long()}, ValueError, r"labels must be int64 \[4\], a class or"),
        ({"labels": torch.zeros(4).int()}, ValueError, "got torch.int32"),
        ({"labels": torch.tensor([0, 2, 1, 0])}, ValueError, r"lie in 0..1, or be -1, got 2"),
        ({"labels": torch.tensor([0, -100, 1, 0])}, ValueError, "got -100; -100 and the like"),
        ({"weight": torch.zeros(3, 3)}, ValueError, r"weight must be \[2, 3\], a row for each"),
        ({"weight": torch.zeros(2, 3, device="meta")}, ValueError, "on one device, got cpu, cpu"),
        ({"statistic": "var"}, ValueError, "statistic must be one of std, cv, mean, got 'var'"),
        ({"impl": "fast"}, ValueError, "impl must be one of reference, triton, native, got 'fast'"),
        ({"impl": "triton"}, RuntimeError, "no Triton kernel for collapse_alignment"),
        (
            {"detach_features": False},
            ValueError,
            "detach_features=False must come with a state of mode 'window' or 'batch'.* fades",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, error, text):
    with pytest.raises(error, match=text):
        call(**changes)


def test_a_refused_call_leaves_the_state_alone():
    state = filled(fastdean.CollapseState(2, 3))
    before = state.sums.clone(), state.counts.clone()
    with pytest.raises(ValueError, match="labels must lie"):
        call(state=state, labels=torch.tensor([0, 1, 5, 0]))
    assert torch.equal(state.sums, before[0]) and torch.equal(state.counts, before[1])


@pytest.mark.parametrize(
    "arguments, options, error, text",
    [
        ((0, 3), {}, ValueError, "must be at least 1, got 0 and 3"),
        ((2, 3), {"mode": "epoch"}, ValueError, "mode must be one of cumulative, window, batch"),
        ((2, 3), {"decay": 0.5}, ValueError, "decay must be left out in mode 'cumulative'"),
        ((2, 3), {"mode": "window", "decay": 1.0}, ValueError, "above 0 and below 1, got 1.0"),
        ((2, 3), {"dtype": torch.bfloat16}, TypeError, "dtype must be torch.float32 or torch.flo"),
    ],
)
def test_a_state_that_makes_no_sense_is_refused(arguments, options, error, text):
    with pytest.raises(error, match=text):
        fastdean.CollapseState(*arguments, **options)


def test_states_of_another_kind_are_neither_added_nor_loaded():
    state = fastdean.CollapseState(2, 3)
    for other in (
        fastdean.CollapseState(2, 4),
        fastdean.CollapseState(2, 3, mode="batch"),
        fastdean.CollapseState(2, 3, dtype=torch.float64),
    ):
        with pytest.raises(ValueError, match="the other state must be of kind"):
            state + other
        with pytest.raises(ValueError, match="stored must be of kind"):
            state.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="must hold the field counts, got no such field"):
        state.load_state_dict({"sums": state.sums, "mode": "cumulative"})
    window = [fastdean.CollapseState(2, 3, mode="window", decay=d) for d in (0.5, 0.9)]
    with pytest.raises(ValueError, match="'decay': 0.5"):
        window[0] + window[1]


DEVICE_SHAPES = pytest.mark.parametrize(
    "shape", [(40, 7, 9), (3000, 300, 1100), (5000, 3, 64)], ids=str
)


@functools.cache
def device_case(shape, dtype):
    """(features, labels, weight), a state with a past, and a step of "std" exactly and in torch."""
    data = problem(*shape, dtype=dtype)
    state = filled(state_for(data[2], "window"))
    exact = std_step(*data, state.sums, state.counts, state.decay)
    same = autograd_of_the_reference(*data, state, "std", state.sums.dtype)
    return data, state, exact, same


def assert_any_order_within_budget(found, shape, dtype):
    """The budget of a `device_case`, for an implementation that adds in an order of its own."""
    _, state, exact, same = device_case(shape, dtype)
    wide, (rows, _, columns) = state.sums.dtype, shape
    assert abs(float(found[0]) - float(exact[0])) <= 16 * torch.finfo(wide).eps
    torch.testing.assert_close(found[2], exact[2], rtol=1e-15, atol=0)
    # Sums of n numbers in two orders differ by a walk of n steps: its length grows as sqrt(n).
    # Rows are added to sums, columns to products.
    share = torch.finfo(wide).eps * math.sqrt(rows + columns)
    for position, promised in ((1, wide), (3, dtype), (4, dtype)):
        lost = share * float(exact[position].abs().max())
        assert_within_budget(
            found[position], same[position].to(promised), exact[position], promised, lost
        )


def test_the_wide_oracle_is_the_references_own_gradient():
    data = problem(60)
    state = filled(state_for(data[2], "window"))
    exact = std_step(*data, state.sums, state.counts, state.decay)
    plain = autograd_of_the_reference(*data, state, "std")
    for value, expected in zip(exact, plain, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@DEVICE_SHAPES
def test_the_budget_of_the_device_is_one_that_the_cpu_keeps_in_any_order(impl, dtype, shape):
    (features, labels, weight), state = device_case(shape, dtype)[:2]
    for order in (torch.arange(len(labels)), torch.arange(len(labels)).flip(0)):
        found = list(run(impl, features[order], labels[order], weight, state))
        found[4] = found[4][order.argsort()]
        assert_any_order_within_budget(found, shape, dtype)


@DEVICE_SHAPES
def test_the_budget_of_the_device_sees_an_error_of_the_twelfth_digit(impl, shape):
    data, state = device_case(shape, torch.float64)[:2]
    found = run(impl, *data, state)
    for position in range(5):
        wrong = list(found)
        wrong[position] = found[position] * (1 + 1e-12)
        with pytest.raises(AssertionError):
            assert_any_order_within_budget(wrong, shape, torch.float64)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["reference", "native"])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float64], ids=str)
@DEVICE_SHAPES
def test_cuda_is_within_the_budget_and_repeats_bit_for_bit(impl, dtype, shape):
    data, state = device_case(shape, dtype)[:2]
    on_device = state_for(data[2], "window")
    on_device.load_state_dict(state.state_dict())
    on_device.to("cuda")
    arguments = [each.cuda() for each in data]
    found, again = (run(impl, *arguments, on_device) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(found, again, strict=True))
    assert_any_order_within_budget([each.cpu() for each in found], shape, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["reference", "native"])
@pytest.mark.parametrize("poison", POISONED.values(), ids=POISONED)
def test_on_cuda_nan_shows_and_a_class_not_seen_is_not_looked_at(impl, poison):
    features, weight = 2 * torch.eye(5, device="cuda"), torch.eye(5, device="cuda")
    labels = torch.arange(5, device="cuda")
    labels[4] = -1
    weight[4] = float("nan")
    state = state_for(weight, "batch").to("cuda")
    loss, *_, grad_weight, grad_features = run(impl, features, labels, weight, state)
    assert loss.isfinite() and not grad_weight[4].any()
    assert grad_weight.isfinite().all() and grad_features.isfinite().all()
    poison(features, weight)
    loss, *_, grad_weight, grad_features = run(impl, features, labels, weight, state)
    assert loss.isnan()
    assert grad_weight[:4].isnan().any() and grad_features[:4].isnan().any()


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["reference", "native"])
def test_on_cuda_labels_out_of_range_show_as_a_loss_of_nan(impl):
    features, labels, weight = (each.cuda() for each in problem())
    state = filled(state_for(weight, "window")).to("cuda")
    kept = run(impl, features, torch.where(labels == 3, -1, labels), weight, state)
    found = run(impl, features, torch.where(labels == 3, 99, labels), weight, state)
    assert found[0].isnan() and not found[3].any() and not found[4].any()
    assert torch.equal(found[1], kept[1]) and torch.equal(found[2], kept[2])


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["reference", "native"])
def test_nothing_waits_for_the_device(impl):
    features, labels, weight = (each.cuda() for each in problem())
    state = filled(state_for(weight, "window")).to("cuda")
    run(impl, features, labels, weight, state)
    with device_waits() as waits:
        run(impl, features, labels, weight, state)
    assert waits == []
