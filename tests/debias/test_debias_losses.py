"""The losses of the debiasing methods, against values worked out by hand and their derivatives."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from fastdean.debias.adept import (
    adept_loss,
    bias_loss,
    js_divergence,
    log_affinities,
    preservation_loss,
)
from fastdean.debias.ase import (
    ase_loss,
    diagonal_fisher,
    elastic_loss,
    gender_direction,
    stereotype_loss,
)
from fastdean.debias.bec import mask_tokens, masked_lm_loss
from fastdean.debias.causal import causal_loss
from fastdean.debias.mabel import alignment_loss, contrastive_loss, mabel_loss


def random(*shape, seed=0, requires_grad=True):
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(*shape, dtype=torch.float64, generator=generator)
    return tensor.requires_grad_(requires_grad)


def softmax_loss(logits, target):
    """-log softmax(logits)[target] of one row, by the definition."""
    return math.log(sum(math.exp(value) for value in logits)) - logits[target]


# causal


def test_causal_loss_is_the_mean_over_the_next_tokens_that_are_none_of_padding():
    logits = random(2, 3, 4, requires_grad=False)
    ids = torch.tensor([[1, 2, 3], [3, 0, 2]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    terms = [(0, 0, 2), (1, 0, 0), (1, 1, 2)]
    expected = sum(softmax_loss(logits[b, t].tolist(), target) for b, t, target in terms) / 3
    assert causal_loss(logits, ids, mask).item() == pytest.approx(expected, rel=1e-12)


def test_causal_loss_skips_the_step_out_of_left_padding():
    logits, ids = random(1, 3, 4, requires_grad=False), torch.tensor([[0, 2, 3]])
    expected = softmax_loss(logits[0, 1].tolist(), 3)
    found = causal_loss(logits, ids, torch.tensor([[0, 1, 1]]))
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_causal_loss_of_nothing_is_zero_with_zero_gradients():
    logits = random(1, 1, 4)
    loss = causal_loss(logits, torch.tensor([[1]]), torch.tensor([[1]]))
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_half_precision_logits_are_widened():
    logits = random(1, 3, 4, requires_grad=False).bfloat16()
    ids, mask = torch.tensor([[1, 2, 3]]), torch.ones(1, 3)
    assert causal_loss(logits, ids, mask).dtype == torch.float32
    assert torch.equal(causal_loss(logits, ids, mask), causal_loss(logits.float(), ids, mask))


# bec


IDS = torch.arange(10, 5010).view(50, 100)
MAY_HIDE = (IDS % 5) != 0


def masked(seed=0, may_hide=MAY_HIDE, random_ids=None, **options):
    return mask_tokens(
        IDS,
        may_hide,
        mask_id=4,
        random_ids=torch.arange(6000, 6500) if random_ids is None else random_ids,
        generator=torch.Generator().manual_seed(seed),
        **options,
    )


def test_fifteen_percent_are_hidden_most_of_them_behind_the_mask():
    found = masked()
    hidden = found.labels != -100
    n = MAY_HIDE.sum().item()
    # Four standard deviations of the counts.
    assert abs(hidden.sum().item() / n - 0.15) < 4 * math.sqrt(0.15 * 0.85 / n)
    shown = found.input_ids[hidden]
    for share, probability in [
        ((shown == 4).double().mean(), 0.8),
        ((shown >= 6000).double().mean(), 0.1),
        ((shown == IDS[hidden]).double().mean(), 0.1),
    ]:
        assert abs(share - probability) < 4 * math.sqrt(
            probability * (1 - probability) / len(shown)
        )


def test_special_tokens_and_what_is_not_hidden_stay_as_they_are():
    found = masked(rate=1.0)
    assert torch.equal(found.labels != -100, MAY_HIDE)
    assert torch.equal(found.labels[MAY_HIDE], IDS[MAY_HIDE])
    assert torch.equal(found.input_ids[~MAY_HIDE], IDS[~MAY_HIDE])


def test_the_choice_is_the_generators_alone():
    a, b, other = masked(seed=1), masked(seed=1), masked(seed=2)
    assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.labels, b.labels)
    assert not torch.equal(a.labels, other.labels)


@pytest.mark.parametrize("rate", [0, -0.1, 1.1, float("nan")])
def test_a_rate_out_of_range_is_refused(rate):
    with pytest.raises(ValueError, match=f"rate must be above 0 and at most 1, got {rate}"):
        masked(rate=rate)


def test_random_words_must_come_from_somewhere():
    with pytest.raises(ValueError, match="random_ids must hold at least one token id, got none"):
        masked(random_ids=torch.tensor([], dtype=torch.int64))


def test_masked_lm_loss_is_the_mean_over_the_hidden_tokens():
    logits = random(2, 2, 3, requires_grad=False)
    labels = torch.tensor([[-100, 2], [0, -100]])
    expected = (softmax_loss(logits[0, 1].tolist(), 2) + softmax_loss(logits[1, 0].tolist(), 0)) / 2
    assert masked_lm_loss(logits, labels).item() == pytest.approx(expected, rel=1e-12)
    assert masked_lm_loss(logits, torch.full((2, 2), -100)).item() == 0


# mabel


# Unit vectors at these angles: every cosine is that of a difference.
ANGLES = {"p": [0.0, 1.0], "h": [0.5, 0.7], "p'": [0.1, 2.0], "h'": [1.1, 0.2]}


def sentences(scale=1.0):
    return [
        torch.tensor(
            [[scale * math.cos(a), scale * math.sin(a)] for a in angles], dtype=torch.float64
        )
        for angles in ANGLES.values()
    ]


def contrast_by_hand(temperature):
    p, h, p_swapped, h_swapped = ANGLES.values()

    def term(premise, own, hypotheses):
        scores = [math.cos(premise - angle) / temperature for angle in hypotheses]
        return softmax_loss(scores, own)

    terms = [term(p[i], i, h + h_swapped) for i in (0, 1)]
    terms += [term(p_swapped[i], i, h_swapped + h) for i in (0, 1)]
    return sum(terms) / 4


def alignment_by_hand(form, temperature=0.05):
    """Of cosines of differences of angles; the released code's is over all pairs of the batch."""
    p, h, p_swapped, h_swapped = ANGLES.values()

    def squared(i, j):
        return (math.cos(p[i] - h[j]) - math.cos(p_swapped[i] - h_swapped[j])) ** 2

    if form == "paper":
        return (squared(0, 0) + squared(1, 1)) / 2
    return sum(squared(i, j) for i in (0, 1) for j in (0, 1)) / temperature**2 / 2


