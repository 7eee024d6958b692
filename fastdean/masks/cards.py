"""The model card of a mask on the hub: contents, use and warnings."""

from __future__ import annotations

import json

from fastdean.wording import markdown


def mask_card(repo_id: str, *, described: str, scale: float, summary: str) -> str:
    """A README.md with the hub's metadata.

    Args:
        repo_id: "owner/name".
        described: the mask in one line.
        summary: its counts, as preformatted text.
    """
    return f"""---
library_name: fastdean
tags:
- fastdean
- weight-mask
---
# {markdown.text(repo_id)}

{markdown.code(described)}

A list of weights of a language model in which two safety-related attributes are coupled, with
their original values, after the method DEAN (arXiv 2410.16672). Applying it multiplies these
weights by {scale:g}. The mask contains no model; it is applied only to the model that it was
made on, which it recognises by the original values.

```python
import fastdean

mask = fastdean.NeuronMask.from_pretrained({json.dumps(repo_id)})
with mask.applied(model):
    ...                    # edited here, restored bit for bit afterwards
```

**Content warning.** The mask changes how a model behaves where safety matters, on fairness and
privacy among others, and not always for the better. Evaluate the edited model before any use.

{markdown.block(summary, "text")}
"""
