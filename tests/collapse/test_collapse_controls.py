"""Control classes: as many whole words, none of the original, matched by frequency where asked."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
from tiny_tokenizers import ACCENTED, PEOPLE, THINGS, TOKENIZERS, byte_level, word_piece

from fastdean.collapse import CollapseClasses, LeftOut, frequency_matched_control, random_control

GROUPS = {"female": ["she", "her", "woman"], "male": ["he", "him", "man"]}
NEAREST = 10


def classes_of(tokenizer, **options):
    return CollapseClasses.from_words(tokenizer, GROUPS, **options)


def both_controls(classes, tokenizer, seed):
    return [
        random_control(classes, tokenizer, seed=seed),
        frequency_matched_control(classes, tokenizer, seed=seed),
        frequency_matched_control(classes, tokenizer, counts={}, seed=seed),
    ]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("seed", range(3))
def test_controls_are_as_many_other_whole_words(kind, seed):
    tokenizer = TOKENIZERS[kind]()
    classes = classes_of(tokenizer)
    for control in both_controls(classes, tokenizer, seed):
        assert len(control) == len(classes)
        assert not set(control.pieces) & set(classes.pieces)
        chosen = {word.strip().lower() for word in control.words}
        # Some tokens of a byte-level vocabulary only begin words.
        assert all(any(word.startswith(text) for word in (*PEOPLE, *THINGS)) for text in chosen)
        assert not chosen & {word for words in GROUPS.values() for word in words}
        for pieces, word in zip(control.pieces, control.words, strict=True):
            ids = tokenizer(f"the{word} of", add_special_tokens=False)["input_ids"]
            assert (ids[1],) == pieces
            assert len(ids) == 3


def test_controls_are_named_after_the_group_they_stand_for():
    control = random_control(classes_of(word_piece()), word_piece(), seed=0)
    assert control.groups == ("control of female",) * 3 + ("control of male",) * 3


def test_a_seed_gives_one_control():
    tokenizer, classes = byte_level(), classes_of(byte_level())
    first, again, other = (both_controls(classes, tokenizer, seed) for seed in (1, 1, 2))
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_random_controls_reach_every_word():
    tokenizer, classes = word_piece(), classes_of(word_piece())
    controls = (random_control(classes, tokenizer, seed=seed) for seed in range(120))
    drawn = {word for control in controls for word in control.words}
    originals = {word for words in GROUPS.values() for word in words}
    assert {word.strip() for word in drawn} == {
        word for word in (*PEOPLE, *THINGS) if len(word) > 1 and word not in originals
    }


def test_letters_are_those_of_the_words():
    tokenizer = byte_level()

    def drawn(words):
        classes = CollapseClasses.from_words(tokenizer, {"g": words})
        controls = (random_control(classes, tokenizer, seed=seed) for seed in range(20))
        return {word.strip().lower() for control in controls for word in control.words}

    cafe, elan = ACCENTED
    assert cafe in drawn([*PEOPLE, elan])
    assert cafe not in drawn(PEOPLE)


def test_words_that_were_left_out_are_no_controls():
    tokenizer = word_piece()
    classes = CollapseClasses.from_words(tokenizer, GROUPS)
    without = replace(classes, left_out=(LeftOut("Stone", "g", "splits into 2 pieces"),))

    def drawn(classes):
        controls = (random_control(classes, tokenizer, seed=seed) for seed in range(60))
        return {word for control in controls for word in control.words}

    assert " stone" in drawn(classes)
    assert " stone" not in drawn(without)


def rank_by_hand(classes, control, tokenizer, frequency):
    """For each class how many candidates are nearer to its frequency than the one it got."""
    everything = [word for word in (*PEOPLE, *THINGS) if len(word) > 1]
    originals = {word for words in GROUPS.values() for word in words}
    ids = [
        tokenizer(word, add_special_tokens=False)["input_ids"]
        for word in everything
        if word not in originals
    ]
    for pieces, chosen in zip(classes.pieces, control.pieces, strict=True):
        own = frequency(pieces)
        distance = abs(frequency(chosen) - own)
        yield sum(abs(frequency(candidate) - own) < distance for candidate in ids)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("by", ["counts", "id"])
def test_a_matched_control_is_among_the_nearest(seed, by):
    """At its draw at most 9 candidates left were nearer, and K - 1 were drawn before."""
    tokenizer, classes = word_piece(), classes_of(word_piece())
    counts = {i: (i * 7919) % 1009 for i in range(len(tokenizer)) if i % 5}

    def frequency(pieces):
        return math.log(1 + (counts.get(pieces[0], 0) if by == "counts" else pieces[0]))

    control = frequency_matched_control(
        classes, tokenizer, counts=counts if by == "counts" else None, seed=seed
    )
    ranks = list(rank_by_hand(classes, control, tokenizer, frequency))
    assert max(ranks) < NEAREST + len(classes) - 1
    # A random one is not: the property is one of the matching.
    others = (random_control(classes, tokenizer, seed=s) for s in range(10))
    worst = [max(rank_by_hand(classes, other, tokenizer, frequency)) for other in others]
    assert min(worst) >= NEAREST + len(classes) - 1


def test_a_run_is_as_frequent_as_its_rarest_piece():
    tokenizer = word_piece()
    classes = CollapseClasses.from_words(tokenizer, {"g": ["manhood"]}, multi_piece="mean")
    ((_, rare),) = classes.pieces
    words = [word for word in (*THINGS, *PEOPLE) if len(word) > 1 and word != "man"]
    ids = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in words]
    # The first ten words never occur, and no more does "##hood"; all others and "man" do once.
    counts = {classes.pieces[0][0]: 1, **dict.fromkeys(ids[NEAREST:], 1)}
    assert rare not in counts
    for seed in range(20):
        control = frequency_matched_control(classes, tokenizer, counts=counts, seed=seed)
        assert control.words[0].strip() in words[:NEAREST]
        assert len(control.pieces[0]) == 1


def test_too_few_words_for_a_control():
    tokenizer = word_piece()
    classes = CollapseClasses.from_words(tokenizer, {"g": [*PEOPLE, *THINGS[:60]]})
    message = (
        r"classes must be at most as many as the \d+ whole words of the vocabulary that can be "
        f"their control, got {len(classes)}; use fewer words"
    )
    for make in (random_control, frequency_matched_control):
        with pytest.raises(ValueError, match=message):
            make(classes, tokenizer, seed=0)


def test_counts_below_zero():
    message = "counts must be 0 or above, got -2; count the tokens of a corpus"
    with pytest.raises(ValueError, match=re.escape(message)):
        frequency_matched_control(
            classes_of(word_piece()), word_piece(), counts={3: -2, 4: 1}, seed=0
        )