@pytest.mark.parametrize("temperature", [0.05, 1.0])
@pytest.mark.parametrize("scale", [1.0, 7.0])
def test_contrastive_loss_by_hand(temperature, scale):
    found = contrastive_loss(*sentences(scale), temperature=temperature)
    assert found.item() == pytest.approx(contrast_by_hand(temperature), rel=1e-10)


@pytest.mark.parametrize("scale", [1.0, 7.0])
@pytest.mark.parametrize("form", ["published", "paper"])
def test_alignment_and_mabel_loss_by_hand(form, scale):
    alignment = alignment_by_hand(form)
    found = alignment_loss(*sentences(scale), form=form)
    assert found.item() == pytest.approx(alignment, rel=1e-10)
    expected = contrast_by_hand(0.05) + 0.05 * alignment + 0.1 * 3.0
    mlm = torch.tensor(3.0, dtype=torch.float64)
    assert mabel_loss(*sentences(scale), mlm, form=form).item() == pytest.approx(expected, rel=1e-9)


def test_the_released_form_is_the_default_and_far_larger():
    """By 1 / T^2 and the pairs of other examples: the weight of 0.05 is for this one."""
    found = alignment_loss(*sentences())
    assert found.item() == pytest.approx(alignment_by_hand("published"), rel=1e-10)
    assert found > 400 * alignment_loss(*sentences(), form="paper")
    cooler = alignment_loss(*sentences(), temperature=0.1)
    assert cooler.item() == pytest.approx(found.item() / 4, rel=1e-10)


