"""`mixture`: `fastdean.score` on a mixture of experts, beside a pass of the same model that scores
nothing: forward, and backward to the inputs, with frozen weights.

Random weights in the layout of Qwen3's mixtures. The plain pass runs the experts as transformers
does, by whichever of its implementations and of two sizes of a batch is the fastest here.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.harness import command, gate, lengths, models, tables
from benchmarks.harness.cases import Case, Contender
from benchmarks.harness.clock import elapsed
from benchmarks.harness.rates import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, copy_bandwidth
from benchmarks.harness.session import Session, attempt
from benchmarks.harness.store import Record, say
from benchmarks.score.run import OURS, compare
from benchmarks.score.work import first_products, our_sums
from fastdean.coupling.targets.finding import find_targets
from fastdean.data.examples import IGNORE_INDEX, Example
from fastdean.models.batch_size import tokens_per_batch_of
from fastdean.models.model_state import frozen, undone

PLAIN = "forward and backward"
NAMES = {PLAIN: "forward and backward, nothing scored", OURS: "`fastdean.score`"}
# The third of transformers' implementations copies an expert's weights for every token.
IMPLEMENTATIONS = ("grouped_mm", "eager")
_VOCABULARY, _HEAD = 2048, 64
_TOY = {"hidden": 64, "units": 32, "experts": 4, "chosen": 2, "layers": 2, "examples": 3}
_AIMS = "Aims: at most 1.6x the time of the plain pass, at least 60 % of the floor"


class Mixture(NamedTuple):
    """Sizes: `hidden`, `units` of an expert, `experts` of a layer, `chosen` of them by a token."""

    hidden: int
    units: int
    experts: int
    chosen: int
    layers: int


class Way(NamedTuple):
    """How the plain pass runs: transformers' experts, and the examples of a batch."""

    implementation: str
    examples: int


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    for name, default, said in (
        ("hidden", 1024, "hidden size"),
        ("units", 768, "units of an expert"),
        ("experts", 64, "experts of a layer"),
        ("chosen", 8, "experts that a token goes to"),
        ("layers", 2, "decoder layers"),
        ("examples", 16, "number of examples"),
    ):
        add(f"--{name}", type=command.positive, default=default, metavar="N", help=said)
    add("--tokens", type=command.at_least_two, default=128, metavar="N", help="of each example")
    said = "may be repeated; default: both"
    add("--dtype", action="append", choices=list(models.DTYPES), help=said)
    command.toy(parser)
    command.repeats(parser, 3)


def require(options: argparse.Namespace) -> None:
    if options.chosen > options.experts:
        raise ValueError(
            f"chosen must be at most the {options.experts} experts, got {options.chosen}; "
            "take fewer"
        )


def tests(options: argparse.Namespace, on_gpu: bool) -> Sequence[str]:
    return (*gate.score_tests(on_gpu), *gate.test_files("experts"))


def run(session: Session) -> int:
    """Append one record per contender and dtype."""
    options, device = session.options, session.device
    sizes = vars(options) | (_TOY if session.toy else {})
    mixture = Mixture(*(sizes[name] for name in Mixture._fields))
    examples = lengths.random_examples(sizes["examples"], options.tokens, _VOCABULARY)
    wanted = {"repeats": options.repeats, **mixture._asdict(), "examples": len(examples)}
    wanted["tokens"] = sum(map(len, examples))
    due = [
        dtype
        for dtype in models.DTYPES
        if dtype in (options.dtype or models.DTYPES)
        and not session.earlier("mixture", set(NAMES), wanted | {"dtype": dtype})
    ]
    for dtype in session.due(due, "dtypes"):
        model = mixture_model(mixture, models.DTYPES[dtype], device)
        way = fastest_way(model, examples, device)
        case = mixture_case(model, mixture, examples, dtype, way)
        rows = compare(session, case, examples, copy_bandwidth(device))
        if rows:
            print(tables.rendered(TABLE, rows))
        # Before the next one is built.
        del model, case
    return int(session.failed)


