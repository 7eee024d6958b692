"""The contents of FastDEAN's files, declared as data and checked in one place.

A *kind* says what a value must be: `Whole(least=1)`, `Maps(Text())`, `Record({"scale": Real()})`.
Each reader declares the kind of its file beside the code that writes it, and `read_json` or
`require` compare the two. What does not fit is refused in one line that names file and field:

    '<file>' must hold entries['mlp'].shape[0] as a whole number of at least 1, got -3; copy it

Whatever a file holds, checking takes time and memory in proportion to the file's size.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fastdean.wording.printable import error_line

LARGEST = 2**63 - 1
# Every float and integer that arithmetic on a few of them keeps finite.
FINITE = 1e300
_MOST_BYTES = 1 << 28
# The manifests of masks that were combined lie in each other; far more than this stops Python.
_DEEPEST = 300


class Unfit(ValueError):
    """A file, or a part of one, that does not fit its declaration: damaged, foreign or edited."""


class Misfit(Exception):
    """A value that is not of a kind, on its way to the gate, which knows the file.

    Args:
        where: the field, as `entries['a'].shape[0]`; empty for the whole value.
        expected: what a sound file has there.
        got: what this one has, in short.
    """

    def __init__(self, where: str, expected: str, got: str) -> None:
        super().__init__(where, expected, got)
        self.where, self.expected, self.got = where, expected, got


class Kind(Protocol):
    """What a value must be."""

    def check(self, value: Any, where: str) -> None:
        """Raise `Misfit` for anything else."""


@dataclass(frozen=True)
class _Single:
    """A value without parts: what it must be, in words, and a test that it passes."""

    expected: str
    fits: Callable[[Any], bool]

    def check(self, value: Any, where: str) -> None:
        if not self.fits(value):
            raise Misfit(where, self.expected, brief(value))


def Whole(least: int = 0, most: int = LARGEST) -> Kind:
    """An integer; True and False are none."""
    bounds = f"of at least {least}" if most == LARGEST else f"from {least} to {most}"
    return _Single(
        f"a whole number {bounds}", lambda value: type(value) is int and least <= value <= most
    )


def Real(least: float = -FINITE, most: float = FINITE, above: float | None = None) -> Kind:
    """A finite number, True and False are none; `least` and `most` are allowed, `above` is not."""
    low = least if above is None else above
    bounds = [f"above {above:g}"] if above is not None else []
    bounds += [f"at least {least:g}"] if least > -FINITE else []
    bounds += [f"at most {most:g}"] if most < FINITE else []
    return _Single(
        " ".join(["a finite number", " and ".join(bounds)]).strip(),
        lambda value: type(value) in (int, float) and low <= value <= most and value != above,
    )


def Number() -> Kind:
    """Any number, also one that is not finite: figures in memory, numpy's scalars among them."""
    return _Single(
        "a number", lambda value: not isinstance(value, bool) and hasattr(value, "__float__")
    )


def Flag() -> Kind:
    """True or false."""
    return _Single("true or false", lambda value: isinstance(value, bool))


def Exactly(wanted: Any) -> Kind:
    """This value and no other."""
    expected = "null" if wanted is None else repr(wanted)
    return _Single(expected, lambda value: type(value) is type(wanted) and value == wanted)


@dataclass(frozen=True)
class Text:
    """A text of at most `longest` characters, or one of `choices`."""

    longest: int = 100_000
    choices: tuple[str, ...] = ()

    def check(self, value: Any, where: str) -> None:
        if self.choices:
            if not isinstance(value, str) or value not in self.choices:
                listed = " or ".join(map(repr, self.choices))
                raise Misfit(where, listed, brief(value))
        elif not isinstance(value, str):
            raise Misfit(where, "a text", brief(value))
        elif len(value) > self.longest:
            expected = f"a text of at most {self.longest} characters"
            raise Misfit(where, expected, f"one of {len(value)}")


@dataclass(frozen=True)
class Either:
    """A value of one of the kinds."""

    kinds: tuple[Kind, ...]

    def check(self, value: Any, where: str) -> None:
        misfits = []
        for kind in self.kinds:
            try:
                return kind.check(value, where)
            except Misfit as misfit:
                misfits.append(misfit)
        # A fault in a part says more than that the whole is none of the kinds.
        for inside in misfits:
            if inside.where != where:
                raise inside
        raise Misfit(where, " or ".join(m.expected for m in misfits), misfits[-1].got)


def Maybe(kind: Kind) -> Kind:
    """null, or a value of the kind."""
    return Either((Exactly(None), kind))


