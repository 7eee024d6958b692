"""Which class each position of a batch has: by brute force, at borders, under padding."""

from __future__ import annotations

import re

import pytest
import tiny_models
import torch
import transformers
from device_reads import DeviceReads

from fastdean.collapse import CollapseClasses, default_shift, position_labels

SHIFTS = ("next", "same", "published")
PAD, MASK = 0, 1
RUNS = ((5,), (7,), (5, 7), (9, 9), (5, 7, 9))
CLASSES = CollapseClasses(RUNS, tuple(map(str, RUNS)), ("g",) * len(RUNS))


def class_of_tokens(text):
    """For each token of one text its class: the longest run over it, then the first to start."""
    found = []
    for position in range(len(text)):
        over = [
            (-len(run), start, number)
            for number, run in enumerate(RUNS)
            for start in range(max(0, position - len(run) + 1), position + 1)
            if tuple(text[start : start + len(run)]) == run
        ]
        found.append(min(over)[2] if over else -1)
    return found


def by_hand(ids, mask, labels, shift):
    """Each row is cut at its padding, and each piece of it is a text of its own."""
    rows = []
    for row, inside, hidden in zip(ids.tolist(), mask.tolist(), labels.tolist(), strict=True):
        if shift == "published":
            rows.append([*class_of_tokens(row)[1:], -1])
            continue
        if shift == "same":
            row = [own if true == -100 else true for own, true in zip(row, hidden, strict=True)]
        found = [-1] * len(row)
        starts = [t for t in range(len(row)) if inside[t] and (t == 0 or not inside[t - 1])]
        for start in starts:
            end = next((t for t in range(start, len(row)) if not inside[t]), len(row))
            classes = class_of_tokens(row[start:end])
            found[start:end] = classes if shift == "same" else [*classes[1:], -1]
        rows.append(found)
    return rows


def random_batch(seed, rows=24, length=11):
    generator = torch.Generator().manual_seed(seed)

    def drawn(values):
        chosen = torch.randint(len(values), (rows, length), generator=generator)
        return torch.tensor(values)[chosen]

    # Padding of every kind, also in the middle, and with ids that could be part of a run.
    return drawn([5, 7, 9, MASK, 3]), drawn([1, 1, 1, 1, 0]), drawn([-100, -100, 5, 7, 9])


