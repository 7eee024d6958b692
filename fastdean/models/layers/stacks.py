"""Where a model's decoder layers are: the stacks of its text model, found by structure.

No list of model families. A stack is a ModuleList of layers; towers for images and sound are none
of the text model's, however many layers they have.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from fastdean.models.adapters import base_model, plain_modules


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> layer, in the order of the stacks; of an encoder and a decoder both.

    A text model's stack is its longest ModuleList of layers that lies in no other one, with those
    of the same length beside it, where a model keeps the parts of its layers in lists of their own.
    """
    names = {plain.module: plain.name for plain in plain_modules(model)}
    layers: dict[str, nn.Module] = {}
    for root in text_models(model):
        for layer in _layers(root, names):
            layers.setdefault(names[layer], layer)
    return layers


def text_models(model: nn.Module) -> list[nn.Module]:
    """The parts of a model that read text: its decoder, after its encoder where it has one.

    A model of no transformers class is taken as a whole.
    """
    model = base_model(model)
    found = []
    encoder = _part(model, "get_encoder")
    if encoder is not None and _reads_text(encoder):
        found.append(encoder)
    decoder = _part(model, "get_decoder")
    if decoder is not None:
        # A language model inside a vision-language model may be an encoder with a decoder itself.
        found += text_models(decoder)
    return found or [model]


def _part(model: nn.Module, getter: str) -> nn.Module | None:
    """What a model names as its encoder or decoder, if it is a part of it that has layers."""
    if not hasattr(model, getter):
        return None
    try:
        part = getattr(model, getter)()
    except (AttributeError, NotImplementedError):  # transformers' lookup is best-effort
        return None
    if part is model or not isinstance(part, nn.Module):
        return None
    return part if any(True for _ in _stacks(part)) else None


def _reads_text(module: nn.Module) -> bool:
    """transformers' models say what they take in: token ids, pixels or features of sound.

    Some towers keep the name that every model has by default, and name no text among the kinds of
    input that they take.
    """
    named = getattr(module, "main_input_name", "input_ids") in ("input_ids", "decoder_input_ids")
    return named and "text" in getattr(module, "input_modalities", "text")


def _layers(root: nn.Module, names: dict[nn.Module, str]) -> list[nn.Module]:
    stacks = [stack for stack in _stacks(root) if stack in names]
    if not stacks:
        return []
    longest = max(stacks, key=len)
    parent = names[longest].rpartition(".")[0]
    beside = [
        stack
        for stack in stacks
        if len(stack) == len(longest) and names[stack].rpartition(".")[0] == parent
    ]
    together = [element for position in zip(*beside, strict=True) for element in position]
    return [layer for element in together for layer in _flattened(element)]


def _flattened(element: nn.Module) -> Iterator[nn.Module]:
    """The layers of a stack's element: itself, or those of a block of layers."""
    if isinstance(element, nn.ModuleList):
        for inner in element:
            yield from _flattened(inner)
    else:
        yield element


def _stacks(module: nn.Module) -> Iterator[nn.ModuleList]:
    """The ModuleLists of layers that lie in no other one and in no tower for anything but text."""
    for child in module.children():
        if not _reads_text(child):
            continue
        if isinstance(child, nn.ModuleList):
            if _has_layers(child):
                yield child
        else:
            yield from _stacks(child)


def _has_layers(stack: nn.ModuleList) -> bool:
    """Lists of single projections, norms or embeddings are no stacks."""
    return any(True for element in stack for _ in element.children())
