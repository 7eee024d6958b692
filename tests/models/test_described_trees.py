"""What layers return, in JSON and back."""

from __future__ import annotations

import json
from collections import OrderedDict, namedtuple

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from fastdean.models import described_trees, trees

Pair = namedtuple("Pair", ["first", "second"])


class Cache:
    def __init__(self):
        self.keys = torch.ones(2)


def test_a_tree_comes_back():
    a, b, c, d = (torch.full((2,), float(n)) for n in range(4))
    tree = (
        a,
        None,
        [True, 3, "text", 0.1, float("inf")],
        {"x": b, 4: (), (1, "y"): torch.Size([2, 3])},
        OrderedDict(z=Pair(c, torch.bfloat16)),
        BaseModelOutput(last_hidden_state=d),
    )
    text = json.dumps(described_trees.described(tree), allow_nan=False)
    numbered = [tensor for _, tensor in trees.tensors(tree)]
    again = described_trees.rebuilt(json.loads(text), numbered)
    assert again == tree
    assert [type(part) for part in again] == [type(part) for part in tree]
    assert isinstance(again[4]["z"], Pair) and again[5].last_hidden_state is d
    assert isinstance(again[3][1, "y"], torch.Size)


def test_what_is_no_tree_is_refused_by_name():
    with pytest.raises(RuntimeError, match="resume must be left out for .*, got Cache; use order"):
        described_trees.described((torch.ones(1), Cache()))


@pytest.mark.parametrize(
    "text",
    [
        {"tensor": 1},
        {"odd": []},
        {"class": "builtins:dict", "output": []},
        {"class": "subprocess:Popen", "fields": [{"value": "true"}]},
        {"class": "no.such:thing", "fields": []},
        7,
    ],
)
def test_what_nobody_described_is_refused(text):
    with pytest.raises(ValueError, match="no described tree"):
        described_trees.rebuilt(text, [torch.ones(1)])
