"""Sources: every file type, column mapping, presets, and what is refused with which text."""

from __future__ import annotations

import csv
import json

import pytest
import tiny_folders

from fastdean.data.examples import encode
from fastdean.data.sources import PRESETS, load_rows, load_table, sample_rows

ROWS = [
    {"prompt": "who?", "response": "them, all"},
    {"prompt": 'a "quoted"\nline', "response": "ünïcode"},
]


def write(path, rows=ROWS, bom=False):
    """The rows as a file of the kind that the path's suffix names."""
    if path.suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), path)
        return path
    if path.suffix == ".csv":
        import io

        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        text = buffer.getvalue()
    elif path.suffix == ".json":
        text = json.dumps(rows)
    else:
        text = "\n".join(json.dumps(row) for row in rows)
    path.write_bytes(text.encode("utf-8-sig" if bom else "utf-8"))
    return path


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl", ".parquet", ".JSONL"])
def test_every_file_type_gives_the_rows_in_order(tmp_path, suffix):
    assert load_rows(write(tmp_path / f"rows{suffix}")) == ROWS


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path, suffix):
    assert load_rows(write(tmp_path / f"rows{suffix}", bom=True)) == ROWS


def test_a_json_object_with_one_list_is_that_list(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"version": 1, "data": ROWS}))
    assert load_rows(file) == ROWS


def test_blank_lines_between_rows_are_no_rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    assert load_rows(file) == ROWS


def test_columns_are_mapped_and_others_are_dropped(tmp_path):
    rows = [{"question": "q", "answer": "a", "bad": "b", "id": 3, "response": "not this one"}]
    file = write(tmp_path / "rows.jsonl", rows)
    found = load_rows(f"{file}::prompt=question,response=answer,unsafe=bad")
    assert found == [{"prompt": "q", "response": "a", "unsafe": "b"}]


TURN = {"role": "user", "content": "q"}
REPLY = {"role": "assistant", "content": "a"}
HABITS = {
    "alpaca": ({"instruction": "q", "input": "x", "output": "a"}, {"prompt": "q\nx"}),
    "alpaca without input": ({"instruction": "q", "input": "", "output": "a"}, {"prompt": "q"}),
    "dolly": ({"instruction": "q", "context": "x", "response": "a"}, {"prompt": "q\nx"}),
    "trl": ({"prompt": "q", "completion": "a"}, {"prompt": "q"}),
    "trl chat": ({"prompt": [TURN], "completion": [REPLY]}, {"messages": [TURN, REPLY]}),
    "both": ({"prompt": "q", "response": "a", "completion": "z"}, {"prompt": "q"}),
}


@pytest.mark.parametrize("case", HABITS)
def test_columns_of_other_habits_are_read(tmp_path, case):
    row, expected = HABITS[case]
    expected = expected if "messages" in expected else {**expected, "response": "a"}
    (found,) = load_rows(write(tmp_path / "rows.jsonl", [row]))
    assert {key: found[key] for key in expected} == expected
    if "messages" not in expected:
        tokenizer = tiny_folders.tokenizer()
        ours = {key: "w1 w2" for key in ("prompt", "response")}
        theirs = {key: "w1 w2" if value else value for key, value in row.items()}
        theirs |= {key: "" for key in ("input", "context") if key in theirs}
        assert encode([theirs], tokenizer) == encode([ours], tokenizer)


