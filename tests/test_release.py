"""What a release says of itself in several files says the same in all of them."""

from __future__ import annotations

import re
import tomllib
from datetime import date
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
VERSION = PROJECT["project"]["version"]
EXTRAS = PROJECT["project"]["optional-dependencies"]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text("utf-8")


def _read(name: str):
    return yaml.safe_load((ROOT / name).read_text("utf-8"))


def _released() -> list[tuple[str, date]]:
    """(version, date) of every released section of the changelog, as it lists them."""
    found = re.findall(r"^## \[(\d[^\]]*)\] - (\S+)$", CHANGELOG, re.MULTILINE)
    return [(version, date.fromisoformat(day)) for version, day in found]


def test_changelog_and_citation_name_this_version():
    citation = _read("CITATION.cff")
    assert citation["version"] == VERSION
    assert _released()[0] == (VERSION, citation["date-released"])


def test_changelog_runs_backwards_in_known_words():
    numbers = [tuple(map(int, version.split("."))) for version, _ in _released()]
    assert numbers == sorted(set(numbers), reverse=True)
    days = [day for _, day in _released()]
    assert days == sorted(days, reverse=True)
    headings = set(re.findall(r"^### (.+)$", CHANGELOG, re.MULTILINE))
    assert headings <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    sections = re.findall(r"^## (.+)$", CHANGELOG, re.MULTILINE)
    assert len(sections) - ("[Unreleased]" in sections) == len(numbers)


@pytest.mark.parametrize(
    ("tool", "extra", "repository"),
    [("ruff", "test", "ruff-pre-commit"), ("clang-format", "dev", "mirrors-clang-format")],
)
def test_formatters_have_one_version(tool, extra, repository):
    (pinned,) = [need for need in EXTRAS[extra] if need.startswith(f"{tool}==")]
    version = pinned.partition("==")[2]
    (hook,) = [r for r in _read(".pre-commit-config.yaml")["repos"] if repository in r["repo"]]
    assert hook["rev"] == f"v{version}"
    assert f"{tool}=={version}" in (ROOT / "constraints.txt").read_text().splitlines()


def test_every_tool_of_the_site_and_of_a_release_is_bound():
    bound = {
        line.partition("==")[0]
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    }
    named = {re.match(r"[\w-]+", need)[0] for extra in ("docs", "dev") for need in EXTRAS[extra]}
    assert named | {"twine"} <= bound


def test_the_workflow_runs_what_a_person_runs():
    jobs = _read(".github/workflows/ci.yml")["jobs"]
    steps = {name: [step.get("run") for step in job["steps"]] for name, job in jobs.items()}
    assert ".ci/run" in steps["checks"]
    made = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for run in filter(None, sum(steps.values(), [])):
        assert run == ".ci/run" or run.removeprefix("make ") in made, run
    versions = jobs["checks"]["strategy"]["matrix"]["python"]
    assert PROJECT["project"]["requires-python"] == f">={versions[0]}"
    built = PROJECT["tool"]["cibuildwheel"]["build"].split()
    assert built == [f"cp{version.replace('.', '')}-*" for version in versions]


def test_what_an_install_is_asked_for_is_in_the_package():
    source = (ROOT / "tests" / "support" / "installed.py").read_text("utf-8")
    names = re.findall(r'^    "([\w/.]+)",$', source, re.MULTILINE)
    assert len(names) == 6
    for name in names:
        assert (ROOT / "fastdean" / name).is_file(), name
    command = PROJECT["tool"]["cibuildwheel"]["test-command"]
    assert (ROOT / command.rpartition("{project}/")[2]).is_file()
