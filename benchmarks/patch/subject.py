"""A checkpoint of random values in the form of Hugging Face's, and a mask on it."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import fastdean
from fastdean.files import atomic
from fastdean.masks import MaskEntry

MASKED_EACH = 25
_ITEM_BYTES = torch.bfloat16.itemsize
_SIZES = (2048, 8192)  # hidden and intermediate, as in models of a billion parameters
_TOY_SIZES, _TOY_LAYERS = (16, 32), 2
_SEED = 11


@dataclass(frozen=True)
class Checkpoint:
    """The MLPs of a language model in bf16, and nothing else of it.

    Attributes:
        shards: number of files, as equal as the matrices allow.
    """

    hidden: int
    intermediate: int
    layers: int
    shards: int

    @classmethod
    def sized(cls, gigabytes: float, shards: int, *, toy: bool) -> Checkpoint:
        """The fewest layers that make `gigabytes` (1e9 bytes); toy: two tiny ones.

        Raises:
            ValueError: more shards than matrices.
        """
        hidden, intermediate = _TOY_SIZES if toy else _SIZES
        layer_bytes = 3 * hidden * intermediate * _ITEM_BYTES
        layers = _TOY_LAYERS if toy else -int(-gigabytes * 1e9 // layer_bytes)
        if shards > 3 * layers:
            raise ValueError(
                f"shards must be at most {3 * layers}, the matrices of the checkpoint, got "
                f"{shards}; pass fewer, or more gigabytes"
            )
        return cls(hidden, intermediate, layers, shards)

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Name -> shape, in the order of the layers."""
        wide, narrow = (self.intermediate, self.hidden), (self.hidden, self.intermediate)
        projections = {"gate_proj": wide, "up_proj": wide, "down_proj": narrow}
        return {
            f"model.layers.{layer}.mlp.{projection}.weight": shape
            for layer in range(self.layers)
            for projection, shape in projections.items()
        }

    @property
    def nbytes(self) -> int:
        """Of all values."""
        return len(self.matrices) * self.hidden * self.intermediate * _ITEM_BYTES

    @property
    def masked(self) -> int:
        """Number of values in the mask."""
        return MASKED_EACH * len(self.matrices)

    @property
    def name(self) -> str:
        return (
            f"{self.nbytes / 1e9:.3g} GB in {self.shards} shards, {len(self.matrices)} matrices of "
            f"{self.intermediate} x {self.hidden}, {MASKED_EACH} values masked in each"
        )


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> fastdean.NeuronMask:
    """Write the checkpoint as a new folder, through to the disk, and return a mask on it.

    The same values and the same mask every time. One shard at a time is held.
    """
    from safetensors.torch import save_file

    folder.mkdir()
    generator = torch.Generator().manual_seed(_SEED)
    places = random.Random(_SEED)
    weight_map: dict[str, str] = {}
    entries: dict[str, MaskEntry] = {}
    for number, names in enumerate(_split(list(checkpoint.matrices), checkpoint.shards), start=1):
        file_name = f"model-{number:05d}-of-{checkpoint.shards:05d}.safetensors"
        tensors = {}
        for name in names:
            tensors[name] = torch.empty(checkpoint.matrices[name], dtype=torch.bfloat16)
            tensors[name].normal_(generator=generator)
            entries[name] = _entry(tensors[name], places)
            weight_map[name] = file_name
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
    _write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": checkpoint.nbytes}, "weight_map": weight_map},
    )
    _write_json(folder / "config.json", _config(checkpoint))
    # What the disk has still to write would be counted in the first turn.
    for path in (*folder.iterdir(), folder):
        atomic.flush(path)
    return fastdean.NeuronMask(entries)


def _split(names: Sequence[str], parts: int) -> list[Sequence[str]]:
    bounds = [len(names) * part // parts for part in range(parts + 1)]
    return [names[bounds[part] : bounds[part + 1]] for part in range(parts)]


def _entry(weight: torch.Tensor, places: random.Random) -> MaskEntry:
    index = torch.tensor(sorted(places.sample(range(weight.numel()), MASKED_EACH)))
    return MaskEntry(index, weight.reshape(-1)[index], tuple(weight.shape))


def _config(checkpoint: Checkpoint) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": checkpoint.hidden,
        "intermediate_size": checkpoint.intermediate,
        "num_hidden_layers": checkpoint.layers,
        "torch_dtype": "bfloat16",
    }


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