def test_rows_of_messages_and_of_text(tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert load_rows(write(tmp_path / "chat.parquet", [{"messages": turns}])) == [
        {"messages": turns}
    ]
    assert load_rows(write(tmp_path / "text.csv", [{"text": "all of it"}])) == [
        {"text": "all of it"}
    ]


def test_an_empty_cell_is_a_missing_unsafe_answer(tmp_path):
    rows = [{"prompt": "p", "response": "r", "unsafe": "", "text": ""}]
    assert load_rows(write(tmp_path / "rows.csv", rows)) == [{"prompt": "p", "response": "r"}]


BAD_FILES = {
    "truncated.json": (b'[{"prompt": "p"', r"truncated\.json' must be a well-formed \.json file"),
    "a_number.json": (b"3", "no list of rows; use a JSON list"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": ', "broken.jsonl.*line 2: "),
    "list.jsonl": (b"[1, 2]", "row 1 of .* must be an object, got int"),
    "ragged.csv": (b"prompt,response\na,b,c\n", "line 2 has another number of columns"),
    "short.csv": (b"prompt,response\na\n", "line 2 has another number of columns"),
    "quote.csv": (b'prompt,response\n"a,b\n', "quote.csv' must be a well-formed"),
    "latin.csv": ("prompt,response\né,b\n".encode("latin-1"), "line 2 is not UTF-8"),
    "foreign.parquet": (b"not a parquet file at all", "foreign.parquet' must be a well-formed"),
    "header.csv": (b"prompt,response\n", "must hold at least one row, got none"),
    "empty.jsonl": (b"", "must hold at least one row, got the empty file"),
    "blank.jsonl": (b"\n\n", "must hold at least one row, got none"),
    "list.txt": (b"hello", r"must be a file ending in \.csv, \.tsv, \.json, \.jsonl, \.parquet"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_by_name_and_reason(tmp_path, name):
    content, text = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=text) as caught:
        load_rows(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_wrong_columns_are_named_with_the_way_to_map_them(tmp_path):
    file = write(tmp_path / "rows.csv", [{"question": "q", "answer": "a"}])
    with pytest.raises(
        ValueError,
        match=r"must have the columns 'prompt' and 'response'.*got \['answer', 'question'\] in row "
        "1; map them with ::prompt=COLUMN,response=COLUMN",
    ):
        load_rows(file)
    with pytest.raises(ValueError, match=r"must have the column 'reply', got \['answer', 'quest"):
        load_rows(f"{file}::prompt=question,response=reply")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("prompt", "source options must be key=value with the keys prompt, .*got 'prompt'"),
        ("colour=red", "got 'colour=red'"),
        ("prompt=a,prompt=b", "given once each, got 'prompt' twice"),
        ("split=test", "is a file and takes columns only, got the option 'split'"),
    ],
)
def test_options_that_mean_nothing_are_refused(tmp_path, options, text):
    with pytest.raises(ValueError, match=text):
        load_rows(f"{write(tmp_path / 'rows.jsonl')}::{options}")


def test_a_preset_takes_no_options():
    with pytest.raises(ValueError, match=r"is a preset and takes no options, got \['split'\]"):
        load_rows("embedded:fairness::split=train")


@pytest.mark.parametrize("name", ["embedded:fairnes", "rows.xlsx", "./rows/answers", "no/such/set"])
def test_what_is_no_source_is_refused_with_the_ones_there_are(name):
    with pytest.raises(ValueError, match=f"hub id owner/name or one of {', '.join(PRESETS)}"):
        load_rows(name)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be an existing file, got .*nothing.csv"):
        load_rows(tmp_path / "nothing.csv")


def test_an_unreachable_data_set_of_the_hub_is_refused_in_one_line():
    with pytest.raises(
        ValueError, match="reachable data set of the hub, got: .+ or pass a local"
    ) as e:
        load_rows("nobody-at-all/no-such-set")
    assert "\n" not in str(e.value)


BEAVERTAILS = [
    # prompt, response, category, safe
    ("old people?", "they are useless", "discrimination,stereotype,injustice", False),
    ("old people?", "they are people", None, True),
    ("old people?", "lazy as well", "discrimination,stereotype,injustice", False),
    ("his address?", "12 Elm Street", "privacy_violation", False),
    ("his address?", "I cannot say", None, True),
    ("a joke?", "knock knock", None, True),
    ("old people?", "wise, often", None, True),
]


@pytest.fixture
def hub(monkeypatch):
    """`datasets.load_dataset` with data sets in the columns of the real ones; records its calls."""
    import datasets

    categories = (
        "discrimination,stereotype,injustice",
        "privacy_violation",
        "violence,aiding_and_abetting,incitement",
    )
    rows = {
        "PKU-Alignment/BeaverTails": [
            {
                "prompt": prompt,
                "response": response,
                "category": {name: name == labelled for name in categories},
                "is_safe": is_safe,
            }
            for prompt, response, labelled, is_safe in BEAVERTAILS
        ],
        "yahma/alpaca-cleaned": [
            {"instruction": "Add.", "input": "2 and 3", "output": "5"},
            {"instruction": "Say hello.", "input": "", "output": "Hello."},
            {"instruction": "Say nothing.", "input": "", "output": ""},
        ],
        "org/name": [{"q": "a", "prompt": None, "response": "b"}],
    }
    calls = []

    def load_dataset(path, name=None, *, split=None, revision=None):
        calls.append((path, name, split, revision))
        return datasets.Dataset.from_list(rows[path])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_beavertails_pairs_a_safe_answer_with_the_labelled_one_to_its_prompt(hub):
    assert load_rows("beavertails:fairness") == [
        {"prompt": "old people?", "response": "they are people", "unsafe": "they are useless"},
        {"prompt": "old people?", "response": "wise, often", "unsafe": "they are useless"},
    ]
    assert load_rows("beavertails:privacy") == [
        {"prompt": "his address?", "response": "I cannot say", "unsafe": "12 Elm Street"}
    ]
    assert {call[2] for call in hub} == {"330k_train"}


def test_beavertails_unsafe_rows_are_the_labelled_answers(hub):
    assert [row["response"] for row in load_rows("beavertails:fairness:unsafe")] == [
        "they are useless",
        "lazy as well",
    ]
    assert load_rows("beavertails:privacy:unsafe") == [
        {"prompt": "his address?", "response": "12 Elm Street"}
    ]


def test_alpaca_joins_instruction_and_input_and_drops_empty_answers(hub):
    assert load_rows("alpaca-cleaned") == [
        {"prompt": "Add.\n2 and 3", "response": "5"},
        {"prompt": "Say hello.", "response": "Hello."},
    ]


def test_a_hub_source_passes_its_options_on_and_maps_columns(hub):
    found = load_rows("org/name::split=test,config=en,revision=v2,prompt=q")
    assert found == [{"prompt": "a", "response": "b"}]
    assert hub == [("org/name", "en", "test", "v2")]


@pytest.mark.parametrize("topic", ["fairness", "privacy", "general"])
def test_embedded_rows_need_nothing(topic):
    rows = load_rows(f"embedded:{topic}")
    assert len(rows) >= 32
    assert all(row.get("unsafe") for row in rows) == (topic != "general")


def test_embedded_debiasing_rows_are_texts_and_their_pairs():
    assert {tuple(row) for row in load_rows("embedded:debias")} == {("text",)}
    pairs = load_rows("embedded:debias:pairs")
    assert {tuple(row) for row in pairs} == {("premise", "hypothesis")}


def test_entailment_pairs_are_rows(tmp_path):
    pair = {"premise": "A girl runs.", "hypothesis": "A child runs."}
    assert load_rows(write(tmp_path / "pairs.jsonl", [pair])) == [pair]
    named = [{"sentence1": pair["premise"], "sentence2": pair["hypothesis"], "label": 0}]
    source = f"{write(tmp_path / 'named.csv', named)}::premise=sentence1,hypothesis=sentence2"
    assert load_rows(source) == [pair]
    with pytest.raises(ValueError, match="or 'premise' and 'hypothesis', got .'premise'. in row 1"):
        load_rows(write(tmp_path / "half.jsonl", [{"premise": "A girl runs."}]))


@pytest.mark.parametrize("seed", [0, 7])
def test_rows_are_sampled_as_datasets_shuffle_does(seed):
    import datasets

    rows = [{"text": str(i)} for i in range(50)]
    shuffled = datasets.Dataset.from_list(rows).shuffle(seed=seed)
    first, others = sample_rows(rows, 20, seed)
    assert first == shuffled.select(range(20)).to_list()
    assert others == shuffled.select(range(20, 50)).to_list()


def test_without_a_count_all_rows_are_taken():
    first, others = sample_rows(ROWS, None, 0)
    assert sorted(first, key=str) == sorted(ROWS, key=str) and others == []


@pytest.mark.parametrize("count", [0, -1, 3])
def test_a_count_out_of_range_is_refused(count):
    with pytest.raises(ValueError, match=f"between 1 and the source's 2 rows, got {count}"):
        sample_rows(ROWS, count, 0)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("prompt,prompt,response\na,b,c\n", "the header has the column 'prompt' more than once"),
        ("prompt,response\na,b\0c\n", "line 2 holds a NUL character"),
    ],
)
def test_a_csv_file_that_reads_two_ways_is_refused(tmp_path, text, told):
    file = tmp_path / "rows.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=told):
        load_rows(file)


