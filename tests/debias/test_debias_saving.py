"""A debiased model's folder and the card in it."""

from __future__ import annotations

import json

import pytest
import tiny_folders
import tiny_models
import torch

from fastdean.debias import METHODS, Effect, model_card, save_model
from fastdean.debias import saving as saving_module

CARD = {"base_model": "org/base", "method": "bec", "strength": 100.0, "data": "embedded:debias"}


def card(**options):
    return model_card("org/fair", **{**CARD, **options})


@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_the_folder_loads_as_any_other(tmp_path, name):
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        PreTrainedTokenizerFast,
    )

    model = tiny_models.MODELS[name]()
    out = save_model(
        tmp_path / "out", model, tiny_folders.tokenizer(), card=card(), manifest={"method": "bec"}
    )
    auto = AutoModelForMaskedLM if name in tiny_models.MASKED_MODELS else AutoModelForCausalLM
    loaded = auto.from_pretrained(out, dtype=torch.float32)
    for parameter, other in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(parameter, other)
    assert PreTrainedTokenizerFast.from_pretrained(out)("w1 w2")["input_ids"] == [6, 7]
    assert (out / "README.md").read_text() == card()
    manifest = json.loads((out / "fastdean_debias.json").read_text())
    assert manifest["method"] == "bec" and {"created", "versions"} <= manifest.keys()


def test_only_its_own_output_is_replaced(tmp_path):
    model, tokenizer = tiny_models.llama(), tiny_folders.tokenizer()
    save_model(tmp_path / "out", model, tokenizer, card="first")
    with pytest.raises(ValueError, match="must be a new or empty folder"):
        save_model(tmp_path / "out", model, tokenizer, card="second")
    save_model(tmp_path / "out", model, tokenizer, card="second", overwrite=True)
    assert (tmp_path / "out" / "README.md").read_text() == "second"
    tiny_folders.save_model(tmp_path / "other")
    with pytest.raises(ValueError, match="must be a folder that FastDEAN wrote"):
        save_model(tmp_path / "other", model, tokenizer, card="", overwrite=True)


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    model = tiny_models.llama()
    monkeypatch.setattr(saving_module, "write_json_atomic", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_model(tmp_path / "parent" / "out", model, tiny_folders.tokenizer(), card="")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_does_not_hold_the_trained_weights_is_not_written(tmp_path, monkeypatch):
    model, other = tiny_models.llama(), tiny_models.llama(seed=1)
    monkeypatch.setattr(model, "save_pretrained", other.save_pretrained)
    with pytest.raises(RuntimeError, match="saved model must hold the trained '.*', got other val"):
        save_model(tmp_path / "out", model, tiny_folders.tokenizer(), card="")
    assert list(tmp_path.iterdir()) == []


def test_the_card_says_what_was_done_and_warns():
    text = card(command="fastdean debias --method bec")
    head, body = text.split("---\n")[1:]
    assert 'base_model: "org/base"\n' in head and "- debiasing\n" in head
    for part in (
        "# org/fair",
        "BEC",
        "strength 100",
        "`embedded:debias`",
        "```bash\nfastdean debias --method bec\n```",
        "**Content warning.**",
        "None was measured.",
    ):
        assert part in body


@pytest.mark.parametrize("base_model", ["./models/base", "/models/base", "base", "a/b/c"])
def test_a_local_path_is_no_base_model_of_the_hub(base_model):
    text = card(base_model=base_model)
    assert "base_model:" not in text and f"`{base_model}`" in text


def test_no_effect_is_claimed_within_noise():
    effects = [
        Effect("SS, %", 60.0, 55.0, -7.0, -3.0, "lower"),
        Effect("SS 2, %", 40.0, 35.0, -7.0, -3.0, "lower", "farther from neutral"),
        Effect("LM, %", 90.0, 89.5, -1.5, 0.5, "lower"),
        Effect("ICAT", 70.0, 75.0, 1.0, 9.0, "no verdict from an interval without a test"),
        Effect("perplexity", 10.0, 11.0, 0.5, 1.5),
        Effect("cosine", 0.5, 0.25),
        Effect("WEAT", 0.5, 0.2, -0.5, -0.1, "lower", p_adjusted=0.06),
        Effect("text", 20.0, 18.0, 0.85, 0.95, "lower", p_adjusted=0.02, no_effect=1.0),
        Effect("text 2", 20.0, 20.1, 0.95, 1.05, "higher", p_adjusted=0.02, no_effect=1.0),
    ]
    rows = [line for line in card(effects=effects).splitlines() if line.startswith("| ")][1:]
    assert rows == [
        "| SS, % | 60 | 55 | -7 to -3 | - | lower |",
        "| SS 2, % | 40 | 35 | -7 to -3 | - | lower; farther from neutral |",
        "| LM, % | 90 | 89.5 | -1.5 to +0.5 | - | no effect beyond noise |",
        "| ICAT | 70 | 75 | +1 to +9 | - | no verdict from an interval without a test |",
        "| perplexity | 10 | 11 | +0.5 to +1.5 | - | not judged |",
        "| cosine | 0.5 | 0.25 | - | - | no verdict without an interval |",
        "| WEAT | 0.5 | 0.2 | -0.5 to -0.1 | 0.06 | no effect beyond noise |",
        "| text | 20 | 18 | ratio 0.85 to 0.95 | 0.02 | lower |",
        "| text 2 | 20 | 20.1 | ratio 0.95 to 1.05 | 0.02 | no effect beyond noise |",
    ]


def test_every_method_has_a_line_and_no_other():
    assert all(model_card("x", **{**CARD, "method": method}) for method in METHODS)
    with pytest.raises(ValueError, match="one of causal, bec.*, got 'dpo'; pass what"):
        card(method="dpo")


def test_without_a_regulariser_none_is_named():
    assert "**Collapse regulariser**: none\n" in card(strength=None)
