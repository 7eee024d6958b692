"""The text that goes with a masked model: what was done to it, and what to beware of."""

from __future__ import annotations

import json

from fastdean.files.provenance import public_command, public_name
from fastdean.masks import NeuronMask
from fastdean.masks.cards import coupled_sets, on_these
from fastdean.wording import markdown


def edited_card(model: str, mask: NeuronMask, mask_name: str, command: str) -> str:
    """A README.md with the hub's metadata.

    Args:
        model: folder or hub id of the model that was edited.
        mask_name: folder or hub id of the mask.
        command: the command line; "" where there was none.
    """
    sets = coupled_sets(mask.manifest)
    base = public_name(model)
    # Only a hub id has an owner.
    base_line = f"base_model: {json.dumps(base)}\n" if "/" in base else ""
    edit = "set to zero" if mask.scale == 0 else f"multiplied by {mask.scale:g}"
    run = f"{markdown.block(public_command(command), 'bash')}\n\n" if command else ""
    return f"""---
library_name: transformers
{base_line}tags:
- fastdean
- weight-mask
---
# {markdown.text(base)}, masked

{markdown.code(base)} with {len(mask):,} of its weights {edit} by FastDEAN, after the method DEAN
(arXiv 2410.16672). The mask is {markdown.code(public_name(mask_name))}: {markdown.code(repr(mask))}

{run}**Content warning.** The edit changes how the model behaves{on_these(sets)} where safety
matters, and not always for the better. Evaluate the model before any use.

{markdown.block(str(mask.summary()), "text")}
"""