def test_a_long_csv_field_is_read_and_the_limit_left_as_it_was(tmp_path):
    limit = csv.field_size_limit()
    rows = [{"prompt": "p" * (limit + 1), "response": "r"}]
    assert load_rows(write(tmp_path / "rows.csv", rows)) == rows
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("key", ["prompt", "response", "text", "premise"])
@pytest.mark.parametrize(
    ("value", "kind"),
    [(3, "int"), (["a"], "list"), (None, "null"), ("a\ud800", "a lone surrogate")],
)
def test_what_is_no_text_is_refused_by_row_and_column(tmp_path, key, value, kind):
    forms = ({"text": "t"}, {"prompt": "p", "response": "r"}, {"premise": "p", "hypothesis": "h"})
    good = next(form for form in forms if key in form)
    file = write(tmp_path / "rows.jsonl", [good, {**good, key: value}])
    with pytest.raises(ValueError, match=rf"row 2 of .* must be text in .* '{key}', got {kind}"):
        load_rows(file)


def test_a_table_keeps_its_own_columns(tmp_path):
    file = tmp_path / "table.csv"
    file.write_text("left,right\nup,down\n")
    assert load_table(file) == [{"left": "up", "right": "down"}]


def test_a_table_takes_no_mapping_and_names_what_it_can_be(tmp_path):
    file = tmp_path / "table.csv"
    file.write_text("left,right\nup,down\n")
    with pytest.raises(ValueError, match="must keep its own columns here, got the mapping of 'te"):
        load_table(f"{file}::text=left")
    with pytest.raises(ValueError, match=r"\.parquet or a hub id owner/name, got 'embedded:x'"):
        load_table("embedded:x")