@pytest.mark.parametrize("form", ["published", "paper"])
def test_mabel_gradients(form):
    inputs = [random(3, 4, seed=seed) for seed in range(4)]
    mlm = random(1, seed=9).squeeze()
    assert gradcheck(lambda *x: mabel_loss(*x, form=form, temperature=0.5), (*inputs, mlm))


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="form must be 'published' or 'paper', got 'released'"):
        alignment_loss(*sentences(), form="released")
    with pytest.raises(ValueError, match="form must be 'published' or 'paper', got 'bits'"):
        bias_loss(torch.ones(2, 2), torch.ones(2, 2), form="bits")
    with pytest.raises(ValueError, match="temperature must be above 0, got 0; 0.05 is"):
        alignment_loss(*sentences(), temperature=0)


def test_mabel_refuses_shapes_that_differ_and_a_temperature_of_zero():
    p, h, p_swapped, _ = sentences()
    with pytest.raises(ValueError, match=r"must have one shape \[B, D\], got .*\(1, 2\)"):
        contrastive_loss(p, h, p_swapped, p[:1])
    with pytest.raises(ValueError, match="temperature must be above 0, got 0; 0.05 is"):
        contrastive_loss(*sentences(), temperature=0)


# ase


def test_gender_direction_points_from_the_female_to_the_male_sum():
    female = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    # One word has two pieces. Sums (0, 2) and (6, 10): the difference is (6, 8).
    male = torch.tensor([[6.0, 1.0], [0.0, 4.0], [0.0, 5.0]])
    direction = gender_direction(female.requires_grad_(), male.requires_grad_())
    assert direction.tolist() == pytest.approx([0.6, 0.8])
    assert not direction.requires_grad


def test_stereotype_loss_is_the_sum_of_the_absolute_projections():
    hidden = torch.tensor([[1.0, 0.0], [0.0, -2.0], [-5.0, 5.0]])
    found = stereotype_loss(hidden, torch.tensor([0.6, 0.8]))
    assert found.item() == pytest.approx(0.6 + 1.6 + 1.0)
    assert stereotype_loss(hidden[:0], torch.tensor([0.6, 0.8])).item() == 0


def test_diagonal_fisher_is_the_mean_squared_gradient():
    a, b, unused = random(2), random(3, seed=1), random(1, seed=2)
    losses = (scale * (a.sum() + (b * b).sum()) for scale in (1.0, 3.0))
    found = diagonal_fisher(losses, {"a": a, "b": b, "unused": unused})
    assert torch.allclose(found["a"], torch.full((2,), 5.0, dtype=torch.float64))
    assert torch.allclose(found["b"], 5.0 * (2 * b.detach()) ** 2)
    assert found["unused"].tolist() == [0.0]
    assert a.grad is None


def test_elastic_and_ase_loss_by_hand():
    parameters = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3.0]])}
    start = {"a": torch.tensor([0.0, 4.0]), "b": torch.tensor([[3.0]])}
    importance = {"a": torch.tensor([10.0, 0.5]), "b": torch.tensor([[8.0]])}
    elastic = elastic_loss(parameters, start, importance)
    assert elastic.item() == pytest.approx(10 * 1 + 0.5 * 4)
    hidden, direction = torch.tensor([[3.0, 4.0]]), torch.tensor([0.0, -1.0])
    assert ase_loss(torch.tensor(2.0), hidden, direction, elastic).item() == pytest.approx(
        2 + 4 + 0.5 * 12
    )


def test_ase_gradients():
    direction = torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64)
    start, importance = random(2, 2, requires_grad=False), random(2, 2, seed=1).detach().square()

    def loss(mlm, hidden, parameter):
        elastic = elastic_loss({"w": parameter}, {"w": start}, {"w": importance})
        return ase_loss(mlm, hidden, direction, elastic)

    assert gradcheck(
        loss, (random(1, seed=3).squeeze(), random(4, 3, seed=4), random(2, 2, seed=5))
    )


def test_ase_refuses_what_gives_no_direction_and_names_that_differ():
    with pytest.raises(ValueError, match=r"must have shapes .*, got \[2, 2\] and \[0, 2\]"):
        gender_direction(torch.eye(2), torch.zeros(0, 2))
    with pytest.raises(ValueError, match="female must differ from male, got .* equal sums"):
        gender_direction(torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match="must have the same names, got 'b' in some only"):
        elastic_loss({"a": torch.ones(1)}, {"a": torch.ones(1)}, {"a": 1, "b": torch.ones(1)})
    with pytest.raises(ValueError, match="losses must hold at least one loss, got none"):
        diagonal_fisher([], {})


