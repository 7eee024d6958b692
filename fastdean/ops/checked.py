"""Which CUDA forms have passed their check on a GPU: the record that the dispatch reads.

A form is an operation's implementation on CUDA. `checked_forms.json`, beside this file, has an
entry for each form that passed: the GPU, the versions, and the digest of its sources. A form whose
sources have changed since has not passed. The extension carries the digests of the sources it was
compiled from; a Triton form's sources are the installed files.

On a machine with a GPU, after the check has passed:

    python -m fastdean.ops.checked --out FILE --passed OP:IMPL [OP:IMPL ...] \
        [--slower OP:IMPL=FIGURE ...]

A new FILE begins with the entries of `checked_forms.json` and may replace it. `--rehearse` needs no
GPU; its entries count for nothing.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib import metadata
from os import PathLike
from pathlib import Path

import torch

from fastdean import native
from fastdean.files.atomic import write_json_atomic
from fastdean.wording.mendable import StateError

FILE = Path(__file__).with_name("checked_forms.json")
_FORMAT = 1

_KERNELS = Path(__file__).parent.parent / "kernels"
_WEIGHTS = ("__init__.py", "importance.py", "settings.py", "token_blocks.py")
_MASK = ("fastdean.h", "mask_cuda.cu")
_COLLAPSE = ("collapse_cuda.cu", "fastdean.h")

# (operation, implementation) -> its sources: files of csrc/, or of fastdean/kernels/.
SOURCES: dict[tuple[str, str], tuple[str, ...]] = {
    ("accumulate_importance_", "triton"): _WEIGHTS,
    ("accumulate_expert_importance_", "triton"): _WEIGHTS,
    ("accumulate_unit_importance_", "triton"): (
        "__init__.py",
        "token_blocks.py",
        "unit_importance.py",
    ),
    ("select_top", "triton"): ("__init__.py", "selection.py"),
    ("select_importance", "triton"): (*_WEIGHTS, "importance_selection.py", "selection.py"),
    ("gather_at", "native"): _MASK,
    ("write_at_", "native"): _MASK,
    ("zero_at_", "native"): _MASK,
    ("collapse_alignment", "native"): _COLLAPSE,
    ("collapse_alignment_backward", "native"): _COLLAPSE,
}


@dataclass(frozen=True)
class Entry:
    """One form that passed its check on one kind of GPU.

    Attributes:
        op, impl: a key of `SOURCES`.
        capability: the GPU's compute capability, such as "9.0"; None only in a rehearsal.
        device: the GPU's name; None only in a rehearsal.
        digest: of the form's sources; None only in a rehearsal.
        versions: package -> version; "cuda" is the CUDA that compiled the form.
        date: of the check, YYYY-MM-DD.
        preferred: False if the reference was faster.
        figure: how much slower than the reference the form was; "" if it is preferred.
        rehearsal: written without a check; counts for nothing.
    """

    op: str
    impl: str
    capability: str | None
    device: str | None
    digest: str | None
    versions: dict[str, str]
    date: str
    preferred: bool = True
    figure: str = ""
    rehearsal: bool = False


def digest(op: str, impl: str) -> str:
    """SHA-256 over the names and contents of the installed form's sources.

    Raises: ValueError for an unknown form; RuntimeError if this install does not have it.
    """
    _check_form(op, impl)
    sources = dict(_compiled_sources()) if impl == "native" else _kernel_sources(op, impl)
    names = SOURCES[op, impl]
    if not sources.keys() >= set(names):
        raise StateError(
            f"{op}:{impl} must be in this install to have a digest, got an extension without CUDA; "
            "build it with FASTDEAN_CUDA=ON"
        )
    lines = "".join(f"{name} {sources[name]}\n" for name in names)
    return hashlib.sha256(lines.encode()).hexdigest()


def read(path: str | PathLike | None = None) -> tuple[Entry, ...]:
    """The entries of a record; `path` is None for the one of this install.

    Raises: ValueError if there is no such file or it is not a record.
    """
    path = FILE if path is None else Path(path)
    try:
        return _parsed(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"the record of checks at {path} cannot be read: {error}") from None


def entry(op: str, impl: str, *, figure: str = "", rehearsal: bool = False) -> Entry:
    """The entry of a form that has just passed its check on this machine's current CUDA device.

    Args:
        op, impl: a key of `SOURCES`.
        figure: how much slower than the reference it was, in words; "" if it is to be preferred.
        rehearsal: a field that needs a GPU or the form is None where there is none.
    Raises: ValueError for an unknown form; RuntimeError without a CUDA device or the form.
    """
    _check_form(op, impl)
    on_gpu = torch.cuda.is_available()
    if not (on_gpu or rehearsal):
        raise StateError(
            "a record of checks must be written where they ran, on a CUDA device, got none; "
            "--rehearse writes one that nothing believes"
        )
    try:
        its_digest = digest(op, impl)
    except RuntimeError:
        if not rehearsal:
            raise
        its_digest = None
    return Entry(
        op=op,
        impl=impl,
        capability=_words(torch.cuda.get_device_capability()) if on_gpu else None,
        device=torch.cuda.get_device_name() if on_gpu else None,
        digest=its_digest,
        versions=_versions(impl),
        date=datetime.now(UTC).date().isoformat(),
        preferred=not figure,
        figure=figure,
        rehearsal=rehearsal,
    )


def write(path: str | PathLike, entries: Iterable[Entry]) -> None:
    """Add entries to the record at `path`, which need not exist.

    An entry replaces the same form's on the same compute capability. A rehearsal replaces only
    rehearsals, and goes when its form has passed.
    Raises: ValueError if there is a file that is not a record.
    """
    path = Path(path)
    known = {}
    for each in (*(read(path) if path.exists() else ()), *entries):
        known[each.op, each.impl, each.rehearsal, "" if each.rehearsal else each.capability] = each
    passed = {key[:2] for key in known if not key[2]}
    kept = [known[key] for key in sorted(known) if not key[2] or key[:2] not in passed]
    write_json_atomic(path, {"format": _FORMAT, "forms": [asdict(each) for each in kept]})


def objection(op: str, impl: str, device: torch.device) -> str:
    """Why the record does not prefer a form on a CUDA device; "" if it does.

    Creates no CUDA context: the GPU is asked for its compute capability only where torch has one.
    """
    found, why = _of_these_sources(op, impl)
    if why:
        return why
    if not torch.cuda.is_initialized():
        return _slower_message(found[-1]) if all(not each.preferred for each in found) else ""
    here = _words(torch.cuda.get_device_capability(device))
    fitting = [each for each in found if _major(str(each.capability)) == _major(here)]
    if not fitting:
        where = ", ".join(sorted({str(each.capability) for each in found}))
        return f"its check passed on compute capability {where}, and this GPU has {here}"
    exact = [each for each in fitting if each.capability == here]
    best = max(exact or fitting, key=lambda each: each.date)
    return "" if best.preferred else _slower_message(best)


def described(op: str, impl: str) -> str:
    """The record's entries of a form in words, for `fastdean info`; never raises."""
    found, why = _of_these_sources(op, impl)
    return why or "; ".join(_passed_message(each) for each in found)