ROW = {"prompt": "é", "response": "b"}
LINE = '{"prompt": "é", "response": "b"}'
TABLES = {
    "lines.json": f"{LINE}\n\n{LINE}\n",
    "crlf.json": f"{LINE}\r\n{LINE}\r\n",
    "list.jsonl": f"[{LINE}, {LINE}]\n",
    "printed.jsonl": f"\n[\n  {LINE},\n  {LINE}\n]",
    "empty_lines.jsonl": f"\n{LINE}\r\n \r\n{LINE}",
    "table.tsv": "prompt\tresponse\né\tb\né\tb\n",
    "crlf.tsv": "prompt\tresponse\r\né\tb\r\né\tb\r\n",
}


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "marked"])
@pytest.mark.parametrize("name", TABLES)
def test_files_that_are_written_otherwise_than_they_are_called_are_read(tmp_path, name, mark):
    (tmp_path / name).write_bytes(mark + TABLES[name].encode())
    assert load_rows(tmp_path / name) == [ROW, ROW]


@pytest.mark.parametrize(
    "row", [ROW, {"text": "a"}, {"messages": [{"role": "user", "content": "a"}]}]
)
@pytest.mark.parametrize("name", ["one.json", "one.jsonl"])
def test_a_single_row_is_a_row(tmp_path, name, row):
    (tmp_path / name).write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert load_rows(tmp_path / name) == [row]


def test_a_bad_line_of_json_lines_is_told_by_its_number_whatever_the_file_is_called(tmp_path):
    (tmp_path / "lines.json").write_text('{"text": "a"}\n{"text": \n', encoding="utf-8")
    with pytest.raises(ValueError, match="well-formed .json file, got: line 2: "):
        load_rows(tmp_path / "lines.json")


def test_bad_rows_are_left_out_and_counted(tmp_path, caplog):
    good = [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}]
    lines = [json.dumps(good[0]), "{", "3", json.dumps({"prompt": 7, "response": "x"})]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*lines, json.dumps(good[1])]))
    with pytest.raises(ValueError, match="line 2: "):
        load_rows(path)
    assert load_rows(path, skip_bad_rows=True) == good
    assert f"{path}: 3 rows are left out: row 2 (source" in caplog.text
    caplog.clear()
    assert load_rows("embedded:fairness", skip_bad_rows=True) and not caplog.records
    path.write_text("{\n{")
    with pytest.raises(ValueError, match="must hold at least one row, got none that can be read: "):
        load_rows(path, skip_bad_rows=True)


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("rows.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n{"text": "\xc3\xa4"}\n', 2),
        ("rows.csv", b"text,n\na,1\n\xff,2\n\xc3\xa4,3\n", 3),
    ],
)
def test_a_row_with_bytes_that_are_no_text_is_left_out_alone(tmp_path, caplog, name, content, line):
    path = tmp_path / name
    path.write_bytes(content)
    for read in (load_rows, load_table):
        with pytest.raises(ValueError, match=f"got: line {line} is not UTF-8; repair"):
            read(path)
        assert [row["text"] for row in read(path, skip_bad_rows=True)] == ["a", "ä"]
    assert f"{path}: 1 row is left out: row 2 (source" in caplog.text


def test_a_table_whose_header_is_no_text_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_bytes(b"text,\xff\na,1\n")
    with pytest.raises(ValueError, match="got: the header is not UTF-8; repair"):
        load_rows(tmp_path / "rows.csv", skip_bad_rows=True)


def test_torn_rows_of_a_table_are_left_out_and_counted(tmp_path, caplog):
    path = tmp_path / "table.csv"
    path.write_text("a,b\n1,2\n3\n4,5\n")
    with pytest.raises(ValueError, match="line 3 has another number of columns"):
        load_table(path)
    assert load_table(path, skip_bad_rows=True) == [{"a": "1", "b": "2"}, {"a": "4", "b": "5"}]
    assert f"{path}: 1 row is left out: row 2 (source" in caplog.text
