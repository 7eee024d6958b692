"""patch_checkpoint: the same bytes as editing the model and saving it, and nothing half-done."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tracemalloc

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from tiny_experts import experts_model

import fastdean
from fastdean.files import safetensors as safetensors_files
from fastdean.masks import MaskEntry, NeuronMask, checkpoint, patch_plan, patched_copy
from fastdean.models.experts import fused_tensors

PLACES = {
    "llama": ["model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.q_proj.weight"],
    "gpt2": ["transformer.h.0.mlp.c_fc.weight", "transformer.h.1.attn.c_attn.weight"],
}
# The first and the last element, neighbours, and single ones.
INDEX = [0, 7, 8, 9, 500, -1]


def mask_of(model, names, index=INDEX, **options):
    entries = {}
    for name in names:
        weight = model.get_parameter(name).detach()
        places = torch.tensor(sorted(i % weight.numel() for i in index))
        entries[name] = MaskEntry(places, weight.reshape(-1)[places].clone(), tuple(weight.shape))
    return NeuronMask(entries, **options)


def tensor_mask(tensors, **options):
    """A mask on index 1 of every given tensor."""
    place = torch.tensor([1])
    return NeuronMask(
        {
            name: MaskEntry(place, tensor.reshape(-1)[place].clone(), tuple(tensor.shape))
            for name, tensor in tensors.items()
        },
        **options,
    )


def contents(folder):
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.fixture
def simple(tmp_path):
    """A folder with two plain tensors, the tensors, and a mask on the first."""
    folder = tmp_path / "source"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(4, 6, generator=generator) for name in ("h.0.weight", "wte")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text("{}")
    return folder, tensors, tensor_mask({"h.0.weight": tensors["h.0.weight"]})


def refuse(source, mask, out, text, error=ValueError, **options):
    """Expect an error; nothing may appear beside, and the source stays as it was."""
    before = contents(source) if source.is_dir() else None
    beside = sorted(out.parent.iterdir())
    with pytest.raises(error, match=text) as caught:
        fastdean.patch_checkpoint(source, mask, out, **options)
    assert sorted(out.parent.iterdir()) == beside
    assert (contents(source) if source.is_dir() else None) == before
    return str(caught.value)


@pytest.mark.parametrize("shard_size", ["1GB", "20KB"], ids=["one_file", "sharded"])
@pytest.mark.parametrize("scale", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", PLACES)
def test_equals_editing_the_model_and_saving_it(tmp_path, family, dtype, scale, shard_size):
    model = tiny_models.MODELS[family]().to(dtype)
    source, out, expected = tmp_path / "source", tmp_path / "out", tmp_path / "expected"
    model.save_pretrained(source, max_shard_size=shard_size)
    (source / "extra").mkdir()
    (source / "extra" / "note.txt").write_text("kept")
    before = contents(source)
    mask = mask_of(model, PLACES[family], scale=scale, manifest={"rule": "paper"})

    result = fastdean.patch_checkpoint(source, mask, out)

    with mask.applied(model):
        model.save_pretrained(expected, max_shard_size=shard_size)
    assert contents(source) == before
    found = contents(out)
    manifest = json.loads(found.pop("fastdean_patch.json"))
    assert found.pop("extra/note.txt") == b"kept"
    assert found == contents(expected)
    assert ("model.safetensors.index.json" in found) == (shard_size == "20KB")

    shards = {name for name in found if found[name] != before[name]}
    assert set(result.files_edited) == shards
    assert result.out == out
    assert result.values_edited == len(mask) == 12
    assert result.renamed == {}
    assert result.unpatched_files == ()
    assert manifest["source"] == "source"
    assert manifest["mask"] == {"weights": 12, "scale": scale, "manifest": {"rule": "paper"}}
    assert manifest["values_edited"] == sum(manifest["files"].values()) == 12
    assert set(manifest["files"]) == shards
    assert str(tmp_path) not in json.dumps(manifest)


def test_patched_folder_loads_as_the_edited_model(tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_models.llama()
    model.save_pretrained(tmp_path / "source")
    mask = mask_of(model, PLACES["llama"])
    fastdean.patch_checkpoint(tmp_path / "source", mask, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(3, 13)[None]
    with torch.no_grad(), mask.applied(model):
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    mask.restore_(loaded)
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_every_dtype(tmp_path, dtype, scale):
    source = tmp_path / "source"
    source.mkdir()
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    save_file({"odd": torch.zeros(3, dtype=torch.uint8), "w": weight}, source / "model.safetensors")
    fastdean.patch_checkpoint(source, tensor_mask({"w": weight}, scale=scale), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = weight.clone()
    expected[0, 1] = (weight[0, 1].to(wide) * torch.tensor(scale, dtype=wide)).to(dtype)
    assert torch.equal(found["w"], expected)
    assert found["odd"].tolist() == [0, 0, 0]


def test_mask_made_in_a_wider_dtype_than_the_file(tmp_path):
    model = tiny_models.llama().bfloat16()
    model.save_pretrained(tmp_path / "source")
    narrow = mask_of(model, PLACES["llama"], scale=0.3)
    wide = mask_of(model.float(), PLACES["llama"], scale=0.3)
    fastdean.patch_checkpoint(tmp_path / "source", narrow, tmp_path / "narrow")
    fastdean.patch_checkpoint(tmp_path / "source", wide, tmp_path / "wide")
    one, two = contents(tmp_path / "narrow"), contents(tmp_path / "wide")
    assert one["model.safetensors"] == two["model.safetensors"]


def test_a_mask_of_the_wide_model_fits_its_rounded_copy(tmp_path):
    model = tiny_models.llama()
    mask = mask_of(model, PLACES["llama"], scale=0.3)
    model.bfloat16().save_pretrained(tmp_path / "source")
    fastdean.patch_checkpoint(tmp_path / "source", mask, tmp_path / "patched")
    mask.apply_(model)
    model.save_pretrained(tmp_path / "saved")
    one, two = contents(tmp_path / "patched"), contents(tmp_path / "saved")
    assert one["model.safetensors"] == two["model.safetensors"]


def test_mask_made_in_a_narrower_dtype_holds_other_values(tmp_path, simple):
    source, tensors, _ = simple
    mask = tensor_mask({"h.0.weight": tensors["h.0.weight"].half()})
    refuse(source, mask, tmp_path / "out", "another model or already patched")


@pytest.mark.parametrize(
    ("in_mask", "in_file"),
    [
        ("transformer.h.0.weight", "h.0.weight"),
        ("h.0.weight", "transformer.h.0.weight"),
        ("model.language_model.h.0.weight", "h.0.weight"),
    ],
)
def test_base_model_prefix_may_differ(tmp_path, in_mask, in_file):
    source = tmp_path / "source"
    source.mkdir()
    weight = torch.randn(4, 6)
    tensors = {in_file: weight, "transformer.h.1.weight": weight + 1, "other": weight + 2}
    save_file(tensors, source / "model.safetensors")
    mask = tensor_mask({in_mask: weight})
    result = fastdean.patch_checkpoint(source, mask, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert result.renamed == {in_mask: in_file}
    assert found.pop(in_file)[0, 1] == 0
    for name, tensor in found.items():
        assert torch.equal(tensor, tensors[name])


def test_layer_numbers_are_no_prefix(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    weight = torch.randn(4, 6)
    save_file({"h.1.mlp.weight": weight}, source / "model.safetensors")
    mask = tensor_mask({"mlp.weight": weight})
    refuse(source, mask, tmp_path / "out", "'mlp.weight' .no tensor of that name")


def test_ambiguous_name_is_refused_and_copies_are_all_edited(tmp_path):
    weight = torch.randn(4, 6)
    mask = tensor_mask({"h.0.weight": weight})
    for folder, other in (("differ", weight + 1), ("copies", weight.clone())):
        (tmp_path / folder).mkdir()
        tensors = {"encoder.h.0.weight": weight, "decoder.h.0.weight": other}
        save_file(tensors, tmp_path / folder / "model.safetensors")
    refuse(
        tmp_path / "differ", mask, tmp_path / "out", "not unique: 'decoder.h.0.weight' or 'encoder"
    )
    result = fastdean.patch_checkpoint(tmp_path / "copies", mask, tmp_path / "out")
    assert result.values_edited == 2
    for tensor in load_file(tmp_path / "out" / "model.safetensors").values():
        assert tensor.flatten()[:3].count_nonzero() == 2


def test_two_names_of_the_mask_cannot_mean_one_tensor(tmp_path, simple):
    source, tensors, _ = simple
    weight = tensors["h.0.weight"]
    mask = tensor_mask({"encoder.h.0.weight": weight, "decoder.h.0.weight": weight})
    refuse(source, mask, tmp_path / "out", "'encoder.h.0.weight' of the mask means the same tensor")


def test_names_that_cannot_be_mapped_are_listed_with_reasons(tmp_path, simple):
    source, tensors, _ = simple
    weight = tensors["h.0.weight"]
    renamed = {f"experts.{i}.weight": weight for i in range(4)}
    mask = tensor_mask({"h.0.weight": weight, "wte": weight[:2], **renamed})
    text = refuse(source, mask, tmp_path / "out", "got 5 of 6 that .* does not have")
    assert "'wte' (shape [2, 6] in the mask, [4, 6] in the file)" in text
    assert "'experts.1.weight' (no tensor of that name: renamed or fused in the file)" in text
    assert "experts.2" not in text
    assert "and 2 more" in text


# One parameter holds all experts of a layer; on disk each has tensors of its own, or not.
@pytest.mark.parametrize("shard_size", ["1GB", "20KB"], ids=["one_file", "sharded"])
@pytest.mark.parametrize("family", ["Mixtral", "Qwen2Moe", "DeepseekV3", "GptOss", "Llama4Text"])
def test_fused_experts_are_edited_where_they_lie_apart(tmp_path, family, shard_size):
    model = experts_model(family)
    names = [n for n, p in model.named_parameters() if p.dim() == 3]
    size = model.get_parameter(names[0])[0].numel()
    mask = mask_of(model, names, [0, 7, 8, size // 2 - 1, size // 2, size - 1, size, -1])
    source = tmp_path / "source"
    model.save_pretrained(source, max_shard_size=shard_size)
    apart = not any(name in checkpoint.stored_tensors(source) for name in names)
    assert apart == (family not in ("GptOss", "Llama4Text"))
    result = fastdean.patch_checkpoint(source, mask, tmp_path / "patched")
    assert result.values_edited == len(mask)
    if apart:
        stored_name = result.renamed[names[0]]
        assert ".experts.*." in stored_name and " and " in stored_name
    mask.apply_(model)
    model.save_pretrained(tmp_path / "saved", max_shard_size=shard_size)
    checkpoint.verify_checkpoint(tmp_path / "saved", mask)
    checkpoint.verify_checkpoint(tmp_path / "patched", mask)
    saved, patched = contents(tmp_path / "saved"), contents(tmp_path / "patched")
    assert saved == {name: patched[name] for name in saved}
    with pytest.raises(RuntimeError, match="must hold the masked values of"):
        checkpoint.verify_checkpoint(source, mask)
    refuse(tmp_path / "patched", mask, tmp_path / "again", "or already patched")


def test_experts_that_no_rule_finds_are_refused_by_name(tmp_path, monkeypatch):
    model = experts_model("Mixtral")
    model.save_pretrained(tmp_path / "source")
    mask = mask_of(model, ["model.layers.0.mlp.experts.gate_up_proj"])
    made = fused_tensors.FusedTensor(reason="made by Interleave of the file's tensors")
    monkeypatch.setattr(patch_plan, "fused_tensors", lambda *_: dict.fromkeys(mask.names, made))
    text = r"'model.layers.0.mlp.experts.gate_up_proj' \(made by Interleave"
    refuse(tmp_path / "source", mask, tmp_path / "out", text)


def test_another_model_of_the_same_shapes(tmp_path):
    tiny_models.llama(seed=1).save_pretrained(tmp_path / "source")
    mask = mask_of(tiny_models.llama(seed=0), PLACES["llama"])
    refuse(tmp_path / "source", mask, tmp_path / "out", "which holds other values .* of 6 places")


def test_patched_folder_is_not_patched_again_by_the_same_mask(tmp_path, simple):
    source, tensors, mask = simple
    fastdean.patch_checkpoint(source, mask, tmp_path / "one")
    refuse(tmp_path / "one", mask, tmp_path / "two", "another model or already patched")
    other = tensor_mask({"wte": tensors["wte"]})
    fastdean.patch_checkpoint(tmp_path / "one", other, tmp_path / "two")
    manifest = json.loads((tmp_path / "two" / "fastdean_patch.json").read_text())
    assert manifest["earlier"]["files"] == {"model.safetensors": 1}
    assert manifest["earlier"]["earlier"] is None


def test_quantised_tensor_is_named(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    save_file({"w": torch.ones(4, 6, dtype=torch.int8)}, source / "model.safetensors")
    mask = tensor_mask({"w": torch.ones(4, 6)})
    refuse(source, mask, tmp_path / "out", "hold 'w' as one of .*, got I8 .quantised.")


def test_scale_that_overflows_the_file(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    weight = torch.full((4, 6), 1000.0)
    save_file({"w": weight.half()}, source / "model.safetensors")
    mask = tensor_mask({"w": weight}, scale=1000)
    refuse(source, mask, tmp_path / "out", "got scale 1000 for 'w' stored as F16")


@pytest.mark.parametrize("where", ["same", "inside", "around"])
def test_out_must_be_outside_of_the_source(simple, where):
    source, _, mask = simple
    out = {"same": source, "inside": source / "deep" / "out", "around": source.parent}[where]
    before = contents(source)
    with pytest.raises(ValueError, match="out must be a folder outside of source"):
        fastdean.patch_checkpoint(source, mask, out, overwrite=True)
    assert contents(source) == before
    assert not (source / "deep").exists()


def test_out_in_use(tmp_path, simple):
    source, _, mask = simple
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    refuse(source, mask, out, "out must be a new or empty folder, got .*pass overwrite=True .--ov")
    refuse(source, mask, out, "overwrite=True .--overwrite. to replace it", overwrite=True)
    assert (out / "mine.txt").read_text() == "mine"


def test_overwrite_replaces_an_earlier_patch(tmp_path, simple):
    source, _, mask = simple
    fastdean.patch_checkpoint(source, mask, tmp_path / "out")
    (tmp_path / "out" / "config.json").unlink()
    fastdean.patch_checkpoint(source, mask.with_scale(0.5), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "config.json").is_file()
    manifest = json.loads((tmp_path / "out" / "fastdean_patch.json").read_text())
    assert manifest["mask"]["scale"] == 0.5


@pytest.mark.parametrize("mine", ["notes.txt", "adapter/adapter_model.safetensors", "empty/"])
def test_overwrite_never_removes_what_a_user_put_there(tmp_path, simple, mine):
    source, _, mask = simple
    out = tmp_path / "out"
    fastdean.patch_checkpoint(source, mask, out)
    if mine.endswith("/"):
        (out / mine).mkdir()
    else:
        (out / mine).parent.mkdir(exist_ok=True)
        (out / mine).write_text("mine")
    refuse(source, mask, out, "holds nothing else, for overwrite=True", overwrite=True)
    assert (out / mine).exists()


def test_source_that_is_no_checkpoint(tmp_path, simple):
    _, _, mask = simple
    refuse(tmp_path / "none", mask, tmp_path / "out", "source must be a local folder")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", mask, tmp_path / "out", r"source must hold \*.safetensors, got none")
    (tmp_path / "empty" / "pytorch_model.bin").write_bytes(b"pickle")
    refuse(tmp_path / "empty", mask, tmp_path / "out", "only .*bin files .*`fastdean apply`")


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-1],
        lambda raw: raw[:40],
        lambda raw: raw[:4],
        lambda raw: b"",
        lambda raw: raw + b"x",
        lambda raw: b"\xff" * 8 + raw[8:],
        lambda raw: raw[:8] + b"[" + raw[9:],
        lambda raw: raw.replace(b"[4,6]", b"[4,7]"),
    ],
    ids=["end", "header", "length", "empty", "longer", "foreign", "no_json", "sizes"],
)
def test_damaged_file_is_named(tmp_path, simple, damage):
    source, _, mask = simple
    file = source / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    text = "model.safetensors' must be a whole safetensors file, got .*; copy or write it again"
    refuse(source, mask, tmp_path / "out", text)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [10**400]},
        {"shape": [2**62, 2**62]},
        {"shape": [True]},
        {"shape": [-1]},
        {"dtype": []},
        {"data_offsets": [0]},
        {"data_offsets": [0, 10**30]},
    ],
    ids=str,
)
def test_a_header_that_claims_what_cannot_be_is_refused(tmp_path, simple, change):
    source, _, mask = simple
    file = source / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header[next(name for name in header if name != "__metadata__")].update(change)
    edited = json.dumps(header).encode()
    file.write_bytes(len(edited).to_bytes(8, "little") + edited + raw[8 + length :])
    refuse(source, mask, tmp_path / "out", "must be a whole safetensors file")


def test_index_that_cannot_be_followed(tmp_path, simple):
    source, _, mask = simple
    (source / "model.safetensors").rename(source / "shard.safetensors")
    index = source / "model.safetensors.index.json"
    for text, expected in [
        ('{"weight_map": {"h.0.weight": "gone.safetensors"}}', "hold 'gone.safetensors', got no s"),
        ('{"weight_map": {"h.0.weight": "../x.safetensors"}}', "files of its own folder"),
        ("{}", "index.json' must hold the field weight_map, got no such field; copy it again"),
        ("[]", "index.json' must hold an object, got "),
        ('{"weight_map": {"h.0.weight": []}}', "weight_map.'h.0.weight'. as a text, got "),
        ("[" * 100_000, "index.json' must hold JSON, got something else"),
    ]:
        index.write_text(text)
        refuse(source, mask, tmp_path / "out", expected)


@pytest.fixture
def doubled(tmp_path):
    """A folder with one whole file and, beside it, the shards of another model; the whole one's."""
    model, folder = tiny_models.llama(), tmp_path / "source"
    tiny_models.llama(seed=1).save_pretrained(folder, max_shard_size="20KB")
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return model, folder, mask_of(model, PLACES["llama"])


