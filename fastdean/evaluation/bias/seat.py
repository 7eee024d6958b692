"""SEAT: are sentences about two groups represented nearer to one set of attributes than another?

May et al. 2019 (NAACL), the Word Embedding Association Test (Caliskan et al. 2017) on sentences.
With targets X, Y and attributes A, B, s(w) = mean_a cos(w, a) - mean_b cos(w, b), the effect size
is d = (mean_X s - mean_Y s) / std_{X and Y} s, between -2 and 2.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastdean.data.batching import Batch, Layout, plan_batches
from fastdean.data.examples import Example
from fastdean.default_device import cpu_by_default
from fastdean.evaluation.bias.finite import require_finite
from fastdean.evaluation.bias.likelihood import encode_text, labels_at
from fastdean.evaluation.bias.result import BiasResult
from fastdean.evaluation.bias.rows import Row, Source, benchmark_rows, file_named, require_columns
from fastdean.evaluation.hidden_states import layer_outputs
from fastdean.evaluation.passes import rows_of_examples
from fastdean.evaluation.statistics.bootstrap import bootstrap_interval
from fastdean.evaluation.statistics.intervals import Interval
from fastdean.models.adapters import require_no_prompts
from fastdean.models.batch_size import tokens_per_batch_of
from fastdean.models.exact_layout import exact_layout
from fastdean.models.label_shift import label_shift
from fastdean.models.model_state import input_device, unwrap

SETS = ("targ1", "targ2", "attr1", "attr2")
COLUMNS = ("set", "category", "sentence")
_PARTITIONS_PER_CHUNK = 10_000
# Associations that spread less than this are those of equal float32 representations.
_SAME = 1e-7


@cpu_by_default
def seat(
    model: nn.Module,
    tokenizer: Any,
    source: Source | Mapping[str, Any],
    *,
    pooling: Literal["mean", "last", "first"] = "mean",
    layer: int = -1,
    permutations: int = 100_000,
    tokens_per_batch: int | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    progress: bool = True,
) -> BiasResult:
    """Effect size of one association test on sentence representations.

    Args:
        model: any transformers text model; evaluated without dropout and left in its mode.
        source: a test as it is published, {"targ1": {"category", "examples"}, ...} in a .json or
            .jsonl file or as a mapping; or rows with the columns `COLUMNS`, `set` being one of
            `SETS`.
        pooling: what represents a sentence: the mean of its own tokens' states, or that of the last
            one ("last"), special tokens left out of both; or the state of the first token,
            specials included ("first": [CLS] of BERT; not for causal models).
        layer: whose output, -1 the last one's, after the model's final norm where it has one.
        permutations: the p-value is exact where the targets can be split in at most this many ways
            of the same sizes, else from so many random splits.
        tokens_per_batch: a bound for memory; the result does not depend on it.
        confidence, resamples, seed: of the intervals. All four sets are resampled, sentence by
            sentence; sentences about one word are alike, so that the intervals are narrow. They can
            be wide beside a small p-value, which takes the attributes as given.

    Returns:
        The effect size; neutral is 0, unit standard deviations (n - 1 in the denominator, as in the
        published code). n counts target sentences. Categories: the effect with the association to
        each attribute set alone, cos(w, A) or cos(w, B) in place of s. Figures: `p_value`, one
        sided: the share of splits, the given one included, whose difference is at least as large
        (Phipson & Smyth 2010 for random splits); `splits`; `exact`, 1 or 0.

    Raises:
        ValueError: a set that is missing or too small, an unknown pooling or layer, or
            representations that are all alike or no finite numbers.
    """
    if pooling not in ("mean", "last", "first"):
        raise ValueError(f"pooling must be 'mean', 'last' or 'first', got {pooling!r}")
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, got {permutations}")
    names, sentences = seat_sets(source)
    sizes = [len(examples) for examples in sentences]
    states = sentence_states(
        model,
        tokenizer,
        [sentence for examples in sentences for sentence in examples],
        pooling=pooling,
        layer=layer,
        tokens_per_batch=tokens_per_batch,
        progress=progress,
    )
    places = [(key, i) for key, size in zip(SETS, sizes, strict=True) for i in range(1, size + 1)]
    require_finite(model, states, lambda number: "sentence {1} of {0}".format(*places[number - 1]))
    targets, attributes = states.split([sizes[0] + sizes[1], sizes[2] + sizes[3]])
    cosines = _unit(targets) @ _unit(attributes).T
    p_value, splits, exact = permutation_p_value(
        association(cosines, sizes[2]), sizes[0], permutations=permutations, seed=seed
    )
    options = {"confidence": confidence, "resamples": resamples, "seed": seed}
    overall = _interval(cosines, sizes, (1.0, -1.0), options)
    return BiasResult(
        name=f"SEAT, {names[0]} and {names[1]} with {names[2]} and {names[3]}, effect size",
        value=overall.mean,
        interval=overall,
        n=sizes[0] + sizes[1],
        unit="standard deviations",
        neutral=0.0,
        by_category={
            f"association with {names[2]}": _interval(cosines, sizes, (1.0, 0.0), options),
            f"association with {names[3]}": _interval(cosines, sizes, (0.0, 1.0), options),
        },
        figures={"p_value": p_value, "splits": splits, "exact": int(exact)},
        notes=(
            f"{pooling} pooling of the outputs of layer {layer}; all four sets resampled sentence "
            "by sentence; the p-value takes the attributes as given",
        ),
    )


def association(cosines: Tensor, size_a: int) -> Tensor:
    """s(w, A, B) = mean_a cos(w, a) - mean_b cos(w, b): [n, |A| + |B|] -> [n]."""
    return cosines[:, :size_a].mean(1) - cosines[:, size_a:].mean(1)


def effect_size(s: Tensor, size_x: int) -> Tensor:
    """(mean_X s - mean_Y s) / std s, unbiased std over X and Y: [..., |X| + |Y|] -> [...]."""
    difference = s[..., :size_x].mean(-1) - s[..., size_x:].mean(-1)
    return difference / s.std(-1)


def permutation_p_value(
    s: Tensor, size_x: int, *, permutations: int = 100_000, seed: int = 0
) -> tuple[float, int, bool]:
    """One-sided p-value of mean_X s - mean_Y s over the splits of the targets into such sizes.

    Args:
        s: float64 [n], associations of X then of Y.
        permutations: exact where there are at most this many splits; else so many random ones.
    Returns:
        The share of splits whose difference is at least that of X and Y, the given split included;
        how many splits were looked at; whether these were all.
    """
    # With the sizes fixed, the difference grows with the sum over X alone.
    observed = float(s[:size_x].sum())
    # The same members summed in another order are the same split.
    bound = observed - 1e-12 * float(s.abs().sum())
    splits = math.comb(len(s), size_x)
    if splits <= permutations:
        chosen = torch.tensor(list(combinations(range(len(s)), size_x)))
        return float((s[chosen].sum(1) >= bound).double().mean()), splits, True
    generator = torch.Generator().manual_seed(seed)
    at_least = 0
    for start in range(0, permutations, _PARTITIONS_PER_CHUNK):
        rows = min(_PARTITIONS_PER_CHUNK, permutations - start)
        order = torch.rand(rows, len(s), generator=generator).argsort(1)
        at_least += int((s[order[:, :size_x]].sum(1) >= bound).sum())
    return (1 + at_least) / (1 + permutations), permutations, False


@torch.no_grad()
def sentence_states(
    model: nn.Module,
    tokenizer: Any,
    sentences: list[str],
    *,
    pooling: str = "mean",
    layer: int = -1,
    tokens_per_batch: int | None = None,
    progress: bool = True,
) -> Tensor:
    """One vector per sentence, float64 [n, D] on the CPU; `pooling` and `layer` as in `seat`."""
    model = unwrap(model)
    require_no_prompts(model)
    shift = _shift(model)
    if pooling == "first" and shift == 1:
        raise ValueError(
            "pooling must be 'mean' or 'last' for a causal model, got 'first'; its first token "
            "knows nothing of the sentence"
        )
    examples = [_pooled(tokenizer, sentence, pooling) for sentence in sentences]
    device = input_device(model)
    layout = Layout(packed=False, padded=False) if shift is None else exact_layout(model, examples)
    batches = plan_batches(
        examples,
        shift=0,
        tokens_per_batch=tokens_per_batch or tokens_per_batch_of(model),
        **vars(layout),
    )

    def states_of(batch: Batch) -> Tensor:
        outputs = layer_outputs(model, batch.to(device).model_inputs())
        if not -len(outputs) <= layer < len(outputs):
            raise ValueError(
                f"layer must be in {-len(outputs)}..{len(outputs) - 1}, got {layer}; the model "
                f"has {len(outputs)} layers"
            )
        flat = outputs[layer].flatten(0, 1)
        rows = flat.index_select(0, batch.target_rows.to(flat.device)).cpu().double()
        sums = rows.new_zeros(batch.num_examples, rows.shape[1])
        return sums.index_add_(0, batch.target_example, rows) / batch.target_counts[:, None]

    return rows_of_examples(model, batches, states_of, "representations", progress)


def _shift(model: nn.Module) -> int | None:
    """1 for a causal model, 0 for a masked one, None for one without a language modelling head."""
    try:
        return label_shift(model)
    except ValueError:
        return None


def _pooled(tokenizer: Any, sentence: str, pooling: str) -> Example:
    """The sentence with the tokens whose states are averaged as its targets."""
    text = encode_text(tokenizer, sentence)
    places = {"mean": text.own, "last": text.own[-1:], "first": (0,)}[pooling]
    return Example(text.ids, labels_at(text.ids, places))


def _unit(states: Tensor) -> Tensor:
    norms = states.norm(dim=1, keepdim=True)
    if not bool((norms > 0).all()):
        raise ValueError(
            "model must give representations that are not zero, got a zero vector; choose another "
            "layer"
        )
    return states / norms


def _interval(
    cosines: Tensor, sizes: list[int], signs: tuple[float, float], options: dict[str, Any]
) -> Interval:
    """The effect size with s = signs[0] * mean cos(w, A) + signs[1] * mean cos(w, B)."""
    size_x, size_y, size_a, _ = sizes
    split = size_x + size_y
    scale = torch.full((cosines.shape[1],), signs[1], dtype=torch.float64)
    scale[:size_a] = signs[0]
    scaled = cosines * scale

    def statistic(index: Tensor) -> Tensor:
        targets, attributes = index[:, :split], index[:, split:] - split
        weights = torch.zeros(len(index), cosines.shape[1], dtype=torch.float64)
        for part in attributes.split([size_a, attributes.shape[1] - size_a], dim=1):
            weights.scatter_add_(1, part, torch.full(part.shape, 1.0 / part.shape[1]).double())
        return effect_size((weights @ scaled.T).gather(1, targets), size_x)

    if not float((scaled[:, :size_a].mean(1) + scaled[:, size_a:].mean(1)).std()) > _SAME:
        raise ValueError(
            "model must tell the target sentences apart, got the same association for all of them; "
            "choose another layer or pooling"
        )
    return bootstrap_interval(statistic, sum(sizes), strata=sizes, **options)


def seat_sets(source: Source | Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Name and sentences of each of the four sets; arguments and errors as `seat`."""
    if isinstance(source, Mapping):
        test = source
    else:
        path = file_named(source, ".json", ".jsonl")
        written = _read_test(path) if path else None
        test = _from_rows(benchmark_rows(source)) if written is None else written
    missing = [key for key in SETS if not isinstance(test.get(key), Mapping)]
    if missing:
        raise ValueError(
            f"source must hold the sets {', '.join(SETS)}, got no {' and no '.join(missing)}; pass "
            "a test in the published form"
        )
    sentences = [list(test[key].get("examples") or ()) for key in SETS]
    for key, examples, least in zip(SETS, sentences, (2, 2, 1, 1), strict=True):
        if len(examples) < least or not all(isinstance(e, str) for e in examples):
            raise ValueError(
                f"{key} must hold at least {least} sentences under 'examples', got "
                f"{examples!r:.60}; add sentences"
            )
    return [str(test[key].get("category") or key) for key in SETS], sentences


def _read_test(path: Path) -> Mapping[str, Any] | None:
    """The published files are one object over many lines, whatever their ending; None for rows."""
    try:
        content = json.loads(path.read_text("utf-8-sig"))
    except ValueError:
        return None
    return content if isinstance(content, Mapping) and "targ1" in content else None


def _from_rows(rows: list[Row]) -> dict[str, dict[str, Any]]:
    require_columns(rows, COLUMNS, "SEAT", set=SETS)
    test: dict[str, dict[str, Any]] = {}
    for row in rows:
        part = test.setdefault(row["set"], {"category": row["category"], "examples": []})
        part["examples"].append(row["sentence"])
    return test
