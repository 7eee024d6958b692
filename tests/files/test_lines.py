"""Lines that are only added to: what a kill leaves, and what is no line."""

from __future__ import annotations

import pytest

from fastdean.files.declared import Record, Text, Whole
from fastdean.files.lines import Lines

KIND = Record({"id": Whole(), "text": Text()})
ROWS = [{"id": 1, "text": "ä\u2028\n"}, {"id": 2, "text": "\ud800"}]


def test_records_come_back_as_they_were_added(tmp_path):
    lines = Lines(tmp_path / "a.jsonl", KIND)
    assert lines.read() == []
    lines.add(ROWS[:1])
    lines.add([])
    lines.add(ROWS[1:])
    assert lines.read() == ROWS


def test_what_a_kill_cut_short_is_no_line_and_is_cut_off(tmp_path):
    lines = Lines(tmp_path / "a.jsonl", KIND)
    lines.repair()
    lines.add(ROWS)
    whole = lines.file.read_bytes()
    for rest in (b"{", "{'ä".encode()[:3], b'{"id": 3, "text": "x"}'):
        lines.file.write_bytes(whole + rest)
        assert lines.read() == ROWS
        lines.repair()
        assert lines.file.read_bytes() == whole
    lines.file.write_bytes(b"{")
    lines.repair()
    assert lines.file.read_bytes() == b"" and lines.read() == []


@pytest.mark.parametrize("line", [b"{", b"\xff", b'{"id": "1", "text": ""}', b"[]", b""])
def test_another_line_is_refused_by_its_number(tmp_path, line):
    lines = Lines(tmp_path / "a.jsonl", KIND)
    lines.add(ROWS[:1])
    lines.file.write_bytes(lines.file.read_bytes() + line + b"\n")
    with pytest.raises(ValueError, match="line 2' must hold .*; delete the line"):
        lines.read()


def test_a_record_that_is_there_already_or_of_another_job_is_refused_by_its_line(tmp_path):
    lines = Lines(tmp_path / "a.jsonl", KIND, key=("id",))
    lines.add(ROWS)
    assert lines.read({(1,), (2,)}) == lines.read() == ROWS
    with pytest.raises(
        ValueError, match="line 2' must hold a record of this job, got that of id 2"
    ):
        lines.read({(1,)})
    lines.add([{"id": 1, "text": "another"}])
    said = "line 3' must hold a record of its own, got that of id 1 again, which line 1 has; delete"
    with pytest.raises(ValueError, match=said):
        lines.read()
