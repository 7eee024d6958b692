"""`Scores`: sums of runs, sparse forms, files, fingerprints and manifests."""

from __future__ import annotations

import json
import logging
from importlib import metadata

import pytest
import torch
from oracle import norm_error, top_k
from resigned import resign
from tiny_data import batches, make_examples
from tiny_models import INTERMEDIATE, gpt2, llama

import fastdean
from fastdean.coupling.results.score_entry import ScoreEntry, fingerprint
from fastdean.coupling.results.scores import Scores
from fastdean.ops import reference

EXAMPLES = make_examples()
UP = "model.layers.0.mlp.up_proj.weight"


def score(model, examples=EXAMPLES, **options):
    return fastdean.score(model, batches(examples, 2), progress=False, **options)


@pytest.fixture(scope="module")
def model():
    return llama()


@pytest.fixture(scope="module")
def dense(model):
    return score(model)


@pytest.fixture(scope="module")
def units(model):
    return score(model, granularity="unit")


# Adding.


@pytest.mark.parametrize("granularity", ["weight", "unit"])
def test_the_sum_of_two_runs_is_the_score_of_all_their_examples(model, granularity):
    first, second = EXAMPLES[:2], EXAMPLES[2:]
    joined = score(model, first, granularity=granularity) + score(
        model, second, granularity=granularity
    )
    whole = score(model, granularity=granularity)
    assert joined.num_examples == whole.num_examples == len(EXAMPLES)
    for name in whole:
        assert norm_error(joined[name], whole[name]) < 1e-6
    data, expected = joined.manifest["data"], whole.manifest["data"]
    assert {key: data[key] for key in expected} == expected
    assert len(joined.manifest["joined_from"]) == 2
    assert len((joined + whole).manifest["joined_from"]) == 3


def test_sparse_scores_are_not_added(dense):
    for pair in ((dense, dense.keep(0.1)), (dense.keep(0.1), dense)):
        with pytest.raises(ValueError, match="scores must be dense to be added, got .* keep_top;"):
            pair[0] + pair[1]


def test_scores_of_other_things_are_not_added(model, dense, units):
    with pytest.raises(ValueError, match="must share one granularity, got 'weight' and 'unit'; "):
        dense + units
    with pytest.raises(ValueError, match="must cover the same matrices, got 8 in only one of them"):
        dense + score(model, target_modules="all")
    with pytest.raises(ValueError, match="must belong to the same weights, got different values"):
        dense + score(llama(seed=1))
    said = r"must be of one model, got two that differ in dtype \('float32' and 'bfloat16'\); score"
    with pytest.raises(ValueError, match=said):
        dense + score(llama().bfloat16())
    with pytest.raises(TypeError):
        dense + 1


# Sparse scores.


@pytest.mark.parametrize("granularity, ratio", [("weight", 0.01), ("weight", 1.0), ("unit", 0.1)])
def test_keep_top_keeps_the_dense_top_k(model, granularity, ratio):
    whole = score(model, granularity=granularity)
    sparse = score(model, granularity=granularity, keep_top=ratio)
    assert sparse.is_sparse and sparse.keep_top == sparse.manifest["keep_top"] == ratio
    kept = whole.keep(ratio)
    for name, value in whole.items():
        expected = top_k(value, int(ratio * value.numel()))
        assert sparse.index(name).tolist() == kept.index(name).tolist() == expected
        assert torch.equal(sparse[name], value.flatten()[expected])
        assert torch.equal(sparse[name], kept[name])
        assert sparse.select(name, 3).tolist() == whole.select(name, 3).tolist()


def test_keeping_less_of_sparse_scores_is_keeping_less_of_the_dense_ones(dense):
    twice, once = dense.keep(0.1).keep(0.02), dense.keep(0.02)
    for name in dense:
        assert torch.equal(twice.index(name), once.index(name))
        assert torch.equal(twice[name], once[name])
    with pytest.raises(
        ValueError, match="must be at most the 0.02 that these scores kept, got 0.1"
    ):
        once.keep(0.1)


@pytest.mark.parametrize("ratio", [0, -0.1, 1.01, float("nan")])
def test_ratios_out_of_range_are_refused(dense, ratio):
    with pytest.raises(ValueError, match="keep_top must be a ratio above 0 and at most 1, got"):
        dense.keep(ratio)


def test_selecting_more_than_was_kept_is_refused(dense):
    with pytest.raises(ValueError, match=f"keep_top=0.01 kept of {UP}, got k=21 of 2048; score"):
        dense.keep(0.01).select(UP, 21)


