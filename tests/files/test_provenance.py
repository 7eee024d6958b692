"""What manifests say of a model, a file or a command: names, and not where they lie."""

from __future__ import annotations

import pytest

from fastdean.files.provenance import public_command, public_name, public_source


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("/home/alice/models/base", "base"),
        ("/home/alice/models/base/", "base"),
        ("~/models/base", "base"),
        ("./base", "base"),
        ("../x/base", "base"),
        ("work/alice/base", "base"),
        ("C:\\Users\\alice\\base", "base"),
        ("\\\\server\\alice\\base", "base"),
        ("file:///home/alice/base", "base"),
        ("owner/name", "owner/name"),
        ("gpt2", "gpt2"),
        ("embedded:fairness", "embedded:fairness"),
        ("beavertails:privacy:unsafe", "beavertails:privacy:unsafe"),
        ("", ""),
    ],
)
def test_a_path_is_told_by_its_last_part(given, told):
    assert public_name(given) == told


def test_a_folder_of_two_parts_that_exists_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert public_name("alice/base") == "alice/base"
    (tmp_path / "alice" / "base").mkdir(parents=True)
    assert public_name("alice/base") == "base"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("/home/alice/rows.csv::prompt=q,response=a", "rows.csv::prompt=q,response=a"),
        ("owner/name::split=train", "owner/name::split=train"),
        ("seat=/home/alice/seat.jsonl", "seat=seat.jsonl"),
        ("crows_pairs", "crows_pairs"),
        ("/home/a=b/rows.csv", "rows.csv"),
        ("--source=fair=/home/alice/fair.csv::prompt=q", "--source=fair=fair.csv::prompt=q"),
    ],
)
def test_a_source_keeps_its_measure_and_its_columns(given, told):
    assert public_source(given) == told


def test_a_file_before_a_model_keeps_its_name(tmp_path):
    (tmp_path / "own.json").write_text("{}")
    for model, told in (("/m/a=b/judge", "judge"), ("me/judge", "me/judge")):
        assert public_source(f"{tmp_path}/own.json={model}") == f"own.json={told}"


def test_a_command_can_still_be_read():
    given = "fastdean run --model /home/alice/m --out=/home/alice/o --general alpaca-cleaned 'a b'"
    assert public_command(given) == (
        "fastdean run --model m --out=o --general alpaca-cleaned 'a b'"
    )
    assert "/home" not in public_command("fastdean 'unclosed /home/alice/m")
    assert public_command("") == ""
