"""Tokenizers that can spell any English sentence in the tiny models' vocabulary, and oracles.

Oracles take one text at a time, plain logits, and the softmax in float64.
"""

from __future__ import annotations

import string

import torch
from tiny_models import VOCAB

_SPECIAL = ("[PAD]", "<s>", "</s>", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_WHOLE = ("the", "he", "she", "is", "nurse", "man", "woman", "cook", "worker", "poor", "rich", "a")
SMALL_BOOTSTRAP = {"resamples": 200, "progress": False}
BATCH_SIZES = [1, 40, 4096]


def spelling_tokenizer(kind: str):
    """Whole words of `_WHOLE`, anything else letter by letter ("##" before all but the first).

    kind: "masked" puts [CLS] and [SEP] around a text, "causal" <s> before it, "bare" nothing.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = string.ascii_lowercase
    pieces = [*_SPECIAL, *letters, *(f"##{letter}" for letter in letters), *",.'", *_WHOLE[1:-1]]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    assert len(vocabulary) <= VOCAB
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    around = {"masked": "[CLS] $A [SEP]", "causal": "<s> $A", "bare": "$A"}[kind]
    named = [(token, vocabulary[token]) for token in ("<s>", "[CLS]", "[SEP]") if token in around]
    pair = "[CLS] $A [SEP] $B:1 [SEP]:1" if kind == "masked" else None
    if named:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=around, pair=pair, special_tokens=named
        )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "</s>"}
    if kind == "masked":
        special |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    else:
        special |= {"bos_token": "<s>"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=[name for name in inputs if kind == "masked" or "type" not in name],
        **special,
    )


@torch.no_grad()
def log_p(model, ids: list[int]) -> torch.Tensor:
    """float64 [T, V]."""
    return model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)


def causal_oracle(model, ids: list[int], places=None) -> float:
    """log p of the tokens at `places`, default all after the first, each given those before it."""
    found = log_p(model, ids)
    places = range(1, len(ids)) if places is None else places
    return sum(float(found[t - 1, ids[t]]) for t in places)


def masked_oracle(model, tokenizer, ids: list[int], asked, hidden) -> float:
    """log p of the tokens at `asked` with those at `hidden` masked, all at once."""
    seen = [tokenizer.mask_token_id if t in hidden else token for t, token in enumerate(ids)]
    found = log_p(model, seen)
    return sum(float(found[t, ids[t]]) for t in asked)


def pseudo_oracle(model, tokenizer, ids: list[int], places=None) -> float:
    """Sum of log p of the tokens at `places`, default all but the ends, one mask at a time."""
    places = range(1, len(ids) - 1) if places is None else places
    return sum(masked_oracle(model, tokenizer, ids, [t], [t]) for t in places)


def hooks(model) -> int:
    """How many hooks hang on the model besides those transformers collects hidden states with."""
    return sum(
        not hook.__module__.startswith("transformers.")
        for module in model.modules()
        for found in (module._forward_hooks, module._forward_pre_hooks)
        for hook in found.values()
    )
