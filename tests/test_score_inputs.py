"""What a loader gives beside tokens and labels: divided, carried to the model, or refused by name.

Against one example at a time through the plain model, with exactly what the loader gave it.
"""

from __future__ import annotations

import pytest
import torch
from oracle import norm_error, weight_importance
from tiny_data import batches, make_examples
from tiny_models import HIDDEN, MAX_TOKENS, MODELS, VOCAB, bert, gpt2, llama

import fastdean
from fastdean.collapse import CollapseClasses, collapse_metrics
from fastdean.data import Example, read_examples
from fastdean.evaluation import last_token_states, perplexity, response_margins
from fastdean.targets import find_targets

EXAMPLES = make_examples(lengths=(4, 9, 2, 7, 12, 5))
TOTAL = sum(len(ids) for ids, _ in EXAMPLES)


def score(model, loader, **options):
    return fastdean.score(model, loader, progress=False, **options)


def assert_scored_as(model, loader, examples, shift=1, **options):
    """`examples`: (input_ids, labels[, inputs]) of each example, as the plain model is given it."""
    scores = score(model, loader, **options)
    assert scores.num_examples == len(examples)
    expected = weight_importance(model, examples, list(scores), shift)
    for name, value in scores.items():
        assert norm_error(value, expected[name]) < 1e-5, name
    return scores


# Rows that hold several examples.


def flattened(examples=EXAMPLES, **options):
    from transformers import DataCollatorWithFlattening

    rows = [
        {"input_ids": ids.tolist(), "labels": labels.tolist()} for ids, labels in examples
    ]
    return [DataCollatorWithFlattening(return_tensors="pt", **options)(rows)]


def joined(**columns):
    row = {
        "input_ids": torch.cat([ids for ids, _ in EXAMPLES]),
        "labels": torch.cat([labels for _, labels in EXAMPLES]),
        **columns,
    }
    return [{name: column.unsqueeze(0) for name, column in row.items()}]


def numbers(first=0):
    return torch.cat([torch.full_like(ids, i) for i, (ids, _) in enumerate(EXAMPLES, first)])


def lengths_so_far():
    ends = torch.tensor([0] + [len(ids) for ids, _ in EXAMPLES]).cumsum(0)
    return ends.to(torch.int32)


def restarting():
    return torch.cat([torch.arange(len(ids)) for ids, _ in EXAMPLES])


def padded_on(batch, **values):
    return [
        {
            name: torch.nn.functional.pad(column, (0, 5), value=values.get(name, 0))
            for name, column in batch[0].items()
        }
    ]


FLATTENED = {
    "position_ids that restart": lambda: flattened(),
    "seq_idx": lambda: flattened(return_position_ids=False, return_seq_idx=True),
    "cumulative lengths": lambda: flattened(
        return_position_ids=False, return_flash_attn_kwargs=True
    ),
    "everything the collator gives": lambda: flattened(
        return_seq_idx=True, return_flash_attn_kwargs=True
    ),
    "no separator in the labels": lambda: joined(position_ids=restarting()),
    "a mask that numbers them": lambda: joined(attention_mask=numbers(1)),
    "a mask that numbers them, and padding": lambda: padded_on(
        joined(attention_mask=numbers(1)), labels=-100
    ),
    "restarting under a mask": lambda: joined(
        attention_mask=torch.ones(TOTAL), position_ids=restarting()
    ),
    "filled up with zeros": lambda: padded_on(joined(position_ids=restarting()), labels=-100),
    "filled up, seq_idx -1": lambda: padded_on(joined(seq_idx=numbers()), labels=-100, seq_idx=-1),
    "cumulative lengths alone": lambda: [joined()[0] | {"cu_seqlens": lengths_so_far()}],
    "lists": lambda: [{k: v.tolist() for k, v in flattened()[0].items()}],
    "two rows": lambda: flattened(EXAMPLES[:3]) + flattened(EXAMPLES[3:]),
}


@pytest.mark.parametrize("kind", FLATTENED)
def test_rows_of_several_examples_are_read_one_by_one(kind):
    found = read_examples(FLATTENED[kind]())
    assert [example.input_ids.tolist() for example in found] == [i.tolist() for i, _ in EXAMPLES]
    # The collator's own labels leave out the first token of each, which has no prediction anyway.
    for example, (_, labels) in zip(found, EXAMPLES, strict=True):
        assert torch.equal(example.labels[1:], labels[1:])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_rows_of_several_examples_are_scored_one_by_one(name):
    scores = assert_scored_as(MODELS[name](), flattened(), EXAMPLES)
    assert scores.manifest["batching"]["packed"] is True
    separate = score(MODELS[name](), batches(EXAMPLES, 3))
    assert scores.manifest["data"]["sha256"] == separate.manifest["data"]["sha256"]


def test_masked_models_are_scored_example_by_example_too():
    assert_scored_as(bert(), joined(position_ids=restarting()), EXAMPLES, shift=0)


def test_max_length_cuts_each_example_of_a_row():
    cut = [(ids[:5], labels[:5]) for ids, labels in EXAMPLES]
    assert_scored_as(llama(), flattened(), cut, max_length=5)


def test_default_collation_of_flattened_rows():
    row = {name: column[0].tolist() for name, column in joined(position_ids=restarting())[0].items()}
    loader = torch.utils.data.DataLoader([row, row], batch_size=2)
    assert len(read_examples(loader)) == 2 * len(EXAMPLES)
