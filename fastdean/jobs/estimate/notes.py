"""What an estimate does not count or divide, in sentences."""

from __future__ import annotations

from typing import Any

from fastdean.jobs.estimate.job import EstimateJob
from fastdean.jobs.estimate.wording import counted
from fastdean.wording.printable import one_line

# The least share of the parameters that is told: what does not round to 0 %.
_SAID = 0.005


def quantised(model: Any) -> list[str]:
    """A sentence on a checkpoint whose weights are counted as what they are not in its files."""
    asked = getattr(model.config, "quantization_config", None)
    if not asked:
        return []
    settings = asked if isinstance(asked, dict) else asked.to_dict()
    method = str(settings.get("quant_method") or "no name").split(".")[-1].lower()
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return [
        f"The checkpoint's weights are quantised ({one_line(method)}), and counted in {dtype}: "
        "only weights that are no longer quantised once they are loaded can be scored."
    ]


def notes(
    job: EstimateJob,
    ranks: int,
    on_gpu: bool,
    covered: dict[str, Any],
    dense: bool,
    by_example: int,
    timed: bool,
) -> list[str]:
    found = []
    if job.tensor_parallel > 1:
        owned = " and owns whole experts" if job.expert_parallel > 1 else ""
        found.append(
            f"Each of the {job.tensor_parallel} ranks of a model has its part of the weights that "
            f"the plan splits{owned}, with their sums, and all examples of the model's share."
        )
    elif ranks > 1:
        found.append(
            f"Each of the {ranks} ranks holds the whole model, all sums and its own batch; only "
            "examples, and what layers return for them, are divided. Of a model that FSDP2 shards "
            "the weights are divided too, but for one layer at a time and what is outside of the "
            "layers."
        )
    if on_gpu:
        found.append("What the GPU's driver and libraries take for themselves is not counted.")
    if dense:
        found.append("With keep_top 1 the sums of all data sets stay to the end.")
        if job.granularity == "weight":
            found.append("Weights cannot stay in their files then: streaming needs keep_top.")
    if by_example:
        verb = "is" if by_example == 1 else "are"
        found.append(
            f"{counted(by_example, 'parameter')} {verb} scored by example: a forward and backward "
            "pass for each example, in a batch of its own, is counted beside the others."
        )
    unscorable = covered["unscorable"]
    share = sum(unscorable.values()) / max(1, covered["model_parameters"])
    # Routers alone are less than can be said in whole percents.
    if share >= _SAID:
        found.append(
            f"{share:.0%} of the parameters are in tensors that are not scored and have no sums, "
            f"such as {max(unscorable, key=unscorable.__getitem__)}."
        )
    if timed:
        found.append("Reading files takes the disk's time, which is in no figure.")
    return found


def unrunnable(model: Any) -> list[str]:
    """A sentence where queries and keys, as attention usually pairs them, do not go together."""
    from fastdean.models.model_state import text_config

    config = text_config(model)
    heads, keys = (
        getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads")
    )
    if not (isinstance(heads, int) and isinstance(keys, int)) or (keys > 0 and not heads % keys):
        return []
    return [
        f"The configuration's num_key_value_heads ({keys}) does not divide its num_attention_heads "
        f"({heads}): attention that shares keys among its queries cannot run like that."
    ]