@dataclass(frozen=True)
class Lists:
    """A list of values of one kind."""

    kind: Kind
    least: int = 0
    most: int = LARGEST

    def check(self, value: Any, where: str) -> None:
        if not _is_list(value) or not self.least <= len(value) <= self.most:
            found = f"{len(value)} of them" if _is_list(value) and len(value) > 4 else brief(value)
            raise Misfit(where, f"a list{self._bounds()}", found)
        for place, part in enumerate(value):
            self.kind.check(part, f"{where}[{place}]")

    def _bounds(self) -> str:
        if self.least == self.most:
            return f" of {self.least}"
        bounds = [f"at least {self.least}"] if self.least else []
        bounds += [f"at most {self.most}"] if self.most < LARGEST else []
        return f" of {' and '.join(bounds)}" if bounds else ""


@dataclass(frozen=True)
class Row:
    """A list with one value of each kind, in their order."""

    kinds: tuple[Kind, ...]

    def check(self, value: Any, where: str) -> None:
        if not _is_list(value) or len(value) != len(self.kinds):
            raise Misfit(where, f"a list of {len(self.kinds)}", brief(value))
        for place, (kind, part) in enumerate(zip(self.kinds, value, strict=True)):
            kind.check(part, f"{where}[{place}]")


@dataclass(frozen=True)
class Maps:
    """An object with any names and values of one kind."""

    kind: Kind
    names: Kind = Text(longest=1000)
    least: int = 0

    def check(self, value: Any, where: str) -> None:
        if not isinstance(value, Mapping):
            raise Misfit(where, "an object", brief(value))
        if len(value) < self.least:
            raise Misfit(where, f"an object of at least {self.least}", brief(value))
        for name, part in value.items():
            self.names.check(name, f"{where} (a name)" if where else "a name")
            self.kind.check(part, _inside(where, name, quoted=True))


@dataclass(frozen=True)
class Record:
    """An object with these fields; of the others that are named `optional`, any may be missing.

    `others`: what fields of no name here must be; None: there are none.
    """

    fields: Mapping[str, Kind] = field(default_factory=dict)
    optional: Mapping[str, Kind] = field(default_factory=dict)
    others: Kind | None = None

    def check(self, value: Any, where: str) -> None:
        if not isinstance(value, Mapping):
            raise Misfit(where, "an object", brief(value))
        if missing := [name for name in self.fields if name not in value]:
            raise Misfit("", f"the field {_inside(where, missing[0])}", "no such field")
        known = {**self.fields, **self.optional}
        for name, part in value.items():
            kind = known.get(name, self.others) if isinstance(name, str) else None
            if kind is None:
                raise Misfit(where, f"an object of {', '.join(known)}", f"one with {brief(name)}")
            kind.check(part, _inside(where, name, quoted=name not in known))


@dataclass(frozen=True)
class Anything:
    """Any JSON that is not too deep: what others have written, or what is only shown."""

    finite: bool = True

    def check(self, value: Any, where: str) -> None:
        self._check(value, where, 0)

    def _check(self, value: Any, where: str, depth: int) -> None:
        if depth > _DEEPEST:
            raise Misfit(
                where, f"a value that is nested less than {_DEEPEST} times", "a deeper one"
            )
        if isinstance(value, Mapping):
            for name, part in value.items():
                if not isinstance(name, str):
                    raise Misfit(where, "an object with names that are text", brief(name))
                self._check(part, _inside(where, name, quoted=True), depth + 1)
        elif _is_list(value):
            for place, part in enumerate(value):
                self._check(part, f"{where}[{place}]", depth + 1)
        elif self.finite and isinstance(value, float) and not math.isfinite(value):
            raise Misfit(where, "a finite number", brief(value))


@dataclass(frozen=True)
class Filled:
    """A tensor on the CPU.

    Args:
        dtypes: by name, such as "torch.float32".
        shape: None for a size that is not known, or for the whole shape.
        finite: no NaN and no infinity in it.
        least: no value in it is below this.
    """

    dtypes: tuple[str, ...]
    shape: tuple[int | None, ...] | None = None
    finite: bool = False
    least: float | None = None

    def check(self, value: Any, where: str) -> None:
        if not hasattr(value, "dtype") or not hasattr(value, "aminmax"):
            raise Misfit(where, f"a tensor in {' or '.join(self.dtypes)}", brief(value))
        found = f"{value.dtype} {list(value.shape)}"
        sizes = self.shape if self.shape is not None else (None,) * value.dim()
        fits = len(sizes) == value.dim() and all(
            wanted in (None, size) for wanted, size in zip(sizes, value.shape, strict=True)
        )
        if str(value.dtype) not in self.dtypes or not fits:
            wanted = "" if self.shape is None else f" {_sizes(self.shape)}"
            raise Misfit(where, f"{' or '.join(self.dtypes)}{wanted}", found)
        if value.numel() and (self.finite or self.least is not None):
            self._check_values(value, where)

    def _check_values(self, value: Any, where: str) -> None:
        # One pass that makes no copy; NaN comes out as both ends.
        low, high = (float(end) for end in value.aminmax())
        if self.finite and not (math.isfinite(low) and math.isfinite(high)):
            raise Misfit(where, "finite numbers", f"{high if math.isfinite(low) else low} in it")
        if self.least is not None and low < self.least:
            raise Misfit(where, f"numbers of at least {self.least:g}", f"{low:g} in it")


