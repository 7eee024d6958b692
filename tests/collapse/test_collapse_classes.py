"""Classes from words: what is kept and left out, and their labels and rows by brute force."""

from __future__ import annotations

import json
import re
from collections import Counter
from importlib import resources

import pytest
import torch
from device_reads import DeviceReads
from tiny_tokenizers import TOKENIZERS, byte_level, sentence_piece, word_piece

import fastdean
from fastdean.collapse import WORD_LISTS, CollapseClasses, LeftOut, read_word_groups

PEOPLE = {"female": ["she", "her", "woman"], "male": ["he", "him", "man"]}
RUNS = ((5,), (7,), (5, 7), (7, 5), (5, 7, 9), (9, 9), (2, 5, 7, 9))


def test_a_repr_is_short_whatever_the_classes():
    classes = CollapseClasses.from_words(byte_level(), PEOPLE)
    counted = ", ".join(f"{name!r} {count}" for name, count in Counter(classes.groups).items())
    assert repr(classes).startswith(f"CollapseClasses({len(classes)} classes: {counted}; ")
    many = CollapseClasses(
        tuple((n,) for n in range(500)),
        ("w",) * 500,
        tuple("g" * 900 + str(n) for n in range(500)),
    )
    assert len(repr(many)) < 400 and "492 more groups" in repr(many)


def classes_of(runs):
    return CollapseClasses(tuple(runs), tuple(map(str, runs)), ("g",) * len(runs))


def labels_by_hand(runs, row):
    """For each position the longest run over it, of the longest the one that starts first."""
    found = []
    for position in range(len(row)):
        over = [
            (-len(run), start, number)
            for number, run in enumerate(runs)
            for start in range(max(0, position - len(run) + 1), position + 1)
            if tuple(row[start : start + len(run)]) == run
        ]
        found.append(min(over)[2] if over else -1)
    return found


def random_ids(*shape):
    ids = torch.tensor([2, 5, 7, 9, 0, -100])
    return ids[torch.randint(len(ids), shape, generator=torch.Generator().manual_seed(len(shape)))]


def test_a_byte_level_tokenizer_gives_four_classes_a_word():
    classes = CollapseClasses.from_words(byte_level(), {"male": ["he"]})
    assert classes.words == ("he", " he", "He", " He")
    assert len({*classes.pieces}) == len(classes) == 4
    assert classes.groups == ("male",) * 4
    assert classes.left_out == ()


@pytest.mark.parametrize(
    ("build", "words"), [(word_piece, ("he",)), (sentence_piece, ("he", "He"))]
)
def test_forms_with_the_same_token_are_one_class(build, words):
    classes = CollapseClasses.from_words(build(), {"male": ["he", "He"]})
    assert classes.words == words
    assert classes.left_out == ()


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_words_are_found_in_running_text(kind):
    tokenizer = TOKENIZERS[kind]()
    classes = CollapseClasses.from_words(tokenizer, PEOPLE)
    ids = tokenizer("She saw the man and he saw her", add_special_tokens=False)["input_ids"]
    found = classes.labels(torch.tensor(ids)).tolist()
    seen = [(classes.words[c].strip().lower(), classes.groups[c]) for c in found if c >= 0]
    assert seen == [("she", "female"), ("man", "male"), ("he", "male"), ("her", "female")]


def test_casing_and_leading_space_can_be_left_out():
    def words(**options):
        return CollapseClasses.from_words(byte_level(), {"g": ["she"]}, **options).words

    assert words(casing=False) == ("she", " she")
    assert words(leading_space=False) == ("she", "She")
    assert words(casing=False, leading_space=False) == ("she",)


def test_a_capital_is_never_taken_away():
    assert CollapseClasses.from_words(byte_level(), {"g": ["She"]}).words == ("She", " She")


def test_words_of_several_pieces_are_left_out_and_said_so():
    classes = CollapseClasses.from_words(word_piece(), {"g": ["man", "manhood", "widow"]})
    assert classes.words == ("man",)
    assert classes.left_out == (
        LeftOut("manhood", "g", "splits into 2 pieces"),
        LeftOut("widow", "g", "is unknown to the tokenizer"),
    )


