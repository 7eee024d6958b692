"""A tiny model with its own tokenizer as a folder: what `load_model` reads without a network."""

from __future__ import annotations

from collections import Counter

from tiny_models import VOCAB, llama

from fastdean.data.sources import load_rows


def save_language_model(folder: str) -> None:
    """Save a random Llama and a tokenizer of the most frequent words of the embedded rows."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    texts = [row["response"] for row in load_rows("embedded:general")]
    frequent = Counter(word for text in texts for word in text.split()).most_common(VOCAB - 3)
    words = ["<pad>", "<unk>", "</s>", *(word for word, _ in frequent)]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
    )
    llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
