"""`score("folder")`: the weights come from their files, one layer at a time."""

from __future__ import annotations

import gc
import hashlib
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from interrupts import interrupt, moments
from oracle import norm_error
from safetensors.torch import load_file, save_file
from test_by_layers import FAMILIES, SMALL, per_token_losses, stubs_left
from tiny_data import batches, make_examples
from tiny_tokenizers import byte_level

import fastdean
from fastdean.coupling import tried_sets
from fastdean.coupling.workloads.loss_scale import LossScale
from fastdean.files.safetensors import MappedFiles
from fastdean.models import loading
from fastdean.models.layers import replay, streaming
from fastdean.models.loading import load_or_stream, stream_model

# Tables of their own and tied ones, Conv1D, fused projections and experts, shared K and V, an
# encoder; each with its own names on disk.
STREAMED = ["qwen3", "gemma3n_text", "phi3", "gpt2", "gpt_neox", "mixtral", "gpt_oss", "roberta"]
OPTIONS = {"progress": False, "target_modules": "all", "keep_top": 0.05, "tokens_per_batch": 40}


def tiny(family="qwen3", **options):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    kind = AutoModelForMaskedLM if family == "roberta" else AutoModelForCausalLM
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SMALL | FAMILIES.get(family, {}) | options))
    return kind.from_config(config, dtype=torch.float32).eval()


@pytest.fixture
def checkpoint(tmp_path):
    """Writes a model in several files and returns the folder."""

    def write(model, name="model", **options):
        folder = tmp_path / name
        model.save_pretrained(folder, **({"max_shard_size": "60KB"} | options))
        return folder

    return write


def loader():
    return list(batches(make_examples(), 4))


def assert_same_scores(found, expected):
    assert list(found) == list(expected)
    for name in expected:
        assert torch.equal(found.index(name), expected.index(name))
        assert norm_error(found.entries[name].sums, expected.entries[name].sums) < 1e-6
        assert found.entries[name].fingerprint == expected.entries[name].fingerprint
    assert found.manifest["coverage"] == expected.manifest["coverage"]


def assert_nothing_in_memory(stream):
    assert {parameter.device.type for parameter in stream.model.parameters()} == {"meta"}
    assert not stubs_left(stream.model)
    assert len(stream.layers) == len(fastdean.models.layers.stacks.decoder_layers(stream.model))
    gc.collect()
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(stream._folder) not in maps.read_text()


@pytest.mark.parametrize("family", STREAMED)
def test_equals_the_model_in_memory(family, checkpoint, monkeypatch):
    model = tiny(family)
    folder = checkpoint(model)
    expected = fastdean.score(model, loader(), order="layers", **OPTIONS)
    read, real = Counter(), MappedFiles.view
    monkeypatch.setattr(
        MappedFiles, "view", lambda self, t: (read.update([t.name]), real(self, t))[1]
    )
    stream = stream_model(str(folder))
    assert not read
    found = fastdean.score(stream, loader(), **OPTIONS)
    assert_same_scores(found, expected)
    inside = {name for name in read if re.search(r"(layers|layer|h)\.\d+\.", name)}
    assert {read[name] for name in inside} == {2}
    # A table that is also the head: for the first window, and for the losses.
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    window = list(stream._windows.values())[-1]
    twice = {tensor.name for tensor in stream._tensors[window]} if tied else set()
    assert twice == {name for name in read.keys() - inside if read[name] != 1}
    assert {read[name] for name in twice} <= {2} and len(twice) <= 2
    assert found.manifest["order"]["by"] == "layers"
    size = sum(p.numel() * 4 for p in model.parameters())
    assert size < found.manifest["order"]["bytes_of_weights_read"] <= 2 * size
    assert_nothing_in_memory(stream)


def test_by_the_name_of_a_folder_with_its_tokenizer(checkpoint):
    tokenizer = byte_level()
    model = tiny(vocab_size=len(tokenizer))
    folder = checkpoint(model)
    tokenizer.save_pretrained(folder)
    rows = [{"prompt": "a b", "response": "c d e"}, {"prompt": "c", "response": "b a"}]
    found = fastdean.score(folder, rows, **OPTIONS)
    assert_same_scores(
        found, fastdean.score(model, rows, tokenizer=tokenizer, order="layers", **OPTIONS)
    )


