"""A checkpoint of random values in the form of Hugging Face's, and a mask on it."""

from __future__ import annotations

import json
import random
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
    """The MLPs of a language model in bf16, in `shards` files, and nothing else of it."""

    hidden: int
    intermediate: int
    layers: int
    shards: int

    @classmethod
    def sized(cls, gigabytes: float, shards: int, *, toy: bool) -> Checkpoint:
        """The fewest layers that make `gigabytes` (1e9 bytes); toy: two tiny ones."""
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
    generator, places = torch.Generator().manual_seed(_SEED), random.Random(_SEED)
    weight_map: dict[str, str] = {}
    entries: dict[str, MaskEntry] = {}
    names, shards = list(checkpoint.matrices), checkpoint.shards
    for shard in range(shards):
        file_name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        tensors = {}
        for name in names[len(names) * shard // shards : len(names) * (shard + 1) // shards]:
            weight = torch.empty(checkpoint.matrices[name], dtype=torch.bfloat16)
            weight.normal_(generator=generator)
            index = torch.tensor(sorted(places.sample(range(weight.numel()), MASKED_EACH)))
            entries[name] = MaskEntry(index, weight.flatten()[index], tuple(weight.shape))
            tensors[name], weight_map[name] = weight, file_name
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": checkpoint.hidden,
        "intermediate_size": checkpoint.intermediate,
        "num_hidden_layers": checkpoint.layers,
        "torch_dtype": "bfloat16",
    }
    index = {"metadata": {"total_size": checkpoint.nbytes}, "weight_map": weight_map}
    for name, content in (("model.safetensors.index.json", index), ("config.json", config)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    # What the disk has still to write would be counted in the first turn.
    for path in (*folder.iterdir(), folder):
        atomic.flush(path)
    return fastdean.NeuronMask(entries)