def test_a_piece_of_other_words_is_no_class():
    """A token of its own inside words, "hood" is none where it stands as a word."""
    (inside,) = byte_level()("hood", add_special_tokens=False)["input_ids"]
    assert len(byte_level()(" hood", add_special_tokens=False)["input_ids"]) > 1
    for multi_piece in ("skip", "mean"):
        classes = CollapseClasses.from_words(
            byte_level(), {"g": ["hood", "she"]}, casing=False, multi_piece=multi_piece
        )
        assert (inside,) not in classes.pieces
        assert classes.left_out[0] == LeftOut(
            "hood", "g", "is a token only where no space precedes it"
        )
    alone = CollapseClasses.from_words(
        byte_level(), {"g": ["hood"]}, casing=False, leading_space=False
    )
    assert alone.pieces == ((inside,),)


def test_pieces_that_are_more_behind_a_space_are_pieces_still():
    def of(**options):
        return CollapseClasses.from_words(
            byte_level(), {"g": ["she", "hoods"]}, casing=False, **options
        )

    assert of().left_out[0] == LeftOut("hoods", "g", "splits into 2 pieces")
    run, spaced = of(multi_piece="mean").pieces[-2:]
    assert 2 == len(run) < len(spaced)


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_every_form_that_splits_is_left_out(kind):
    classes = CollapseClasses.from_words(TOKENIZERS[kind](), {"g": ["he", "widow"]})
    assert {left.word.strip() for left in classes.left_out} == {"widow", "Widow"}
    assert all(re.fullmatch(r"splits into \d pieces", left.reason) for left in classes.left_out)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_run_of_pieces_is_a_class_in_running_text(kind):
    tokenizer = TOKENIZERS[kind]()
    word = "manhood" if kind == "wordpiece" else "widow"
    classes = CollapseClasses.from_words(tokenizer, {"g": [word, "she"]}, multi_piece="mean")
    assert classes.left_out == ()
    ids = tokenizer(f"the {word} saw the {word}", add_special_tokens=False)["input_ids"]
    found = [c for c in classes.labels(torch.tensor(ids)).tolist() if c >= 0]
    (run,) = {classes.pieces[c] for c in found}
    assert len(run) > 1
    assert len(found) == 2 * len(run)
    assert tokenizer.decode(run).strip() == word


def test_a_sentencepiece_space_is_not_counted_twice():
    """By itself " widow" is the tokens of "widow" behind one more that is a space alone."""
    tokenizer = sentence_piece()
    classes = CollapseClasses.from_words(
        tokenizer, {"g": ["widow"]}, multi_piece="mean", casing=False
    )
    assert classes.words == ("widow",)
    assert classes.pieces == (tuple(tokenizer("widow", add_special_tokens=False)["input_ids"]),)


def test_a_token_in_two_groups_is_named():
    with pytest.raises(ValueError) as raised:
        CollapseClasses.from_words(word_piece(), {"one": ["she"], "two": ["woman", "She"]})
    (token_id,) = word_piece()("she", add_special_tokens=False)["input_ids"]
    assert str(raised.value) == (
        f"groups must share no token, got 'She' of 'two' with the token ids [{token_id}] of 'she' "
        "in 'one'; leave one of them out"
    )


