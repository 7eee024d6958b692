"""A tokenizer that knows some gendered words, folders of tiny models with it, and texts of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import tiny_models

SPECIAL = ("[PAD]", "[BOS]", "[EOS]", "[UNK]", "[MASK]")
LISTED = """
    she he her his him woman man women men girl boy mother father sister brother nurse doctor
    teacher pilot farmer the a saw met said works reads and with in town today . old
"""
WORDS = LISTED.split()
TEXTS = [
    "she works with the nurse and he works with the doctor .",
    "the doctor said he met her in town .",
    "a pilot saw the old woman today .",
    "his mother reads and her father works .",
    "the teacher met the farmer and she said he works .",
    "the man and the woman met in town .",
    "her sister saw his brother today .",
    "he said she reads with the girl .",
    "the boy met a man and the old nurse .",
    "she saw him and he saw her .",
]


def tokenizer():
    """A word is a token; adds no special token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = ("pad_token", "bos_token", "eos_token", "unk_token", "mask_token")
    return PreTrainedTokenizerFast(tokenizer_object=words, **dict(zip(names, SPECIAL, strict=True)))


def write_place(folder: Path, build=tiny_models.llama) -> dict[str, Path]:
    """model, text (rows), words (two groups of them) and crows (pairs), as folder and files."""
    folder.mkdir(parents=True, exist_ok=True)
    place = {name: folder / name for name in ("model", "text.jsonl", "words.json", "crows.csv")}
    build().save_pretrained(place["model"])
    tokenizer().save_pretrained(place["model"])
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    place["text.jsonl"].write_text(rows, encoding="utf-8")
    groups = {"female": ["she", "her", "woman"], "male": ["he", "his", "man", "gentleman"]}
    place["words.json"].write_text(json.dumps(groups), encoding="utf-8")
    with open(place["crows.csv"], "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["sent_more", "sent_less", "stereo_antistereo", "bias_type"])
        for text in TEXTS[:8]:
            other = text.replace("she", "he").replace("woman", "man").replace("her ", "his ")
            table.writerow([text, f"{other} old", "stereo", "gender"])
    return {path.stem: path for path in place.values()}