def padded(texts, side):
    length = max(map(len, texts))
    empty = [[PAD] * (length - len(text)) for text in texts]
    ones = [[1] * len(text) for text in texts]
    zeros = [[0] * len(row) for row in empty]
    if side == "left":
        ids = [e + text for e, text in zip(empty, texts, strict=True)]
        mask = [z + o for z, o in zip(zeros, ones, strict=True)]
    else:
        ids = [text + e for e, text in zip(empty, texts, strict=True)]
        mask = [o + z for z, o in zip(zeros, ones, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("seed", range(4))
def test_labels_are_those_found_by_hand(shift, seed):
    ids, mask, labels = random_batch(seed)
    found = position_labels(CLASSES, ids, attention_mask=mask, labels=labels, shift=shift)
    assert found.dtype == torch.int64
    assert found.tolist() == by_hand(ids, mask, labels, shift)


@pytest.mark.parametrize("shift", SHIFTS)
def test_without_mask_and_labels(shift):
    ids, mask, labels = random_batch(9)
    expected = by_hand(ids, torch.ones_like(mask), torch.full_like(labels, -100), shift)
    assert position_labels(CLASSES, ids, shift=shift).tolist() == expected


@pytest.mark.parametrize("shift", ["next", "same"])
def test_the_side_of_the_padding_makes_no_difference(shift):
    texts = [[5, 7, 9, 5], [9, 9], [7], [3, 5, 7]]
    found = []
    for side in ("left", "right"):
        ids, mask = padded(texts, side)
        labels = position_labels(CLASSES, ids, attention_mask=mask, shift=shift)
        assert (labels[mask == 0] == -1).all()
        found.append([row[inside == 1].tolist() for row, inside in zip(labels, mask, strict=True)])
    alone = [position_labels(CLASSES, torch.tensor([t]), shift=shift)[0].tolist() for t in texts]
    assert found == [alone, alone]


def test_next_is_the_class_of_the_token_that_is_predicted():
    ids = torch.tensor([[3, 5, 3, 7]])
    assert position_labels(CLASSES, ids, shift="next").tolist() == [[0, -1, 1, -1]]


def test_next_does_not_look_at_labels():
    ids, mask, labels = random_batch(1)
    found = position_labels(CLASSES, ids, attention_mask=mask, labels=labels, shift="next")
    assert torch.equal(found, position_labels(CLASSES, ids, attention_mask=mask, shift="next"))


def test_same_knows_what_a_mask_token_hides():
    ids = torch.tensor([[3, MASK, 7, MASK]])
    labels = torch.tensor([[-100, 5, -100, -100]])
    # Hidden 5 and visible 7 are one run; the second mask token hides nothing that is known.
    found = position_labels(CLASSES, ids, labels=labels, shift="same")
    assert found.tolist() == [[-1, 2, 2, -1]]


def test_a_run_that_padding_interrupts_is_none():
    # 5 and 7 are neighbours in the row, and the 7 is padding.
    ids, mask = torch.tensor([[3, 5, 7]]), torch.tensor([[1, 1, 0]])
    same = position_labels(CLASSES, ids, attention_mask=mask, shift="same")
    assert same.tolist() == [[-1, 0, -1]]
    following = position_labels(CLASSES, ids, attention_mask=mask, shift="next")
    assert following.tolist() == [[0, -1, -1]]


def test_a_run_over_the_border_of_two_rows_is_none():
    ids = torch.tensor([[3, 3, 9], [9, 3, 3]])
    assert (position_labels(CLASSES, ids, shift="same") == -1).all()


def test_published_counts_padding_too():
    ids, mask = torch.tensor([[3, 5, 7]]), torch.tensor([[1, 0, 0]])
    found = position_labels(CLASSES, ids, attention_mask=mask, shift="published")
    assert found.tolist() == [[2, 2, -1]]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_masks_of_other_types(dtype):
    ids, mask, _ = random_batch(2)
    found = position_labels(CLASSES, ids.int(), attention_mask=mask.to(dtype), shift="next")
    expected = position_labels(CLASSES, ids, attention_mask=mask, shift="next")
    assert torch.equal(found, expected)


@pytest.mark.parametrize("shift", SHIFTS)
def test_the_host_does_not_wait(shift):
    batch = random_batch(3)
    CLASSES.labels(batch[0])  # makes the tables
    with DeviceReads() as reads:
        reads.mark(batch)
        position_labels(CLASSES, batch[0], attention_mask=batch[1], labels=batch[2], shift=shift)
    assert reads.reads == []


@pytest.mark.parametrize(("name", "shift"), [("llama", "next"), ("bert", "same")])
def test_the_shift_of_a_model(name, shift):
    model = tiny_models.MODELS[name]()
    assert default_shift(model) == shift
    assert default_shift(torch.nn.DataParallel(model)) == shift


def test_a_model_of_no_language():
    message = (
        "model must be a causal or masked language model, got Linear; load it as one "
        "(AutoModelForCausalLM, AutoModelForMaskedLM), or pass shift=, one of next, same, published"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        default_shift(torch.nn.Linear(2, 2))


def test_a_model_whose_shift_is_not_what_its_class_says():
    """What is wrong is said as it is, and `loss_fn`, which nobody takes here, is not."""
    model = transformers.BertLMHeadModel(tiny_models.bert().config)
    message = "whose logits depend on later tokens; set is_decoder=True .*, or pass shift=, one of"
    with pytest.raises(ValueError, match=message):
        default_shift(model)


def test_arguments_that_do_not_fit():
    ids = torch.tensor([[3, 5, 7]])
    with pytest.raises(ValueError, match="shift must be one of next, same, published, got None; "):
        position_labels(CLASSES, ids, shift=None)
    message = r"attention_mask must have the shape of input_ids, \[1, 3\], got \[1, 2\]; pass"
    with pytest.raises(ValueError, match=message):
        position_labels(CLASSES, ids, attention_mask=torch.ones(1, 2), shift="next")
    message = r"labels must have the shape of input_ids, \[1, 3\], got \[1\]; pass one value"
    with pytest.raises(ValueError, match=message):
        position_labels(CLASSES, ids, labels=torch.tensor([1]), shift="same")
    with pytest.raises(TypeError, match="token_ids must be integers, got torch.float32"):
        position_labels(CLASSES, ids.float(), shift="next")
