"""The model card of a mask on the hub: contents, use and warnings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastdean.wording import markdown


def coupled_sets(manifest: Mapping[str, Any]) -> list[str]:
    """What the two coupled data sets were called in the run that scored them; empty if unknown."""
    found = []
    for which in ("first", "second"):
        part: Any = manifest
        for key in (which, "data", "set"):
            part = part.get(key) if isinstance(part, Mapping) else None
        found.append(part)
    return found if all(isinstance(name, str) for name in found) else []


def on_these(sets: Sequence[str]) -> str:
    """As in " on fairness and privacy, and elsewhere,"; "" where no set is known."""
    names = " and ".join(markdown.text(name) for name in sets)
    return f" on {names}, and elsewhere," if names else ""


def mask_card(
    repo_id: str, *, described: str, scale: float, summary: str, sets: Sequence[str] = ()
) -> str:
    """A README.md with the hub's metadata.

    Args:
        repo_id: "owner/name".
        described: the mask in one line.
        summary: its counts, as preformatted text.
        sets: what the two data sets that were coupled are called; empty if unknown.
    """
    coupled = " and ".join(markdown.text(name) for name in sets) or "two data sets"
    return f"""---
library_name: fastdean
tags:
- fastdean
- weight-mask
---
# {markdown.text(repo_id)}

{markdown.code(described)}

A list of weights of a language model in which {coupled} are coupled, with their original
values, after the method DEAN (arXiv 2410.16672). Applying it multiplies these
weights by {scale:g}. The mask contains no model; it is applied only to the model that it was
made on, which it recognises by the original values.

```python
import fastdean

mask = fastdean.NeuronMask.from_pretrained({json.dumps(repo_id)})
with mask.applied(model):
    ...                    # edited here, restored bit for bit afterwards
```

**Content warning.** The mask changes how a model behaves{on_these(sets)} where safety
matters, and not always for the better. Evaluate the edited model before any use.

{markdown.block(summary, "text")}
"""
