"""Random examples, loader batches and a word-level tokenizer for the tiny models."""

from __future__ import annotations

import torch
from tiny_models import VOCAB

LENGTHS = (3, 9, 17, 2, 12, 5)
WORDS = ("the", "cat", "dog", "sat", "ran", "on", "a", "mat", "yes", "no", "user", "assistant", ":")


def make_examples(seed=0, lengths=LENGTHS, vocab=VOCAB):
    """(input_ids [T], labels [T]) with the first third as prompt; fresh random tokens."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for length in lengths:
        ids = torch.randint(3, vocab, (length,), generator=generator)
        labels = ids.clone()
        labels[: max(1, length // 3)] = -100
        examples.append((ids, labels))
    return examples


def batches(examples, size, side="right", pad=0):
    """Padded loader batches of `size` examples."""
    for start in range(0, len(examples), size):
        group = examples[start : start + size]
        width = max(ids.numel() for ids, _ in group) + 2
        columns = {"input_ids": pad, "labels": -100, "attention_mask": 0}
        batch = {key: torch.full((len(group), width), fill) for key, fill in columns.items()}
        for row, (ids, labels) in enumerate(group):
            part = slice(0, ids.numel()) if side == "right" else slice(width - ids.numel(), width)
            batch["input_ids"][row, part] = ids
            batch["labels"][row, part] = labels
            batch["attention_mask"][row, part] = 1
        yield batch


CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def word_tokenizer(bos=True, chat_template=CHAT_TEMPLATE):
    """One token per word of `WORDS`; with `bos`, <s> before every text, as Llama's tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(("<pad>", "<s>", "</s>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    wrapped.chat_template = chat_template
    return wrapped
