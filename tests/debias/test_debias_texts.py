"""Where the gendered and the neutral words of a text end, in tokens."""

from __future__ import annotations

import pytest
import torch

from fastdean.debias.gender_words import GenderWords
from fastdean.debias.texts import (
    FEMALE,
    MALE,
    NEUTRAL,
    OTHER,
    TextEncoder,
    collate,
    embedded_neutral_words,
)

LISTS = {"pairs": [["she", "he"], ["her", "his"]], "ambiguous": {}, "names": {}}
PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "she", "he", "her", "nur", "##se", "##s", "##d", ".")


def word_piece():
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {piece: i for i, piece in enumerate(PIECES)}
    pieces = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    pieces.normalizer = normalizers.Lowercase()
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="[PAD]", unk_token="[UNK]")


def byte_level():
    """Spaces belong to the word after them, as in GPT-2: "he" and " he" are two tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted({*"ĠSHsheinur."})
    merges = [("h", "e"), ("Ġ", "he"), ("s", "he"), ("Ġ", "she")]
    vocabulary = {piece: i for i, piece in enumerate([*letters, "he", "Ġhe", "she", "Ġshe"])}
    pieces = Tokenizer(models.BPE(vocabulary, merges))
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=pieces)


def kinds(tokenizer, text, max_length=50):
    encoder = TextEncoder(
        tokenizer, GenderWords.from_lists(LISTS), neutral_words=["Nurse"], max_length=max_length
    )
    return encoder(text)


def test_a_word_is_known_by_its_last_piece():
    text = kinds(word_piece(), "She d nurse he nurses .")
    assert [PIECES[i] for i in text.input_ids[3:5]] == ["nur", "##se"]
    assert text.kinds.tolist() == [
        OTHER,
        FEMALE,
        OTHER,
        OTHER,
        NEUTRAL,
        MALE,
        OTHER,
        OTHER,
        OTHER,
        OTHER,
        OTHER,
    ]
    assert text.special.tolist() == [True] + [False] * 9 + [True]


def test_a_word_that_is_cut_off_is_none():
    whole, cut = kinds(word_piece(), "she nurse"), kinds(word_piece(), "she nurse", max_length=4)
    assert NEUTRAL in whole.kinds.tolist()
    assert cut.kinds.tolist() == [OTHER, FEMALE, OTHER, OTHER]


@pytest.mark.parametrize("text", ["ſhe . he", "hıſ . he", "hİs . he", "HER . he"])
def test_letters_of_which_only_a_pattern_takes_the_case_for_the_same_are_no_word(text):
    found = kinds(word_piece(), text).kinds.tolist()
    assert found[-2] == MALE
    assert (FEMALE in found) == text.startswith("HER")


def test_without_any_word_no_token_is_of_a_kind():
    words = GenderWords.from_lists({"pairs": [], "ambiguous": {}, "names": {}})
    text = TextEncoder(word_piece(), words, neutral_words=[], max_length=9)("she . he")
    assert not text.kinds.any()


@pytest.mark.parametrize("own", ["none", "both"])
@pytest.mark.parametrize("text", ["she d nurse", None])
def test_the_tokenizers_own_settings_are_as_before_also_after_an_error(own, text):
    tokenizer = word_piece()
    backend = tokenizer.backend_tokenizer
    if own == "both":
        backend.enable_truncation(7, stride=1, direction="left")
        backend.enable_padding(length=9, pad_id=0, pad_token="[PAD]")
    before = backend.to_str()
    if text is None:
        with pytest.raises((TypeError, ValueError)):
            kinds(tokenizer, text)
    else:
        assert len(kinds(tokenizer, text, max_length=4).input_ids) == 4
    assert backend.to_str() == before


def test_spaces_inside_tokens_do_no_harm():
    text = kinds(byte_level(), "he nurse she.")
    assert text.kinds.tolist() == [MALE, *[OTHER] * 5, NEUTRAL, FEMALE, OTHER]


def test_padding_is_special_and_masked():
    texts = [kinds(word_piece(), "she"), kinds(word_piece(), "he he")]
    batch = collate(texts, pad_id=0)
    assert batch.input_ids.tolist() == [[2, 4, 3, 0], [2, 5, 5, 3]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.special.tolist() == [[True, False, True, True], [True, False, False, True]]
    assert batch.kinds.tolist() == [[0, FEMALE, 0, 0], [0, MALE, MALE, 0]]


def test_the_neutral_words_are_words_of_no_gender():
    neutral = embedded_neutral_words()
    words = GenderWords.from_lists()
    assert len(set(neutral)) == len(neutral) >= 100
    assert not set(neutral) & (words.female | words.male)
    assert all(word == word.lower() and word.isalpha() for word in neutral)


@pytest.mark.parametrize("fill", [0, 9])
def test_the_pad_id_is_the_callers(fill):
    texts = [kinds(word_piece(), "she"), kinds(word_piece(), "he he")]
    assert torch.equal(collate(texts, fill).input_ids[0, 3], torch.tensor(fill))
