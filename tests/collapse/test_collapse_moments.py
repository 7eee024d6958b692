"""Class moments: what a loop in float64 gives, from any split of the tokens."""

from __future__ import annotations

import pytest
import torch

from fastdean.collapse import ClassMoments

K, D = 5, 6


def tokens(n=60, seed=0, dtype=torch.float64, offset=0.0, scale=1.0):
    """(features [n, D], labels [n]): class 3 has no token, class 4 one, some tokens are of none."""
    generator = torch.Generator().manual_seed(seed)
    features = offset + scale * torch.randn(n, D, generator=generator, dtype=torch.float64)
    labels = torch.tensor([-1, 0, 1, 2])[torch.randint(4, (n,), generator=generator)]
    labels[n // 2] = 4
    return features.to(dtype), labels


def brute_force(features, labels):
    counts, means, scatter = torch.zeros(K), torch.zeros(K, D).double(), torch.zeros(K).double()
    for c in range(K):
        rows = [row.double() for row, label in zip(features, labels, strict=True) if label == c]
        if rows:
            counts[c] = len(rows)
            means[c] = sum(rows) / len(rows)
            scatter[c] = sum(((row - means[c]) ** 2).sum() for row in rows)
    return counts.double(), means, scatter


def moments_of(*batches):
    moments = ClassMoments(K, D)
    for features, labels in batches:
        moments.add_(features, labels)
    return moments


def assert_same(moments, expected, rtol=1e-12):
    counts, means, scatter = expected
    assert torch.equal(moments.counts, counts)
    assert torch.allclose(moments.means, means, rtol=rtol, atol=rtol)
    assert torch.allclose(moments.scatter, scatter, rtol=rtol, atol=1e-20)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_one_batch_is_the_loop_over_its_tokens(dtype):
    features, labels = tokens(dtype=dtype)
    assert_same(moments_of((features, labels)), brute_force(features, labels))


@pytest.mark.parametrize("size", [1, 7, 60])
def test_any_grouping_gives_the_same(size):
    features, labels = tokens()
    moments = moments_of(*zip(features.split(size), labels.split(size), strict=True))
    assert_same(moments, brute_force(features, labels))


def test_the_order_of_the_tokens_does_not_matter():
    features, labels = tokens()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    batches = zip(features[order].split(11), labels[order].split(11), strict=True)
    assert_same(moments_of(*batches), brute_force(features, labels))


@pytest.mark.parametrize("size", [1, 7, 60])
def test_a_large_common_mean_costs_no_digits(size):
    features, labels = tokens(offset=1e6, scale=1e-3)
    moments = moments_of(*zip(features.split(size), labels.split(size), strict=True))
    # About the common mean the loop loses nothing; means of 1e6 round at 1e-10.
    expected = brute_force(features - 1e6, labels)[2]
    assert torch.allclose(moments.scatter, expected, rtol=1e-6, atol=0)
    naive = (features.square() * (labels == 0).unsqueeze(1)).sum()
    naive -= moments.counts[0] * moments.means[0].square().sum()
    assert abs(naive / expected[0] - 1) > 0.5


def test_halves_add_to_the_whole():
    features, labels = tokens()
    first = moments_of((features[:20], labels[:20]))
    second = moments_of((features[20:], labels[20:]))
    whole = brute_force(features, labels)
    assert_same(first + second, whole)
    assert_same(second + first, whole)
    assert_same(first + ClassMoments(K, D), (first.counts, first.means, first.scatter), rtol=0)
    assert_same(ClassMoments(K, D) + first, (first.counts, first.means, first.scatter), rtol=0)


def test_alone_a_rank_merges_to_a_copy_of_itself():
    moments = moments_of(tokens())
    merged = moments.across_ranks()
    assert_same(merged, (moments.counts, moments.means, moments.scatter), rtol=0)
    merged.add_(*tokens(seed=1))
    assert_same(moments, brute_force(*tokens()))


def test_variances_divide_by_the_count():
    features, labels = tokens()
    variances = moments_of((features, labels)).variances
    rows = features[labels == 1]
    assert torch.allclose(variances[1], rows.var(0, unbiased=False).sum())
    assert variances[3] == 0 and variances[4] == 0


def test_rows_of_no_class_are_not_looked_at():
    features, labels = tokens()
    expected = brute_force(features, labels)
    features[labels < 0] = float("nan")
    assert_same(moments_of((features, labels)), expected)
    nothing = moments_of((features, torch.full_like(labels, -1)), (features[:0], labels[:0]))
    assert nothing.counts.sum() == 0 and nothing.means.abs().sum() == 0


def test_strides_do_not_matter():
    features, labels = tokens()
    wide = torch.full((len(labels), 2 * D), float("nan"), dtype=torch.float64)
    wide[:, ::2] = features
    assert_same(moments_of((wide[:, ::2], labels)), brute_force(features, labels))


def test_no_graph_is_kept():
    features, labels = tokens()
    moments = moments_of((features.requires_grad_(), labels))
    assert not any(part.requires_grad for part in (moments.means, moments.scatter))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((torch.zeros(2, D + 1), torch.zeros(2).long()), ValueError, r"of shape \[N, 6\], got"),
        ((torch.zeros(2, D).long(), torch.zeros(2).long()), TypeError, "must be floating point"),
        ((torch.zeros(2, D), torch.zeros(2)), ValueError, r"int64 \[2\], got torch.float32 \[2\]"),
        ((torch.zeros(2, D), torch.zeros(3).long()), ValueError, r"got torch.int64 \[3\]"),
        (
            (torch.zeros(2, D), torch.tensor([0, K])),
            ValueError,
            "from -1 to 4, got values from 0 to 5",
        ),
        ((torch.zeros(2, D), torch.tensor([0, -2])), ValueError, "got values from -2 to 0"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        ClassMoments(K, D).add_(*arguments)


def test_other_shapes_do_not_add():
    with pytest.raises(ValueError, match=r"\[K, D\] = \[5, 6\], got \[5, 7\]"):
        ClassMoments(K, D) + ClassMoments(K, D + 1)
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 6"):
        ClassMoments(0, D)
