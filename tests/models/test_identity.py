"""What tells one model from another, and what does not."""

from __future__ import annotations

import json

import pytest
import tiny_folders
import tiny_models
import torch

from fastdean.models.identity import json_digest, model_files_digest, model_identity
from fastdean.models.loading import load_model


def identity(change=lambda model, tokenizer: None):
    model, tokenizer = tiny_models.llama(), tiny_folders.tokenizer()
    change(model, tokenizer)
    return model_identity(model, tokenizer)


def _head(model, tokenizer):
    with torch.no_grad():
        model.lm_head.weight[3, 3] += 1e-3


def _dtype(model, tokenizer):
    model.to(torch.bfloat16)


def _attention(model, tokenizer):
    model.set_attn_implementation("eager")


def _special(model, tokenizer):
    tokenizer.eos_token = "w3"


def _split(model, tokenizer):
    tokenizer.split_special_tokens = True


def _chat(model, tokenizer):
    tokenizer.chat_template = "{{ messages[0].content }}"


@pytest.mark.parametrize(
    "change, named",
    [
        (_head, "model weights"),
        (_dtype, "model weights"),
        (_attention, "attention implementation"),
        (_special, "tokenizer"),
        (_split, "tokenizer"),
        (_chat, "chat template"),
    ],
)
def test_what_changes_figures_changes_one_part_by_name(change, named):
    before, after = identity(), identity(change)
    assert (
        named
        in {part for part in before if before[part] != after[part]}
        <= {
            named,
            "model configuration",
        }
    )


def _used(model, tokenizer):
    tokenizer(["w0 w1"], padding=True, truncation=True, max_length=1)
    model(torch.tensor([[5, 6]]))


def _moved(model, tokenizer):
    model.config._name_or_path = "elsewhere"
    model.generation_config.temperature = 0.3


@pytest.mark.parametrize("change", [_used, _moved])
def test_use_and_place_are_no_part_of_it(change):
    assert identity(change) == identity()


def test_merges_of_a_tokenizer_in_python_are_part_of_it(tmp_path):
    from transformers import CTRLTokenizer

    def digest(merges):
        vocabulary = tmp_path / "vocab.json"
        vocabulary.write_text(json.dumps({"a": 0, "b</w>": 1, "ab</w>": 2, "<unk>": 3, "a@@": 4}))
        (tmp_path / "merges.txt").write_text(f"#version\n{merges}\n")
        tokenizer = CTRLTokenizer(str(vocabulary), str(tmp_path / "merges.txt"))
        return model_identity(tiny_models.llama(), tokenizer)["tokenizer"]

    assert digest("a b</w>") == digest("a b</w>") != digest("b a</w>")


def _with_code_of_a_tokenizer(folder, rule):
    """A saved model whose tokenizer is its own Python code, in two files."""
    tiny_folders.save_model(folder)
    (folder / "rule_own.py").write_text(f"def changed(text):\n    return {rule}\n")
    (folder / "tokenizer_own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n"
        "from .rule_own import changed\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n"
        "    def __call__(self, text, **options):\n"
        "        return super().__call__(changed(text), **options)\n"
    )
    options = json.loads((folder / "tokenizer_config.json").read_text())
    options |= {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenizer_own.OwnTokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    return folder


def test_the_code_of_a_tokenizer_is_part_of_it_with_what_it_imports(tmp_path):
    def digest(name, rule):
        folder = _with_code_of_a_tokenizer(tmp_path / name, rule)
        return model_identity(*load_model(str(folder), trust_remote_code=True))["model code"]

    first = digest("first", "text")
    assert digest("second", "text") == first != digest("third", "text + text")


def test_a_set_has_one_digest_in_whatever_order_a_process_has_it():
    class InOrder(set):
        def __iter__(self):
            return iter(sorted(set.copy(self)))

    class Backwards(set):
        def __iter__(self):
            return iter(sorted(set.copy(self), reverse=True))

    one, other = InOrder("xyz"), Backwards("xyz")
    assert list(one) == list(other)[::-1]
    expected = json_digest({"a": ["x", "y", "z"]})
    assert json_digest({"a": one}) == json_digest({"a": other}) == expected


def test_a_local_models_files_tell_it_from_another_of_its_name(tmp_path):
    def folder(name, **files):
        place = tmp_path / name / "model"
        place.mkdir(parents=True)
        for file, content in {"config": "{}", **files}.items():
            (place / f"{file}.json").write_text(content)
        return place

    first, copy, other = folder("a"), folder("b"), folder("c", config="{ }")
    (copy / "README.md").write_text("about it")
    digests = [model_files_digest(str(place)) for place in (first, copy, other)]
    assert digests[0] == digests[1] != digests[2]
    assert model_files_digest(str(first / "config.json")) != digests[0]
    assert model_files_digest("someone/a-model") is None