@dataclass(frozen=True)
class Places:
    """A tensor int64 [M] of places among `numel`: ascending, each once."""

    numel: int

    def check(self, value: Any, where: str) -> None:
        Filled(("torch.int64",), (None,)).check(value, where)
        unordered = (value.diff() <= 0).nonzero()
        if unordered.numel():
            place = int(unordered[0]) + 1
            expected = "places in ascending order without repetition"
            raise Misfit(where, expected, f"{int(value[place])} after {int(value[place - 1])}")
        for end in (value[:1], value[-1:]):
            if end.numel() and not 0 <= int(end) < self.numel:
                raise Misfit(where, f"places within 0..{self.numel - 1}", str(int(end)))


def require(
    value: Any,
    kind: Kind,
    holder: str | os.PathLike,
    *,
    where: str = "",
    advice: str = "save it again",
) -> None:
    """Raise `Unfit` unless `value` is of the kind.

    Args:
        holder: the file or folder that the value was read from.
        where: its field there; empty for the whole content.
        advice: what to do.
    """
    try:
        kind.check(value, where)
    except Misfit as misfit:
        raise unfit(holder, misfit.where, misfit.expected, misfit.got, advice) from None


def unfit(holder: str | os.PathLike, where: str, expected: str, got: str, advice: str) -> Unfit:
    """The refusal, in one line."""
    said = f"{where} as {expected}" if where else expected
    return Unfit(f"{str(holder)!r} must hold {said}, got {got}; {advice}")


def read_json(
    file: str | os.PathLike,
    kind: Kind = Anything(),
    *,
    advice: str = "write or copy it again",
    most_bytes: int = _MOST_BYTES,
) -> Any:
    """The content of a JSON file: UTF-8, finite numbers, no name twice in an object.

    Raises:
        Unfit: it is missing, no file, cannot be read, larger than `most_bytes`, no JSON, or not of
            the kind.
    """
    file = Path(file)
    text = read_text(file, advice=advice, most_bytes=most_bytes)
    try:
        value = json.loads(
            text, object_pairs_hook=_distinct, parse_float=_finite, parse_constant=_finite
        )
    except (ValueError, RecursionError) as error:
        raise unfit(file, "", "JSON", f"something else ({error_line(error)})", advice) from None
    require(value, kind, file, advice=advice)
    return value


def read_text(file: Path, *, advice: str, most_bytes: int = _MOST_BYTES) -> str:
    """The text of a file in UTF-8, with or without the mark of an editor before it.

    Raises:
        Unfit: as `read_json`.
    """
    try:
        # What is no file, such as a pipe, could be waited for without end.
        if not file.is_file():
            what = "something else" if file.exists() else "no such file"
            what = "a folder" if file.is_dir() else what
            raise Unfit(f"{str(file)!r} must be a file, got {what}; {advice}")
        if (size := file.stat().st_size) > most_bytes:
            expected = f"at most {most_bytes:,} bytes"
            raise unfit(file, "", expected, f"{size:,}", advice)
        return file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise Unfit(
            f"{str(file)!r} must be a file that can be read, got: {reason}; {advice}"
        ) from None
    except UnicodeDecodeError as error:
        raise unfit(file, "", "text in UTF-8", f"other bytes at {error.start}", advice) from None


def brief(value: Any) -> str:
    """A value in at most a line, whatever it is."""
    try:
        return _BRIEF.repr(value)
    except (ValueError, RecursionError):
        # Python does not write integers of thousands of digits.
        return f"a very large {type(value).__name__}"


class _Brief(reprlib.Repr):
    """Short representations; those of tensors would read all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict = 2, 2
        self.maxlist = self.maxtuple = 4
        self.maxstring = self.maxother = 60

    def repr_Tensor(self, value: Any, level: int) -> str:
        return f"a tensor in {value.dtype} {list(value.shape)}"


_BRIEF = _Brief()


def _distinct(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs; JSON itself would keep the last of two with one name."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the name {brief(name)} stands in one object twice")
            seen.add(name)
    return found


def _finite(written: str) -> float:
    """A number as JSON writes it; NaN and infinities, which JSON does not know, are refused."""
    value = float(written)
    if not math.isfinite(value):
        raise ValueError(f"{brief(written)} is no finite number")
    return value


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _inside(where: str, name: str, *, quoted: bool = False) -> str:
    if quoted:
        return f"{where}[{brief(name)}]"
    return f"{where}.{name}" if where else name


def _sizes(shape: tuple[int | None, ...]) -> str:
    return f"[{', '.join('M' if size is None else str(size) for size in shape)}]"