def mixture_model(sizes: Mixture, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A causal language model of random weights, in eval mode; the same ones every time."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    heads = max(2, sizes.hidden // _HEAD)
    config = Qwen3MoeConfig(
        vocab_size=_VOCABULARY,
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=sizes.hidden // heads,
        num_experts=sizes.experts,
        num_experts_per_tok=sizes.chosen,
        moe_intermediate_size=sizes.units,
    )
    build = partial(AutoModelForCausalLM.from_config, config, dtype=dtype)
    return models.built(build, device)


def fastest_way(model: nn.Module, examples: Sequence[Example], device: torch.device) -> Way:
    """How the plain pass is fastest, of one run each after one to warm up."""
    most = max(1, tokens_per_batch_of(model, device) // len(examples[0]))
    found = {}
    for implementation in IMPLEMENTATIONS:
        for size in sorted({min(most, len(examples)), len(examples)}):
            way = Way(implementation, size)
            call = partial(plain_pass, model, examples, way)
            _, problem = attempt(call, device)
            if problem is not None:
                say(f"  {implementation}: {problem.reason}")
                break
            found[way] = elapsed(call, device)
            say(f"  {way.implementation}, {way.examples} examples a batch: {found[way]:.2f} s")
    if not found:
        raise RuntimeError("the model must run by one of transformers' experts, got none that does")
    return min(found, key=found.__getitem__)


def plain_pass(model: nn.Module, examples: Sequence[Example], way: Way) -> Mapping[str, Tensor]:
    """Forward and backward of all examples, of equal length; gradients of the inputs alone."""
    embedding: Any = model.get_input_embeddings()
    own, device = model.config._experts_implementation, embedding.weight.device
    model.set_experts_implementation(way.implementation)
    with frozen(model), undone(lambda: model.set_experts_implementation(own)):
        for first in range(0, len(examples), way.examples):
            batch = examples[first : first + way.examples]
            ids, labels = (
                torch.stack([getattr(each, name) for each in batch]).to(device)
                for name in ("input_ids", "labels")
            )
            inputs = embedding(ids).detach().requires_grad_(True)
            logits = model(inputs_embeds=inputs, use_cache=False).logits[:, :-1]
            loss = functional.cross_entropy(
                logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX
            )
            loss.backward()
            if inputs.grad is None or not inputs.grad.isfinite().all():
                raise RuntimeError("the inputs must get a finite gradient, got another")
    # Nothing is scored.
    return {}


def mixture_case(
    model: nn.Module, sizes: Mixture, examples: Sequence[Example], dtype: str, way: Way
) -> Case:
    """The contenders, and the products that a scoring cannot avoid.

    An expert's products have as many rows as it gets of a batch if all get as many.
    """

    tokens, target_tokens, rows, products = first_products(model, examples)
    of_expert = max(1, round(rows * sizes.chosen / sizes.experts))
    operations = entries = scored = 0
    for target in find_targets(model, "all"):
        outputs, inputs = target.num_outputs, target.num_inputs
        size, used = outputs * inputs, sizes.chosen if target.stacked else 1
        number, each = (sizes.experts, of_expert) if target.stacked else (1, rows)
        kinds = (FORWARD, INPUT_GRADIENT, *((WEIGHT_GRADIENT,) if target.stacked else ()))
        products.update({(kind, outputs, inputs, each): number for kind in kinds})
        operations += len(kinds) * 2 * size * used * tokens
        entries += number * size
        scored += number * size * target.stacked
    head = model.get_output_embeddings().weight
    settings = {
        **sizes._asdict(),
        "examples": len(examples),
        "tokens": tokens,
        "tokens_per_batch": rows,
        "sums_bytes": 4 * scored,
        "experts_by": way.implementation,
        "plain_batch": way.examples,
    }
    return Case(
        "mixture",
        "{layers} layers of {experts} experts, {chosen} chosen, {hidden} x {units}".format_map(
            sizes._asdict()
        ),
        dtype,
        settings=settings,
        operations=operations + 4 * head.numel() * target_tokens,
        bytes=head.element_size() * (entries + head.numel()),
        products=products,
        contenders=(
            Contender(PLAIN, lambda chosen: plain_pass(model, chosen, way)),
            Contender(OURS, partial(our_sums, model, target_modules="mlp"), ours=True),
        ),
    )


def _columns(rows: Sequence[Record]) -> tables.Columns:
    plain = {row["dtype"]: row["median_s"] for row in rows if row.contender == PLAIN}
    return {
        "dtype": "{dtype}",
        "": lambda row: NAMES[row.contender],
        **tables.TURNS,
        "of the plain pass": lambda row: tables.share(row["median_s"], plain.get(row["dtype"])),
        **tables.PEAK,
        # The floor is that of a scoring.
        "floor / time": lambda r: "" if r.contender == PLAIN else f"{r['share_of_floor']:.0%}",
    }


def _notes(rows: Sequence[Record]) -> list[str]:
    sizes = [
        f"{row['dtype']}: floor {row['floor_s']:.2f} s at {row['matrix_rate'] / 1e9:.1f} GFLOP/s, "
        f"plain pass by {row['experts_by']} with {row['plain_batch']} examples a batch"
        for row in rows
        if row.contender == OURS
    ]
    row = rows[0]
    return [
        f"{row.case}, random weights; {row['examples']} examples, {row['tokens']} tokens, at most "
        f"{row['tokens_per_batch']} a batch; sums {row['sums_bytes'] / 1e6:.0f} MB. "
        f"{'; '.join(sizes)}. {_AIMS}. {tables.provenance_line(row)}"
    ]


_KIND = ("device", "case", "dtype")
TABLE = tables.Table("python -m benchmarks mixture", _columns, _notes, _KIND, tables.RUNS)
