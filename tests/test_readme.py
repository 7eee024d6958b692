"""What the README and the guide show is what the package does: Python runs, commands parse.

A Python block stands below a line `<!-- tested -->` and runs here, page after page in the site's
order, in one namespace, on a tiny model with a tokenizer of its own. `SMALLER` names what the tiny
model needs instead of the values that are shown.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
import typer
import yaml
from tiny_checkpoint import save_language_model

import fastdean
from fastdean.cli import app
from fastdean.data.sources import PRESETS, load_rows
from fastdean.jobs.rows import is_pair
from fastdean.models.loading import DEMO_MODEL

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PERFORMANCE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
NAV = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
GUIDE = [page for part in NAV for page in part.get("Guide", [])]
TEXTS = {"README.md": README}
for each in (path for page in GUIDE for path in page.values()):
    TEXTS[each] = (ROOT / "docs" / each).read_text(encoding="utf-8")
ALL = "\n".join([*TEXTS.values(), PERFORMANCE])
TESTED = re.compile(r"^<!-- tested -->\n```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SMALLER = {
    '"smollm2-135m-instruct"': '"tiny"',
    "ratio=1e-5": "ratio=2e-2",
    "ratios=[1e-5, 1e-4]": "ratios=[1e-2, 1e-1]",
    "1e-3": "1e-1",
    '"embedded:{topic}"), 32': '"embedded:{topic}"), 12',
    "examples=32": "examples=8",
    "permutations=200": "permutations=20",
    "[:32]": "[:8]",
    'tokenizer, "gender")': 'tokenizer, {"one": ["the", "of"], "two": ["and", "is"]})',
    'max_steps": 2': 'max_steps": 1',
}


def fenced(language: str, text: str = ALL) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands(text: str = ALL) -> list[list[str]]:
    """Words of every `fastdean` call in the shell blocks, without the program's name."""
    found = []
    for line in "\n".join(fenced("bash", text)).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "fastdean" in words:
            found.append(words[words.index("fastdean") + 1 :])
    return found


def test_every_python_block_is_tested_and_every_substitution_is_needed():
    assert TESTED.findall(ALL) == fenced("python")
    shown = "".join(fenced("python"))
    for original in SMALLER:
        assert original in shown, original
    missing = [
        name for name in fastdean.__all__ if name[0] != "_" and f"fastdean.{name}" not in shown
    ]
    assert missing == []


def test_python_blocks_run_and_both_ways_give_the_same_importance(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_language_model("tiny")
    names = {}
    for page, text in TEXTS.items():
        for number, block in enumerate(TESTED.findall(text)):
            for original, smaller in SMALLER.items():
                block = block.replace(original, smaller)
            exec(compile(block, f"{page}, Python block {number}", "exec"), names)

    _assert_the_same(names["importance"], names["fair"])
    weights = names["model"].state_dict()
    patched = _stored(Path("model-masked"))
    changed = sum(int((patched[name] != weights[name]).sum()) for name in weights)
    assert changed == len(names["mask"]) > 0
    assert names["kept"].keys() == names["small"].keys() == names["fair"].keys()
    assert names["both"].num_examples == 24
    assert len(names["curve"]) == 2 and len(names["by_layer"]) == 2
    assert 0 < names["last"].p_value <= 1


def _assert_the_same(importance: dict[str, torch.Tensor], scores: fastdean.Scores) -> None:
    assert set(importance) == set(scores)
    for name, dense in scores.items():
        top = scores.select(name, 200)
        expected = importance[name].detach().flatten()[top]
        torch.testing.assert_close(dense.flatten()[top], expected, rtol=1e-4, atol=0)


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


def test_a_model_in_a_command_is_the_demo_s_or_said_to_be_a_placeholder():
    """What a reader pastes runs, and first of all what stands in the README."""
    assert "my-model" not in README
    assert {words[words.index("--model") + 1] for words in commands(README)} == {DEMO_MODEL}
    for page, text in TEXTS.items():
        if "my-model" in "".join(fenced("bash", text)):
            assert "`my-model` stands for a model of yours" in text, page


def test_every_command_is_shown_and_every_one_named_exists():
    named = set(re.findall(r"`fastdean ([a-z-]+)", ALL)) | {words[0] for words in commands()}
    assert named == set(typer.main.get_command(app).commands)


def test_rows_of_two_files_are_joined_to_pairs_as_the_guide_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("fairness", "privacy"):
        for kind, prompts in (("safe", "aab"), ("unsafe", "abc")):
            rows = "".join(f'"{p}, q","{kind} {n}"\n' for n, p in enumerate(prompts))
            (tmp_path / f"{name}_{kind}.csv").write_text(f"prompt,response\n{rows}", "utf-8")
    (tmp_path / "fairness_unsafe.csv").write_text('prompt,response\n"b, q",no\n', "utf-8")
    joined = re.search(r"^python - <<'EOF'\n(import csv\n.*?)^EOF$", ALL, re.DOTALL | re.MULTILINE)
    exec(compile(joined[1], "guide", "exec"), {})
    found = [(row["response"], row.get("unsafe")) for row in load_rows("privacy.jsonl")]
    assert found == [("safe 0", "unsafe 0"), ("safe 1", "unsafe 0"), ("safe 2", "unsafe 1")]
    # A row without one is a row all the same.
    assert [is_pair(row) for row in load_rows("fairness.jsonl")] == [False, False, True]


def test_options_named_in_the_text_exist():
    group = typer.main.get_command(app)
    known = {o for c in group.commands.values() for p in c.params for o in p.opts}
    named = set(re.findall(r"`(--[a-z-]+)`", "\n".join(TEXTS.values())))
    assert named and named <= known


def test_sources_are_those_the_package_knows():
    listed = {name for name in PRESETS if f"`{name}`" in ALL}
    assert listed == {name for name in PRESETS if not name.endswith(":unsafe")}


def test_links_to_files_lead_somewhere():
    pages = [
        p
        for folder in (".", "docs", "docs/guide", "docs/reference", "examples")
        for p in sorted((ROOT / folder).glob("*.md"))
    ]
    links = 0
    for page in pages:
        text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", text):
            assert (page.parent / target).is_file(), f"{page.name}: {target}"
            links += 1
    assert links > 50


def test_the_readme_is_a_page():
    assert len(README.splitlines()) <= 160
    assert len(fenced("python", README)) == 1
    (picture,) = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert (ROOT / picture).stat().st_size < 200_000


def test_what_the_readme_shows_as_measured_is_in_the_records_table():
    start = README.index("## Measured")
    shown = README[start : README.index("\n## ", start)]
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    caption = re.search(r"^.*: `python .*`$", shown, re.MULTILINE)
    assert len(rows) > 2
    assert "\n".join(rows) + "\n\n" + caption[0] in PERFORMANCE


def test_make_targets_exist():
    made = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    code = "\n".join(re.findall(r"`[^`\n]+`", ALL)) + "".join(fenced("bash"))
    named = set(re.findall(r"\bmake ([a-z0-9-]+)", code))
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
