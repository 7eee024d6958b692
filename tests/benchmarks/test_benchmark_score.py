"""The benchmarks of `score`: what is timed computes the same thing, and is recorded as it is."""

from __future__ import annotations

import json
import math
import re

import pytest
import tiny_data
import torch
from oracle import norm_error, weight_importance
from tiny_models import HIDDEN, INTERMEDIATE, LAYERS, VOCAB, gpt2, llama

from benchmarks.__main__ import main
from benchmarks.harness import environment, models, profile, store, tables
from benchmarks.harness.profile import Launch
from benchmarks.score import agreement, growth, mixture, orders, run, streamed, subject, sweep, work
from fastdean.data.examples import Example

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("quick_benchmarks")


def make_examples(lengths=(7, 3, 12, 5)):
    return [Example(*pair) for pair in tiny_data.make_examples(3, lengths)]


class Tokenizer:
    """One token per letter, of the first 20: the tiny models take no long texts."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [3 + ord(letter) % 90 for letter in text[:20]]}


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    """A benchmark on a tiny model, without the tests before: its status."""
    found = (llama(), Tokenizer(), "tiny")
    monkeypatch.setattr(models, "load_model", lambda model, gguf, dtype, device: found)

    def benchmark(name, *arguments):
        return main([name, "--no-gate", "--device", "cpu", "--out", str(tmp_path), *arguments])

    return benchmark


RANDOM = ("score", "--random-model", "toy", "--examples", "3", "--dtype", "bf16", "--repeats", "1")
RANDOM = (*RANDOM, "--tokens", "4")
VMAP = (*RANDOM, "--vmap", "--resume")


def read(out, op="score"):
    return [row for row in store.read(out, op) if row.problem is None]


def contenders(rows):
    return [row.contender for row in rows]


# What is timed.


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("target_modules", ["mlp", "all"])
def test_all_contenders_compute_the_importance_and_leave_the_model_alone(build, target_modules):
    model, examples = build(), make_examples()
    model.get_output_embeddings().weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    options = {"target_modules": target_modules, "layers": LAYERS, "vmap_examples": 3}
    case = work.score_case(model, examples, **options)
    sums = {each.name: each.run(examples) for each in case.contenders}
    assert list(sums) == ["published", "loop", "vmap", "fastdean"]
    pairs = [(example.input_ids, example.labels) for example in examples]
    expected = weight_importance(model, pairs, list(sums["fastdean"]))
    for name, found in sums.items():
        assert set(found) == set(expected), name
        for parameter, value in found.items():
            weight = model.get_parameter(parameter).detach()
            importance = value * weight.abs() / len(examples)
            assert norm_error(importance, expected[parameter]) < 1e-4, (name, parameter)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert all(p.grad is None for p in model.parameters())


def test_published_sums_have_the_dtype_of_the_weight_and_the_others_fp32():
    model, examples = llama(), make_examples()
    frequencies = model.model.rotary_emb.inv_freq.clone()
    models.cast_parameters_(model, torch.bfloat16)
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    for each in work.score_case(model, examples, vmap_examples=2).contenders:
        dtype = torch.bfloat16 if each.name == "published" else torch.float32
        assert {value.dtype for value in each.run(examples).values()} == {dtype}


def test_the_floor_of_the_tiny_model_by_hand():
    model, examples = llama(), make_examples()
    case = work.score_case(model, examples, target_modules="mlp")
    # q and o are square, k and v have half the heads.
    attention, mlp, head = 2 * 32 * 32 + 2 * 16 * 32, 3 * 32 * 64, 96 * 32
    assert (HIDDEN, INTERMEDIATE, LAYERS, VOCAB) == (32, 64, 2, 96)
    # A third of each is prompt.
    tokens, target_tokens = 27, 27 - (2 + 1 + 4 + 1)
    assert (case.setup["tokens"], case.setup["target_tokens"]) == (tokens, target_tokens)
    layers = 2 * (attention + mlp)
    weights = 2 * 2 * mlp * tokens
    assert case.operations == (2 + 2) * (layers * tokens + head * target_tokens) + weights
    assert case.bytes == 4 * (layers + head) and case.setup["sums_bytes"] == 4 * 2 * mlp
    # All tokens fit into one batch, whose products are then all there is.
    found = case.products.items()
    assert sum(2 * math.prod(size) * number for (_, *size), number in found) == case.operations
    # No gradient of activations is counted below the lowest target.
    upper = work.score_case(model, examples, target_modules=r".*layers\.1\.mlp\..*")
    assert case.operations - upper.operations == 2 * (layers // 2) * tokens + weights // 2


def test_some_layers_stand_for_all_and_say_so():
    assert work.spread(range(30), 2) == [0, 29] and work.spread(range(30), 3) == [0, 14, 29]
    assert work.spread(range(30), 31) == list(range(30))
    with pytest.raises(ValueError, match="layers must be at least 2, got 1; the cost depends on"):
        work.spread(range(30), 1)
    from transformers import LlamaForCausalLM

    config = llama().config
    config.num_hidden_layers = 4
    model, examples = LlamaForCausalLM(config).eval(), make_examples((4, 5))
    published = work.score_case(model, examples, layers=2).contenders[0]
    assert (published.scale, published.extrapolated) == (2.0, "2 of 4 layers")
    assert {name.split(".")[2] for name in published.run(examples)} == {"0", "3"}
    published = work.score_case(model, examples, layers=4).contenders[0]
    assert (published.scale, published.extrapolated) == (1.0, None)


def test_random_weights_are_the_same_every_time():
    before = torch.get_rng_state()
    one, other = (models.random_model("toy", torch.bfloat16, CPU) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(p, other.get_parameter(n)) for n, p in one.named_parameters())


@pytest.mark.parametrize(
    "name, parameters", [("qwen2-0.5b", 494e6), ("qwen2-1.5b", 1.544e9), ("qwen2-7b", 7.616e9)]
)
def test_a_shape_has_as_many_parameters_as_were_published(name, parameters):
    model = models.random_model(name, torch.bfloat16, torch.device("meta"))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=1e-3)


def test_rows_come_from_a_csv_or_from_all_embedded_data_sets_in_turn(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,response,other\n"a, b",c,d\n')
    assert subject.load_rows(path, 1) == [{"prompt": "a, b", "response": "c"}]
    assert len({row["prompt"] for row in subject.load_rows(None, 200)}) == 200
    with pytest.raises(ValueError, match="examples must be between 1 and 1, the rows of rows.csv"):
        subject.load_rows(path, 2)


# Runs.


def test_score_appends_one_complete_record_per_contender_and_dtype(benchmark, tmp_path, capsys):
    dtypes = ("--dtype", "bf16", "--dtype", "fp32", "--repeats", "2", "--profile")
    assert benchmark("score", *dtypes, "--examples", "3", "--bf16-examples", "2") == 0
    rows = read(tmp_path)
    assert [(row["dtype"], row.contender, row["examples"]) for row in rows] == [
        *(("fp32", name, 3) for name in ("published", "loop", "fastdean")),
        *(("bf16", name, 2) for name in ("published", "loop", "fastdean")),
    ]
    for row in rows:
        assert row["p20_s"] <= row["median_s"] <= row["p80_s"] and len(row["rounds_s"]) == 2
        assert row["tokens_per_s"] * row["median_s"] == pytest.approx(row["tokens"])
        assert row["share_of_floor"] == pytest.approx(row["floor_s"] / row["median_s"])
        assert (row["breakdown"] is not None) == (row.contender == "fastdean")
        assert str(tmp_path) not in json.dumps(vars(row)) and row.gate == "skipped"
        assert row["command"].startswith("python -m benchmarks score --no-gate --device cpu")
    assert capsys.readouterr().out.count("| fp32 | `fastdean.score` |") == 1


def test_agreement_compares_bf16_with_fp32_and_fastdean_with_the_loop(benchmark, tmp_path, capsys):
    assert benchmark("agreement", "--examples", "3") == 0
    loop, *rounded = store.read(tmp_path, "agreement")
    assert (loop["reference"], loop.contender) == ("loop fp32", "fastdean fp32")
    assert loop["k"] == [256, 256] and loop["kept"] > 0.99 and loop["matrices"] == 6
    # 2048 weights in a matrix: 1e-5 and 1e-4 of them is none, 1e-3 is two.
    assert [(row["ratio"], row["k"]) for row in rounded] == [(1e-3, [2, 2])]
    printed = capsys.readouterr().out
    assert "| fastdean bf16 | fastdean fp32 | 0.001 | 2 |" in printed
    assert "tests not run first: `python -m benchmarks agreement" in printed


def test_selections_are_compared_matrix_by_matrix():
    reference = {"a": torch.tensor([1, 2, 3, 4]), "b": torch.tensor([7, 9]), "c": torch.tensor([])}
    other = {"a": torch.tensor([4, 3, 2, 8]), "b": torch.tensor([9, 7]), "c": torch.tensor([1])}
    expected = {"k": [2, 4], "matrices": 2, "equal": 1, "kept": 0.875, "kept_least": 0.75}
    assert agreement.compare(reference, other) == expected
    with pytest.raises(ValueError, match="reference must select at least one entry, got none"):
        agreement.compare({"c": reference["c"]}, {"c": other["c"]})


def test_a_run_is_resumed_only_where_nothing_changed(benchmark, tmp_path, monkeypatch):
    def measured(*chosen):
        assert benchmark(*RANDOM, "--resume", *chosen) == 0
        return len(read(tmp_path))

    assert [measured(), measured()] == [3, 3]
    assert [measured("--impl", "loop"), measured("--impl", "loop")] == [5, 5]
    assert contenders(read(tmp_path)[3:]) == ["loop", "fastdean"]  # ours always
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert [measured(), measured()] == [8, 8]
    monkeypatch.setattr(environment, "sources_checksum", lambda: "other sources")
    assert measured() == 11


@pytest.mark.parametrize("call", [1, 2], ids=["in the check", "while it is timed"])
@pytest.mark.parametrize(
    "error, code, reason",
    [(torch.OutOfMemoryError("9 GB"), 0, "out of memory"), (KeyError("key"), 1, "KeyError: 'key'")],
)
def test_the_others_are_measured_where_one_fails_and_that_is_not_tried_again(
    benchmark, tmp_path, monkeypatch, capsys, call, error, code, reason
):
    right, calls = work.vmap_sums, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) >= call:
            raise error
        return right(*arguments)

    monkeypatch.setattr(work, "vmap_sums", failing)
    for _ in range(2):
        assert benchmark(*VMAP) == code
        assert f"not measured: {reason}" in capsys.readouterr().err
    assert len(calls) == call and contenders(read(tmp_path)) == ["published", "loop", "fastdean"]
    [left_out] = [row for row in store.read(tmp_path, "score") if row.problem is not None]
    assert (left_out.contender, left_out.problem["reason"]) == ("vmap", reason)


def test_vmap_is_left_out_where_two_gradients_do_not_fit(benchmark, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "vmap_chunk", lambda weights: 1)
    assert benchmark(*VMAP) == 0
    assert "not measured: the gradients of two examples do not fit" in capsys.readouterr().err
    assert "vmap" not in contenders(read(tmp_path))


def test_sums_that_differ_or_are_not_there_are_not_timed(benchmark, tmp_path, monkeypatch, capsys):
    right = work.loop_sums
    doubled = lambda *a: {name: 1.01 * value for name, value in right(*a).items()}  # noqa: E731
    monkeypatch.setattr(work, "loop_sums", doubled)
    assert benchmark("score", "--examples", "3") == 2
    assert "loop and fastdean must compute the same sums to 0.001" in capsys.readouterr().err

    def out_of_memory(*arguments, **options):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(work.fastdean, "score", out_of_memory)
    assert benchmark(*RANDOM) == 2
    assert "fastdean must run on 2 examples, got out of memory" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# Sweeps.


SWEEP = ("sweep", "--random-model", "toy", "--repeats", "1", "--resume")


def test_a_sweep_measures_every_point_once(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "_TOKENS", (4, 8))
    for _ in range(2):
        assert benchmark(*SWEEP, "--sweep", "tokens per example") == 0
    rows = read(tmp_path, "sweep")
    assert [(row["x"], row.contender, row["tokens"]) for row in rows] == [
        (x, name, 32 * x) for x in (4, 8) for name in ("loop", "fastdean")
    ]
    text = tables.rendered(sweep.TABLE, rows)
    assert "| tokens per example | |" in text and text.count("| `fastdean.score` |") == 2
    [[above], [below]] = sweep.picture(rows)
    assert [line.label for line in above.lines] == ["loop", "fastdean"] and above.floor.x == [4, 8]
    assert below.y_label == "tokens per second" and len(below.lines) == 2


def test_a_sweep_sees_every_kind_before_it_goes_into_detail():
    points = sweep.points("qwen2-7b")
    assert len({point.sweep for point in points[:4]}) == 4
    assert len(points) == len(set(points)) == 6 + 5 + 5 + 4
    assert {point.shape for point in points} == set(models.SHAPES) - {"toy"}
    # Over the targets it takes the last layers first, two at least.
    deep = models.random_model("qwen2-0.5b", torch.float32, torch.device("meta"))
    for model, count, first in ((llama(), 3 * LAYERS, "0"), (deep, 3 * 6, "18")):
        names = sweep.scored_modules(model, sweep.Point("", "", layers=0.25))
        assert len(names) == count and names[0].startswith(f"model.layers.{first}.mlp")


# Where the time goes.


def test_breakdown_groups_operations_and_names_the_rest():
    spent = [
        ("aten::mm", 4.0), ("aten::addmm", 1.0), ("aten::abs_", 0.5), ("aten::add_", 0.5),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", 1.0),
        ("aten::_log_softmax", 0.25), ("aten::copy_", 0.5), ("aten::silu", 0.25),
    ]  # fmt: skip
    spent = [Launch(name, "", seconds) for name, seconds in spent]
    assert profile.shares(spent, 10.0, profile.OUTSIDE) == {
        "matmul": 0.5, "outside operations": 0.2, "attention": 0.1, "abs + add": 0.1,
        "copies + casts": 0.05, "softmax + loss": 0.025, "other operations": 0.025,
    }  # fmt: skip
    launched = [
        Launch("aten::mm", "gemm", 3.0),
        Launch("", "_importance_kernel", 2.5),
        Launch("", "Memcpy DtoH (Device -> Pinned)", 0.5),
    ]
    found = profile.shares(launched, 10.0, profile.IDLE)
    assert {group: share for group, share in found.items() if share} == pytest.approx(
        {"device idle": 0.4, "matmul": 0.3, "importance kernel": 0.25, "copies + casts": 0.05}
    )


def test_the_profiler_of_a_cpu_lists_its_operations_and_on_a_gpu_nothing_is_made_up(monkeypatch):
    found = profile.shares_of(lambda: torch.mm(torch.ones(200, 200), torch.ones(200, 200)), CPU)
    assert found["matmul"] > 0 and sum(found.values()) == pytest.approx(1)
    monkeypatch.setattr(profile, "profiled", lambda call, device: ([], 4.0))
    assert profile.shares_of(lambda: None, torch.device("cuda")) is None


def test_every_kernel_of_ours_has_a_group():
    names = []
    for path in (store.ROOT / "fastdean" / "kernels").glob("*.py"):
        # With a grid behind its name: what is launched, unlike what kernels call.
        names += re.findall(r"\b(_\w+)\[\(", path.read_text("utf-8"))
    assert len(set(names)) > 8
    groups = {profile.group_of(Launch("", name, 1.0)) for name in names}
    assert groups == set(profile.KERNEL_GROUPS)


# Orders.


@pytest.fixture
def asked(monkeypatch):
    """What processes were asked for; a new one would take longer to import torch than to score."""
    seen = []
    for module in (orders, streamed):
        monkeypatch.setattr(
            module, "apart", lambda function, *given: seen.append(given) or function(*given)
        )
    return seen


def test_a_streamed_checkpoint_is_recorded_with_its_memory(benchmark, tmp_path, asked):
    chosen = ("streamed", "--shape", "toy", "--examples", "2", "--keep-top", "0.01")
    # A folder that is not there yet is made.
    folder = tmp_path / "no" / "disk"
    assert benchmark(*chosen, "--folder", str(folder)) == 0
    (row,) = read(tmp_path, "streamed")
    # Embedding and head of their own, and two layers, in bf16.
    weights = 2 * 96 * 32 + 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32 + 32 + 2 * 16) + 5 * 32
    assert row["checkpoint_bytes"] == 2 * weights
    assert 2 * weights < row["bytes_read"] < 4 * weights
    assert row["peak_bytes"] > row["peak_anonymous_bytes"] > 50_000_000
    assert "2, " in tables.rendered(streamed.TABLE, [row])
    assert not list(folder.iterdir())


def test_the_orders_take_turns_on_the_same_examples(benchmark, tmp_path, asked):
    chosen = ("orders", "--random-model", "toy", "--tokens", "12", "--examples", "2")
    scratch = tmp_path / "scratch"
    assert benchmark(*chosen, "--repeats", "1", "--folder", str(scratch)) == 0
    rows = read(tmp_path, "orders")
    names = ["batches", "layers", "layers, files", "layers, streamed"]
    assert contenders(rows) == names
    assert [(o["order"], streamed, o["states"] == "device") for _, streamed, _, o in asked] == [
        ("batches", False, True), ("layers", False, True), ("layers", False, False),
        ("layers", True, False),
    ]  # fmt: skip
    batches, *layers = rows
    assert all(row["tokens"] == 3 * 2 * 12 and row["median_s"] > 0 for row in rows)
    # A forward more through the matrices of both layers.
    again = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32)
    for row in layers:
        assert row["operations"] == batches["operations"] + 2 * 72 * again
        assert row["bytes"] == batches["bytes"] + 4 * again
    assert not list(scratch.iterdir())


def test_growth_varies_one_thing_at_a_time(benchmark, tmp_path, monkeypatch, asked):
    monkeypatch.setattr(growth, "_VARIED_TOY", {"layers": (3,), "examples": (3,), "hidden": (64,)})
    scratch = tmp_path / "scratch"
    chosen = ("growth", "--toy", "--folder", str(scratch))
    assert benchmark(*chosen) == 0
    rows = read(tmp_path, "growth")
    assert [(r["layers"], r["examples"], r["hidden"]) for r in rows[::3]] == [
        (2, 2, 32), (3, 2, 32), (2, 3, 32), (2, 2, 64),
    ]  # fmt: skip
    assert contenders(rows) == ["batches", "layers", "layers, streamed"] * 4
    for row in rows:
        resident = 0 if "streamed" in row.contender else row["weight_bytes"]
        assert row["with_weights_bytes"] == row["peak_bytes"] + resident
        assert row["tokens"] == row["examples"] * 64 and row["median_s"] > 0
    assert not list(scratch.iterdir())
    monkeypatch.setattr(growth, "_MIDDLE", growth._TOY)
    seconds, memory = growth.picture(rows)
    assert [line.label for line in seconds[0].lines] == ["batches", "layers", "layers, streamed"]
    assert [list(panel.lines[0].x) for panel in memory] == [[2, 3], [2, 3], [32, 64]]
    # What was measured is not measured again.
    assert benchmark(*chosen, "--resume") == 0
    assert len(read(tmp_path, "growth")) == len(rows)


def test_the_table_of_the_orders_says_above_what_each_peak_is():
    # Once: rows of one run have one date.
    here = environment.collect(CPU, ["-m", "benchmarks", "orders"])

    def row(name, seconds, peak_bytes):
        timed = dict.fromkeys(("median_s", "p20_s", "p80_s"), seconds)
        setup = {"dtype": "fp32", "examples": 2, "tokens": 72, "keep_top": 1e-3, "repeats": 1}
        metrics = {"peak_bytes": peak_bytes, "share_of_floor": 0.5}
        setup["weight_bytes"] = int(300e6)
        return store.Record("orders", "tiny", name, setup, timed, metrics, environment=here)

    peaks = {"batches": 200, "layers": 100, "layers, files": 50, "layers, streamed": 250}
    seconds = (2.0, 2.5, 2.6, 3.0)
    rows = [
        row(name, s, int(1e6 * peak))
        for s, (name, peak) in zip(seconds, peaks.items(), strict=True)
    ]
    text = tables.rendered(orders.TABLE, rows)
    assert "| layers, files | 2.60 (2.60 to 2.60) | 1.30x | 1.04x | 50 MB | 0.25x | 50% |" in text
    # 250 of 200 + 300: a streamed model's own weights are among its memory.
    assert "| layers, streamed | 3.00 (3.00 to 3.00) | 1.50x | 1.20x | 250 MB | 0.50x |" in text
    assert "Memory is above the loaded model (300 MB); streamed it is above the process" in text
    text = tables.rendered(orders.TABLE, [row(name, 1.0, None) for name in peaks])
    assert text.count("| not measured | not measured |") == 4


# A mixture of experts.


def test_a_mixture_is_scored_beside_a_pass_that_scores_nothing(benchmark, tmp_path):
    chosen = ("mixture", "--toy", "--tokens", "8", "--repeats", "1")
    assert benchmark(*chosen) == 0
    rows = read(tmp_path, "mixture")
    assert [(row["dtype"], row.contender) for row in rows] == [
        (dtype, name) for dtype in ("fp32", "bf16") for name in (mixture.PLAIN, "fastdean")
    ]
    text = tables.rendered(mixture.TABLE, rows)
    plain, ours, *_ = [line for line in text.splitlines() if line.startswith("| fp32")]
    assert "| 1.00x |" in plain and plain.endswith("| |")
    assert f"| {rows[1]['median_s'] / rows[0]['median_s']:.2f}x |" in ours
    assert ours.endswith(f"| {rows[1]['floor_s'] / rows[1]['median_s']:.0%} |")
    assert rows[0]["experts_by"] in mixture.IMPLEMENTATIONS
    assert "Aims: at most 1.6x" in text
    # Nothing is measured again.
    assert benchmark(*chosen, "--resume") == 0
    assert len(read(tmp_path, "mixture")) == len(rows)


def test_the_floor_of_a_mixture_by_hand_and_the_model_as_it_was():
    sizes = mixture.Mixture(hidden=64, units=32, experts=4, chosen=2, layers=2)
    model = mixture.mixture_model(sizes, torch.float32, CPU)
    examples = make_examples(lengths=(8, 8))
    model.get_output_embeddings().weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    own = model.config._experts_implementation
    case = mixture.mixture_case(model, sizes, examples, "fp32", mixture.Way("eager", 2))
    tokens, targets, head = 16, 2 * 6, 2048 * 64
    # Two heads of queries, one of keys and values, of 32 each.
    attention, expert = 2 * 64 * 64 + 2 * 64 * 32, 3 * 64 * 32
    products = 2 * tokens * 2 * (2 * attention + 3 * 2 * expert) + 2 * 2 * head * targets
    assert case.operations == products
    # All tokens are one batch; of it an expert gets half.
    found = case.products.items()
    assert sum(2 * math.prod(size) * number for (_, *size), number in found) == products
    assert case.bytes == 4 * (2 * (attention + 4 * expert) + head)
    plain, ours = case.contenders
    assert plain.run(examples) == {}
    assert set(ours.run(examples)) == {
        f"model.layers.{k}.mlp.experts.{leaf}"
        for k in (0, 1)
        for leaf in ("gate_up_proj", "down_proj")
    }
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert model.config._experts_implementation == own


def test_more_experts_cannot_be_chosen_than_there_are(benchmark, capsys):
    assert benchmark("mixture", "--experts", "4", "--chosen", "5") == 2
    assert "chosen must be at most the 4 experts, got 5" in capsys.readouterr().err
