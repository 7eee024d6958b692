"""The regulariser against the published construction, and in every way a model can be trained."""

from __future__ import annotations

import copy
import gc
import io
import json
import logging
import pickle
import re
import weakref

import pytest
import torch
from interrupts import interrupt, moments
from tiny_classes import IDS, gradients, rich_batches, some_classes
from tiny_models import VOCAB, bert, gpt2, llama, qwen2
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdean import CollapseRegularizer
from fastdean.collapse import CollapseState, regularizer, representations

STRENGTH = 10.0
LIVE = {"detach_features": False, "mode": "batch"}


def double(build):
    return build().double().train()


def unlabelled(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


def one_hot_term(sums, counts, hidden, next_ids, embedding):
    """The published term: one-hot sums over the vocabulary, std of the listed ids' cosines."""
    hot = nn.functional.one_hot(next_ids.flatten(), VOCAB).double()
    sums += hot.T @ hidden.flatten(0, 1).double()
    counts += hot.sum(0)
    seen = [i for i in IDS if counts[i] > 0]
    means = sums[seen] / counts[seen].unsqueeze(1)
    centred = means - means.mean(0)
    return nn.functional.cosine_similarity(embedding[seen], centred).std()


@pytest.mark.parametrize("build", [qwen2, llama, gpt2, bert], ids=lambda b: b.__name__)
def test_loss_and_gradients_are_those_of_the_published_construction(build):
    model, plain = double(build), double(build)
    regularizer = CollapseRegularizer(model, some_classes(), STRENGTH, shift="published")
    sums = torch.zeros(VOCAB, model.config.hidden_size, dtype=torch.float64)
    counts = torch.zeros(VOCAB, dtype=torch.float64)
    for batch in rich_batches(3):
        model.zero_grad()
        plain.zero_grad()
        loss = model(**batch).loss
        outputs = plain(**batch)
        hidden = plain.base_model(**unlabelled(batch)).last_hidden_state
        term = one_hot_term(
            sums,
            counts,
            hidden[:, :-1].detach(),
            batch["input_ids"][:, 1:],
            plain.get_output_embeddings().weight,
        )
        expected = outputs.loss + STRENGTH * term
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        assert regularizer.value == pytest.approx(term.item(), rel=1e-12)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(gradients(model), gradients(plain), rtol=1e-9, atol=1e-13)


def test_detached_the_term_moves_the_listed_rows_alone():
    model, plain = double(llama), double(llama)
    CollapseRegularizer(model, some_classes(), STRENGTH)
    batch = next(rich_batches(1, rows=6))
    listed = [token for label, token in enumerate(IDS) if label in next_labels(batch)]
    model(**batch).loss.backward()
    plain(**batch).loss.backward()
    found, without = gradients(model), gradients(plain)
    moved = (found.pop("lm_head.weight") - without.pop("lm_head.weight")).abs().sum(1)
    assert moved.nonzero().flatten().tolist() == listed
    assert all(torch.equal(found[name], without[name]) for name in without)


def means_term(state, hidden, labels, weight, statistic):
    """The term of live features, left to autograd. `state` is replaced by what follows it."""
    sums, counts = state["sums"] * state["decay"], state["counts"] * state["decay"]
    hot = nn.functional.one_hot(labels + 1, len(IDS) + 1)[:, 1:].double()
    sums, counts = sums + hot.T @ hidden, counts + hot.sum(0)
    state["sums"], state["counts"] = sums.detach(), counts
    seen = counts > 0
    means = sums[seen] / counts[seen].unsqueeze(1)
    cosines = nn.functional.cosine_similarity(weight[seen], means - means.mean(0))
    return {"std": cosines.std(), "mean": 1 - cosines.mean()}[statistic]


def next_labels(batch):
    """The class of the token after each position; -1 where there is none or padding follows."""
    following = batch["input_ids"].roll(-1, 1)
    inside = batch["attention_mask"].roll(-1, 1) * batch["attention_mask"]
    inside[:, -1] = 0
    place = {token: label for label, token in enumerate(IDS)}
    labels = [[place.get(t, -1) for t in row] for row in following.tolist()]
    return torch.where(inside == 1, torch.tensor(labels), -1)


@pytest.mark.parametrize("mode, decay", [("batch", None), ("window", 0.5)])
@pytest.mark.parametrize("statistic", ["std", "mean"])
@pytest.mark.parametrize("features", ["base", "head"])
def test_live_features_carry_the_gradient_into_the_model(mode, decay, statistic, features):
    model, plain = double(llama), double(llama)
    CollapseRegularizer(
        model,
        some_classes(),
        STRENGTH,
        detach_features=False,
        mode=mode,
        decay=decay,
        statistic=statistic,
        features=features,
    )
    state = {"sums": torch.zeros(len(IDS), 32).double(), "counts": torch.zeros(len(IDS)).double()}
    state["decay"] = decay or 0.0
    for batch in rich_batches(2):
        model.zero_grad()
        plain.zero_grad()
        model(**batch).loss.backward()
        outputs = plain(**batch, output_hidden_states=True)
        hidden, weight = outputs.hidden_states[-1], plain.lm_head.weight[list(IDS)]
        labels = next_labels(batch).flatten()
        term = means_term(state, hidden.flatten(0, 1), labels, weight, statistic)
        (outputs.loss + STRENGTH * term).backward()
        torch.testing.assert_close(gradients(model), gradients(plain), rtol=1e-8, atol=1e-12)


def test_a_masked_model_learns_what_stands_at_a_position_and_its_head_reads_the_transform():
    found = {}
    for features in ("base", "head"):
        model = double(bert)
        regularizer = CollapseRegularizer(model, some_classes(), 1.0, features=features)
        batch = next(rich_batches(1))
        model(**batch)
        counts = torch.tensor([(batch["input_ids"] == i).sum() for i in IDS]).double()
        assert torch.equal(regularizer.state.counts, counts)
        found[features] = regularizer.value
    assert found["base"] != found["head"]


def test_a_schedule_scales_the_strength_step_by_step():
    model, plain = double(qwen2), double(qwen2)
    asked = []

    def schedule(step):
        asked.append(step)
        return step / 2

    regularizer = CollapseRegularizer(model, some_classes(), STRENGTH, schedule=schedule)
    for step, batch in enumerate(rich_batches(3)):
        extra = model(**batch).loss - plain(**batch).loss
        assert extra.item() == pytest.approx(STRENGTH * step / 2 * regularizer.value, rel=1e-9)
    assert asked == [0, 1, 2] and regularizer.step == 3


def test_a_schedule_that_gives_no_number_is_an_error():
    model = llama().train()
    CollapseRegularizer(model, some_classes(), 1.0, schedule=lambda step: float("nan"))
    with pytest.raises(ValueError, match="schedule must give a finite factor, got nan for step 0"):
        model(**next(rich_batches(1)))


def test_the_term_of_a_pass_without_loss_is_there_to_be_taken_once():
    model, added = double(llama), double(llama)
    regularizer = CollapseRegularizer(model, some_classes(), STRENGTH)
    CollapseRegularizer(added, some_classes(), STRENGTH)
    batch = next(rich_batches(1))
    outputs = model(**unlabelled(batch))
    loss = model.loss_function(outputs.logits, batch["labels"], VOCAB) + regularizer.term()
    torch.testing.assert_close(loss, added(**batch).loss, rtol=1e-12, atol=0)
    with pytest.raises(RuntimeError, match="term.. must follow a training pass whose output"):
        regularizer.term()
    model(**batch)
    with pytest.raises(RuntimeError, match="the term is part of it already"):
        regularizer.term()


def test_a_term_that_nobody_takes_is_warned_about_once(caplog):
    model = llama().train()
    CollapseRegularizer(model, some_classes(), STRENGTH)
    with caplog.at_level(logging.WARNING, logger="fastdean"):
        for batch in rich_batches(4):
            model(**unlabelled(batch))
    warned = [record for record in caplog.records if "was in no loss" in record.message]
    assert len(warned) == 1


def test_inside_held_the_output_stays_as_the_model_made_it():
    model, plain = double(llama), double(llama)
    regularizer = CollapseRegularizer(model, some_classes(), STRENGTH)
    batch = next(rich_batches(1))
    with regularizer.held():
        assert torch.equal(model(**batch).loss, plain(**batch).loss)
    assert regularizer.term().item() == pytest.approx(STRENGTH * regularizer.value)


@pytest.mark.parametrize("form", ["tuple", "dictionary"])
def test_outputs_of_every_form_get_the_term(form):
    model, plain = double(llama), double(llama)
    regularizer = CollapseRegularizer(model, some_classes(), STRENGTH)
    batch = next(rich_batches(1))
    expected = plain(**batch).loss
    if form == "tuple":
        loss, logits = model(**batch, return_dict=False)[:2]
        assert logits.dim() == 3
    else:
        outputs = model(**batch)
        assert outputs.loss is outputs["loss"] is outputs[0]
        loss = outputs.loss
    assert loss.item() == pytest.approx(expected.item() + STRENGTH * regularizer.value, rel=1e-9)


def test_evaluation_is_left_alone():
    model, plain = double(llama), double(llama)
    regularizer = CollapseRegularizer(model, some_classes(), STRENGTH)
    first, second = rich_batches(2)
    model(**first)
    counts, value = regularizer.state.counts, regularizer.value
    with torch.no_grad():
        assert torch.equal(model(**second).loss, plain(**second).loss)
    model.eval()
    assert torch.equal(model(**second).loss, plain(**second).loss)
    assert regularizer.state.counts is counts
    assert (regularizer.value, regularizer.step) == (value, 1)


def checkpointed(model, use_reentrant):
    enable = getattr(model, "activation_checkpointing_enable", None)
    enable = enable or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    return model


@pytest.mark.parametrize("options", [{}, LIVE], ids=["detached", "live"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_layers_count_their_batch_once(options, use_reentrant):
    model, plain = checkpointed(double(llama), use_reentrant), double(llama)
    regularizers = [
        CollapseRegularizer(each, some_classes(), STRENGTH, **options) for each in (model, plain)
    ]
    for batch in rich_batches(2):
        for each in (model, plain):
            each.zero_grad()
            each(**batch).loss.backward()
        states = [each.state for each in regularizers]
        assert torch.equal(states[0].counts, states[1].counts)
        torch.testing.assert_close(gradients(model), gradients(plain), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_model_that_is_recomputed_as_a_whole_is_refused(use_reentrant):
    model = llama().train()
    CollapseRegularizer(model, some_classes(), STRENGTH)
    batch = next(rich_batches(1))
    live = torch.ones((), requires_grad=True)

    def whole(one):
        return model(**batch).loss * one

    loss = checkpoint(whole, live, use_reentrant=use_reentrant)
    with pytest.raises(RuntimeError, match="model must not run again during the backward pass"):
        loss.backward()


def test_a_loss_per_item_weights_the_term_by_its_items():
    model, plain = double(llama), double(llama)
    regularizer = CollapseRegularizer(model, some_classes(), STRENGTH)
    batches = list(rich_batches(3))
    items = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    assert len(set(items)) > 1
    found, expected = 0.0, 0.0
    for batch, own in zip(batches, items, strict=True):
        found += model(**batch, num_items_in_batch=torch.tensor(sum(items))).loss.item()
        loss = plain(**batch).loss.item()
        expected += own / sum(items) * (loss + STRENGTH * regularizer.value)
    assert found == pytest.approx(expected, rel=1e-6)


def test_under_autocast_and_in_bf16_the_term_is_that_of_the_rounded_features():
    batch = next(rich_batches(1, rows=6))
    values = []
    for dtype, cast in [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)]:
        model = llama().to(dtype).train()
        regularizer = CollapseRegularizer(model, some_classes(), STRENGTH)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            loss = model(**batch).loss
        loss.backward()
        assert model.lm_head.weight.grad.dtype == dtype
        assert all(grad.isfinite().all() for grad in gradients(model).values())
        values.append(regularizer.value)
    assert values[1:] == pytest.approx(values[:1] * 2, abs=2e-2)


def train(model, batches, **adam):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **adam)
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.state_dict())


@pytest.mark.parametrize("strength, schedule", [(0, None), (STRENGTH, lambda step: 0)])
def test_strength_zero_measures_and_leaves_every_bit(strength, schedule):
    batches = list(rich_batches(3))
    expected = train(llama().train(), batches)
    model = llama().train()
    regularizer = CollapseRegularizer(model, some_classes(), strength, schedule=schedule)
    found = train(model, batches)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert regularizer.value > 0 and regularizer.state.counts.sum() > 0


def hooks_of(model):
    return [
        {name: list(value) for name, value in vars(module).items() if name.endswith("_hooks")}
        | {name: list(value) for name, value in vars(module).items() if "hooks_with" in name}
        for module in model.modules()
    ]


@pytest.mark.parametrize("features", ["base", "head"])
def test_removal_leaves_no_hook_and_no_effect(features):
    model, plain = llama().train(), llama().train()
    before = hooks_of(model)
    batches = list(rich_batches(2))
    with CollapseRegularizer(model, some_classes(), STRENGTH, features=features) as regularizer:
        assert hooks_of(model) != before
        model(**batches[0])
    assert hooks_of(model) == before and not regularizer.attached
    assert torch.equal(model(**batches[1]).loss, plain(**batches[1]).loss)
    regularizer.remove()
    assert regularizer.step == 1


SECOND = "model must have no other regulariser attached, got one .* call its remove.. first"


def test_a_cell_that_is_run_twice_does_not_add_the_term_twice():
    model, plain = double(llama), double(llama)
    first = CollapseRegularizer(model, some_classes(), STRENGTH)
    before = hooks_of(model)
    with pytest.raises(ValueError, match=SECOND):
        CollapseRegularizer(model, some_classes(), STRENGTH)
    assert hooks_of(model) == before
    batch = next(rich_batches(1))
    extra = model(**batch).loss - plain(**batch).loss
    assert extra.item() == pytest.approx(STRENGTH * first.value, rel=1e-9)
    first.remove()
    second = CollapseRegularizer(model, some_classes(), STRENGTH)
    with pytest.raises(ValueError, match=SECOND), first:
        pass
    assert second.attached and not first.attached


def test_a_block_that_is_entered_again_goes_on_with_its_statistics():
    model, whole = double(llama), double(llama)
    regularizer = CollapseRegularizer(model, some_classes(), STRENGTH)
    CollapseRegularizer(whole, some_classes(), STRENGTH)
    before = None
    for batch in rich_batches(2):
        with regularizer:
            assert torch.equal(model(**batch).loss, whole(**batch).loss)
        before = before or hooks_of(model)
        assert hooks_of(model) == before and not regularizer.attached
    assert regularizer.step == 2


def test_a_compiled_model_that_had_no_pass_before_gets_its_term():
    torch._dynamo.reset()
    model, plain = llama().train(), llama().train()
    regularizer = CollapseRegularizer(torch.compile(model, backend="eager"), some_classes(), 1.0)
    compiled = torch.compile(model, backend="eager")
    CollapseRegularizer(plain, some_classes(), 1.0)
    for batch in rich_batches(2):
        torch.testing.assert_close(compiled(**batch).loss, plain(**batch).loss)
    assert regularizer.step == 2


def stored_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("features", ["base", "head"])
@pytest.mark.parametrize("copied", [copy.deepcopy, stored_and_loaded])
def test_copies_of_a_model_come_without_its_regulariser(copied, features):
    model, plain = llama().train(), llama().train()
    regularizer = CollapseRegularizer(model, some_classes(), STRENGTH, features=features)
    first, second = rich_batches(2)
    model(**unlabelled(first))  # Leaves a term with its graph, which nothing can copy.
    other = copied(model)
    counts = regularizer.state.counts.clone()
    assert torch.equal(other(**second).loss, plain(**second).loss)
    assert torch.equal(regularizer.state.counts, counts)
    own = CollapseRegularizer(other, some_classes(), STRENGTH, features=features)
    assert not torch.equal(other(**second).loss, plain(**second).loss)
    assert (own.step, regularizer.step) == (1, 1)
    assert regularizer.term() > 0


def test_a_model_that_nobody_holds_is_let_go_of_with_its_regulariser():
    model = llama()
    CollapseRegularizer(model, some_classes(), STRENGTH)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_a_regulariser_is_not_copied(copied):
    regularizer = CollapseRegularizer(llama(), some_classes(), STRENGTH)
    with pytest.raises(TypeError, match="must not be copied or pickled, .* give it state_dict"):
        copied(regularizer)


def test_a_saved_state_goes_on_where_it_was(tmp_path):
    batches = list(rich_batches(4))
    whole, part = llama().train(), llama().train()
    regularizer = CollapseRegularizer(whole, some_classes(), 1.0, mode="window", decay=0.5)
    stopped = CollapseRegularizer(part, some_classes(), 1.0, mode="window", decay=0.5)
    for batch in batches[:2]:
        whole(**batch), part(**batch)
    torch.save(stopped.state_dict(), tmp_path / "state.pt")
    stored = torch.load(tmp_path / "state.pt", weights_only=True)
    stopped.remove()
    resumed = CollapseRegularizer(part, some_classes(), 1.0, mode="window", decay=0.5)
    resumed.load_state_dict(stored)
    for batch in batches[2:]:
        assert torch.equal(whole(**batch).loss, part(**batch).loss)
    assert torch.equal(resumed.state.sums, regularizer.state.sums) and resumed.step == 4


@pytest.mark.parametrize(
    "options, ids, message",
    [
        ({"shift": "same"}, IDS, "regulariser with the same shift, got another"),
        ({"features": "head"}, IDS, "regulariser with the same features, got another"),
        ({}, (*IDS[:-1], 61), "regulariser with the same classes, got another"),
        ({"statistic": "mean"}, IDS, "regulariser with the same statistic, got another"),
        ({"mode": "batch"}, IDS, "regulariser with the same mode, got another"),
        ({"strength": 2.0}, IDS, "regulariser with the same strength, got another"),
    ],
)
def test_the_state_of_another_regulariser_is_refused(options, ids, message):
    stored = CollapseRegularizer(llama(), some_classes(), 1.0).state_dict()
    other = CollapseRegularizer(llama(), some_classes(ids), **{"strength": 1.0, **options})
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(stored)


def test_a_schedule_is_known_by_the_factors_of_the_steps_done():
    def rising(until):
        return lambda step: min(1.0, step / until)

    model = llama().train()
    regularizer = CollapseRegularizer(model, some_classes(), 1.0, schedule=rising(2))
    for batch in rich_batches(5):
        model(**batch)
    stored = json.loads(json.dumps(regularizer.state_dict(), default=Tensor.tolist))
    assert stored["factors"] == [[0, 0, 0.0], [1, 1, 0.5], [2, 4, 1.0]]
    stored |= regularizer.state.state_dict()
    for schedule in (rising(3), lambda step: min(1.0, step / 2) if step < 4 else 0.0, None):
        other = CollapseRegularizer(llama(), some_classes(), 1.0, schedule=schedule)
        with pytest.raises(ValueError, match="regulariser with the same schedule, got another"):
            other.load_state_dict(stored)
        assert other.step == 0 and not other.state.counts.any()
    later = CollapseRegularizer(
        llama(), some_classes(), 1.0, schedule=lambda step: min(1.0, step / 2) if step < 5 else 0.0
    )
    later.load_state_dict(stored)
    assert later.step == 5 and later.state_dict()["factors"] == stored["factors"]


def test_a_state_of_something_else_is_refused():
    regularizer = CollapseRegularizer(llama(), some_classes(), 1.0)
    with pytest.raises(
        ValueError, match="'stored' must hold the field step, got no such field; save the whole"
    ):
        regularizer.load_state_dict(CollapseState(len(IDS), 32).state_dict())


def _filled(tensor, value):
    tensor = tensor.clone()
    tensor.view(-1)[0] = value
    return tensor


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda s: {"factors": [[0, 10**15, 1.0]]}, "factors[0][1] as a whole number from 0 to"),
        (lambda s: {"factors": [[0, 10**12, 1.0]]}, "factors as spans of at most the 2 steps done"),
        (lambda s: {"factors": [[1, 0, 1.0]]}, "factors[0] as a span forward, got 1 to 0"),
        (lambda s: {"factors": [[0, 1]]}, "factors[0] as a list of 3, got [0, 1]"),
        (lambda s: {"factors": [[0, 1, float("nan")]]}, "factors[0][2] as a finite number, got n"),
        (lambda s: {"factors": None}, "factors as a list, got None"),
        (lambda s: {"of": []}, "of as an object, got []"),
        (lambda s: {"step": True}, "step as a whole number from 0 to 1099511627776, got True"),
        (lambda s: {"step": 10**400}, "step as a whole number from 0 to 1099511627776, got 1000"),
        (lambda s: {"sums": _filled(s["sums"], float("nan"))}, "sums as finite numbers, got nan"),
        (lambda s: {"counts": _filled(s["counts"], float("inf"))}, "counts as finite numbers, go"),
        (lambda s: {"counts": _filled(s["counts"], -1.0)}, "counts as numbers of at least 0, got"),
        (lambda s: {"counts": s["counts"].float()}, "counts as torch.float64 ["),
        (lambda s: {"sums": [0.0]}, "sums as a tensor in torch.float32 or torch.float64, got [0"),
        (lambda s: {"decay": "1"}, "decay as a finite number at least 0 and at most 1, got '1'"),
        (lambda s: {"mode": ["window"]}, "mode as 'cumulative' or 'window' or 'batch', got ['w"),
    ],
)
@pytest.mark.parametrize("schedule", [None, lambda step: 1.0])
def test_a_damaged_state_is_refused_in_one_line_and_at_once(damage, text, schedule):
    model = llama().train()
    regularizer = CollapseRegularizer(model, some_classes(), 1.0, schedule=schedule)
    for batch in rich_batches(2):
        model(**batch)
    stored = regularizer.state_dict()
    before = regularizer.state.counts.clone()
    with pytest.raises(ValueError, match=re.escape(f"'stored' must hold {text}")) as caught:
        regularizer.load_state_dict(stored | damage(stored))
    assert len(str(caught.value).splitlines()) == 1
    assert regularizer.step == 2 and torch.equal(regularizer.state.counts, before)