def test_keeping_nothing_says_why():
    message = (
        "groups must hold a word that is one token of the tokenizer, got none: 'manhood' splits "
        "into 2 pieces, 'widow' is unknown to the tokenizer; choose other words, or pass "
        "multi_piece='mean'"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        CollapseClasses.from_words(word_piece(), {"g": ["manhood", "widow"]})
    with pytest.raises(ValueError, match=r"got none: .* and 7 more; choose"):
        CollapseClasses.from_words(word_piece(), {"g": [f"widow{n}" for n in range(15)]})


def test_multi_piece_is_one_of_two():
    with pytest.raises(ValueError, match="multi_piece must be 'skip' or 'mean', got 'first'; "):
        CollapseClasses.from_words(word_piece(), PEOPLE, multi_piece="first")


def test_files_of_words(tmp_path):
    (tmp_path / "people.txt").write_text("she\n\n  he \nshe\n")
    (tmp_path / "people.json").write_text(json.dumps(PEOPLE))
    assert read_word_groups(tmp_path / "people.txt") == {"people": ["she", "he"]}
    assert read_word_groups(str(tmp_path / "people.json")) == PEOPLE
    assert CollapseClasses.from_words(word_piece(), tmp_path / "people.json") == (
        CollapseClasses.from_words(word_piece(), PEOPLE)
    )


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        ("age", ValueError, "groups must be one of gender, religion, ethnicity, a file ending in"),
        ("no.txt", ValueError, "groups must be an existing file, got 'no.txt'; check the path"),
        (["she"], TypeError, "groups must be a name, a file or a mapping .* got a list; write"),
        ({}, ValueError, "groups must hold at least one group of words, got none; name one"),
        ({"g": "she"}, TypeError, "the words of group 'g' must be a list, got a str; write"),
        ({"g": ["she", 3]}, TypeError, "the words of group 'g' must be text, got 3; write it"),
        ({"g": []}, ValueError, "group 'g' must hold words, got none; leave it out"),
        ({"g": ["she", " "]}, ValueError, "group 'g' must hold words, got an empty one; leave"),
    ],
)
def test_groups_that_are_no_words(groups, error, message):
    with pytest.raises(error, match=message):
        read_word_groups(groups)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "must hold JSON, got something else (Expecting property name"),
        (b'["she"]', "must hold an object, got ['she']; correct the file"),
        (b'{"g": ["\xff"]}', "must hold text in UTF-8, got other bytes at 8; correct the file"),
        (b'{"g": "she"}', "must hold ['g'] as a list of at least 1, got 'she'; correct the file"),
        (b'{"g": ["she", 3]}', "must hold ['g'][1] as a text, got 3; correct the file"),
        (b'{"g": []}', "must hold ['g'] as a list of at least 1, got []; correct the file"),
        (b'{"g": ["she", " "]}', "words.json': group 'g' must hold words, got an empty one; leave"),
        (b'{"g": ["she"], "g": ["he"]}', "something else (the name 'g' stands in one object twice"),
        (b'{"g": [1e400]}', "must hold JSON, got something else ('1e400' is no finite number)"),
        (b"[" * 100_000, "must hold JSON, got something else ("),
        (b'{"g": ["' + b"w" * 10**6 + b'"]}', "['g'][0] as a text of at most 1000 characters"),
        (b"", "must hold JSON, got something else (Expecting value"),
    ],
)
def test_files_that_are_no_words(tmp_path, content, message):
    path = tmp_path / "words.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_word_groups(path)
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", WORD_LISTS)
def test_the_lists_of_the_package(name):
    groups = read_word_groups(name)
    times = Counter(word.casefold() for words in groups.values() for word in words)
    assert [word for word, number in times.items() if number > 1] == []
    assert all(len(words) >= 3 for words in groups.values())
    assert all(re.fullmatch(r"[^\W\d_]+(['-][^\W\d_]+)*", word) for word in times)


def test_gender_has_three_groups_with_their_pronouns():
    groups = read_word_groups("gender")
    assert {"she", "her", "hers", "herself"} <= set(groups["female"])
    assert {"he", "him", "his", "himself"} <= set(groups["male"])
    assert {"they", "them", "themself", "xe"} <= set(groups["nonbinary"])


def test_gender_pairs_say_where_a_word_has_several_counterparts():
    text = (resources.files("fastdean.data") / "words" / "gender_pairs.json").read_text("utf-8")
    stored = json.loads(text)
    female, male = ([pair[side] for pair in stored["pairs"]] for side in (0, 1))
    assert not set(female) & set(male)
    assert all(word == word.lower() for word in female + male)
    assert len({*map(tuple, stored["pairs"])}) == len(stored["pairs"])
    for word, by_use in stored["ambiguous"].items():
        own, other = (female, male) if word in female else (male, female)
        assert word in own
        assert {counterpart for counterpart in by_use.values() if counterpart} <= set(other)
        assert len(by_use) > 1
    assert {*stored["ambiguous"]["her"].values()} == {"his", "him"}
    assert {*stored["ambiguous"]["his"].values()} == {"her", "hers"}


def test_paired_names_are_parallel_and_of_one_gender():
    text = (resources.files("fastdean.data") / "words" / "gender_pairs.json").read_text("utf-8")
    stored = json.loads(text)
    female, male = stored["names"]["female"], stored["names"]["male"]
    assert len(female) == len(male) == len({*female, *male}) / 2
    paired = {word for pair in stored["pairs"] for word in pair}
    assert not {name.lower() for name in female + male} & paired