def _of_these_sources(op: str, impl: str) -> tuple[list[Entry], str]:
    """The entries that hold for this install; if there are none, why."""
    return _held_against(_compiled_sources(), op, impl, FILE)


# Cached because every call of an operation asks.
@functools.cache
def _held_against(
    compiled: tuple[tuple[str, str], ...], op: str, impl: str, path: Path
) -> tuple[list[Entry], str]:
    """`_of_these_sources` for the record at `path` and an extension compiled from `compiled`."""
    try:
        entries = read(path)
    except ValueError as error:
        return [], str(error)
    mine = [each for each in entries if (each.op, each.impl) == (op, impl)]
    passed = [each for each in mine if not each.rehearsal]
    if not passed:
        rehearsed = ", only of a rehearsal" if mine else ""
        return [], f"no check on a GPU is recorded for its CUDA kernel{rehearsed}"
    last = max(each.date for each in passed)
    try:
        now = digest(op, impl)
    except RuntimeError:
        return [], f"its check passed on {last}, and this install does not have it"
    current = [each for each in passed if each.digest == now]
    if not current:
        return [], f"its sources have changed since its check passed on {last}"
    return current, ""


def _slower_message(found: Entry) -> str:
    return f"its check passed, and it was slower than the reference: {found.figure}"


def _passed_message(found: Entry) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    slower = f"; slower than the reference: {found.figure}" if not found.preferred else ""
    where = f"compute capability {found.capability} ({found.device})"
    return f"passed on {where}, {found.date}, {versions}{slower}"