def test_a_schedule_is_asked_for_few_of_very_many_steps():
    asked = []
    regularizer = CollapseRegularizer(
        llama(), some_classes(), 1.0, schedule=lambda step: asked.append(step) or 1.0
    )
    stored = regularizer.state_dict() | {"step": 10**12, "factors": [[0, 10**12 - 1, 1.0]]}
    regularizer.load_state_dict(stored)
    assert {0, 10**12 - 1} <= set(asked) and 100_000 <= len(asked) <= 100_002


def test_a_schedule_that_ends_before_the_steps_done_is_another():
    table = [1.0, 1.0]
    regularizer = CollapseRegularizer(llama(), some_classes(), 1.0, schedule=table.__getitem__)
    stored = regularizer.state_dict() | {"step": 5, "factors": [[0, 4, 1.0]]}
    with pytest.raises(ValueError, match="regulariser with the same schedule, got another"):
        regularizer.load_state_dict(stored)


REFUSED = [
    ({"strength": -1.0}, "strength must be finite and at least 0, got -1.0"),
    ({"strength": float("nan")}, "strength must be finite and at least 0, got nan"),
    ({"statistic": "sum"}, "statistic must be one of std, cv, mean, got 'sum'"),
    (
        {"detach_features": False},
        "detach_features=False must come with a state of mode 'window' or 'batch'",
    ),
    ({"mode": "epoch"}, "mode must be one of cumulative, window, batch, got 'epoch'"),
    ({"decay": 0.5}, "decay must be left out in mode 'cumulative'"),
    ({"features": "last"}, "features must be one of base, head, got 'last'"),
    ({"shift": "previous"}, "shift must be one of"),
]