@pytest.mark.parametrize("runs", [((5,), (9,)), ((9,),), RUNS], ids=["two", "one", "runs"])
@pytest.mark.parametrize("shape", [(0,), (1,), (300,), (40, 7), (2, 0), (3, 5, 12)], ids=str)
def test_labels_are_those_found_by_hand(runs, shape):
    ids = random_ids(*shape)
    labels = classes_of(runs).labels(ids)
    assert labels.dtype == torch.int64
    assert labels.shape == ids.shape
    rows = ids.reshape(-1, shape[-1]).tolist() if ids.numel() else []
    by_hand = [label for row in rows for label in labels_by_hand(runs, row)]
    assert labels.flatten().tolist() == by_hand


def test_the_longest_run_counts_and_then_the_first():
    classes = classes_of(RUNS)
    # 5 7 9 is longer than 5 7; of 5 7 and 7 5 the first has the 7 between them.
    assert classes.labels(torch.tensor([5, 7, 9, 5, 7, 5])).tolist() == [4, 4, 4, 2, 2, 3]


def test_a_run_ends_with_its_row():
    labels = classes_of(((5, 7),)).labels(torch.tensor([[1, 5], [7, 1]]))
    assert labels.tolist() == [[-1, -1], [-1, -1]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_labels_of_other_integers_and_layouts(dtype):
    ids = random_ids(6, 9).clamp(min=0)
    expected = classes_of(RUNS).labels(ids.T.contiguous())
    assert torch.equal(classes_of(RUNS).labels(ids.to(dtype).T), expected)


def test_labels_need_no_table_of_the_vocabulary():
    largest = 2**31 - 1
    classes = classes_of(((largest,), (largest, 0), (0, largest)))
    ids = torch.tensor([largest, largest, 1, 0, largest, -1, -(2**31)])
    assert classes.labels(ids).tolist() == [0, 0, -1, 2, 2, -1, -1]


def test_labels_do_not_wait_for_the_device():
    classes = classes_of(RUNS)
    ids = random_ids(4, 9)
    with DeviceReads() as reads:
        reads.mark([ids])
        classes.labels(ids)
    assert reads.reads == []


def test_labels_of_what_is_no_row_of_ids():
    classes = classes_of(RUNS)
    with pytest.raises(TypeError, match=r"token_ids must be integers, got torch.float32; pass"):
        classes.labels(torch.ones(3))
    with pytest.raises(TypeError, match=r"token_ids must be integers, got torch.bool; pass"):
        classes.labels(torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"token_ids must be \[\.\.\., T\], got a single number"):
        classes.labels(torch.tensor(3))


def rows_by_hand(runs, embedding):
    wide = embedding.double()
    return torch.stack([sum(wide[piece] for piece in run) / len(run) for run in runs])


@pytest.mark.parametrize("runs", [((5,), (9,), (0,)), RUNS], ids=["single", "runs"])
def test_rows_and_their_gradient(runs):
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(10, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(len(runs), 4, dtype=torch.float64, generator=generator)
    rows, expected = classes_of(runs).rows(embedding), rows_by_hand(runs, embedding)
    torch.testing.assert_close(rows, expected, rtol=1e-14, atol=1e-14)
    (grad,) = torch.autograd.grad((rows * weight).sum(), embedding)
    (grad_by_hand,) = torch.autograd.grad((expected * weight).sum(), embedding)
    torch.testing.assert_close(grad, grad_by_hand, rtol=1e-14, atol=1e-14)


def test_rows_in_half_precision_are_averaged_in_single():
    embedding = torch.tensor([[1.0], [2**-8], [2**-8]]).bfloat16()
    # Summed in bf16, 1 + 2^-8 + 2^-8 stays 1, and a third of it is another number.
    (row,) = classes_of(((0, 1, 2),)).rows(embedding)
    assert row.dtype == torch.bfloat16
    assert row == torch.tensor((1 + 2**-7) / 3).bfloat16() != torch.tensor(1 / 3).bfloat16()


def test_rows_of_another_model():
    with pytest.raises(ValueError) as raised:
        classes_of(RUNS).rows(torch.zeros(9, 4))
    assert str(raised.value) == (
        "embedding must be [V, D] with V above 9, the largest token id, got [9, 4]; use the "
        "tokenizer of this model"
    )
    with pytest.raises(ValueError, match=r"embedding must be \[V, D\] .* got \[40\]; use"):
        classes_of(RUNS).rows(torch.zeros(40))


def test_measuring_before_training_does_not_spoil_the_gradient():
    classes = classes_of(RUNS)
    with torch.inference_mode():
        classes.labels(torch.tensor([5, 7]))
    embedding = torch.ones(10, 2, requires_grad=True)
    classes.rows(embedding).sum().backward()
    assert embedding.grad.sum().item() == pytest.approx(len(RUNS) * 2)


def test_classes_go_through_json():
    classes = CollapseClasses.from_words(byte_level(), {"g": ["she", "widow"], "h": ["he"]})
    again = CollapseClasses.from_dict(json.loads(json.dumps(classes.to_dict())))
    assert again == classes
    assert hash(again) == hash(classes)
    assert again.left_out == classes.left_out != ()
    with pytest.raises(ValueError, match="'stored' must hold the field groups, got no such field;"):
        CollapseClasses.from_dict({"pieces": [[1]], "words": ["she"]})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"pieces": [[True]]}, "pieces[0][0] as a whole number from 0 to 2147483647, got True"),
        ({"pieces": [[10**400]]}, "pieces[0][0] as a whole number from 0 to 2147483647, got 1000"),
        ({"pieces": [[1] * 10**6]}, "pieces[0] as a list of at least 1 and at most 1000, got 1000"),
        ({"pieces": [1]}, "pieces[0] as a list of at least 1 and at most 1000, got 1"),
        ({"words": "she"}, "words as a list, got 'she'"),
        (
            {"words": ["w" * 10**6]},
            "words[0] as a text of at most 1000 characters, got one of 1000",
        ),
        ({"left_out": [["she"]]}, "left_out[0] as a list of 3, got ['she']"),
        ({"more": 1}, "an object of pieces, words, groups, left_out, got one with 'more'"),
    ],
)
def test_what_describes_no_classes_is_refused_in_one_line(change, text):
    stored = {"pieces": [[1]], "words": ["she"], "groups": ["g"], "left_out": []}
    with pytest.raises(ValueError, match=re.escape(f"'stored' must hold {text}")) as caught:
        CollapseClasses.from_dict(stored | change)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("pieces", "words", "message"),
    [
        ((), (), "pieces, words and groups must have one entry .* got 0, 0 and 1; use from_words"),
        (((1,), (2,)), ("he",), "pieces, words and groups must have .* got 2, 1 and 1; use"),
        (((),), ("he",), r"pieces must be token ids, at least one for each class, got \(\); use"),
        (((-1,),), ("he",), r"pieces must be token ids, .* got \(-1,\); use from_words"),
        (((2**31,),), ("he",), r"pieces must be token ids, .* got \(2147483648,\); use"),
    ],
)
def test_classes_that_are_none(pieces, words, message):
    with pytest.raises(ValueError, match=message):
        CollapseClasses(pieces, words, ("g",))


