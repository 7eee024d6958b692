"""Windows that keep inputs and gradients in place of sums select the same entries, to the bit."""

from __future__ import annotations

import re

import pytest
import torch
from live_bytes import LiveBytes
from oracle import norm_error
from tiny_data import batches, make_examples

import fastdean
from fastdean import native
from fastdean.coupling import entries, score_sets, tried_sets
from fastdean.coupling.layers import by_layers
from fastdean.coupling.resuming import resumable
from fastdean.coupling.sums import accumulators, held_pairs, holding
from fastdean.coupling.sums.holding import Holding, Pair
from fastdean.coupling.targets.target import Target
from fastdean.coupling.workloads.loss_scale import LossScale
from fastdean.models.ranks.distributed import Ranks

COMPILED = pytest.mark.skipif(
    native.status().state != "available", reason="the operation has no other form that saves memory"
)
SIZES = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KEEP_TOP = 1e-3


@pytest.fixture(autouse=True)
def small_sums(monkeypatch):
    """Models that a test has time for have small matrices, whose sums would be kept."""
    monkeypatch.setattr(holding, "_SMALL_SUMS_BYTES", 0)


def built(family, dtype=torch.float32, **sizes):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SIZES | sizes))
    return AutoModelForCausalLM.from_config(config).eval().to(dtype)


def score(model, loader=None, **options):
    options = {
        "progress": False,
        "target_modules": "all",
        "order": "layers",
        "keep_top": KEEP_TOP,
        "tokens_per_batch": 16,
        **options,
    }
    return fastdean.score(model, loader or batches(make_examples(), 4), **options)


@pytest.fixture
def summed(monkeypatch):
    """Scores without anything held."""

    def score_summed(*args, **options):
        with monkeypatch.context() as patch:
            patch.setattr(tried_sets, "takes", lambda *args: False)
            found = score(*args, **options)
        if options.get("order") != "batches":
            assert found.manifest["order"]["matrices"]["held"] == 0
        return found

    return score_summed


def assert_same_bits(found, expected):
    assert list(found) == list(expected)
    for name, entry in expected.entries.items():
        other = found.entries[name]
        for part in ("index", "sums", "weight"):
            assert torch.equal(getattr(other, part), getattr(entry, part)), (name, part)
        assert (other.shape, other.fingerprint) == (entry.shape, entry.fingerprint)


def target(rows, columns, parameter="a", transposed=False):
    linear = torch.nn.Linear(columns, rows, bias=False)
    if transposed:
        linear.weight = torch.nn.Parameter(linear.weight.detach().T.contiguous())
    return Target(parameter, linear, transposed, 0, "mlp")


def of_targets(tokens, *targets, sources=None, dtype=torch.float32, keep_top=1e-6, signs=False):
    sources = sources or range(len(targets))
    pairs = {t.parameter: Pair(dtype, True, s) for t, s in zip(targets, sources, strict=True)}
    return Holding(tokens, 3, keep_top, pairs, signs)


