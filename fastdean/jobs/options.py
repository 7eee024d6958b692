"""What the options of a job are: each is declared once, as a field with its type, help and default.

The command line and `fastdean.run` take their parameters from here. Nothing here needs torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, fields
from types import NoneType
from typing import Annotated, Any, get_args, get_type_hints

from fastdean.wording.numbers import require_real, require_whole

SOURCE_HELP = (
    "a .csv, .tsv, .json, .jsonl or .parquet file, a hub id, or a preset (beavertails:fairness, "
    "beavertails:privacy, each also :unsafe; alpaca-cleaned; embedded:fairness, embedded:privacy, "
    "embedded:general, embedded:debias, embedded:debias:pairs). Columns and splits are mapped "
    "behind '::', as in org/name::split=train,prompt=question,response=answer"
)


@dataclass(frozen=True)
class Help:
    """What the command line says about an option.

    Attributes:
        text: its help.
        typed: the type that is typed there; None: the option's own.
        read: turns a typed value into the option's; None: they are the same.
        metavar: what stands for the value in the help; None: the name of its type.
        flag: what is typed for it; None: its name.
    """

    text: str
    typed: Any = None
    read: Callable[[Any], Any] | None = None
    metavar: str | None = None
    flag: str | None = None


def with_fields(
    own: inspect.Signature, job: type, with_help: bool = False, positional: Sequence[str] = ()
) -> inspect.Signature:
    """A function's signature with the fields of a job in place of its parameter `job`.

    Those without a default come first, then `out`, where the function has it.

    Args:
        with_help: annotate with type and `Help`, and not with the type alone.
        positional: fields that may be given without their names.
    """
    hints = get_type_hints(job, include_extras=with_help)
    asked = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD
            if field.name in positional
            else inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in option_fields(job)
    ]
    required = [each for each in asked if each.default is inspect.Parameter.empty]
    others = [
        each.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, each in own.parameters.items()
        if name not in ("job", "out", *positional)
    ]
    out = [
        each.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, each in own.parameters.items()
        if name == "out"
    ]
    return own.replace(parameters=[*required, *out, *asked[len(required) :], *others])


def asked(job: Any) -> dict[str, Any]:
    """The options of a job as plain values: equal for jobs that ask for the same."""
    return job.asked() if hasattr(job, "asked") else plain_options(job)


def plain_options(job: Any) -> dict[str, Any]:
    """The fields of a job as plain values, in the order of `option_fields`."""
    found = asdict(job)
    return {field.name: found[field.name] for field in option_fields(type(job))}


def option_fields(job: type) -> list[Field]:
    """The fields of a job: its own first, then what it shares with ever more jobs.

    Those without a default come before all others, the model first.
    """
    declared = [list(vars(kind).get("__annotations__", {})) for kind in job.__mro__]

    def place(field: Field) -> tuple[bool, int, int]:
        depth = next(n for n, names in enumerate(declared) if field.name in names)
        has_default = field.default is not MISSING
        return has_default, depth if has_default else -depth, declared[depth].index(field.name)

    return sorted(fields(job), key=place)


def require_one_of(job: Any, name: str, allowed: Sequence[str]) -> None:
    """Raise ValueError unless the job's option is one of these."""
    if getattr(job, name) not in allowed:
        (usual,) = (field.default for field in fields(job) if field.name == name)
        remedy = "leave it out" if usual is None else f"leave it out for {usual!r}"
        raise ValueError(
            f"{name} must be one of {', '.join(allowed)}, got {getattr(job, name)!r}; {remedy}"
        )


