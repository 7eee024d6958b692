"""Which classes of language models the installed transformers has."""

from __future__ import annotations

from typing import Any, NamedTuple

KINDS = ("causal", "masked", "seq2seq")


class Listed(NamedTuple):
    """A class in transformers' table of language models of a kind, with a configuration of it."""

    kind: str
    model_type: str
    class_name: str

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.model_type}"

    def config_class(self) -> Any:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        return CONFIG_MAPPING[self.model_type]

    def model_class(self) -> Any:
        import transformers

        return getattr(transformers, self.class_name)


def listed() -> dict[str, Listed]:
    """By name, in the order of transformers' tables: causal, masked, encoder-decoder.

    A class that stands in two tables with the same configuration is in the first one alone, but for
    those that are causal and masked: these compute something else with each.
    """
    from transformers.models.auto import modeling_auto as auto

    tables = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )
    found, seen = {}, set()
    for kind, table in zip(KINDS, tables, strict=True):
        for model_type, class_name in table.items():
            # Encoder-decoder classes stand in the table of masked ones too.
            if kind == "masked" and model_type in tables[2] and class_name == tables[2][model_type]:
                continue
            if kind == "seq2seq" and (model_type, class_name) in seen:
                continue
            seen.add((model_type, class_name))
            entry = Listed(kind, model_type, class_name)
            found[entry.name] = entry
    return found
