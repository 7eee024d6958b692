"""Prompts of a source: which columns they stand in, and that answers are not needed."""

from __future__ import annotations

import pytest
from tiny_data import word_tokenizer
from tiny_folders import write_jsonl

from fastdean.data.prompts import prompt_text
from fastdean.data.sources import numbered_rows
from fastdean.data.tokenising import tokenised_prompt

TURNS = [{"role": "user", "content": "the cat"}]
ANSWERED = [*TURNS, {"role": "assistant", "content": "sat"}]

ROWS = {
    "prompt alone": ({"prompt": "the cat"}, "", {"prompt": "the cat"}),
    "an answer beside it": ({"prompt": "a", "response": "b"}, "", {"prompt": "a"}),
    "an answer that is no text": ({"prompt": "a", "response": None}, "", {"prompt": "a"}),
    "a list of answers": ({"prompt": "a", "completion": ["b"]}, "", {"prompt": "a"}),
    "instruction": ({"instruction": "a", "output": "b"}, "", {"prompt": "a"}),
    "instruction, input, text": (
        {"instruction": "a", "input": "b", "output": "c", "text": "a b c"},
        "",
        {"prompt": "a\nb"},
    ),
    "mapped": ({"question": "q", "answer": 3}, "::prompt=question", {"prompt": "q"}),
    "messages": ({"messages": TURNS}, "", {"messages": TURNS}),
    "answered messages": ({"messages": ANSWERED}, "", {"messages": TURNS}),
    "a prompt of turns": ({"prompt": TURNS, "completion": ANSWERED[1:]}, "", {"messages": TURNS}),
    "mapped beside messages": (
        {"messages": TURNS, "question": "q"},
        "::prompt=question",
        {"prompt": "q"},
    ),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_prompt_is_found_in_the_columns_that_others_use(tmp_path, case):
    row, mapping, expected = ROWS[case]
    file = write_jsonl(tmp_path / "p.jsonl", [row])
    assert numbered_rows(f"{file}{mapping}", prompts=True) == [(1, expected)]


BAD = {
    "no column": ({"question": "q"}, "must have the column 'prompt' or 'messages', got"),
    "null": ({"prompt": None}, "must have text as its prompt, got null"),
    "a number": ({"prompt": 3}, "must have text as its prompt, got int"),
    "empty": ({"prompt": " "}, "must have text as its prompt, got an empty text"),
    "text alone": ({"text": "a"}, "map it with ::prompt=COLUMN"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_row_without_a_prompt_is_refused_by_number_or_left_out(tmp_path, case):
    row, text = BAD[case]
    file = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "fine"}, row])
    with pytest.raises(ValueError, match="row 2 of .*") as refused:
        numbered_rows(file, prompts=True)
    assert text in str(refused.value)
    skipped: dict[int, str] = {}
    assert numbered_rows(file, skipped, prompts=True) == [(1, {"prompt": "fine"})]
    assert list(skipped) == [2]


def test_tokens_of_a_prompt_are_those_before_the_answer():
    tokenizer = word_tokenizer()
    raw = tokenised_prompt({"prompt": "the cat"}, tokenizer, None, 1)
    assert raw == tokenizer("the cat")["input_ids"]
    chat = tokenised_prompt({"prompt": "the cat"}, tokenizer, "chat", 1)
    assert tokenizer.decode(chat) == "user : the cat </s> assistant :"
    assert tokenised_prompt({"messages": TURNS}, tokenizer, None, 1) == chat
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="tokenizer must have a chat template to encode row 7"):
        tokenised_prompt({"messages": TURNS}, tokenizer, None, 7)
    with pytest.raises(ValueError, match="row 7 must have a prompt of at least one token"):
        tokenised_prompt({"prompt": ""}, word_tokenizer(bos=False), None, 7)


def test_the_text_of_a_chat_is_what_its_user_asked_last():
    turns = [*ANSWERED, {"role": "user", "content": "and then"}]
    assert prompt_text({"messages": turns}) == "and then"
    assert prompt_text({"prompt": "a"}) == "a"
