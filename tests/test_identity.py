"""What tells one model from another, and what does not."""

from __future__ import annotations

import subprocess
import sys

import pytest
import tiny_folders
import tiny_models
import torch

from fastdean.identity import json_digest, model_identity


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


def _chat(model, tokenizer):
    tokenizer.chat_template = "{{ messages[0].content }}"


@pytest.mark.parametrize(
    "change, named",
    [
        (_head, "model weights"),
        (_dtype, "model weights"),
        (_attention, "attention implementation"),
        (_special, "tokenizer"),
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


def test_a_set_has_one_digest_in_every_process():
    code = "from fastdean.identity import json_digest; print(json_digest({'a': {'x', 'y', 'z'}}))"
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed},
        ).stdout.strip()
        for seed in ("1", "2", "3")
    }
    assert said == {json_digest({"a": {"x", "y", "z"}})}
