"""What `make gpu-first` runs, in the order of its worth, as data; `first.py` does the rest.

The aims that the figures are held against stand in `aims.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.gate import test_files

_ROOT = Path(__file__).resolve().parents[2]

TESTS, SANITIZER, RECORDS, TOOL = "tests", "sanitizer", "records", "tool"


@dataclass(frozen=True)
class Part:
    """A process of its own, with a limit of its own.

    Attributes:
        kind: TESTS (pytest on `tests`), SANITIZER (the same under compute-sanitizer's `tool`),
            RECORDS (`python -m benchmarks` with `arguments`) or TOOL (a script of this folder).
        limit: seconds after which it is ended.
        least: seconds below which it is not worth starting.
        after: parts that have to have ended before.
        needs: parts that have to have passed before.
        needs_tests: files or tests that have to have passed before, in whatever part.
        alone: nothing runs beside it, since it measures.
        workers: processes that share its tests, where pytest-xdist is there.
        seconds: after which a measurement starts nothing new.
        rehearsed: arguments in place of `arguments` where there is no GPU.
    """

    name: str
    kind: str
    limit: int
    least: int = 15
    after: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    needs_tests: tuple[str, ...] = ()
    alone: bool = False
    workers: int = 1
    tests: tuple[str, ...] = ()
    tool: str = ""
    arguments: tuple[str, ...] = ()
    seconds: int = 0
    rehearsed: tuple[str, ...] = ()


def _test_file(name: str) -> str:
    """Where test_NAME.py lies, whatever folder of tests/ that is."""
    [found] = (_ROOT / "tests").rglob(f"test_{name}.py")
    return found.relative_to(_ROOT).as_posix()


def _tests(name: str, *files: str, workers: int = 1, after: tuple[str, ...] = ("build",)) -> Part:
    paths = test_files(*files)
    return Part(
        f"tests-{name}", TESTS, 150, needs=("machine",), after=after, tests=paths, workers=workers
    )


_BEFORE = (
    Part("machine", TOOL, 90, arguments=("prerequisites.py",)),
    Part("build", TOOL, 240, arguments=("build_extension.py",)),
)

_CHECK = (
    _tests("collapse", "collapse_op", workers=2),
    _tests("masks", "mask_op", "edits", "toggling", workers=2),
    # Triton's kernels do not wait for the extension.
    _tests("importance", "importance_op", workers=4, after=()),
    _tests("selection", "selection_op", "selection_kernel", workers=3, after=()),
    _tests("experts", "expert_importance_op", workers=2, after=()),
    _tests("repeatable", "repeatable", workers=2),
    _tests("host", "no_host_in_the_loop"),
    _tests("score", "score", "score_kernels", "score_losses", "score_state", workers=3),
    _tests("other", "token_blocks", "coupling", "distributed", workers=2),
)

_REPEATABLE, _COLLAPSE_OP, _MASK_OP, _IMPORTANCE_OP, _EXPERTS_OP, _SCORE_OP, _KERNELS = test_files(
    *("repeatable", "collapse_op", "mask_op", "importance_op", "expert_importance_op"),
    *("score", "score_kernels"),
)
_REPEATS = f"{_REPEATABLE}::test_an_op_repeats_its_bits"
# What is sanitized of an operation: awkward strides and lengths, and sizes that no tile divides.
_SANITIZED = {
    "collapse": (
        f"{_COLLAPSE_OP}::test_cuda_is_within_the_budget_and_repeats_bit_for_bit",
        f"{_COLLAPSE_OP}::test_on_cuda_labels_out_of_range_show_as_a_loss_of_nan",
    ),
    "masks": (
        f"{_MASK_OP}::test_cuda_clears_what_the_cpu_clears",
        f"{_MASK_OP}::test_cuda_gathers_writes_and_replaces_what_the_cpu_does",
    ),
    "importance": (
        f"{_IMPORTANCE_OP}::test_strides_do_not_matter",
        f"{_IMPORTANCE_OP}::test_numbers_and_lengths_of_examples",
        f"{_IMPORTANCE_OP}::test_a_long_example_beside_a_short_one",
    ),
    "selection": (f"{_REPEATS}[selection-torch.bfloat16-triton]",),
    "experts": (f"{_EXPERTS_OP}::test_every_expert_gets_its_own_examples",),
    "units": (f"{_REPEATS}[unit_sums-torch.bfloat16-triton]",),
}
# Whose tests have compiled its kernels, which the sanitizer would slow down.
_COMPILED_BY = {"selection": "repeatable", "units": "repeatable"}

_SANITIZE = (
    Part("sanitizer", TOOL, 60, needs=("machine",), arguments=("sanitized.py",)),
    *(
        Part(
            f"{tool}-{name}",
            SANITIZER,
            150,
            needs=("sanitizer", "build"),
            after=(f"tests-{_COMPILED_BY.get(name, name)}",),
            tests=tests,
            tool=tool,
        )
        for name, tests in _SANITIZED.items()
        for tool in ("memcheck", "racecheck")
    ),
)


def _records(name: str, op: str, *files: str, seconds: int) -> Part:
    return Part(
        f"records-{name}",
        RECORDS,
        seconds + 45,
        least=25,
        needs=("machine",),
        after=("build",),
        needs_tests=test_files(*files),
        alone=True,
        arguments=("kernels", "--op", op),
        seconds=seconds,
        rehearsed=("kernels", "--toy", "--op", op),
    )


_SCORE_TESTS = (
    _SCORE_OP,
    _KERNELS,
    f"{_REPEATABLE}::test_a_deterministic_run_of_score_repeats_its_bits",
    f"{_REPEATS}[weight_sums-torch.float32-triton]",
    f"{_REPEATS}[weight_sums-torch.bfloat16-triton]",
)
_SCORE = ("score", "--dtype", "bf16", "--random-model")

_BENCH = (
    _records("importance", "importance", "importance_op", seconds=40),
    _records("selection", "selection", "selection_op", "selection_kernel", seconds=20),
    _records("masks", "mask", "mask_op", "edits", "toggling", seconds=20),
    _records("collapse", "collapse", "collapse_op", seconds=35),
    _records("units", "unit_importance", "importance_op", seconds=10),
    _records("experts", "expert_importance", "expert_importance_op", seconds=15),
    Part(
        "records-score",
        RECORDS,
        170,
        least=60,
        needs=("machine",),
        after=("build",),
        needs_tests=_SCORE_TESTS,
        alone=True,
        arguments=(
            *(*_SCORE, "qwen2-7b", "--examples", "128", "--profile", "--repeats", "2"),
            *("--impl", "loop", "--impl", "fastdean"),
        ),
        seconds=170,
        rehearsed=(*_SCORE, "toy", "--examples", "4", "--impl", "loop", "--impl", "fastdean"),
    ),
)
# Further than the first ten minutes reach.
_MORE = (
    Part(
        "records-all-of-score",
        RECORDS,
        400,
        least=120,
        needs=("machine",),
        after=("build",),
        needs_tests=_SCORE_TESTS,
        alone=True,
        arguments=(*_SCORE, "qwen2-7b", "--examples", "128", "--vmap", "--profile"),
        seconds=400,
        rehearsed=(*_SCORE, "toy", "--examples", "4", "--vmap"),
    ),
    Part(
        "records-sweep",
        RECORDS,
        400,
        least=60,
        needs=("machine",),
        after=("build",),
        needs_tests=_SCORE_TESTS,
        alone=True,
        arguments=("sweep", "--random-model", "qwen2-7b"),
        seconds=380,
        rehearsed=("sweep", "--random-model", "toy", "--repeats", "1"),
    ),
)

# What the targets of the Makefile ask for, each with the parts it rests on.
_ASKED = {
    "first": (*_CHECK, *_SANITIZE, *_BENCH),
    "check": _CHECK,
    "sanitize": _SANITIZE,
    "bench": (*_BENCH, *_MORE),
}
TARGETS = tuple(_ASKED)


def parts_of(target: str) -> list[Part]:
    """The target's parts and those they rest on, in the order in which they start."""
    every = [*_BEFORE, *_CHECK, *_SANITIZE, *_BENCH, *_MORE]
    chosen = {"machine", "build", *(part.name for part in _ASKED[target])}
    while True:
        before = set(chosen)
        for part in every:
            if part.name in chosen:
                chosen |= {*part.after, *part.needs, *_testing(part.needs_tests, every)}
        if chosen == before:
            return [part for part in every if part.name in chosen]


def _testing(tests: Sequence[str], parts: Iterable[Part]) -> set[str]:
    files = {test.split("::")[0] for test in tests}
    return {part.name for part in parts if part.kind == TESTS and files & set(part.tests)}


@dataclass(frozen=True)
class Form:
    """An implementation of an operation, and what has to have passed before it is a checked one.

    Attributes:
        name: operation and implementation.
        tests: of the operation, and that it repeats its bits.
        sanitized: parts that have to have found nothing.
        op, ours: the results file and the contender that runs it: one that is slower than the
            reference is said to be.
    """

    name: str
    tests: tuple[str, ...]
    sanitized: tuple[str, ...]
    op: str
    ours: str


def _form(name: str, files: Sequence[str], sanitized: str, op: str, repeats: str = "") -> Form:
    """`repeats`: what test_repeatable.py calls it; "" where its own tests hold that."""
    repeated = (
        f"{_REPEATS}[{repeats}-torch.{dtype}-triton]"
        for dtype in ("float32", "bfloat16", "float16")
        if repeats
    )
    return Form(
        name,
        (*test_files(*files), *repeated),
        (f"memcheck-{sanitized}", f"racecheck-{sanitized}"),
        op,
        name.partition(":")[2],
    )


_COLLAPSE = (["collapse_op"], "collapse", "collapse")
_MASKS = (["mask_op", "edits", "toggling"], "masks", "mask")
_WEIGHT = (["importance_op"], "importance", "importance", "weight_sums")
_EXPERTS = (["expert_importance_op"], "experts", "expert_importance", "expert_sums")
_UNITS = (["importance_op"], "units", "unit_importance", "unit_sums")
_SELECTION = (["selection_op", "selection_kernel"], "selection", "selection", "selection")
FORMS = (
    _form("collapse_alignment:native", *_COLLAPSE),
    _form("collapse_alignment_backward:native", *_COLLAPSE),
    _form("gather_at:native", *_MASKS),
    _form("write_at_:native", *_MASKS),
    _form("zero_at_:native", *_MASKS),
    _form("accumulate_importance_:triton", *_WEIGHT),
    _form("select_top:triton", *_SELECTION),
    _form("accumulate_unit_importance_:triton", *_UNITS),
    _form("accumulate_expert_importance_:triton", *_EXPERTS),
)