def test_where_one_file_and_shards_exist_the_one_that_is_loaded_is_edited(tmp_path, doubled):
    from transformers import AutoModelForCausalLM

    model, source, mask = doubled
    result = fastdean.patch_checkpoint(source, mask, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    mask.restore_(loaded)
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
    assert result.files_edited == ("model.safetensors",)
    shards = sorted(file.name for file in source.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert list(result.unpatched_files) == shards


def test_a_saved_model_is_verified_in_the_file_that_is_loaded(tmp_path, doubled):
    model, source, mask = doubled
    with pytest.raises(RuntimeError, match="got others in 'model.safetensors'"):
        checkpoint.verify_checkpoint(source, mask)
    mask.apply_(model)
    save_file(model.state_dict(), source / "model.safetensors", metadata={"format": "pt"})
    checkpoint.verify_checkpoint(source, mask)
    (source / "model.safetensors").unlink()
    with pytest.raises(RuntimeError, match="got others in 'model-000"):
        checkpoint.verify_checkpoint(source, mask)


def test_weights_of_another_name_are_found_through_the_configuration(tmp_path, simple):
    source, tensors, mask = simple
    save_file(tensors, source / "ours.safetensors")
    (source / "config.json").write_text('{"transformers_weights": "ours.safetensors"}')
    result = fastdean.patch_checkpoint(source, mask, tmp_path / "out")
    assert result.files_edited == ("ours.safetensors",)
    assert result.unpatched_files == ("model.safetensors",)
    (source / "deep").mkdir()
    (source / "ours.safetensors").rename(source / "deep" / "ours.safetensors")
    (source / "config.json").write_text('{"transformers_weights": "deep/ours.safetensors"}')
    refuse(source, mask, tmp_path / "two", "in its own folder .* got 'deep/ours.safetensors'")


def test_other_weight_files_are_reported(tmp_path, simple):
    source, _, mask = simple
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    (source / "original").mkdir()
    (source / "original" / "consolidated.00.pth").write_bytes(b"pickle")
    (source / ".git").mkdir()
    (source / ".git" / "objects").write_bytes(b"large")
    result = fastdean.patch_checkpoint(source, mask, tmp_path / "out")
    assert result.unpatched_files == ("original/consolidated.00.pth", "pytorch_model.bin")
    assert not (tmp_path / "out" / ".git").exists()


def test_links_of_the_cache_are_copied_and_never_written_through(tmp_path, simple):
    source, _, mask = simple
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b/snapshots/1"
    snapshot.mkdir(parents=True)
    source.rename(blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    before = contents(blobs)
    fastdean.patch_checkpoint(snapshot, mask, tmp_path / "out")
    assert contents(blobs) == before
    assert not (tmp_path / "out" / "model.safetensors").is_symlink()
    assert load_file(tmp_path / "out" / "model.safetensors")["h.0.weight"][0, 1] == 0


def test_linked_folders_are_copied_with_what_is_in_them(tmp_path, simple):
    source, _, mask = simple
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "inner").mkdir(parents=True)
    (elsewhere / "inner" / "tokenizer.json").write_text("{}")
    (source / "extra").symlink_to(elsewhere)
    (source / "again").symlink_to(elsewhere)
    fastdean.patch_checkpoint(source, mask, tmp_path / "out", follow_links=True)
    for name in ("extra", "again"):
        assert (tmp_path / "out" / name / "inner" / "tokenizer.json").read_text() == "{}"
        assert not (tmp_path / "out" / name).is_symlink()


@pytest.mark.parametrize("where", [".", "..", "../beside"], ids=["itself", "above", "out"])
def test_a_link_that_leads_in_a_circle_is_named(tmp_path, simple, where):
    source, _, mask = simple
    beside = tmp_path / "beside"
    beside.mkdir()
    (source / "link").symlink_to(where)
    out = beside / "out"
    text = "source must hold no link to a folder that it is copied from"
    text = refuse(source, mask, out, text, follow_links=True)
    assert "link" in text and "remove the link" in text


def test_a_link_to_itself_is_named(tmp_path, simple):
    source, _, mask = simple
    (source / "link").symlink_to("link")
    refuse(source, mask, tmp_path / "out", "no link that leads back to itself, got .*/link'")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pipe"])
def test_a_pipe_is_refused_before_anything_waits_for_it(tmp_path, simple, name):
    source, _, mask = simple
    (source / name).unlink(missing_ok=True)
    os.mkfifo(source / name)
    with pytest.raises(ValueError, match=f"files and folders only, got .*/{name}', a device, pipe"):
        fastdean.patch_checkpoint(source, mask, tmp_path / "out")


def test_every_file_is_read_twice_and_listed(tmp_path, simple, monkeypatch):
    source, _, mask = simple
    (source / "inner").mkdir()
    (source / "inner" / "notes.txt").write_text("notes")
    monkeypatch.setattr(checkpoint.storage, "listed", None)
    out = fastdean.patch_checkpoint(source, mask, tmp_path / "out").out
    manifest = json.loads((out / "fastdean_patch.json").read_text())
    files = {name: raw for name, raw in contents(out).items() if name != "fastdean_patch.json"}
    assert manifest["sha256"] == {
        name: hashlib.sha256(raw).hexdigest() for name, raw in sorted(files.items())
    }


def test_nothing_private_is_open_to_others_while_it_is_copied(tmp_path, simple, monkeypatch):
    source, _, mask = simple
    (source / "model.safetensors").chmod(0o600)
    seen, real = [], patched_copy._copy_file

    def copy_file(file, target, patch):
        seen.append(target.parent.stat().st_mode & 0o077)
        real(file, target, patch)

    monkeypatch.setattr(patched_copy, "_copy_file", copy_file)
    fastdean.patch_checkpoint(source, mask, tmp_path / "out")
    assert set(seen) == {0}


@pytest.mark.parametrize("inside", ["", "inner/"], ids=["file", "folder"])
def test_a_link_that_leads_out_is_not_published(tmp_path, simple, inside):
    source, _, mask = simple
    secret = tmp_path / "home" / inside / "secret"
    secret.parent.mkdir(parents=True)
    secret.write_text("mine")
    (source / "notes").symlink_to(secret if not inside else secret.parent)
    text = refuse(source, mask, tmp_path / "out", "no link that leads out of it, got .*notes")
    assert "--follow-links" in text
    fastdean.patch_checkpoint(source, mask, tmp_path / "out", follow_links=True)
    assert (tmp_path / "out" / "notes" / ("secret" if inside else "")).read_text() == "mine"


def test_what_is_no_file_is_refused_however_it_is_reached(tmp_path, simple):
    source, _, mask = simple
    (source / "link").symlink_to("/dev/zero")
    for follow_links in (False, True):
        with pytest.raises(ValueError, match="files and folders only, got .*link.* a device"):
            fastdean.patch_checkpoint(source, mask, tmp_path / "out", follow_links=follow_links)
    (source / "link").unlink()
    os.mkfifo(source / "pipe")
    with pytest.raises(ValueError, match="files and folders only, got .*pipe"):
        fastdean.patch_checkpoint(source, mask, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_modes_are_those_of_the_source(tmp_path, simple, mode):
    source, _, mask = simple
    (source / "model.safetensors").chmod(mode)
    fastdean.patch_checkpoint(source, mask, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()],
    ids=["disk_full", "interrupt"],
)
def test_interrupted_copy_leaves_nothing(tmp_path, simple, monkeypatch, error):
    source, _, mask = simple
    real, copied = patched_copy._copy_file, []

    def copy_file(file, target, patch):
        if copied:
            raise error
        copied.append(real(file, target, patch))

    monkeypatch.setattr(patched_copy, "_copy_file", copy_file)
    refuse(source, mask, tmp_path / "out", None, error=type(error))
    assert len(copied) == 1


def test_a_disk_that_fails_behind_the_copy_leaves_nothing(tmp_path, simple, monkeypatch):
    source, _, mask = simple

    def fsync(handle):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    refuse(source, mask, tmp_path / "out", "Input/output error", error=OSError)


def test_a_file_is_flushed_after_its_values_were_written(tmp_path, simple, monkeypatch):
    source, _, mask = simple
    seen, real = [], os.fsync

    def fsync(handle):
        if os.fstat(handle).st_size == (source / "model.safetensors").stat().st_size:
            seen.append(os.pread(handle, 10_000, 0))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    fastdean.patch_checkpoint(source, mask, tmp_path / "out")
    assert set(seen) == {(tmp_path / "out" / "model.safetensors").read_bytes()}


@pytest.fixture
def after_copying(monkeypatch):
    """Have `act(source file, its copy)` called each time a file has been copied."""

    def install(act):
        real = patched_copy._copy_file

        def copy_file(file, target, patch):
            real(file, target, patch)
            act(file, target)

        monkeypatch.setattr(patched_copy, "_copy_file", copy_file)

    return install


def flip(file, at):
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    file.write_bytes(raw)


def test_write_that_did_not_arrive_is_found(tmp_path, simple, after_copying):
    source, _, mask = simple
    after_copying(lambda file, target: shutil.copyfile(file, target))
    text = "could not be verified after writing: it differs from the edited source"
    refuse(source, mask, tmp_path / "out", text, error=RuntimeError)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_copy_of_another_length_is_found(tmp_path, simple, after_copying, change):
    source, _, mask = simple
    after_copying(lambda file, target: os.truncate(target, target.stat().st_size + change))
    text = "could not be verified after writing"
    refuse(source, mask, tmp_path / "out", text, error=RuntimeError)


@pytest.mark.parametrize(
    ("name", "at"), [("model.safetensors", 3), ("model.safetensors", -1), ("tokenizer.json", 0)]
)
def test_a_flipped_bit_anywhere_in_the_copy_is_found(
    tmp_path, simple, monkeypatch, after_copying, name, at
):
    source, _, mask = simple
    (source / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(patched_copy, "_BLOCK_BYTES", 64)
    after_copying(lambda file, target: flip(target, at) if file.name == name else None)
    refuse(source, mask, tmp_path / "out", "could not be verified", error=RuntimeError)


def test_a_source_that_changes_while_it_is_copied_is_found(tmp_path, simple, after_copying):
    source, _, mask = simple
    after_copying(lambda file, target: flip(file, -1))
    with pytest.raises(RuntimeError, match="that nothing changes the source"):
        fastdean.patch_checkpoint(source, mask, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["masked value", "length"])
def test_a_source_that_changes_before_it_is_copied_is_found(tmp_path, simple, monkeypatch, change):
    source, _, mask = simple
    real = checkpoint.copy_patched

    def copy_patched(*arguments):
        file = source / "model.safetensors"
        tensor = safetensors_files.stored_tensors(source)["h.0.weight"]
        if change == "length":
            os.truncate(file, tensor.offset + 5)
        else:
            flip(file, tensor.offset + 4)
        return real(*arguments)

    monkeypatch.setattr(checkpoint, "copy_patched", copy_patched)
    with pytest.raises(RuntimeError, match="model.safetensors changed while it was copied; try ag"):
        fastdean.patch_checkpoint(source, mask, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("block_bytes", [1, 3, 64, 1 << 18])
def test_masked_values_may_lie_across_blocks(tmp_path, simple, monkeypatch, block_bytes):
    source, tensors, _ = simple
    mask = tensor_mask(tensors, scale=0.5)
    monkeypatch.setattr(patched_copy, "_BLOCK_BYTES", block_bytes)
    fastdean.patch_checkpoint(source, mask, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in tensors.items():
        expected = tensor.clone()
        expected[0, 1] *= 0.5
        assert torch.equal(found[name], expected)


def test_only_the_masked_values_are_held(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    weight = torch.randn(1 << 21, generator=torch.Generator().manual_seed(0))
    save_file({"w": weight}, source / "model.safetensors")
    index = torch.tensor([1, 2, 3, 1 << 20, (1 << 21) - 1])
    mask = NeuronMask({"w": MaskEntry(index, weight[index].clone(), (1 << 21,))})

    class Counting:
        """Stands before a file and counts what is read through it."""

        def __init__(self, file):
            self.file = file
            self.seek = file.seek

        def read(self, size):
            moved.append(size)
            return self.file.read(size)

    moved: list[int] = []
    read_values = patch_plan.read_values
    monkeypatch.setattr(
        patch_plan, "read_values", lambda file, *rest: read_values(Counting(file), *rest)
    )
    tracemalloc.start()
    fastdean.patch_checkpoint(source, mask, tmp_path / "out")
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 2_000_000 < weight.nbytes
    # The comparison with the originals: three neighbours in one go.
    assert sorted(moved) == [4, 4, 12]


def test_dense_mask_is_read_in_pieces(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    weight = torch.randn(10, 10, generator=torch.Generator().manual_seed(0))
    save_file({"w": weight}, source / "model.safetensors")
    mask = NeuronMask({"w": MaskEntry(torch.arange(5, 95), weight.flatten()[5:95], (10, 10))})
    monkeypatch.setattr(safetensors_files, "_MAX_RUN_BYTES", 64)
    fastdean.patch_checkpoint(source, mask, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")["w"].flatten()
    assert found[5:95].count_nonzero() == 0
    assert torch.equal(found[:5], weight.flatten()[:5])
    assert torch.equal(found[95:], weight.flatten()[95:])


def test_empty_mask_copies(tmp_path, simple):
    source, _, _ = simple
    result = fastdean.patch_checkpoint(source, NeuronMask({}), tmp_path / "out")
    assert result.values_edited == 0
    assert result.files_edited == ()


def saved(folder, tensors):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("scale", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PLACES)
def test_a_saved_model_holds_the_masked_values_in_the_dtype_of_its_file(
    tmp_path, name, dtype, scale
):
    model = tiny_models.MODELS[name]()
    mask = mask_of(model, PLACES[name], scale=scale)
    mask.apply_(model)
    model.to(dtype).save_pretrained(tmp_path / "model")
    checkpoint.verify_checkpoint(tmp_path / "model", mask)


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_a_saved_name_may_have_another_prefix(tmp_path, prefix):
    mask = tensor_mask({"model.h.0.weight": torch.randn(4, 6)})
    folder = saved(tmp_path / "out", {f"{prefix}h.0.weight": torch.zeros(4, 6)})
    checkpoint.verify_checkpoint(folder, mask)


@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_one_value_that_is_not_masked_in_the_files_is_found(tmp_path, scale):
    model = tiny_models.llama()
    mask = mask_of(model, PLACES["llama"], scale=scale)
    mask.apply_(model)
    weight = model.get_parameter(PLACES["llama"][1]).data.view(-1)
    weight[500] += 1e-3
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(
        RuntimeError, match=f"must hold the masked values of {PLACES['llama'][1]!r}, got others in"
    ):
        checkpoint.verify_checkpoint(tmp_path / "model", mask)


@pytest.mark.parametrize(
    "tensors",
    [
        {"other.weight": torch.zeros(4, 6)},
        {"h.0.weight": torch.zeros(6, 4)},
        {"h.0.weight": torch.zeros(4, 6, dtype=torch.int8)},
    ],
    ids=["renamed", "transposed", "quantised"],
)
def test_a_masked_parameter_that_is_not_in_the_files_is_named(tmp_path, tensors):
    mask = tensor_mask({"h.0.weight": torch.randn(4, 6)})
    folder = saved(tmp_path / "out", tensors)
    with pytest.raises(
        RuntimeError, match=r"must hold 'h.0.weight' of shape \[4, 6\], got no such"
    ):
        checkpoint.verify_checkpoint(folder, mask)
