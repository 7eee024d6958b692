"""What README.md shows is what the package does: its Python runs, its commands parse.

A Python block in the README stands below a line `<!-- tested -->` and runs here, in order, in one
namespace, on a tiny model with a tokenizer of its own. `SMALLER` names what the tiny model needs
instead of the README's values.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from pathlib import Path

import pytest
import torch
import typer
from tiny_models import VOCAB, llama

import fastdean
from fastdean.cli import app
from fastdean.data.examples import encode
from fastdean.data.sources import PRESETS, load_rows

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TESTED = re.compile(r"^<!-- tested -->\n```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SMALLER = {
    '"smollm2-135m-instruct"': '"tiny"',
    "ratio=5e-7": "ratio=2e-2",
    "ratio=1e-5": "ratio=2e-2",
    "ratios=[1e-5, 1e-4]": "ratios=[1e-2, 1e-1]",
    "1e-3": "1e-1",
    '"embedded:{name}"), 32': '"embedded:{name}"), 12',
    "examples=32": "examples=8",
    "permutations=200": "permutations=20",
    "[:32]": "[:8]",
    'tokenizer, "gender")': 'tokenizer, {"one": ["the", "of"], "two": ["and", "is"]})',
    'max_steps": 2': 'max_steps": 1',
}


def fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """Words of every `fastdean` call in the README's shell blocks, without the program's name."""
    found = []
    for line in "\n".join(fenced("bash")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "fastdean" in words:
            found.append(words[words.index("fastdean") + 1 :])
    return found


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """(model, tokenizer), also saved as the folder `tiny` of the current directory."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    monkeypatch.chdir(tmp_path)
    texts = [row["response"] for row in load_rows("embedded:general")]
    frequent = Counter(word for text in texts for word in text.split()).most_common(VOCAB - 3)
    words = ["<pad>", "<unk>", "</s>", *(word for word, _ in frequent)]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
    )
    model = llama()
    model.save_pretrained("tiny")
    tokenizer.save_pretrained("tiny")
    return model, tokenizer


def test_every_python_block_is_tested_and_every_substitution_is_needed():
    blocks = TESTED.findall(README)
    assert blocks == fenced("python")
    for original in SMALLER:
        assert any(original in block for block in blocks), original
    shown = "".join(blocks)
    missing = [
        name for name in fastdean.__all__ if name[0] != "_" and f"fastdean.{name}" not in shown
    ]
    assert missing == []


def test_python_blocks_run_and_both_ways_give_the_same_importance(tiny):
    model, tokenizer = tiny
    rows = {
        topic: load_rows(f"embedded:{topic}")[:8] for topic in ("fairness", "privacy", "general")
    }
    fairness = encode(rows["fairness"], tokenizer)
    names = {
        "model": model,
        "tokenizer": tokenizer,
        "examples": [{"input_ids": e.input_ids[None], "labels": e.labels[None]} for e in fairness],
        **{f"{topic}_rows": some for topic, some in rows.items()},
    }
    blocks = TESTED.findall(README)
    for number, block in enumerate(blocks):
        for original, smaller in SMALLER.items():
            block = block.replace(original, smaller)
        exec(compile(block, f"README.md, Python block {number}", "exec"), names)
        if number == 1:
            _assert_the_same(names["importance"], names["fair"])

    weights = names["model"].state_dict()
    patched = _stored(Path("model-masked"))
    changed = sum(int((patched[name] != weights[name]).sum()) for name in weights)
    assert changed == len(names["mask"]) > 0
    assert names["kept"].keys() == names["fair"].keys()
    assert names["both"].num_examples == 24
    assert len(names["curve"]) == 2 and len(names["by_layer"]) == 2
    assert 0 < names["last"].p_value <= 1


def _assert_the_same(importance: dict[str, torch.Tensor], scores: fastdean.Scores) -> None:
    assert set(importance) == set(scores)
    for name, sparse in scores.items():
        expected = importance[name].detach().flatten()[scores.index(name)]
        torch.testing.assert_close(sparse, expected, rtol=1e-4, atol=0)


def _stored(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words[:3]))
def test_shell_commands_are_accepted_as_written(words):
    name, *arguments = words
    group = typer.main.get_command(app)
    assert name in group.commands
    # Parsing refuses unknown options, missing ones and values of another type; nothing is run.
    context = group.commands[name].make_context(name, arguments)
    assert context.args == []


def test_every_command_is_shown_and_every_one_named_exists():
    named = set(re.findall(r"`fastdean ([a-z]+)", README)) | {words[0] for words in commands()}
    assert named == set(typer.main.get_command(app).commands)


def test_options_named_in_the_text_exist():
    group = typer.main.get_command(app)
    known = {o for c in group.commands.values() for p in c.params for o in p.opts}
    named = set(re.findall(r"`(--[a-z-]+)`", README))
    assert named and named <= known


def test_sources_are_those_the_package_knows():
    listed = {name for name in PRESETS if f"`{name}`" in README}
    assert listed == {name for name in PRESETS if not name.endswith(":unsafe")}


def test_links_to_files_lead_somewhere():
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert targets
    for target in targets:
        assert (ROOT / target).is_file(), target


def test_make_targets_exist():
    made = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(
        re.findall(
            r"\bmake ([a-z-]+)", "\n".join(re.findall(r"`[^`]+`", README)) + "".join(fenced("bash"))
        )
    )
    assert named and named <= made


def test_dispatch_table_is_the_one_shown():
    from fastdean.ops import _dispatch

    shown = {}
    for line in README.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 4 and (found := re.match(r"`(\w+_?)`", cells[0])):
            kinds = ("reference", "triton", "native")
            shown[found[1]] = {
                k for k, c in zip(kinds, cells[1:], strict=True) if c != "not in this version"
            }
    assert shown == {op: {entry.name for entry in rows} for op, rows in _dispatch._TABLE.items()}


def test_what_has_not_run_on_a_gpu_is_said_of_what_has_no_record():
    from fastdean.ops import checked

    passed = {each.op for each in checked.read() if each.impl == "native"}
    shown = re.findall(r"^\| `(\w+)`.*CUDA: compiled, not yet run on a GPU", README, re.MULTILINE)
    assert set(shown) == {op for op, impl in checked.SOURCES if impl == "native"} - passed