def require_numbers(job: Any) -> None:
    """Raise TypeError for an option that should be a number and is none, by the fields' types.

    None is taken where the type has it. A float that is an integer becomes one where one is asked
    for.
    """
    for name, hint in get_type_hints(type(job)).items():
        allowed = {*(get_args(hint) or (hint,))}
        kinds = allowed - {NoneType}
        value = getattr(job, name)
        if not kinds <= {int, float} or (value is None and NoneType in allowed):
            continue
        if kinds == {int} and isinstance(value, float) and value.is_integer():
            # As 16e9 bytes are written.
            object.__setattr__(job, name, int(value))
        else:
            (require_real if float in kinds else require_whole)(name, value)


def require_template(job: Any) -> None:
    """Raise ValueError for a template that there is none of; None: by the kind of row."""
    # Not above: the command line reads the options before it loads torch.
    from fastdean.data.examples import TEMPLATES

    if job.template is not None:
        require_one_of(job, "template", TEMPLATES)


def require_at_least(job: Any, **least: int) -> None:
    """Raise ValueError for a number below its least; one that is not given is left alone."""
    for name, lowest in least.items():
        value = getattr(job, name)
        if value is not None and value < lowest:
            raise ValueError(f"{name} must be at least {lowest}, got {value}")


# What is above was meant as bytes.
_MOST_GIGABYTES = 1e6


def _bytes(gigabytes: float | None) -> int | None:
    if gigabytes is None:
        return None
    if not 0 < gigabytes < _MOST_GIGABYTES:
        raise ValueError(
            f"memory_budget must be a positive number of GB, got {gigabytes:.12g}; leave it out to "
            "have it chosen"
        )
    return int(gigabytes * 1e9)


def read_names(typed: list[str] | None) -> str | tuple[str, ...] | None:
    """What was typed once as it is; several times as a tuple."""
    if not typed:
        return None
    return typed[0] if len(typed) == 1 else tuple(typed)


def read_sets(typed: list[str] | None) -> dict[str, str] | None:
    """NAME=SRC, each as an entry; ValueError for one without a name, or for a name given twice."""
    if not typed:
        return None
    found: dict[str, str] = {}
    for text in typed:
        name, equals, source = text.partition("=")
        if not (name and equals and source):
            raise ValueError(f"sets must be typed as NAME=SRC, got {text!r}; give both")
        if name in found:
            raise ValueError(
                f"sets must have a name each, got {name!r} twice; choose another name for one"
            )
        found[name] = source
    return found


def read_ratios(typed: str | None) -> tuple[float, ...] | None:
    """RATIO,RATIO as numbers; ValueError for what is none."""
    if typed is None:
        return None
    try:
        return tuple(float(part) for part in typed.split(","))
    except ValueError:
        raise ValueError(
            f"general_grid must be ratios separated by commas, got {typed!r}; type such as "
            "1e-5,1e-4,1e-3"
        ) from None


def _token(text: str) -> str | int:
    """An id where it is written as one."""
    return int(text) if text.isascii() and text.isdigit() else text


Model = Annotated[str, Help("Hugging Face folder, hub id or .gguf file.")]
Revision = Annotated[str | None, Help("Branch, tag or commit of a model from the hub.")]
TrustRemoteCode = Annotated[
    bool,
    Help(
        "Run the Python code that comes with the model's files; without it such a model is refused."
    ),
]
Dtype = Annotated[str, Help("auto, float32, bfloat16 or float16; or fp32, bf16, fp16.")]
Device = Annotated[str | None, Help("cpu, cuda, cuda:1, or auto to spread over GPUs.")]
Deterministic = Annotated[
    bool,
    Help(
        "Torch's strict deterministic mode, and the same bits on 1, 2, 4, 8 and 16 ranks; takes "
        "more memory."
    ),
]
Seed = Annotated[int, Help("Of shuffles, controls, permutations and bootstraps.")]

