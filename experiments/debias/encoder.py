"""A small masked language model, trained here from scratch: where none can be downloaded.

It knows little of English: it shows that the masked methods run, and in which direction they push,
and nothing about how far they would push a model of use.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.harness.models import Shape, random_encoder
from benchmarks.harness.store import say
from fastdean.data.sources import load_rows
from fastdean.debias import augment, mask_tokens, masked_lm_loss
from fastdean.debias.gender_words import GenderWords
from fastdean.debias.texts import TextEncoder, collate
from fastdean.evaluation.bias import bec_pro_rows

HIDDEN, LAYERS = 128, 2
_SPECIAL = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
# With answers, unlike the text to be trained on: a larger vocabulary, and longer sentences.
_OTHER_TEXT = ("embedded:fairness", "embedded:privacy", "embedded:general")
_MAX_LENGTH = 64
_BATCH_SIZE = 32
_LEARNING_RATE = 1e-3
_MAX_GRADIENT_NORM = 1.0
_NEUTRAL_OCCUPATION = "worker"
_SEED = 17


def trained_encoder(
    trained: Sequence[str], held_out: Sequence[str], steps: int, device: torch.device
) -> tuple[nn.Module, Any]:
    """The model, in eval mode, and its tokenizer; the same every time on a CPU.

    Trained on `trained` without swapped copies, so that whatever bias it has is learned; of
    `held_out` only the words are looked at.
    """
    texts = [*trained, *_other_texts()]
    swapped = [row["text"] for row in augment([{"text": text} for text in (*trained, *held_out)])]
    sentences = [row["sentence"] for row in bec_pro_rows()]
    tokenizer = word_tokenizer([*texts, *swapped, *sentences, _NEUTRAL_OCCUPATION])
    shape = Shape(HIDDEN, 4 * HIDDEN, LAYERS, 2, len(tokenizer))
    model = random_encoder(shape, device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(_SEED)
        _train(model.train(), tokenizer, texts, steps, device)
    return model.eval(), tokenizer


def word_tokenizer(texts: Iterable[str]) -> Any:
    """Every word and sign of `texts`, in lower case, is a token; [CLS] and [SEP] stand around."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(unk_token=_SPECIAL["unk_token"]))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(
        special_tokens=list(_SPECIAL.values()), show_progress=False, vocab_size=1 << 20
    )
    words.train_from_iterator(texts, trainer)
    around = [(token, words.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=around
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, **_SPECIAL)


def _other_texts() -> list[str]:
    rows = [row for source in _OTHER_TEXT for row in load_rows(source)]
    return [row[part] for row in rows for part in ("prompt", "response")]


def _train(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], steps: int, device: torch.device
) -> None:
    """Masked language modelling, `_BATCH_SIZE` texts a step, at a rate that falls to 0."""
    encoder = TextEncoder(tokenizer, GenderWords.from_lists(None), max_length=_MAX_LENGTH)
    encoded = [encoder(text) for text in texts]
    ordinary = torch.arange(len(_SPECIAL), len(tokenizer))
    generator = torch.Generator().manual_seed(_SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * (1 - step / steps)
        chosen = torch.randint(len(encoded), (_BATCH_SIZE,), generator=generator).tolist()
        batch = collate([encoded[i] for i in chosen], tokenizer.pad_token_id)
        masked = mask_tokens(
            batch.input_ids,
            ~batch.special,
            mask_id=tokenizer.mask_token_id,
            random_ids=ordinary,
            generator=generator,
        )
        logits = model(
            input_ids=masked.input_ids.to(device), attention_mask=batch.attention_mask.to(device)
        ).logits
        loss = masked_lm_loss(logits, masked.labels.to(device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % max(1, steps // 5) == 0:
            say(f"  {step + 1}/{steps}  masked loss {loss.item():.3f}")
