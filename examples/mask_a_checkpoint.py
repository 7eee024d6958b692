"""Mask a checkpoint on disk, without loading the model.

    python examples/mask_a_checkpoint.py CHECKPOINT MASK OUT

CHECKPOINT is a Hugging Face folder with safetensors, and MASK a folder that score_and_couple.py
wrote for the same weights. OUT is an ordinary folder again, which other programs load as ever.
"""

import sys

import fastdean
from fastdean.masks.checkpoint import verify_checkpoint


def main(checkpoint, mask_folder, out):
    mask = fastdean.NeuronMask.from_pretrained(mask_folder)

    # The files are copied, and only the masked values change. The mask holds the values that it
    # replaces, so that a checkpoint of another model is refused before anything is written.
    # Nothing is loaded: this takes a few megabytes of memory, whatever the model's size.
    result = fastdean.patch_checkpoint(checkpoint, mask, out)
    print(f"{result.values_edited} values in {len(result.files_edited)} files of {result.out}")

    # Weights in other formats are copied as they are: a program that reads those sees no mask.
    for name in result.unpatched_files:
        print(f"not masked: {name}")

    # Reads the masked values again, from the disk.
    verify_checkpoint(out, mask)
    return result


if __name__ == "__main__":
    main(*sys.argv[1:])