# Which rows, and how they become tokens.
Examples = Annotated[int | None, Help("Rows of each source to score, shuffled by --seed.")]
SkipBadRows = Annotated[
    bool,
    Help(
        "Leave out rows that cannot be read or encoded, and count them, rather than refuse the "
        "first."
    ),
]
Template = Annotated[
    str | None,
    Help(
        "Of prompt and response: raw (one after the other), chat (the tokenizer's template), "
        "or published [default: raw]. Messages always take the chat template, text takes none."
    ),
]
MaxLength = Annotated[int | None, Help("Cut examples to this many tokens.")]
TokensPerBatch = Annotated[int | None, Help("Tokens in one forward pass [default: by device].")]
MemoryBudget = Annotated[
    int | None,
    Help(
        "GB the sums may take, with --order layers the sums and what a layer holds of one batch; "
        "more passes if they need more.",
        typed=float | None,
        read=_bytes,
    ),
]

RankTimeout = Annotated[
    float | None,
    Help(
        "Seconds that a rank of a job of several waits for another, before it ends with an error "
        "that names it [default: as long as torch's process group]."
    ),
]

Order = Annotated[
    str,
    Help(
        "batches, each through the whole model; layers, one after the other for all batches, in "
        "little memory; or auto: layers where the memory there is does not hold the sums."
    ),
]
States = Annotated[
    str,
    Help(
        "Where --order layers keeps what layers return: auto, device, host, or a folder for files."
    ),
]

# Scores, and the sets that are made of them.
Ratio = Annotated[
    float | None,
    Help("Share of each matrix's entries in a top set [default: 5e-7, for units 1e-3]."),
]
Rule = Annotated[str, Help("paper, released, or a control: first, second, union, random.")]
Granularity = Annotated[str, Help("weight, or unit for the units of the MLPs.")]
TargetModules = Annotated[
    str,
    Help(
        "mlp, self_attn, all, ends of names (q_proj,v_proj), or a regular expression. Parameters "
        "of no Linear layer by their names (input_layernorm.weight,A_log), or every: each example "
        "costs them a pass of its own."
    ),
]
ExpertScope = Annotated[
    str,
    Help(
        "Of fused experts, what a ratio is a share of: expert, of each expert by itself, or "
        "tensor, of all experts of a layer together."
    ),
]
Scope = Annotated[str, Help("matrix, or model for one top set over all matrices.")]
MinK = Annotated[int, Help("At least this many candidates in every matrix.")]
Signs = Annotated[
    str,
    Help(
        "any; same: coupled weights whose zeroing helps both sets or harms both; opposite: the "
        "others. Scores must be of score --signs; run keeps signs itself."
    ),
]
Scale = Annotated[float, Help("What the selected weights are multiplied by; 0 zeroes them.")]

# Collapse and bias.
Words = Annotated[
    str,
    Help(
        "gender, religion, ethnicity, or a file: .txt with a word a line, .json with "
        "{group: [words]}."
    ),
]
MultiPiece = Annotated[
    str, Help("Words of several tokens: skip leaves them out, mean averages them.")
]
Control = Annotated[
    str | None, Help("Take as many other words instead: random, or frequency (matched).")
]
Shift = Annotated[
    str | None,
    Help("Which token a representation stands for: next, same or published [default: by model]."),
]
Features = Annotated[str, Help("base (before the prediction head) or head (what enters it).")]
Bias = Annotated[
    tuple[str, ...],
    Help(
        "A bias measure, as NAME or NAME=SRC: crows_pairs, stereoset, winobias, seat, "
        "bec_pro, bbq; or what an edit may cost: gender_facts, over_refusal; may be repeated.",
        typed=list[str] | None,
        read=tuple,
    ),
]
BiasTemplate = Annotated[
    str | None,
    Help(
        "How over_refusal asks its prompts: raw (followed by a line break) or chat (the "
        "tokenizer's template) [default: chat where the tokenizer has a template]."
    ),
]
StartToken = Annotated[
    str | int,
    Help(
        "What a causal model's texts start from in the bias measures: auto, bos, eos, none, a "
        "token of the vocabulary, or its id.",
        typed=str,
        read=_token,
    ),
]