@pytest.mark.parametrize("granularity", ["weight", "unit"])
def test_in_another_dtype_than_on_disk(granularity, checkpoint):
    from transformers import AutoModelForCausalLM

    folder = checkpoint(tiny().bfloat16())
    options = OPTIONS | {"granularity": granularity}
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        found = fastdean.score(stream_model(str(folder), dtype=dtype), loader(), **options)
        assert_same_scores(found, fastdean.score(model, loader(), order="layers", **options))
    assert stream_model(str(folder)).model.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_encoder_and_a_decoder_that_share_their_embedding(kind, checkpoint):
    import transformers

    torch.manual_seed(0)
    if kind == "t5":
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_heads": 2}
        model = transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=96, **sizes)
        )
    else:
        sizes = {
            f"{side}_{what}": number
            for side in ("encoder", "decoder")
            for what, number in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 32))
        }
        model = transformers.BartForConditionalGeneration(
            transformers.BartConfig(vocab_size=96, d_model=16, **sizes)
        )
    pairs = [
        {
            name: torch.arange(3 * width).view(3, width) % 90 + 3
            for name, width in (("input_ids", 6), ("decoder_input_ids", 5), ("labels", 5))
        }
    ]
    options = OPTIONS | {"loss_fn": per_token_losses, "tokens_per_batch": None}
    expected = fastdean.score(model.eval(), pairs, order="layers", **options)
    with pytest.MonkeyPatch.context() as patch:
        # A class that `stream_model` does not choose by itself.
        patch.setattr(loading, "_class_of", lambda config, own_code: _Auto(type(model)))
        stream = stream_model(str(checkpoint(model)))
    assert_same_scores(fastdean.score(stream, pairs, **options), expected)
    assert_nothing_in_memory(stream)


class _Auto:
    def __init__(self, kind):
        self._kind = kind

    def from_config(self, config, dtype, trust_remote_code):
        return self._kind._from_config(config, dtype=dtype)


def test_layers_of_one_kind_stand_for_the_others(checkpoint):
    kinds = ["full_attention"] + 2 * ["sliding_attention"] + ["full_attention"]
    model = tiny("gemma2", num_hidden_layers=4, layer_types=kinds, sliding_window=4)
    stream = stream_model(str(checkpoint(model)))
    with stream.outside_layers():
        with stream.beginning() as alike:
            assert list(alike.values()) == [f"model.layers.{i}" for i in (0, 1, 1, 0)]
            assert len(stream.model.model.layers) == 2
            in_memory = {p.device.type for p in stream.model.parameters()}
            assert in_memory == {"cpu"}
        assert len(stream.model.model.layers) == 4
    assert_nothing_in_memory(stream)


def in_each_window(stream, monkeypatch):
    """Of each layer that runs, which modules outside of the layers are in memory then."""
    found, run = [], replay.Replay.run

    def noted(self, k, arguments):
        here = {n for n, m in stream.on_demand.items() if not m.weight.is_meta}
        found.append((k, *sorted(here)))
        return run(self, k, arguments)

    monkeypatch.setattr(replay.Replay, "run", noted)
    return found


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_are_in_memory_where_they_run(tied, checkpoint, monkeypatch):
    from transformers import AutoModelForCausalLM

    folder = checkpoint(tiny(tie_word_embeddings=tied).bfloat16())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stream = stream_model(str(folder), dtype="fp32")
    found = in_each_window(stream, monkeypatch)
    expected = fastdean.score(model, loader(), order="layers", **OPTIONS)
    found.clear()
    assert_same_scores(fastdean.score(stream, loader(), **OPTIONS), expected)
    embedding, head = "model.embed_tokens", "lm_head"
    assert set(found) == {(0, head, embedding) if tied else (0, embedding), (0,), (1,), (2,)}
    assert_nothing_in_memory(stream)


def test_an_embedding_that_is_used_directly_stays_in_memory(checkpoint, monkeypatch):
    # MPT multiplies with it instead of calling its head.
    model = tiny()
    folder = checkpoint(model)
    forward = type(model.model).forward

    def looks(self, *args, **kwargs):
        result = forward(self, *args, **kwargs)
        return result if self.embed_tokens.weight.device.type == "cpu" else None

    monkeypatch.setattr(type(model.model), "forward", looks)
    stream = stream_model(str(folder))
    found = in_each_window(stream, monkeypatch)
    expected = fastdean.score(model, loader(), order="layers", **OPTIONS)
    found.clear()
    assert_same_scores(fastdean.score(stream, loader(), **OPTIONS), expected)
    assert all("model.embed_tokens" in names for names in found)
    assert_nothing_in_memory(stream)


def test_what_an_embedding_returned_is_changed_in_place(checkpoint, monkeypatch):
    model = tiny()
    folder = checkpoint(model)
    kind = type(model.model.layers[0])
    forward = kind.forward

    def doubles(self, hidden_states, *args, **kwargs):
        with torch.no_grad():
            hidden_states.mul_(2)
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", doubles)
    expected = fastdean.score(model, loader(), order="layers", **OPTIONS)
    assert_same_scores(fastdean.score(folder, loader(), **OPTIONS), expected)


