"""The structs that Python writes are those that the extension reads, field by field."""

from __future__ import annotations

import pytest

from fastdean.native import extension, structs
from fastdean.ops.collapse import STATISTICS


@pytest.fixture(autouse=True)
def compiled(extension_built):
    if not extension_built:
        pytest.skip("an install without the extension is under test")


def status_with(monkeypatch, struct, fields):
    """The state of the extension for a Python that writes `fields` as `struct`."""
    monkeypatch.setitem(structs.STRUCTS, struct, tuple(fields))
    return extension._load.__wrapped__()[1]


def as_compiled(struct):
    return list(extension.loaded().STRUCTS[struct])


@pytest.mark.parametrize("struct", structs.STRUCTS)
def test_every_field_counts_by_its_name_and_its_kind(monkeypatch, struct):
    compiled = as_compiled(struct)
    assert status_with(monkeypatch, struct, compiled).state == "available"
    for number, field in enumerate(compiled):
        kind, name = field.split()
        for other in (f"{kind} other", f"Other {name}"):
            changed = [*compiled[:number], other, *compiled[number + 1 :]]
            found = status_with(monkeypatch, struct, changed)
            assert found.state == "broken"
            assert found.reason == (
                "fastdean._C was compiled from another csrc/fastdean.h: "
                f"field {number} of {struct} is {field!r} there and {other!r} here"
            )


@pytest.mark.parametrize("struct", structs.STRUCTS)
def test_two_fields_that_change_places_are_refused(monkeypatch, struct):
    compiled = as_compiled(struct)
    for number in range(len(compiled) - 1):
        changed = list(compiled)
        changed[number], changed[number + 1] = changed[number + 1], changed[number]
        found = status_with(monkeypatch, struct, changed)
        assert f"field {number} of {struct} is {compiled[number]!r} there" in found.reason


@pytest.mark.parametrize("struct", structs.STRUCTS)
def test_a_field_that_only_one_side_has_is_refused(monkeypatch, struct):
    compiled = as_compiled(struct)
    last = len(compiled) - 1
    shorter = status_with(monkeypatch, struct, compiled[:-1])
    assert f"field {last} of {struct} is {compiled[-1]!r} there and 'none' here" in shorter.reason
    longer = status_with(monkeypatch, struct, [*compiled, "Number more"])
    assert f"field {last + 1} of {struct} is 'none' there and 'Number more' here" in longer.reason


def test_a_struct_that_only_one_side_has_is_refused(monkeypatch):
    found = status_with(monkeypatch, "OtherParams", ["Number one"])
    assert "field 0 of OtherParams is 'none' there and 'Number one' here" in found.reason
    monkeypatch.undo()
    monkeypatch.delitem(structs.STRUCTS, "PlacesRow")
    found = extension._load.__wrapped__()[1]
    assert "field 0 of PlacesRow is 'Address data' there and 'none' here" in found.reason


def test_fields_are_written_where_the_compiled_struct_has_them():
    width = extension.loaded().MAX_RANK
    assert width == structs.MAX_RANK
    words = structs.table("PlacesRow", 2, data=[1, 7], rank=[2, 0])
    structs.write_dimensions(words, "PlacesRow", 0, sizes=(3, 4), strides=(5, 6))
    padding = [0] * (width - 2)
    first = [1, 0, 0, 0, 0, 0, 2, 3, 4, *padding, 5, 6, *padding]
    assert words.tolist() == [*first, 7, *[0] * (len(first) - 1)]
    one = structs.written("ImportanceParams", acc=1, workspace=2)
    assert one.tolist() == [1, *[0] * (len(structs.STRUCTS["ImportanceParams"]) - 2), 2]
    with pytest.raises(KeyError):
        structs.written("CollapseParams", date=1)


def test_a_statistic_is_told_by_its_name():
    """No order of them is written twice: a changed one would compute another loss."""
    assert set(extension.loaded().COLLAPSE_STATISTICS) == set(STATISTICS)
