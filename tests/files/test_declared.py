"""The gate that compares a file with what is declared of it."""

from __future__ import annotations

import json
import os
import re

import pytest
import torch

from fastdean.files.declared import (
    Anything,
    Either,
    Exactly,
    Filled,
    Flag,
    Lists,
    Maps,
    Maybe,
    Places,
    Real,
    Record,
    Row,
    Text,
    Unfit,
    Whole,
    read_json,
    require,
)

NAN = float("nan")


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        (Whole(least=1), 0, "a whole number of at least 1, got 0"),
        (Whole(most=3), 4, "a whole number from 0 to 3, got 4"),
        (Whole(), True, "a whole number of at least 0, got True"),
        (Whole(), 1.0, "a whole number of at least 0, got 1.0"),
        (Whole(), 10**5000, "a whole number of at least 0, got a very large int"),
        (Real(), NAN, "a finite number, got nan"),
        (Real(), False, "a finite number, got False"),
        (Real(), 10**400, "a finite number, got 1000"),
        (Real(above=0, most=1), 0, "a finite number above 0 and at most 1, got 0"),
        (Text(longest=3), "abcd", "a text of at most 3 characters, got one of 4"),
        (Text(choices=("a", "b")), ["a"], "'a' or 'b', got ['a']"),
        (Flag(), 1, "true or false, got 1"),
        (Exactly(1), True, "1, got True"),
        (Maybe(Whole()), "1", "null or a whole number of at least 0, got '1'"),
        (Maybe(Lists(Whole())), [True], "[0] as a whole number of at least 0, got True"),
        (Lists(Whole(), least=2, most=2), [1], "a list of 2, got [1]"),
        (Row((Text(), Whole())), ["a", "b"], "[1] as a whole number of at least 0, got 'b'"),
        (Maps(Whole()), [], "an object, got []"),
        (Maps(Whole()), {"a\x1b": -1}, r"['a\x1b'] as a whole number of at least 0, got -1"),
        (Record({"a": Whole()}), {}, "the field a, got no such field"),
        (Record({"a": Whole()}), {"a": 1, "b": 2}, "an object of a, got one with 'b'"),
        (
            Record(optional={"a": Record({"b": Whole()})}),
            {"a": {}},
            "the field a.b, got no such fi",
        ),
        (Either((Real(), Exactly("inf"))), "nan", "a finite number or 'inf', got 'nan'"),
        (
            Record({"a": Maybe(Record({"b": Whole()}))}),
            {"a": {}},
            "the field a.b, got no such field",
        ),
        (Maybe(Text(longest=3)), "abcd", "null or a text of at most 3 characters, got one of 4"),
        (Anything(), {"a": [NAN]}, "['a'][0] as a finite number, got nan"),
        (Anything(), {1: 2}, "an object with names that are text, got 1"),
        (Filled(("torch.float32",), (2,)), [1.0], "a tensor in torch.float32, got [1.0]"),
        (
            Filled(("torch.float32",), (2,)),
            torch.ones(3),
            "torch.float32 [2], got torch.float32 [3]",
        ),
        (
            Filled(("torch.float32",), finite=True),
            torch.tensor([1, NAN]),
            "finite numbers, got nan",
        ),
        (Filled(("torch.int64",), least=0), torch.tensor([1, -2]), "numbers of at least 0, got -2"),
        (Places(4), torch.tensor([1, 1]), "places in ascending order without repetition, got 1 af"),
        (Places(4), torch.tensor([1, 4]), "places within 0..3, got 4"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_does_not_fit_is_refused_with_its_place(kind, value, text):
    with pytest.raises(Unfit) as caught:
        require(value, kind, "the file", advice="mend it")
    assert str(caught.value).startswith(f"'the file' must hold {text}")
    assert str(caught.value).endswith("; mend it") and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Whole(), 2**63 - 1),
        (Real(above=0, most=1), 1),
        (Maybe(Text()), None),
        (Record({"a": Whole()}, optional={"b": Flag()}), {"a": 0}),
        (Record({}, others=Whole()), {"x": 1}),
        (Anything(), {"a": [1, None, "x" * 10**6, {"b": True}]}),
        (Filled(("torch.float32",), (None, 0), finite=True, least=0), torch.ones(2, 0)),
        (Places(0), torch.empty(0, dtype=torch.int64)),
    ],
)
def test_what_fits_is_not_refused(kind, value):
    require(value, kind, "the file")


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"", "JSON, got something else (Expecting value"),
        (b'{"a": 1, "a": 2}', "JSON, got something else (the name 'a' stands in one object twice)"),
        (b"[NaN]", "JSON, got something else ('NaN' is no finite number)"),
        (b"[-Infinity]", "JSON, got something else ('-Infinity' is no finite number)"),
        (b"[1e400]", "JSON, got something else ('1e400' is no finite number)"),
        (b"[" + b"9" * 5000 + b"]", "JSON, got something else ("),
        (b"[" * 10**5, "JSON, got something else ("),
        (b"[" * 400 + b"]" * 400, "a value that is nested less than 300 times, got a deeper one"),
        (b'["\xff"]', "text in UTF-8, got other bytes at 2"),
        (b"[" + b"1, " * 40 + b"1]", "at most 100 bytes, got 123"),
    ],
)
def test_a_file_that_is_no_json_of_ours_is_refused_in_one_line(raw, text, tmp_path):
    file = tmp_path / "file.json"
    file.write_bytes(raw)
    limit = 100 if "bytes, got" in text else 1 << 20
    with pytest.raises(Unfit, match=re.escape(text)) as caught:
        read_json(file, most_bytes=limit)
    assert str(file) in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_the_mark_of_an_editor_is_no_damage(tmp_path):
    (tmp_path / "file.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": 1}).encode())
    assert read_json(tmp_path / "file.json") == {"a": 1}


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, found in (("pipe", "something else"), ("absent", "no such file"), (".", "a folder")):
        with pytest.raises(Unfit, match=f"must be a file, got {found}; write or copy it again"):
            read_json(tmp_path / name)


def test_masks_that_were_combined_many_times_are_read_again(tmp_path):
    from tiny_masks import FIRST, Stack, mask_of

    from fastdean.masks import NeuronMask

    mask = mask_of(Stack(), {FIRST: [0, 3]})
    for _ in range(100):
        mask = mask | mask_of(Stack(), {FIRST: [3]})
    mask.save_pretrained(tmp_path / "mask")
    assert NeuronMask.from_pretrained(tmp_path / "mask") == mask
