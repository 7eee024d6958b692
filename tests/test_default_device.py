"""Another default device than the CPU changes no result and is left as it was.

"meta" plays the GPU: what is made there without being asked for has no content, and shows.
"""

from __future__ import annotations

import functools
from contextlib import contextmanager
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import tiny_bias
import tiny_folders
import torch
from interrupts import interrupt, moments
from tiny_bias import SMALL_BOOTSTRAP
from tiny_classes import gradients, rich_batches, some_classes
from tiny_data import batches, make_examples
from tiny_experts import experts_model
from tiny_masks import bits
from tiny_models import bert, gpt2, llama
from torch import Tensor

from fastdean import (
    CollapseRegularizer,
    NeuronMask,
    Scores,
    collapse_metrics,
    couple,
    default_device,
    hsic,
    patch_checkpoint,
    score,
)
from fastdean.data import read_examples
from fastdean.debias import fine_tune
from fastdean.default_device import cpu_by_default
from fastdean.evaluation import (
    bootstrap_interval,
    encode_pairs,
    generate,
    last_token_states,
    margin_interval,
    perplexity,
    perplexity_and_divergence,
    response_margins,
)
from fastdean.evaluation.bias import crows_pairs
from fastdean.models import load_model, stream_model
from fastdean.ops import select_expert_importance

LOADER = list(batches(make_examples(), 2))
OTHER = list(batches(make_examples(seed=1), 2))
EXAMPLES = read_examples(LOADER)
ROWS = tiny_folders.rows(4, 0, unsafe=True)
QUIET = {"progress": False}
OF_CLASSES = list(rich_batches(2))
TOKENIZER = tiny_folders.tokenizer()
SPELLING = tiny_bias.spelling_tokenizer("causal")
PAIRS = [
    {"sent_more": more, "sent_less": less, "stereo_antistereo": "stereo", "bias_type": "gender"}
    for more, less in (("she is a cook.", "he is a cook."), ("poor is he", "rich is he"))
]


@contextmanager
def default(device):
    torch.set_default_device(device)
    try:
        yield
        assert torch.get_default_device().type == torch.device(device).type
    finally:
        torch.set_default_device(None)


def plain(found):
    """Numbers, text and lists, so that equal means equal to the bit."""
    if isinstance(found, Tensor):
        assert found.device.type == "cpu"
        return found.dtype, tuple(found.shape), found.tolist()
    if isinstance(found, Scores):
        return {name: plain([found[name], found.index(name)]) for name in found}
    if isinstance(found, NeuronMask):
        return {n: plain([e.index, e.original]) for n, e in found.entries.items()}
    if isinstance(found, np.ndarray):
        return found.tolist()
    if is_dataclass(found):
        return {field.name: plain(getattr(found, field.name)) for field in fields(found)}
    if isinstance(found, dict):
        return {name: plain(value) for name, value in found.items()}
    return [plain(each) for each in found] if isinstance(found, list | tuple) else found


@functools.cache
def two_scores():
    return [score(llama(), loader, **QUIET) for loader in (LOADER, OTHER)]


@functools.cache
def some_mask():
    return couple(*two_scores(), ratio=0.01)


def scored(**options):
    return lambda model: score(model, LOADER, **options, **QUIET)


def toggled(model):
    some_mask().apply_(model)
    applied = bits(model)
    some_mask().restore_(model)
    return applied, bits(model)


def trained_with_the_regulariser(model):
    with CollapseRegularizer(model.train(), some_classes(), 10.0) as regularizer:
        for batch in OF_CLASSES:
            model(**batch).loss.backward()
    return regularizer.value, regularizer.state.sums, gradients(model)


def fine_tuned(model):
    rows = [{"text": row["response"]} for row in ROWS]
    lists = {"pairs": [["w1", "w2"]], "ambiguous": {}, "names": {}}
    fine_tune(model, TOKENIZER, rows, "bec", steps=1, lists=lists, **QUIET)
    return bits(model)


def margins(model):
    found = response_margins(model, encode_pairs(ROWS, TOKENIZER), **QUIET)
    return found, margin_interval(found)


def diverged(model):
    edited = functools.partial(some_mask().applied, model)
    return perplexity_and_divergence(model, EXAMPLES, edited=edited, **QUIET)


def dependence(model):
    states = last_token_states(model, EXAMPLES, **QUIET)
    return hsic(states[0], states[1], permutations=10)