@pytest.mark.parametrize("dtype, itemsize", [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize("rows, columns", [(300, 100), (100, 300)])
def test_pairs_are_held_up_to_the_tokens_at_which_sums_are_smaller(rows, columns, dtype, itemsize):
    one = target(rows, columns)
    # X and G of a token, and the inputs that the operation packs in fp32, against 4 R C.
    most = (4 * rows * columns - 1) // ((rows + columns) * itemsize + 4 * columns)
    for tokens, is_held in ((1, True), (most, True), (most + 1, False)):
        held = of_targets(tokens, one, dtype=dtype)
        assert held.held([one]) == ({one.parameter} if is_held else set())
        assert held.bytes([one]) <= 4 * rows * columns
    # Two sums for each weight against the same pairs.
    assert of_targets(most + 1, one, dtype=dtype, signs=True).held([one])


def test_inputs_that_several_targets_share_are_counted_once():
    gate, up = target(300, 100, "gate"), target(300, 100, "up")
    apart, together = (of_targets(50, gate, up, sources=s) for s in ((0, 1), (0, 0)))
    # X, and what is packed of it.
    assert apart.bytes([gate, up]) - together.bytes([gate, up]) == 2 * 4 * 50 * 100
    # With 70 tokens none is held by itself, and both are together.
    together = of_targets(70, gate, up, sources=(0, 0))
    assert together.held([gate]) == set()
    assert together.held([gate, up]) == {gate.parameter, up.parameter}


def test_small_sums_are_kept_whatever_the_tokens(monkeypatch):
    monkeypatch.undo()
    one, other = target(2048, 2048, "a"), target(2048, 2047, "b")
    assert of_targets(5, one).held([one]) and not of_targets(5, other).held([other])
    assert of_targets(5, other).bytes([other]) == 4 * 2048 * 2047


def test_many_entries_to_keep_are_summed():
    one = target(300, 100)
    assert of_targets(10, one, keep_top=1e-3).held([one])
    assert not of_targets(10, one, keep_top=0.1).held([one])


def test_what_the_operation_does_not_take_is_summed():
    one, pair = target(30, 10), Pair(torch.float32, True, 0)
    cpu = torch.device("cpu")
    assert holding.takes(one, pair, cpu, None) == (native.status().state == "available")
    assert not holding.takes(one, pair, cpu, "reference")
    assert not holding.takes(one, pair, cpu, "triton")
    assert not holding.takes(one, Pair(torch.float64, True, 0), cpu, None)
    assert not holding.takes(one, Pair(torch.float32, False, 0), cpu, None)


@COMPILED
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "cohere", "opt", "gpt_neox"])
def test_selections_have_the_bits_of_dense_sums(family, summed):
    sizes = {"n_head": 4} if family == "gpt2" else {}
    sizes |= {"ffn_dim": 512, "word_embed_proj_dim": 128} if family == "opt" else {}
    model = built(family, **sizes)
    found = score(model)
    assert found.manifest["order"]["matrices"]["held"] >= len(found) // 2
    assert_same_bits(found, summed(model))
    assert_same_bits(found, summed(model, order="batches"))


