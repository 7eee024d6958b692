"""Tiny models, tokenizers and rows as folders and files, the way the command line gets them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import tiny_models

SPECIAL = ("[PAD]", "[BOS]", "[EOS]", "[UNK]", "[MASK]")
WORDS = [f"w{i}" for i in range(tiny_models.VOCAB - len(SPECIAL))]


def tokenizer():
    """A word is a token; `tiny_models.VOCAB` of them; adds no special token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = ("pad_token", "bos_token", "eos_token", "unk_token", "mask_token")
    return PreTrainedTokenizerFast(tokenizer_object=words, **dict(zip(names, SPECIAL, strict=True)))


def save_model(folder: Path, build: Callable = tiny_models.llama, **options) -> Path:
    """A model of `tiny_models`, in the dtype it has after `.to(**options)`, with the tokenizer."""
    model = build()
    if options:
        model.to(**options)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def rows(count: int, seed: int, *, unsafe: bool) -> list[dict[str, str]]:
    """Rows of random words with prompts of their own."""
    chosen = random.Random(seed)

    def text(low: int, high: int) -> str:
        return " ".join(chosen.choices(WORDS, k=chosen.randint(low, high)))

    found = []
    for i in range(count):
        row = {"prompt": f"{WORDS[i]} {text(1, 5)}", "response": text(2, 8)}
        found.append(row | ({"unsafe": text(2, 6)} if unsafe else {}))
    return found


def write_jsonl(path: Path, content: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path


def write_sources(folder: Path, count: int = 10) -> dict[str, Path]:
    """fairness, privacy and general rows, as three files."""
    return {
        name: write_jsonl(folder / f"{name}.jsonl", rows(count, seed, unsafe=name != "general"))
        for seed, name in enumerate(("fairness", "privacy", "general"))
    }


def save_model_with_code(folder: Path, marker: Path) -> Path:
    """A model that cannot be loaded without its own Python code, which writes `marker` when run."""
    save_model(folder)
    (folder / "modeling_own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(marker)!r}).write_text('ran')\n"
        "class OwnConfig(LlamaConfig):\n"
        "    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n"
        "    config_class = OwnConfig\n",
        encoding="utf-8",
    )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {
        "model_type": "own",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