@pytest.mark.parametrize("options, message", REFUSED, ids=lambda value: str(value)[:40])
def test_options_that_make_no_sense_are_refused(options, message):
    model = llama()
    with pytest.raises(ValueError, match=message):
        CollapseRegularizer(model, some_classes(), **{"strength": 1.0, **options})
    assert not any(any(names.values()) for names in hooks_of(model))


@pytest.mark.parametrize(
    "options", [{"strength": "10"}, {"strength": True}, {"mode": "window", "decay": "0.9"}]
)
def test_a_number_that_is_none_is_told_by_its_name(options):
    name, value = list(options.items())[-1]
    with pytest.raises(TypeError, match=f"^{name} must be a number, got {value!r}; give a number"):
        CollapseRegularizer(llama(), some_classes(), **{"strength": 1.0, **options})


def test_classes_of_another_vocabulary_are_refused():
    with pytest.raises(ValueError, match="embedding must be .* above 96, the largest token id"):
        CollapseRegularizer(llama(), some_classes((5, 96)), 1.0)


class Subclassed(torch.Tensor):
    pass


def subclassed(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().as_subclass(Subclassed))


def offloaded(model):
    model.lm_head.to("meta")


def quantised(model):
    model.lm_head.weight = nn.Parameter(torch.ones(VOCAB, 32).char(), requires_grad=False)


