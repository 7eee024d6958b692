"""An installed FastDEAN, tried without its repository: `python -I tests/support/installed.py`.

Run by `make release-check` and by cibuildwheel in an environment that holds the package and its
dependencies alone. No network, no real model. Exits with an error where anything is missing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from importlib import metadata, resources
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastdean

DATA = (
    "data/datasets/fairness.jsonl",
    "data/neutral_words.txt",
    "ops/checked_forms.json",
    "py.typed",
    "report/style.css",
    "data/words/gender.json",
)


def require(holds: bool, what: str) -> None:
    if not holds:
        raise SystemExit(f"this install is not whole: {what}")


def main() -> None:
    place = Path(fastdean.__file__).parent
    require("site-packages" in place.parts, f"imported from {place}, not from an installed package")
    require(fastdean.__version__ == metadata.version("fastdean"), "its version is not its own")
    for name in DATA:
        require((resources.files("fastdean") / name).is_file(), f"{name} is missing")

    command = Path(sysconfig.get_path("scripts")) / "fastdean"
    said = subprocess.run([command, "info", "--json"], capture_output=True, text=True, check=True)
    facts = json.loads(said.stdout)
    require(facts["fastdean"] == fastdean.__version__, "the command is that of another version")
    wanted = "missing" if os.environ.get("FASTDEAN_NATIVE") == "OFF" else "available"
    require(facts["native"]["state"] == wanted, f"its extension is not {wanted}: {facts['native']}")

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
    tokens = [torch.randint(1, 96, (2, 9)) for _ in range(3)]
    loaders = [[{"input_ids": ids, "labels": ids}] for ids in tokens]
    first, second, general = (fastdean.score(model, each, progress=False) for each in loaders)
    mask = fastdean.couple(first, second, general=general, ratio=0.1)
    weights = model.state_dict()
    before = {name: value.clone() for name, value in weights.items()}
    with mask.applied(model):
        changed = sum(int((value != before[name]).sum()) for name, value in weights.items())
    require(0 < len(mask) == changed, f"{changed} weights changed by a mask of {len(mask)}")
    undone = all(torch.equal(value, before[name]) for name, value in weights.items())
    require(undone, "a mask was not undone")
    python = sys.version.split()[0]
    print(f"fastdean {fastdean.__version__} on Python {python}: whole, its extension {wanted}")


if __name__ == "__main__":
    main()