def _check_form(op: str, impl: str) -> None:
    if (op, impl) not in SOURCES:
        raise ValueError(
            f"a form must be one of {', '.join(map(':'.join, SOURCES))}, got {op}:{impl}; "
            "only what runs on CUDA has a record"
        )


def _compiled_sources() -> tuple[tuple[str, str], ...]:
    """Files of csrc/ that the extension's CUDA part was compiled from, with their SHA-256."""
    build = native.status().build
    return build.cuda_sources if build else ()


def _kernel_sources(op: str, impl: str) -> dict[str, str]:
    """File of fastdean/kernels/ -> SHA-256."""
    return {
        name: hashlib.sha256((_KERNELS / name).read_bytes()).hexdigest()
        for name in SOURCES[op, impl]
    }


def _versions(impl: str) -> dict[str, str]:
    build = native.status().build
    compiled_by = build.cuda if impl == "native" and build else torch.version.cuda
    found = {"torch": torch.__version__, "cuda": compiled_by, "triton": _version_of("triton")}
    return {name: version for name, version in found.items() if version}


def _version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _words(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _major(capability: str) -> str:
    return capability.partition(".")[0]


def _parsed(record: object) -> tuple[Entry, ...]:
    if not isinstance(record, dict) or record.keys() != {"format", "forms"}:
        raise ValueError('it must be an object of "format" and "forms"')
    if record["format"] != _FORMAT or not isinstance(record["forms"], list):
        raise ValueError(f'it must have "format" {_FORMAT} and a list of "forms"')
    return tuple(_parsed_entry(each, number) for number, each in enumerate(record["forms"]))


def _parsed_entry(found: object, number: int) -> Entry:
    names = [field.name for field in fields(Entry)]
    if not isinstance(found, dict) or found.keys() != set(names):
        raise ValueError(f"form {number} must have the fields {', '.join(names)}")
    wrong = [name for name in names if not _is_sound(name, found[name], found)]
    if wrong:
        raise ValueError(f"form {number} has no sound {', '.join(wrong)}")
    return Entry(**found)


_PATTERNS = {
    "op": r"\w+",
    "impl": "native|triton",
    "capability": r"\d+\.\d+",
    "device": r".+",
    "digest": "[0-9a-f]{64}",
    "date": r"\d{4}-\d\d-\d\d",
    "figure": ".*",
}


def _is_sound(name: str, value: object, among: dict[str, object]) -> bool:
    if name in ("preferred", "rehearsal"):
        return isinstance(value, bool)
    if name == "versions":
        return isinstance(value, dict) and all(isinstance(each, str) for each in value.values())
    if value is None:
        return among["rehearsal"] is True and name in ("capability", "device", "digest")
    if name == "figure" and among["preferred"] is (value != ""):
        return False
    return isinstance(value, str) and re.fullmatch(_PATTERNS[name], value) is not None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0, or 2 with one line on stderr where it cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m fastdean.ops.checked", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", required=True, metavar="FILE", help="the record to add to")
    parser.add_argument("--passed", nargs="+", default=[], metavar="OP:IMPL")
    parser.add_argument("--slower", nargs="+", default=[], metavar="OP:IMPL=FIGURE")
    parser.add_argument("--rehearse", action="store_true", help="needs no GPU, proves nothing")
    options = parser.parse_args(arguments)
    try:
        figures = {form: "" for form in options.passed}
        figures.update(_slower_form(each) for each in options.slower)
        if not figures:
            raise ValueError("--passed must name a form, got none; see --help")
        made = [
            entry(*_form(form), figure=figure, rehearsal=options.rehearse)
            for form, figure in figures.items()
        ]
        out = Path(options.out)
        write(out, made if out.exists() else [*read(), *made])
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(made)} forms recorded in {out}")
    return 0


def _form(text: str) -> tuple[str, str]:
    op, _, impl = text.partition(":")
    return op, impl


def _slower_form(text: str) -> tuple[str, str]:
    form, _, figure = text.partition("=")
    if not figure.strip():
        raise ValueError(f"--slower must be OP:IMPL=FIGURE, got {text!r}; say how much slower")
    return form, " ".join(figure.split())


if __name__ == "__main__":
    sys.exit(main())