def test_a_score_that_is_not_finite_names_its_matrix():
    entry = ScoreEntry.of(torch.tensor([[1.0, float("nan")]]), torch.ones(1, 2))
    scores = Scores({"a.weight": entry}, granularity="weight", num_examples=1)
    for call in (lambda: scores.select("a.weight", 1), lambda: scores.keep(0.5)):
        with pytest.raises(
            ValueError, match="scores of a.weight: importance must be finite, got nan"
        ):
            call()


# The weights the scores belong to.


def test_dense_scores_share_the_models_memory_and_refuse_to_be_read_once_it_changed():
    model = llama()
    scores, sparse = score(model), score(model, keep_top=0.1)
    weight = model.get_parameter(UP)
    assert scores.entries[UP].weight.data_ptr() == weight.data_ptr()
    before, kept = scores[UP], sparse[UP]
    with torch.no_grad():
        saved = weight[3, 4].item()
        weight[3, 4] = 0
        for read in (
            lambda: scores[UP],
            lambda: scores.select(UP, 3),
            lambda: scores.keep(0.1),
            scores.require_unchanged_weights,
        ):
            with pytest.raises(
                RuntimeError, match=f"{UP} has changed since it was scored; restore"
            ):
                read()
        assert torch.equal(sparse[UP], kept)
        weight[3, 4] = saved
    assert torch.equal(scores[UP], before)