# What builds the model, and what is made of it.
CALLS = {
    "score": (llama, scored()),
    "score by layers": (llama, scored(order="layers")),
    "score units": (llama, scored(granularity="unit")),
    "score sparse": (llama, scored(order="layers", keep_top=0.05, signs=True)),
    "score deterministic": (llama, scored(deterministic=True)),
    "score every parameter": (llama, scored(target_modules="every")),
    "score experts": (lambda: experts_model("Mixtral"), scored(keep_top=0.1)),
    "score a masked model": (bert, scored()),
    "score text": (llama, lambda model: score(model, ROWS, tokenizer=TOKENIZER, **QUIET)),
    "score a generator": (gpt2, lambda model: score(model, iter(LOADER), **QUIET)),
    "couple": (llama, lambda _: couple(*two_scores(), ratio=0.01)),
    "couple at random": (
        llama,
        lambda _: couple(*two_scores(), general=two_scores()[0], rule="random", ratio=0.1),
    ),
    "apply and restore": (llama, toggled),
    "collapse metrics": (
        llama,
        lambda model: (
            collapse_metrics(model, OF_CLASSES, some_classes(), held_out=LOADER, **QUIET).values
        ),
    ),
    "regulariser": (llama, trained_with_the_regulariser),
    "fine-tune": (bert, fine_tuned),
    "perplexity": (llama, lambda model: perplexity(model, EXAMPLES, **QUIET)),
    "divergence": (llama, diverged),
    "margins": (llama, margins),
    "dependence": (llama, dependence),
    "generate": (
        llama,
        lambda model: generate(model, TOKENIZER, ["w1 w2", "w3"], max_new_tokens=3, **QUIET),
    ),
    "bias measure": (
        llama,
        lambda model: crows_pairs(model, SPELLING, PAIRS, **SMALL_BOOTSTRAP),
    ),
    "bootstrap": (
        llama,
        lambda _: bootstrap_interval(lambda rows: rows.double().mean(1), 9, resamples=50),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_result_does_not_depend_on_the_default_device(name):
    build, call = CALLS[name]
    expected = plain(call(build()))
    model = build()
    with default("meta"):
        found = call(model)
    assert plain(found) == expected


def test_what_is_read_from_files_does_not_depend_on_it(tmp_path):
    folder = tiny_folders.save_model(tmp_path / "model")
    scores, mask = two_scores()[0], some_mask()
    with default("meta"):
        streamed = score(stream_model(str(folder), device="cpu"), LOADER, keep_top=1.0, **QUIET)
        scores.save_pretrained(tmp_path / "scores")
        mask.save_pretrained(tmp_path / "mask")
        read = Scores.from_pretrained(tmp_path / "scores")
        read_mask = NeuronMask.from_pretrained(tmp_path / "mask")
        patch_checkpoint(folder, mask, tmp_path / "edited")
        model, _ = load_model(str(tmp_path / "edited"), device="cpu")
    assert plain(read) == plain(scores) and read_mask == mask
    for name, each in scores.items():
        assert torch.equal(streamed[name], each.flatten()[streamed.index(name)])
    assert plain(bits(model)) == plain(toggled(llama())[0])


@pytest.mark.parametrize("impl", ["reference", None])
def test_experts_are_selected_as_without_it(impl):
    generator = torch.Generator().manual_seed(0)
    x, g, weight = (torch.randn(*s, generator=generator) for s in ((9, 8), (9, 6), (2, 6, 8)))
    segments, places = torch.tensor([[0, 5], [5, 9]]), torch.tensor([0, 1])
    arguments = (x, g, segments, places, torch.zeros(2, dtype=torch.int64), weight, [3], [2])
    expected = select_expert_importance(*arguments, signed=True, impl=impl)
    with default("meta"):
        found = select_expert_importance(*arguments, signed=True, impl=impl)
    assert plain(found) == plain(expected)


def test_the_default_device_is_as_it_was_also_after_an_error():
    model = llama()
    for setting in (default("meta"), torch.device("meta")):
        with setting:
            with pytest.raises(ValueError, match="loader must yield at least one example"):
                score(model, [], **QUIET)
            assert torch.get_default_device().type == "meta"
        assert torch.get_default_device().type == "cpu"


def test_the_default_device_is_as_it_was_after_an_interrupt_at_any_line():
    model = llama()

    def call():
        with torch.device("meta"):
            score(model, LOADER, target_modules=["down_proj"], **QUIET)

    def left():
        modes = torch._C._len_torch_function_stack()
        return modes, getattr(default_device._callers, "device", None)

    # What is measured of the model is kept.
    call()
    files, before = [default_device.__file__], left()
    for moment in moments(call, files):
        interrupt(call, files, moment)
        assert left() == before


def test_who_is_given_what_a_generator_yields_has_his_own_default_device():
    @contextmanager
    @cpu_by_default
    def entered():
        seen.append(torch.empty(0).device.type)
        try:
            yield
        finally:
            seen.append(torch.empty(0).device.type)

    @cpu_by_default
    def generated():
        seen.append((yield torch.empty(0)).device.type)
        return torch.empty(0)

    seen = []
    with default("meta"):
        with pytest.raises(ValueError, match="in the block"), entered():
            seen.append(torch.empty(0).device.type)
            raise ValueError("in the block")
        numbers = generated()
        seen.append(next(numbers).device.type)
        with pytest.raises(StopIteration) as ended:
            numbers.send(torch.empty(0))
    assert seen == ["cpu", "meta", "cpu", "cpu", "meta"]
    assert ended.value.value.device.type == "cpu"


def test_a_loader_has_the_callers_default_device():
    """A `DataLoader` that shuffles draws there, and takes no generator of another device."""

    def loader():
        yield from OF_CLASSES
        seen.append(torch.get_default_device().type)

    seen, model = [], gpt2()
    with default("meta"):
        read_examples(loader())
        collapse_metrics(model, loader(), some_classes(), progress=False)
    assert seen == ["meta"] * 2


def test_a_model_goes_to_the_callers_default_device_unless_another_is_named(tmp_path, monkeypatch):
    folder, placed = str(tiny_folders.save_model(tmp_path / "model")), []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.nn.Module, "to", lambda model, device: placed.append(str(device)))
    # As `fastdean.run` calls it, which has the CPU as the default device.
    inside = cpu_by_default(load_model)
    with default("cuda:1"):
        for load in (load_model, inside):
            load(folder, **QUIET)
            load(folder, device="cpu", **QUIET)
    load_model(folder, **QUIET)
    elsewhere = "cuda" if torch.cuda.is_available() else "cpu"
    assert placed == ["cuda:1", "cpu"] * 2 + [elsewhere]


@pytest.mark.parametrize("load", [load_model, stream_model])
def test_a_default_device_that_no_model_can_lie_on_is_refused(load, tmp_path):
    folder = str(tiny_folders.save_model(tmp_path / "model"))
    message = "device must be cpu, cuda, mps or auto, got 'meta', torch's default device; pass"
    with default("meta"), pytest.raises(ValueError, match=message):
        load(folder)