def test_an_embedding_that_is_asked_for_other_rows_is_refused(checkpoint, monkeypatch):
    model = tiny()
    folder = checkpoint(model)
    forward, reach, times = type(model.model).forward, replay.Replay.reach, []

    def other_tokens(self, input_ids=None, **kwargs):
        return forward(self, input_ids=(input_ids + len(times)) % 96, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", other_tokens)
    # Not in the trial, which refuses it too.
    monkeypatch.setattr(replay.Replay, "reach", lambda *args: (times.append(1), reach(*args))[1])
    with pytest.raises(replay.NotByLayers, match="asked for the same rows whenever a batch is run"):
        fastdean.score(folder, loader(), **OPTIONS)


def test_what_takes_no_part_in_one_layer_is_left_out_of_all_of_its_kind(checkpoint):
    # Gemma 4's last layers have keys and values that nobody uses.
    model = tiny("gemma4_text")
    expected = fastdean.score(model, loader(), order="layers", **OPTIONS)
    found = fastdean.score(checkpoint(model), loader(), **OPTIONS)
    assert_same_scores(found, expected)
    left_out = found.manifest["coverage"]["left_out"]
    assert left_out.keys() == expected.manifest["coverage"]["left_out"].keys()
    assert all(name in reason for name, reason in left_out.items())


@pytest.mark.parametrize(
    "pattern",
    [
        r".*layers\.2\.mlp\.down_proj",
        # Of the layer that stands for the others, another module.
        r".*(layers\.0\.mlp\.up_proj|layers\.[12]\.mlp\.down_proj)",
    ],
)
def test_targets_in_layers_that_others_stand_for(pattern, checkpoint):
    model = tiny()
    options = OPTIONS | {"target_modules": pattern}
    found = fastdean.score(checkpoint(model), loader(), **options)
    assert_same_scores(found, fastdean.score(model, loader(), order="layers", **options))


def test_the_files_stay_as_they_are(checkpoint):
    folder = checkpoint(tiny())

    def content():
        return {f.name: hashlib.sha256(f.read_bytes()).digest() for f in folder.iterdir()}

    before = content()
    fastdean.score(folder, loader(), **OPTIONS)
    assert content() == before


def test_an_interrupt_at_any_line_leaves_nothing_in_memory(checkpoint, own_garbage):
    stream = stream_model(str(checkpoint(tiny(num_hidden_layers=2), max_shard_size="10MB")))
    few = list(batches(make_examples(lengths=(4,)), 1))

    def call():
        fastdean.score(stream, few, **(OPTIONS | {"target_modules": ".*up_proj"}))

    call()
    found = moments(call, {streaming.__file__})
    assert len(found) > 40
    for moment in found[::3]:
        interrupt(call, {streaming.__file__}, moment)
        assert_nothing_in_memory(stream)
    call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "batches"}, "order must be 'layers' or 'auto' for a streamed model"),
        ({"keep_top": None}, "keep_top must be given for a streamed model"),
    ],
)
def test_options_that_a_streamed_model_cannot_have(options, message, checkpoint):
    with pytest.raises(ValueError, match=message):
        fastdean.score(checkpoint(tiny()), loader(), **(OPTIONS | options))


def test_checkpoints_that_are_not_whole_are_refused(checkpoint):
    folder = checkpoint(tiny(), max_shard_size="10MB")
    file = folder / "model.safetensors"
    weights = load_file(file)
    save_file({n: t for n, t in weights.items() if "1.mlp.up_proj" not in n}, file)
    with pytest.raises(ValueError, match=r"without 1 .*, such as 'model.layers.1.mlp.up_proj"):
        fastdean.score(folder, loader(), **OPTIONS)
    save_file(weights, file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        fastdean.score(folder, loader(), **OPTIONS)


def test_weights_of_another_shape_are_refused(checkpoint):
    folder = checkpoint(tiny())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    with pytest.raises(ValueError, match=r"shapes in its config.json, got .*mlp.* for \["):
        stream_model(str(folder))


def test_what_cannot_be_streamed_is_refused_by_name_and_loaded_where_that_is_allowed(checkpoint):
    folder = checkpoint(tiny())
    config = json.loads((folder / "config.json").read_text())
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match="must be in safetensors files to be streamed"):
        stream_model(str(folder))
    quantised = {"quantization_config": {"quant_method": "fp8"}}
    (folder / "config.json").write_text(json.dumps(config | quantised))
    with pytest.raises(ValueError, match="must not be quantised to be streamed"):
        stream_model(str(folder))
    with pytest.raises(ValueError, match="must be one device for a streamed model"):
        stream_model(str(folder), device="auto")


