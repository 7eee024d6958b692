"""Tiny tokenizers of the three kinds, built from a page of words, never downloaded.

`TOKENIZERS` maps a readable name to a function without arguments. Every word of WORDS is one token
of each; "widow" is 2 tokens or more, except in WordPiece, which does not know it at all.
"""

from __future__ import annotations

from functools import cache

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PEOPLE = ["he", "she", "him", "her", "man", "woman", "they", "sister"]
_PAGE = (
    "the a of and in it is was on at by table stone river house garden window door bread water "
    "light paper music letter street school winter summer morning evening yellow green silver "
    "apple lemon orange butter cotton leather copper iron glass wooden gentle quiet narrow "
    "bright walk speak listen carry follow open close under over near against between during "
    "saw said "
)
THINGS = _PAGE.split()
WORDS = [*PEOPLE, *THINGS]
ACCENTED = ["café", "élan"]


@cache
def byte_level():
    """A token for each word and each capitalised word, at a text's start and behind a space.

    "hood" is a token at a text's start only.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=5000,
        special_tokens=["<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    forms = [form for word in [*WORDS, *ACCENTED] for form in (word, word.capitalize())]
    tokenizer.train_from_iterator([*forms, "hood", *(f" {form}" for form in forms)], trainer)
    return _fast(tokenizer, pad_token="<pad>")


@cache
def word_piece():
    """Lower case only, and no spaces."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    entries = ["[UNK]", "[PAD]", "[MASK]", *WORDS, "##s", "##hood"]
    vocabulary = {entry: number for number, entry in enumerate(entries)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _fast(tokenizer, unk_token="[UNK]", pad_token="[PAD]", mask_token="[MASK]")


@cache
def sentence_piece():
    """Words begin with the sign of a space, which is also put before every text."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    whole = [f"▁{form}" for word in WORDS for form in (word, word.capitalize())]
    letters = [*LETTERS, *LETTERS.upper(), "▁"]
    scored = [("<unk>", 0.0), ("<pad>", 0.0)]
    scored += [(piece, -2.0) for piece in dict.fromkeys(whole)]
    scored += [(piece, -8.0) for piece in letters]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=0))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _fast(tokenizer, unk_token="<unk>", pad_token="<pad>")


def _fast(tokenizer, **special):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


TOKENIZERS = {
    "byte-level": byte_level,
    "wordpiece": word_piece,
    "sentencepiece": sentence_piece,
}
