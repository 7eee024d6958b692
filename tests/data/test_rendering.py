"""How rows became tokens: what is warned of, and how an example is shown."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from tiny_data import word_tokenizer

from fastdean.data.examples import Example, encode
from fastdean.data.rendering import (
    differing_rendering_cautions,
    rendering_cautions,
    show_example,
)

PAIR = {"prompt": "the cat", "response": "sat yes"}


def test_sets_that_became_tokens_alike_are_not_warned_of():
    alike = {"a": {"rendered": {"raw": 3}}, "b": {"rendered": {"raw": 5}}}
    assert differing_rendering_cautions(alike) == []
    # Nothing is known of tokens that a caller brought, or of scores that were kept before.
    assert differing_rendering_cautions({**alike, "c": {"rendered": {"tokens": 2}}, "d": {}}) == []


def test_sets_that_became_tokens_otherwise_are_named_with_their_counts():
    sets = {"a": {"rendered": {"raw": 3}}, "b": {"rendered": {"chat": 2, "text": 1}}}
    (said,) = differing_rendering_cautions(sets)
    assert "alike: a raw (3); b chat (2), text (1). What differs" in said


def test_two_start_tokens_and_end_tokens_in_the_middle_are_counted():
    tokenizer = word_tokenizer(True)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    good = encode([PAIR], tokenizer)[0]
    doubled = encode([{"text": f"{tokenizer.bos_token} the cat sat"}], tokenizer)[0]
    assert doubled.input_ids[:2].tolist() == [bos, bos]
    ended = Example(
        torch.tensor([bos, 5, eos, 6]), torch.tensor([-100, -100, -100, 6]), rendered="raw"
    )
    said = rendering_cautions(
        [good, doubled, ended, ended], [4, 7, 8, 9], tokenizer, "privacy", None
    )
    assert len(said) == 2
    assert said[0].startswith("privacy: 1 of 4 examples start with two '<s>' (first: row 7)")
    assert said[1].startswith("privacy: 2 of 4 prompts end in an end token (first: row 8)")
    assert rendering_cautions([good], [1], tokenizer, "privacy", None) == []


def test_a_chat_may_end_its_turns_and_a_text_may_start_with_its_only_token():
    tokenizer = word_tokenizer(True)
    eos = tokenizer.eos_token_id
    chat = Example(torch.tensor([5, eos, 6]), torch.tensor([-100, -100, 6]), rendered="chat")
    lone = Example(torch.tensor([eos, 6]), torch.tensor([-100, 6]), rendered="raw")
    assert rendering_cautions([chat, lone], [1, 2], tokenizer, "x", "chat") == []


def test_an_example_is_shown_with_its_special_tokens_and_its_targets():
    tokenizer = word_tokenizer(True)
    (example,) = encode([PAIR], tokenizer)
    assert show_example(example, tokenizer) == [("context", "<s> the cat"), ("target", "sat yes")]


def test_nothing_that_is_shown_moves_a_terminals_cursor():
    tokenizer = SimpleNamespace(decode=lambda ids, **options: "a\x1b[2J\u202eb\n\u00e9\ud800")
    ids = torch.tensor([3, 4])
    shown = show_example(Example(ids, ids), tokenizer)
    assert shown == [("target", "a\\u001b[2J\\u202eb\\n\u00e9\\ud800")]


def test_text_under_a_template_that_does_not_apply_is_told():
    tokenizer = word_tokenizer()
    examples = encode([PAIR, {"text": "the cat sat"}], tokenizer)
    (said,) = rendering_cautions(examples, [1, 2], tokenizer, "general", "chat")
    assert said.startswith("general: 1 of 2 rows are plain text, to which the template 'chat' does")
    assert rendering_cautions(examples, [1, 2], tokenizer, "general", "raw") == []
