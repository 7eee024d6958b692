"""The structs of csrc/fastdean.h, written as arrays of int64, field after field.

When the extension is loaded, its fields are compared with these by kind and name.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from itertools import zip_longest

# csrc/fastdean.h has the same number.
MAX_RANK = 8


def _fields(text: str) -> tuple[str, ...]:
    return tuple(text.split(", "))


# Struct -> "kind name" of each field.
STRUCTS = {
    "PlacesRow": _fields(
        "Address data, Address indices, Address values, Number count, Number numel, "
        "DType dtype, Number rank, PerDimension sizes, PerDimension strides"
    ),
    "ImportanceParams": _fields(
        "Address acc, Number acc_stride_e, Number acc_stride_r, Number acc_stride_c, "
        "Address x, Number x_stride_t, Number x_stride_c, "
        "Address g, Number g_stride_t, Number g_stride_r, DType dtype, "
        "Number experts, Number rows, Number columns, Number tokens, "
        "Address segments, Address expert_starts, "
        "CpuLevel level, Number num_workers, Address workspace"
    ),
    "SelectionParams": _fields(
        "Address sums, Number sums_stride_r, Number sums_stride_c, "
        "Address weight, Number weight_stride_r, Number weight_stride_c, DType weight_dtype, "
        "Number rows, Number columns, Number num_examples, Number k, "
        "Address indices, Address found, CpuLevel level, Number num_workers, Address workspace"
    ),
    "ImportanceSelectionParams": _fields(
        "Address x, Number x_stride_t, Number x_stride_c, Address x_rows, "
        "Address g, Number g_stride_t, Number g_stride_r, Address g_rows, DType dtype, "
        "Address weight, Number weight_stride_e, Number weight_stride_r, DType weight_dtype, "
        "Number experts, Number rows, Number columns, Number tokens, "
        "Address segments, Address group_starts, Address batches, "
        "Address ks, Address num_examples, Number num_sets, "
        "Address indices, Address sums, Address signed_sums, Address found, "
        "CpuLevel level, Number num_workers, Address workspace"
    ),
    "BitSumsParams": _fields(
        "Address bits, Number stride_r, Number stride_c, Number bytes, Number rows, "
        "Number columns, Address of_rows, Address of_columns, Number num_workers"
    ),
    "CollapseParams": _fields(
        "Address features, Number features_stride, DType features_dtype, Address labels, "
        "Address weight, Number weight_stride, DType weight_dtype, "
        "Address old_sums, Address old_counts, Address decay, CollapseStatistic statistic, "
        "Address sums, Address counts, Address centre, Address factors, Address loss, "
        "DType sums_dtype, Address grad_loss, Address grad_weight, Address grad_features, "
        "Number rows, Number columns, Number classes, "
        "CpuLevel level, Number num_workers, Address workspace"
    ),
}


def difference(compiled: Mapping[str, Sequence[str]]) -> str:
    """The first field in which the compiled structs differ from `STRUCTS`; "" if none does."""
    for struct in {**STRUCTS, **compiled}:
        pairs = zip_longest(compiled.get(struct, ()), STRUCTS.get(struct, ()), fillvalue="none")
        for number, (theirs, ours) in enumerate(pairs):
            if theirs != ours:
                return f"field {number} of {struct} is {theirs!r} there and {ours!r} here"
    return ""


def _places(fields: Sequence[str]) -> tuple[dict[str, int], int]:
    """Name -> the field's first word; and how many words the struct has."""
    places, words = {}, 0
    for kind, name in map(str.split, fields):
        places[name] = words
        words += MAX_RANK if kind == "PerDimension" else 1
    return places, words


_PLACES = {struct: _places(fields) for struct, fields in STRUCTS.items()}


def written(struct: str, **fields: int) -> array:
    """One struct; a field that is left out is 0."""
    places, size = _PLACES[struct]
    words = array("q", bytes(8 * size))
    for name, value in fields.items():
        words[places[name]] = value
    return words


def table(struct: str, rows: int, **columns: Sequence[int]) -> array:
    """As many structs, by columns with a number for each; a field that is left out is 0."""
    places, size = _PLACES[struct]
    words = array("q", bytes(8 * size * rows))
    for name, column in columns.items():
        words[places[name] :: size] = array("q", column)
    return words


def write_dimensions(words: array, struct: str, row: int, **fields: Sequence[int]) -> None:
    """Fields of one row of a table that have a number for each dimension."""
    places, size = _PLACES[struct]
    for name, numbers in fields.items():
        start = row * size + places[name]
        words[start : start + len(numbers)] = array("q", numbers)