def emptied(model):
    model.lm_head.weight = nn.Parameter(torch.ones(0))


def freed(model):
    weight = nn.Parameter(model.lm_head.weight.detach().clone())
    weight.untyped_storage().resize_(0)
    model.lm_head.weight = weight


def frozen(model):
    model.lm_head.weight.requires_grad_(False)


PLAIN = "model must hold its output embedding as one plain tensor .V, D., got "


@pytest.mark.parametrize(
    "change, message",
    [
        (subclassed, PLAIN + "a Subclassed"),
        (offloaded, PLAIN + "an offloaded one"),
        (quantised, PLAIN + "a quantised one in torch.int8"),
        (emptied, PLAIN + "a sharded one .here .0.."),
        (freed, PLAIN + "one that needs .* bytes of a storage of 0, freed or cut short"),
        (frozen, "detach_features=True must come with an output embedding that is trained"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_could_not_be_trained_is_refused_whenever_it_comes(change, message, when):
    model = llama().train()
    if when == "before":
        change(model)
        with pytest.raises(ValueError, match=message):
            CollapseRegularizer(model, some_classes(), STRENGTH)
        return
    regularizer = CollapseRegularizer(model, some_classes(), STRENGTH)
    weight = model.lm_head.weight
    # The model itself must come through its pass, so the change is made behind it.
    model.lm_head.register_forward_hook(lambda *_: change(model))
    with pytest.raises(ValueError, match=message):
        model(**unlabelled(next(rich_batches(1))))
    assert regularizer.step == 0
    model.lm_head.weight = weight


@pytest.mark.parametrize("when", ["before", "after"])
def test_live_features_of_a_frozen_model_are_refused(when):
    model = llama().train()
    if when == "before":
        with pytest.raises(ValueError, match="model must have parameters that are trained"):
            CollapseRegularizer(model.requires_grad_(False), some_classes(), STRENGTH, **LIVE)
        return
    CollapseRegularizer(model, some_classes(), STRENGTH, **LIVE)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="model must have parameters that are trained"):
        model(**next(rich_batches(1)))


def test_live_features_train_the_model_below_a_frozen_embedding():
    model, plain = double(llama), double(llama)
    for each in (model, plain):
        frozen(each)
    CollapseRegularizer(model, some_classes(), STRENGTH, **LIVE)
    batch = next(rich_batches(1))
    model(**batch).loss.backward()
    plain(**batch).loss.backward()
    found, without = gradients(model), gradients(plain)
    name = "model.layers.0.mlp.down_proj.weight"
    assert "lm_head.weight" not in found
    assert not torch.allclose(found[name], without[name])


def test_a_frozen_model_may_be_measured():
    model = llama().train().requires_grad_(False)
    regularizer = CollapseRegularizer(model, some_classes(), 0)
    model(**next(rich_batches(1)))
    assert regularizer.value > 0


def test_a_call_with_embeddings_is_refused_because_classes_are_token_ids():
    model = llama().train()
    CollapseRegularizer(model, some_classes(), STRENGTH)
    batch = next(rich_batches(1))
    embedded = model.get_input_embeddings()(batch.pop("input_ids"))
    with pytest.raises(ValueError, match="model must be called with input_ids, got none; classes"):
        model(inputs_embeds=embedded, **batch)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="model must"):
        CollapseRegularizer(llama().model, some_classes(), STRENGTH)


# Ctrl-C at every line of what hooks a model.

HOOKING = {regularizer.__file__, representations.__file__}


def all_hooks(model):
    return [
        hook
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for hook in hooks.values()
    ]


def test_an_interrupt_while_it_is_made_leaves_no_hook():
    model, classes = llama().train(), some_classes()

    def make():
        CollapseRegularizer(model, classes, STRENGTH)

    found = moments(make, HOOKING)
    assert len(found) > 40
    for moment in found:
        for owner in {hook.owner for hook in all_hooks(model)}:
            if isinstance(owner, CollapseRegularizer):
                owner.remove()
        interrupt(make, HOOKING, moment)
        assert not all_hooks(model), moment


@pytest.mark.parametrize("act", ["attach", "remove"])
def test_an_interrupt_at_any_line_leaves_it_attached_whole_or_removed_whole(act):
    model = llama().train()
    made = CollapseRegularizer(model, some_classes(), STRENGTH)
    whole = len(all_hooks(model))
    reset = made.remove if act == "attach" else made.attach
    reset()
    outcomes = set()
    for moment in moments(getattr(made, act), HOOKING):
        reset()
        interrupt(getattr(made, act), HOOKING, moment)
        assert len(all_hooks(model)) == (whole if made.attached else 0), moment
        outcomes.add(made.attached)
        getattr(made, act)()
        assert made.attached is (act == "attach")
    assert False in outcomes
    made.remove()
    assert not all_hooks(model)


def test_an_interrupt_inside_held_puts_back_what_was_held():
    made = CollapseRegularizer(llama().train(), some_classes(), STRENGTH)

    def hold():
        with made.held(step=3):
            assert made._held

    for moment in moments(hold, HOOKING):
        interrupt(hold, HOOKING, moment)
        assert (made._held, made._held_step) == (False, None)


def test_an_interrupt_in_a_training_pass_leaves_the_hooks_and_the_modes():
    model = llama().train()
    made = CollapseRegularizer(model, some_classes(), STRENGTH)
    batch = next(rich_batches(1))
    # The first pass finds out who trains together.
    model(**batch)
    before = [id(hook) for hook in all_hooks(model)]
    for moment in moments(lambda: model(**batch), HOOKING)[::4]:
        interrupt(lambda: model(**batch), HOOKING, moment)
        assert [id(hook) for hook in all_hooks(model)] == before and model.training
        assert all(p.requires_grad for p in model.parameters())
    assert made.attached and torch.isfinite(model(**batch).loss)