def test_the_same_pieces_twice():
    message = r"pieces must differ from class to class, got \(4, 5\) 2 times; leave the others out"
    with pytest.raises(ValueError, match=message):
        classes_of(((4, 5), (3,), (4, 5)))


def test_the_report_tells_what_was_kept_and_left_out():
    classes = CollapseClasses.from_words(
        word_piece(), {"female": ["she", "woman"], "male": ["he", "manhood"], "other": ["widow"]}
    )
    assert classes.report() == "\n".join(
        [
            "3 classes, 2 forms left out",
            "",
            "female: 2 classes of 2 words; 0 words left out",
            "  kept: she, woman",
            "",
            "male: 1 classes of 1 words; 1 words left out",
            "  kept: he",
            "  left out: manhood (splits into 2 pieces)",
            "",
            "other: 0 classes of 0 words; 1 words left out",
            "  left out: widow (is unknown to the tokenizer)",
        ]
    )


def test_the_report_of_long_lists_names_some_and_counts_the_rest():
    words = ["she", "woman", *(f"no{n}" for n in range(20))]
    classes = CollapseClasses.from_words(word_piece(), {"female": words})
    line = classes.report().splitlines()[-1]
    assert line.startswith("  left out: no0 (") and line.endswith(" and 8 more")
    assert "no12 (" not in line and "no19 (" in classes.report(most=None)


def test_the_report_tells_forms_apart():
    classes = CollapseClasses.from_words(byte_level(), {"g": ["she"]})
    partly = CollapseClasses(
        classes.pieces, classes.words, classes.groups, (LeftOut(" SHE", "g", "splits"),)
    )
    assert "  left out in some forms: ' SHE'" in partly.report().splitlines()


def test_the_public_name():
    assert fastdean.CollapseClasses is CollapseClasses
