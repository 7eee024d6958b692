"""Counterfactual text: what each word becomes, what is left alone, and that twice is nothing."""

from __future__ import annotations

import json
from importlib import resources

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdean.debias import augment, counterfactual, irreversible_words

LISTS = {
    "pairs": [["she", "he"], ["mum", "dad"], ["mom", "dad"], ["ex-wife", "ex-husband"]],
    "ambiguous": {},
    "names": {"female": ["Mary", "Soo-jin"], "male": ["Mark", "Jean-Luc"]},
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("He saw himself.", "She saw herself."),
        ("HE LEFT", "SHE LEFT"),
        ("her car and his car", "his car and her car"),
        ("He met her in town.", "She met him in town."),
        ("They met her.", "They met him."),
        ("I saw her, and she waved.", "I saw him, and he waved."),
        ("The red one is his.", "The red one is hers."),
        ("Is it his or hers?", "Is it hers or his?"),
        ("a friend of his, not hers", "a friend of hers, not his"),
        ("Her own sister told him.", "His own brother told her."),
        ("I gave her the key.", "I gave him the key."),
        ('her "little" joke', 'his "little" joke'),
        ("He's here; she'll come.", "She's here; he'll come."),
        ("Ex-Wife or ex-wife", "Ex-Husband or ex-husband"),
        ("Mary's mother", "James's father"),
        ("MARY", "JAMES"),
        ("Sir John laughed", "Lady John laughed"),
        ("yes, sir.", "yes, madam."),
        ("the Lord above", None),
        ("the lord above", "the lady above"),
        ("Father Brown prays", None),
        ("our Founding Fathers", None),
        ("to groom a horse", None),
        ("the groom waited", "the bride waited"),
        ("I miss it", None),
        ("Miss Brown", "Mr Brown"),
        ("Yes, ma’am.", "Yes, sir."),
    ],
)
def test_a_text_becomes(text, expected):
    names = {"female": ["Mary"], "male": ["James"]}
    embedded = json.loads(
        (resources.files("fastdean.data") / "words" / "gender_pairs.json").read_text("utf-8")
    )
    assert counterfactual(text, lists={**embedded, "names": names}) == expected


@pytest.mark.parametrize(
    "text",
    ["", "Rain fell.", "the shed", "he_man", "mark my words", "sHe", "soo-jin", "Theory", "ashe"],
)
def test_what_is_no_such_word_is_left_alone(text):
    assert counterfactual(text, lists=LISTS) is None
    assert counterfactual(text) is None


def test_names_keep_the_spelling_of_the_lists():
    assert counterfactual("Soo-jin, MARK", lists=LISTS) == "Jean-Luc, MARY"


def test_the_first_pair_of_a_word_counts_and_the_others_are_one_way():
    assert counterfactual("mom and dad", lists=LISTS) == "dad and mum"
    assert irreversible_words(lists=LISTS) == ("mom",)


def _reversible_words():
    listed = json.loads(
        (resources.files("fastdean.data") / "words" / "gender_pairs.json").read_text("utf-8")
    )
    one_way = set(irreversible_words())
    words = sorted({word for pair in listed["pairs"] for word in pair} - one_way)
    return words, listed["names"]["female"] + listed["names"]["male"]


WORDS, NAMES = _reversible_words()
CASES = (str.lower, str.capitalize, str.upper)
FILLERS = ("the", "car", "of", "Dr.", "saw", "heroic", "shed", "—", "3", "herd")


@given(
    st.lists(
        st.one_of(
            st.builds(
                lambda word, case: case(word), st.sampled_from(WORDS), st.sampled_from(CASES)
            ),
            st.sampled_from(NAMES),
            st.sampled_from([name.upper() for name in NAMES]),
            st.sampled_from(FILLERS),
        )
    ),
    st.sampled_from([" ", "\n", ", ", "; ", " - ", "/"]),
)
def test_twice_is_the_original_for_words_with_one_counterpart(words, between):
    text = between.join(words)
    once = counterfactual(text)
    gendered = [word for word in words if word not in FILLERS]
    assert (once is not None) == bool(gendered)
    assert once is None or counterfactual(once) == text


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["her car", "his own", "met her in", "met him at", "is hers, said"]),
            st.sampled_from(["he", "She", "the nurse", "Mary", "that day"]),
        ),
        min_size=1,
    )
)
def test_twice_is_the_original_for_pronouns_in_their_places(parts):
    text = " ".join(" ".join(part) for part in parts)
    assert counterfactual(counterfactual(text)) == text


def test_the_reversible_words_are_most_of_them_and_her_is_none():
    one_way = irreversible_words()
    assert {"her", "his", "him", "hers", "mrs", "lady"} <= set(one_way)
    assert not {"she", "he", "herself", "woman", "actress"} & set(one_way)
    assert len(WORDS) > 5 * len(one_way)


def test_rows_are_followed_by_their_copies():
    turns = [{"role": "user", "content": "Who is he?"}, {"role": "assistant", "content": "A king."}]
    rows = [
        {"text": "He reads.", "id": 1},
        {"text": "Rain.", "topic": "he"},
        {"premise": "A girl.", "hypothesis": "A child."},
        {"messages": turns},
        {"prompt": "her?", "response": "yes", "unsafe": "no, him"},
    ]
    assert augment(rows) == [
        rows[0],
        {"text": "She reads.", "id": 1},
        rows[1],
        rows[2],
        {"premise": "A boy.", "hypothesis": "A child."},
        rows[3],
        {
            "messages": [
                {"role": "user", "content": "Who is she?"},
                {"role": "assistant", "content": "A queen."},
            ]
        },
        rows[4],
        {"prompt": "him?", "response": "yes", "unsafe": "no, her"},
    ]
    assert rows[3]["messages"] is turns and turns[0]["content"] == "Who is he?"


@pytest.mark.parametrize(
    ("turn", "found"),
    [
        ({"role": "assistant", "tool_calls": []}, r"got the keys \['role', 'tool_calls'\]; write"),
        ("she", "got 'she'; write"),
    ],
)
def test_a_turn_without_content_is_refused(turn, found):
    with pytest.raises(ValueError, match=f'messages must be turns with a "content", {found}'):
        augment([{"messages": [{"role": "user", "content": None}, turn]}])


@pytest.mark.parametrize(
    ("lists", "text"),
    [
        ({"pairs": []}, "must have the keys pairs, ambiguous, names, got no 'ambiguous'"),
        ({**LISTS, "pairs": [["she"]]}, r"pairs of two words .*, got \['she'\]"),
        ({**LISTS, "pairs": ["he"]}, "pairs of two words .*, got 'he'"),
        ({**LISTS, "pairs": [["a", "b"], ["b", "c"]]}, "one side of its pairs, got 'b' on both"),
        ({**LISTS, "names": {"female": ["Mary"]}}, "as many female as male names, got 1 and 0"),
        (
            {**LISTS, "names": {"female": ["Mary", "Mary"], "male": ["Mark", "Tom"]}},
            "every name once, got 'Mary' twice",
        ),
    ],
)
def test_lists_of_another_form_are_refused(lists, text):
    with pytest.raises(ValueError, match=text):
        counterfactual("he", lists=lists)