# adept


def affinities_by_hand(neutral, prototype, rho):
    weights = [
        math.exp(-sum((x - y) ** 2 for x, y in zip(word, prototype, strict=True)) / (2 * rho**2))
        for word in neutral
    ]
    return [weight / sum(weights) for weight in weights]


def js_by_hand(p, q, log=math.log):
    m = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    return sum(sum(x * log(x / z) for x, z in zip(side, m, strict=True)) / 2 for side in (p, q))


NEUTRAL = [[0.0, 1.0], [2.0, 0.5], [-1.0, 3.0]]
PROTOTYPES = [[1.0, 1.0], [-2.0, 0.0], [0.0, 4.0]]


@pytest.mark.parametrize(
    ("form", "rho", "width"),
    [
        ("published", None, 10.0),
        ("published", 0.7, 0.7),
        ("paper", None, math.sqrt(2)),
        ("paper", 0.7, 0.7),
    ],
)
def test_bias_loss_by_hand(form, rho, width):
    p = [affinities_by_hand(NEUTRAL, prototype, width) for prototype in PROTOTYPES]
    neutral = torch.tensor(NEUTRAL, dtype=torch.float64)
    prototypes = torch.tensor(PROTOTYPES, dtype=torch.float64)
    found = log_affinities(neutral, prototypes, rho=width).exp()
    assert torch.allclose(found, torch.tensor(p, dtype=torch.float64), rtol=1e-10)
    log = math.log2 if form == "published" else math.log
    pairs = [js_by_hand(p[a], p[b], log) for a, b in ((0, 1), (0, 2), (1, 2))]
    expected = sum(pairs) / 3 if form == "published" else sum(pairs)
    loss = bias_loss(neutral, prototypes, form=form, rho=rho)
    assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_js_divergence_is_zero_for_equals_and_log_two_for_strangers():
    uniform = torch.full((4,), 0.25, dtype=torch.float64).log()
    assert js_divergence(uniform, uniform).item() == pytest.approx(0, abs=1e-12)
    apart = torch.log_softmax(torch.tensor([300.0, 0.0], dtype=torch.float64), 0)
    assert js_divergence(apart, apart.flip(0)).item() == pytest.approx(math.log(2))


def test_adept_loss_weighs_bias_and_preservation():
    neutral, prototypes = torch.tensor(NEUTRAL), torch.tensor(PROTOTYPES[:2])
    hidden, original = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 5.0]])
    assert preservation_loss(hidden, original).item() == pytest.approx(4.5)
    expected = 0.3 * bias_loss(neutral, prototypes).item() + 0.7 * 4.5
    found = adept_loss(neutral, prototypes, hidden, original)
    assert found.item() == pytest.approx(expected)


@pytest.mark.parametrize(("words", "attributes"), [(1, 2), (0, 2), (3, 1), (3, 0)])
def test_without_two_of_each_there_is_no_bias(words, attributes):
    neutral, prototypes = random(words, 2), random(attributes, 2, seed=1)
    loss = bias_loss(neutral, prototypes)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(neutral.grad, torch.zeros_like(neutral))


@pytest.mark.parametrize("form", ["published", "paper"])
def test_adept_gradients(form):
    inputs = [random(3, 2), random(2, 2, seed=1), random(4, 2, seed=2)]
    original = random(4, 2, seed=3, requires_grad=False)
    assert gradcheck(lambda *x: adept_loss(*x, original, form=form, rho=1.0), inputs)


def test_adept_refuses_other_shapes_and_a_width_of_zero():
    with pytest.raises(ValueError, match=r"original must have the shape of hidden, got \[1, 2\]"):
        preservation_loss(torch.ones(2, 2), torch.ones(1, 2))
    with pytest.raises(ValueError, match="rho must be above 0, got 0; leave it out"):
        log_affinities(torch.ones(2, 2), torch.ones(2, 2), rho=0)