@COMPILED
@pytest.mark.parametrize("options", [{"max_length": None}, {"tokens_per_batch": 4096}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_and_one_batch(dtype, options, summed):
    model = built("llama", dtype)
    found = score(model, **options)
    assert found.manifest["order"]["matrices"]["held"]
    assert_same_bits(found, summed(model, **options))
    assert_same_bits(found, summed(model, order="batches", **options))


@COMPILED
@pytest.mark.parametrize("exponent", [6, 24])
def test_held_pairs_in_fp16_have_the_scale_taken_off(exponent, summed, monkeypatch):
    """At 2^24 batches overflow: their pairs come in fp32, and the matrix is summed after all."""
    fitted = LossScale(exponent)
    monkeypatch.setattr(LossScale, "fitted", lambda *_: fitted)
    model = built("llama", torch.float16)
    found, expected = (each(model, signs=True) for each in (score, summed))
    assert_same_bits(found, expected)
    for name, entry in expected.entries.items():
        assert norm_error(found.entries[name].signed, entry.signed) < 1e-5


@COMPILED
def test_loss_fn_over_padded_batches(summed):
    def losses(outputs, batch):
        logits = outputs.logits.transpose(1, 2)
        labels = batch["labels"].clamp_min(0)
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none").mean(1)

    model, loader = built("llama"), list(batches(make_examples(lengths=(3, 9, 5)), 2))
    options = {"loss_fn": losses, "tokens_per_batch": None}
    found = score(model, loader, **options)
    assert found.manifest["order"]["matrices"]["held"]
    assert_same_bits(found, summed(model, loader, **options))


@COMPILED
def test_the_manifest_counts_both_and_shared_inputs_are_held_once(monkeypatch):
    model, made, summed = built("llama"), [], []
    kind = accumulators.DenseWeightAccumulator

    def sums(target, *args):
        summed.append(target.parameter)
        return kind(target, *args)

    monkeypatch.setattr(held_pairs, "DenseWeightAccumulator", sums)
    monkeypatch.setitem(accumulators.ACCUMULATORS, "weight", sums)
    real = held_pairs.SharedInputs

    def counted(tokens):
        made.append(tokens)
        return real(tokens)

    monkeypatch.setattr(held_pairs, "SharedInputs", counted)
    found = score(model)
    described = found.manifest["order"]["matrices"]
    # Of each layer q, k and v with one input, gate and up with one, and down; not o.
    assert described == {"held": 12, "summed": 2}
    assert summed == [f"model.layers.{n}.self_attn.o_proj.weight" for n in (1, 0)]
    assert len(made) == 6
    assert "matrices" not in score(model, order="batches").manifest["order"]
    assert score(model, keep_top=None).manifest["order"]["matrices"]["held"] == 0


@COMPILED
def test_a_budget_counts_what_is_held_and_not_the_sums(tmp_path, summed, monkeypatch):
    model = built("llama", hidden_size=512, intermediate_size=4096)
    options = {"target_modules": "mlp", "states": tmp_path}

    def least(of):
        with pytest.raises(ValueError, match="memory_budget must be at least") as caught:
            of(model, memory_budget=10_000, **options)
        return int(re.search(r"at least ([\d,]+)", str(caught.value))[1].replace(",", ""))

    held, dense = least(score), least(summed)
    assert held < dense - 4_000_000
    expected = summed(model, **options)
    live, run = LiveBytes(), by_layers.Sweep.run

    def counted(sweep):
        # The trial before it has a gradient of a whole matrix.
        with live:
            run(sweep)

    monkeypatch.setattr(by_layers.Sweep, "run", counted)
    found = score(model, memory_budget=held, **options)
    monkeypatch.setattr(by_layers.Sweep, "run", run)
    # Beside what selecting threads sum at a time, a megabyte each, and the entries that are kept.
    assert live.peak - 3_000_000 < held < 4 * 512 * 4096
    # The sums of one matrix do not fit, so that batches could not be taken.
    auto = score(model, order="auto", memory_budget=held, **options)
    assert auto.manifest["order"]["by"] == "layers"
    with pytest.raises(ValueError, match="memory_budget must hold the sums of at least one"):
        score(model, order="batches", memory_budget=4 * 512 * 4096 - 1, target_modules="mlp")
    assert_same_bits(found, expected)


class Case:
    """Pairs of two batches for one target, and its dense sums."""

    def __init__(self, transposed=False, dtype=torch.float32, signs=False):
        generator = torch.Generator().manual_seed(3)
        self.target = target(40, 30, transposed=transposed)
        self.weight = self.target.module.weight
        self.batches = [
            tuple(torch.randn(n, w, generator=generator).to(dtype) for w in (30, 40))
            for n in (9, 7)
        ]
        self.segments = [torch.tensor([[0, 3], [3, 8]]), torch.tensor([[1, 2], [2, 3], [4, 7]])]
        self.signs = signs

    def held(self, tokens=16, num_examples=5, inputs=None):
        return held_pairs.HeldPairs(
            self.target,
            inputs or held_pairs.SharedInputs(tokens),
            tokens,
            num_examples,
            12,
            self.sums,
            None,
            self.signs,
        )

    def sums(self):
        cpu = torch.device("cpu")
        return accumulators.DenseWeightAccumulator(self.target, cpu, None, self.signs)

    def expected(self, examples=5):
        sums = self.sums()
        for (x, g), segments in zip(self.batches, self.segments, strict=True):
            sums.add_(x, g, segments)
        return sums.entry(self.weight).keep(examples, 12)

    def result(self, accumulator, examples=5):
        entry = accumulator.entry(self.weight)
        return entry if entry.index is not None else entry.keep(examples, 12)


def assert_same_entry(found, expected):
    for part in ("index", "sums", "weight"):
        assert torch.equal(getattr(found, part), getattr(expected, part)), part


@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_changed_after_it_was_delivered_is_what_it_was(transposed):
    case = Case(transposed)
    held = case.held()
    assert held.tensors() == []
    for (x, g), segments in zip(case.batches, case.segments, strict=True):
        x, g = x.clone(), g.clone()
        held.add_(x, g, segments)
        # As a model does that computes every batch in one buffer.
        x.zero_()
        g.fill_(7)
    assert_same_entry(case.result(held), case.expected())


@pytest.mark.parametrize("what", ["dtype", "rows", "examples", "input"])
def test_what_was_not_foreseen_is_summed_with_the_same_bits(what):
    case = Case()
    inputs = held_pairs.SharedInputs(16)
    tokens, examples = (12, 5) if what == "rows" else (16, 9 if what == "examples" else 5)
    held, other = case.held(tokens, examples, inputs), case.held(16, examples, inputs)
    for number, ((x, g), segments) in enumerate(zip(case.batches, case.segments, strict=True)):
        if what == "input":
            # The other target of the same input gets another one, in the second batch.
            other.add_(x if number == 0 else x + 1, g, segments)
        if what == "dtype" and number == 1:
            case.batches[1] = x, g = x.bfloat16(), g.bfloat16()
        held.add_(x, g, segments)
    entry = held.entry(case.weight)
    assert entry.index is None
    assert_same_entry(entry.keep(examples, 12), case.expected(examples))


def test_an_infinite_gradient_is_refused_with_the_name_of_the_matrix():
    case = Case()
    held = case.held()
    for (x, g), segments in zip(case.batches, case.segments, strict=True):
        g[6, 3] = float("inf")
        held.add_(x, g, segments)
    text = "^scores of a.weight: importance must be finite, got inf at flat index 90; check the"
    with pytest.raises(ValueError, match=text):
        entries.finish({"a.weight": held}, [case.target], Ranks(0, 1), 5, 0.01, "expert", False)


@COMPILED
@pytest.mark.parametrize("way", ["resident", "streamed"])
# Two layers forward, two losses, then each layer backward for each set.
@pytest.mark.parametrize("done", [5, 6])
def test_held_pairs_go_on_after_an_interrupt_and_from_files(way, done, tmp_path, monkeypatch):
    model = built("llama")
    model.save_pretrained(tmp_path / "model")
    reached = resumable.Resumable.reached

    def stopping(self, step):
        reached(self, step)
        if step + 1 == done:
            raise KeyboardInterrupt

    def score_both(**options):
        given = tmp_path / "model" if options and way == "streamed" else built("llama")
        sets = {
            "a": batches(make_examples(), 4),
            "b": batches(make_examples(seed=5, lengths=(7, 4)), 1),
        }
        shared = {"target_modules": "all", "order": "layers", "keep_top": KEEP_TOP}
        return score_sets(given, sets, tokens_per_batch=16, progress=False, **shared, **options)

    with monkeypatch.context() as patch:
        # Dense sums: nothing is held.
        patch.setattr(tried_sets, "takes", lambda *args: False)
        expected = score_both()
    folder = tmp_path / "job"
    with monkeypatch.context() as patch:
        patch.setattr(resumable.Resumable, "reached", stopping)
        with pytest.raises(KeyboardInterrupt):
            score_both(resume=folder)
    found = score_both(resume=folder)
    assert not folder.exists()
    for name in expected:
        assert expected[name].manifest["order"]["matrices"]["held"] == 0
        assert found[name].manifest["order"]["matrices"]["held"] > 0
        assert_same_bits(found[name], expected[name])