@pytest.mark.parametrize(
    ("order", "free", "streamed"),
    [
        ("batches", 0, False),
        ("layers", 10**12, True),
        ("auto", 10**12, False),
        ("auto", 1000, True),
        ("auto", None, False),
    ],
)
def test_a_job_streams_what_does_not_fit(order, free, streamed, checkpoint, monkeypatch):
    folder = checkpoint(tiny())
    byte_level().save_pretrained(folder)
    monkeypatch.setattr(streaming, "available_memory", lambda device: free)
    model, tokenizer = load_or_stream(str(folder), order=order, progress=False)
    assert isinstance(model, streaming.StreamedModel) == streamed
    assert tokenizer is not None


def test_a_job_loads_what_cannot_be_streamed(checkpoint, monkeypatch):
    folder = checkpoint(tiny())
    byte_level().save_pretrained(folder)

    def refused(*args, **options):
        raise streaming.NotStreamableError("for a reason")

    monkeypatch.setattr(loading, "stream_model", refused)
    model, _ = load_or_stream(str(folder), order="layers", progress=False)
    assert isinstance(model, torch.nn.Module)


def assert_same_in_fp16(found, expected):
    """Where both selected; entries that are as good as equal may take each other's place."""
    assert list(found) == list(expected)
    for name, entry in expected.entries.items():
        ours, theirs = (torch.zeros(entry.shape).view(-1) for _ in range(2))
        ours[found.entries[name].index] = found.entries[name].sums
        theirs[entry.index] = entry.sums
        both = (ours > 0) & (theirs > 0)
        assert both.sum() >= 0.95 * len(entry.index)
        assert norm_error(ours[both], theirs[both]) < 4e-3, name


@pytest.mark.parametrize("family", ["qwen3", "mixtral"])
def test_in_float16(family, checkpoint):
    model = tiny(family).half()
    found = fastdean.score(checkpoint(model), loader(), **OPTIONS)
    expected = fastdean.score(model, loader(), order="layers", **OPTIONS)
    # It has another scale: what is too small for fp16 differs.
    assert_same_in_fp16(found, expected)


@pytest.mark.parametrize("exponent", [-20, 40])
def test_the_scale_in_float16_is_fitted_to_the_whole_model(exponent, checkpoint, monkeypatch):
    """The trial runs one layer, whose gradients may be far from those of the model."""
    model = tiny().half()
    expected = fastdean.score(model, loader(), order="layers", **OPTIONS)
    find = tried_sets.find_scorable
    off = LossScale(exponent)
    monkeypatch.setattr(tried_sets, "find_scorable", lambda *args: replace(find(*args), scale=off))
    found = fastdean.score(checkpoint(model), loader(), **OPTIONS)
    assert_same_in_fp16(found, expected)


def test_types_that_are_no_plain_numbers_are_a_reason_to_load(checkpoint):
    folder = checkpoint(tiny(), max_shard_size="10MB")
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"scale": torch.ones(4).to(torch.float8_e4m3fn)}, file)
    with pytest.raises(streaming.NotStreamableError, match="got F8_E4M3 in 'scale'; load it first"):
        stream_model(str(folder))


def test_a_folder_without_a_tokenizer(checkpoint):
    # transformers makes one of special tokens alone of the configuration.
    folder = checkpoint(tiny())
    assert stream_model(str(folder)).tokenizer is None
    with pytest.raises(ValueError, match="loader must .*pass tokenizer="):
        fastdean.score(folder, [{"prompt": "a b", "response": "c"}], **OPTIONS)
    for order in ("batches", "layers"):
        with pytest.raises(ValueError, match="model must come with its tokenizer, got .* without"):
            load_or_stream(str(folder), order=order, progress=False)


def test_a_name_that_is_empty_or_of_a_file(checkpoint, monkeypatch):
    folder = checkpoint(tiny(), max_shard_size="10MB")
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match="folder, hub id or .gguf file, got ''; name one"):
        fastdean.score("", loader(), **OPTIONS)
    with pytest.raises(ValueError, match="got the file 'model.safetensors'; pass the folder"):
        fastdean.score("model.safetensors", loader(), **OPTIONS)


def test_the_bytes_that_were_read_are_those_of_the_job(checkpoint):
    stream = stream_model(str(checkpoint(tiny())))
    first, second = (fastdean.score(stream, loader(), **OPTIONS) for _ in range(2))
    assert first.manifest["order"] == second.manifest["order"]