def test_units_are_read_whatever_became_of_the_weight_but_not_coupled(tmp_path):
    model = llama()
    scores = score(model, granularity="unit")
    name = next(iter(scores))
    value = scores[name]
    with torch.no_grad():
        model.get_parameter(name)[:, 5] = 0
    assert torch.equal(scores[name], value)
    with pytest.raises(RuntimeError, match="has changed since it was scored"):
        scores.require_unchanged_weights()
    with pytest.raises(RuntimeError, match="has changed since it was scored"):
        scores.save_pretrained(tmp_path / "units")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_fingerprints_see_every_bit_and_no_layout(dtype):
    weight = torch.randn(7, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    mark = fingerprint(weight)
    assert fingerprint(weight.t().contiguous().t()) == fingerprint(weight.clone()) == mark
    assert fingerprint(torch.nn.Parameter(weight)) == mark
    for position in (0, 31, 62):
        changed = weight.clone()
        bits = changed.flatten().view(
            {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        )
        bits[position] ^= 1
        assert fingerprint(changed) != mark


@pytest.mark.parametrize("shape", [(13,), (1, 13), (13, 1), (13, 5), (4, 3, 5), (0, 4), (4, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_fingerprints_are_the_sum_that_is_written_down(monkeypatch, dtype, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    bits = weight.view(integers).flatten().tolist()
    total = sum((2 * i + 1) * b for i, b in enumerate(bits))
    assert fingerprint(weight) == (total + 2**63) % 2**64 - 2**63
    monkeypatch.setenv("FASTDEAN_IMPL", "reference")
    for chunk in (1, 12, 1 << 17):
        monkeypatch.setattr(reference, "_CHUNK_ENTRIES", chunk)
        assert fingerprint(weight) == (total + 2**63) % 2**64 - 2**63


def test_sparse_entries_are_taken_from_any_layout():
    sums, weight = torch.rand(6, 5), torch.rand(6, 5)
    expected = ScoreEntry.of(sums, weight).keep(3, 7)
    found = ScoreEntry.of(sums.T.contiguous().T, weight.T.contiguous().T).keep(3, 7)
    for name in ("sums", "weight", "index"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fingerprints_see_where_values_lie(dtype):
    weight = torch.randn(7, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    mark = fingerprint(weight)
    for one, other in ((0, 1), (3, 62), (30, 31)):
        swapped = weight.clone()
        swapped.flatten()[[one, other]] = weight.flatten()[[other, one]]
        assert fingerprint(swapped) != mark
    assert fingerprint(weight[[1, 0, *range(2, 7)]]) != mark
    assert fingerprint(weight.t()) != mark


@pytest.mark.parametrize("shape", [(), (11,), (5, 7), (7, 5), (2, 3, 4), (0, 4)])
@pytest.mark.parametrize("chunk", [1, 14, 1 << 18])
def test_fingerprints_are_the_sum_they_say_whatever_the_chunks(shape, chunk, monkeypatch):
    monkeypatch.setattr(reference, "_CHUNK_ENTRIES", chunk)
    monkeypatch.setenv("FASTDEAN_IMPL", "reference")
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()
    bits = weight.flatten().view(torch.int64).tolist()
    total = sum((2 * i + 1) * value for i, value in enumerate(bits)) % 2**64
    assert fingerprint(weight) == (total if total < 2**63 else total - 2**64)


# Files.


@pytest.mark.parametrize("form", ["dense", "sparse", "units", "sparse units", "joined"])
def test_files_give_back_equal_bits(form, dense, units, tmp_path):
    scores = {
        "dense": dense,
        "sparse": dense.keep(0.05),
        "units": units,
        "sparse units": units.keep(0.2),
        "joined": dense + dense,
    }[form]
    scores.save_pretrained(tmp_path / "scores")
    again = Scores.from_pretrained(tmp_path / "scores")
    assert repr(again) == repr(scores) and list(again) == list(scores)
    assert (again.num_examples, again.keep_top) == (scores.num_examples, scores.keep_top)
    assert again.manifest == scores.manifest
    for name in scores:
        assert torch.equal(again[name], scores[name])
        assert again.select(name, 2).tolist() == scores.select(name, 2).tolist()
        if scores.is_sparse:
            assert torch.equal(again.index(name), scores.index(name))
    again.require_same_weights(scores)
    again.require_unchanged_weights()


def test_files_of_transposed_half_precision_weights(tmp_path):
    scores = score(gpt2().bfloat16())
    scores.save_pretrained(tmp_path / "scores")
    again = Scores.from_pretrained(tmp_path / "scores")
    for name in scores:
        assert again.entries[name].weight.dtype == torch.bfloat16
        assert torch.equal(again[name], scores[name])


def test_scores_from_files_couple_with_scores_from_memory(dense, tmp_path):
    dense.save_pretrained(tmp_path / "scores")
    again = Scores.from_pretrained(tmp_path / "scores")
    assert fastdean.couple(dense, again, ratio=0.01) == fastdean.couple(dense, dense, ratio=0.01)


@pytest.mark.parametrize("part", ["sums", "weight_values", "index"])
def test_a_file_without_one_of_its_tensors_is_refused(part, dense, tmp_path):
    from safetensors.torch import load_file, save_file

    dense.keep(0.05).save_pretrained(tmp_path / "scores")
    file = tmp_path / "scores" / "scores.safetensors"
    tensors = load_file(file)
    del tensors[f"{UP}.{part}"]
    save_file(tensors, file)
    resign(tmp_path / "scores")
    with pytest.raises(
        ValueError, match=f"must hold '{UP}.{part}' as a tensor, got no such tensor; save it again"
    ):
        Scores.from_pretrained(tmp_path / "scores")


def _change_config(change):
    def edit(folder):
        file = folder / "fastdean_config.json"
        config = json.loads(file.read_text("utf-8"))
        change(config)
        file.write_text(json.dumps(config), "utf-8")
        resign(folder)

    return edit


def _change_tensors(change):
    def edit(folder):
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "scores.safetensors")
        change(tensors)
        save_file(tensors, folder / "scores.safetensors")
        resign(folder)

    return edit


def _set(key, value):
    return _change_config(lambda config: config.__setitem__(key, value))


def _set_entry(key, value):
    return _change_config(lambda config: config["entries"][UP].__setitem__(key, value))


def _index(change):
    def edit(tensors):
        tensors[f"{UP}.index"] = change(tensors[f"{UP}.index"])

    return _change_tensors(edit)


def _cast(part, dtype):
    def edit(tensors):
        tensors[f"{UP}.{part}"] = tensors[f"{UP}.{part}"].to(dtype)

    return _change_tensors(edit)


def _cut(part):
    def edit(tensors):
        tensors[f"{UP}.{part}"] = tensors[f"{UP}.{part}"][:-1].clone()

    return _change_tensors(edit)


def _fill(part, value):
    def edit(tensors):
        tensors[f"{UP}.{part}"][-1] = value

    return _change_tensors(edit)


def _at(place, value):
    def change(index):
        index[place] = value
        return index

    return change


@pytest.mark.parametrize(
    "edit, text",
    [
        (_change_config(lambda c: c.pop("entries")), "the field entries, got no such field"),
        (_set("entries", [UP]), f"entries as an object, got ['{UP}']"),
        (_set("granularity", "row"), "granularity as 'weight' or 'unit' or 'neuron', got 'row'"),
        (_set("num_examples", 0), "num_examples as a whole number of at least 1, got 0"),
        (_set("num_examples", True), "num_examples as a whole number of at least 1, got True"),
        (_set("num_examples", "8"), "num_examples as a whole number of at least 1, got '8'"),
        (_set("num_examples", 2.5), "num_examples as a whole number of at least 1, got 2.5"),
        (_set("num_examples", 10**400), "num_examples as a whole number of at least 1, got 1000"),
        (_set("keep_top", 7), "keep_top as null or a finite number above 0 and at most 1, got 7"),
        (_set("keep_top", float("nan")), "JSON, got something else ('NaN' is no finite number)"),
        (_set("manifest", None), "manifest as an object, got None"),
        (_set("manifest", {"a": float("inf")}), "JSON, got something else ('Infinity' is"),
        (
            _change_config(lambda c: c["entries"][UP].pop("shape")),
            f"the field entries['{UP}'].shape, got no such field",
        ),
        (
            _set_entry("shape", [64, -32]),
            f"entries['{UP}'].shape[1] as a whole number of at least 1, got -32",
        ),
        (_set_entry("shape", "64"), f"entries['{UP}'].shape as a list, got '64'"),
        (_set_entry("unit_axis", 1), f"entries['{UP}'].unit_axis as null, got 1"),
        (
            _set_entry("fingerprint", 2**63),
            f"entries['{UP}'].fingerprint as a whole number of at least -922",
        ),
        (_set_entry("fingerprint", "a"), f"entries['{UP}'].fingerprint as a whole number of at"),
        (_set_entry("shape", [8, 4]), f"'{UP}.index' as places within 0..31, got "),
        (_index(lambda i: i.flip(0)), f"'{UP}.index' as places in ascending order without repe"),
        (
            _index(lambda i: i[:1].repeat(len(i))),
            f"'{UP}.index' as places in ascending order without repetition, got",
        ),
        (_index(_at(0, -1)), f"'{UP}.index' as places within 0..2047, got -1"),
        (_index(_at(-1, 2048)), f"'{UP}.index' as places within 0..2047, got 2048"),
        (_index(lambda i: i.int()), f"'{UP}.index' as torch.int64 [M], got torch.int32 [102]"),
        (_index(lambda i: i.view(2, -1)), f"'{UP}.index' as torch.int64 [M], got torch.int64 [2, "),
        (_cut("sums"), f"'{UP}.sums' as torch.float32 [102], got torch.float32 [101]"),
        (_cut("weight_values"), f"'{UP}.weight_values' as torch.float32 or torch.bfloat16 or"),
        (_cast("sums", torch.float64), f"'{UP}.sums' as torch.float32 [102], got torch.float64"),
        (_fill("sums", float("nan")), f"'{UP}.sums' as finite numbers, got nan in it"),
        (_fill("sums", float("inf")), f"'{UP}.sums' as finite numbers, got inf in it"),
        (_fill("sums", -1.0), f"'{UP}.sums' as numbers of at least 0, got -1 in it"),
        (_cast("weight_values", torch.int32), f"'{UP}.weight_values' as torch.float32 or torch.bf"),
        (
            _change_config(lambda c: c["entries"].pop(UP)),
            f"'{UP}.index' as a part of the scores, got another",
        ),
    ],
)
def test_a_folder_that_contradicts_itself_is_refused_in_one_line(edit, text, dense, tmp_path):
    folder = tmp_path / "scores"
    dense.keep(0.05).save_pretrained(folder)
    edit(folder)
    with pytest.raises(ValueError) as caught:
        Scores.from_pretrained(folder)
    said = str(caught.value)
    assert said.startswith(f"'{folder}") and f"' must hold {text}" in said
    assert said.endswith(("; save it again", "; write or copy it again")) and "\n" not in said


def test_a_folder_of_dense_scores_must_hold_whole_matrices(dense, units, tmp_path):
    dense.save_pretrained(tmp_path / "dense")
    _cut("weight_values")(tmp_path / "dense")
    with pytest.raises(
        ValueError, match=r"weight_values' as .*float64 \[64, 32\], got .*float32 \[63, 32\]; save"
    ):
        Scores.from_pretrained(tmp_path / "dense")
    units.save_pretrained(tmp_path / "units")
    name = next(iter(units))
    _change_config(lambda c: c["entries"][name].update(unit_axis=None))(tmp_path / "units")
    with pytest.raises(ValueError, match=r"unit_axis as a whole number from 0 to 1, got None"):
        Scores.from_pretrained(tmp_path / "units")
    _change_config(lambda c: c["entries"][name].update(unit_axis=0))(tmp_path / "units")
    with pytest.raises(ValueError, match=r"sums' as torch.float32 \[32\], got .* \[64\]; save"):
        Scores.from_pretrained(tmp_path / "units")


# What is said about them.


def test_repr(dense, units):
    assert repr(dense) == "Scores(6 matrices, 12,288 weights, n=6 examples, dense)"
    assert repr(units.keep(0.25)) == (
        f"Scores(2 matrices, {2 * INTERMEDIATE} units, n=6 examples, top 0.25 of each matrix)"
    )


def test_scores_are_a_read_only_mapping(dense):
    assert len(dense) == 6 and UP in dense and "nothing" not in dense
    assert dense[UP].dtype == torch.float32 and dense.index(UP) is None
    with pytest.raises(KeyError):
        dense["nothing"]
    with pytest.raises(TypeError):
        dense[UP] = torch.zeros(1)


def test_a_mean_needs_examples():
    with pytest.raises(ValueError, match="num_examples must be at least 1, got 0; give"):
        Scores({}, granularity="weight", num_examples=0)


def test_manifest(model, dense):
    manifest = dense.manifest
    json.dumps(manifest)
    assert manifest["data"] | {"sha256": ""} == {
        "examples": 6,
        "tokens": sum(len(ids) for ids, _ in EXAMPLES),
        "target_tokens": sum(int((labels[1:] != -100).sum()) for _, labels in EXAMPLES),
        "sha256": "",
        "rendered": {"tokens": 6},
    }
    assert manifest["model"] == {
        "name": "LlamaForCausalLM",
        "class": "LlamaForCausalLM",
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": "float32",
    }
    assert (manifest["granularity"], manifest["target_modules"]) == ("weight", "mlp")
    covered = manifest["coverage"]
    assert covered["targets"] == covered["matched"] == covered["scored"] == 6
    assert 0 < covered["share"] < covered["share_of_matched"] == 1
    assert manifest["versions"]["torch"] == metadata.version("torch")
    assert "keep_top" not in manifest
    assert manifest["batching"]["packed"] is True
    assert (manifest["accumulation"], manifest["ranks"]) == ("float32", 1)


@pytest.mark.parametrize(
    "written, told",
    [
        ("{folder}", "my-model"),
        ("{folder}/", "my-model"),
        ("{folder}/gone/since", "since"),
        ("owner/name", "owner/name"),
        ("gpt2", "gpt2"),
        (None, "LlamaForCausalLM"),
    ],
)
def test_the_manifest_names_the_model_and_not_the_users_folders(written, told, tmp_path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    model = llama()
    model.config._name_or_path = written and written.format(folder=folder)
    manifest = score(model, EXAMPLES[:2], target_modules=["down_proj"]).manifest
    assert manifest["model"]["name"] == told
    assert str(tmp_path) not in json.dumps(manifest)


def test_a_folder_given_by_a_relative_path_is_told_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "here" / "my-model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for written, told in (("here/my-model", "my-model"), (".", tmp_path.name)):
        model = llama()
        model.config._name_or_path = written
        manifest = score(model, EXAMPLES[:2], target_modules=["down_proj"]).manifest
        assert manifest["model"]["name"] == told


def test_the_digest_is_of_the_examples_not_of_their_order_or_padding(model):
    def digest(examples, size, side="right"):
        loader = batches(examples, size, side)
        scores = fastdean.score(model, loader, progress=False, target_modules=["down_proj"])
        return scores.manifest["data"]["sha256"]

    expected = digest(EXAMPLES, 2)
    assert len(expected) == 64
    assert digest(EXAMPLES[::-1], 3, "left") == expected
    assert digest(EXAMPLES[:-1], 2) != expected
    ids, labels = EXAMPLES[0]
    relabelled = [(ids, ids.clone()), *EXAMPLES[1:]]
    assert digest(relabelled, 2) != expected
    assert digest([EXAMPLES[0], *EXAMPLES], 2) != expected


def test_scoring_says_its_order_and_its_memory_and_nothing_else(caplog, capsys, model):
    with caplog.at_level(logging.INFO, logger="fastdean"):
        score(model)
    order, memory = [record.getMessage() for record in caplog.records]
    assert memory.startswith("score: at most ")
    assert order.startswith("order='batches': ") and capsys.readouterr().out == ""


def test_scores_of_units_under_their_earlier_word_are_read(units, tmp_path):
    folder = tmp_path / "scores"
    units.save_pretrained(folder)
    file = folder / "fastdean_config.json"
    file.write_text(file.read_text().replace('"granularity": "unit"', '"granularity": "neuron"'))
    resign(folder)
    assert '"neuron"' in file.read_text()
    assert Scores.from_pretrained(folder).granularity == "unit"
