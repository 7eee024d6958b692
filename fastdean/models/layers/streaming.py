"""A model whose weights stay in the files of its checkpoint, and come in one layer at a time.

The model is made from its configuration, its parameters on the meta device. Names and forms of a
checkpoint's tensors become parameters by transformers' own rules (renamed, fused experts). On a CPU
and in the checkpoint's dtype a weight is a view of the mapped file: nothing is copied. Files are
opened for reading only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdean.files.safetensors import MappedFiles, StoredTensor, stored_tensors
from fastdean.models.available_memory import available_memory
from fastdean.models.layers.ahead import Ahead, lane_to
from fastdean.models.layers.first_layers import (
    ScatteredLayersError,
    ending_behind,
    first_of_their_kind,
    stacks_of,
)
from fastdean.models.layers.outside import direct_uses, head_of, last_stack_begins, tables_of
from fastdean.models.layers.stacks import decoder_layers
from fastdean.models.model_state import undone
from fastdean.wording.bars import bars

# The window of everything outside of the layers, less tables and head, which have their own.
_REST = ""


class NotStreamableError(ValueError):
    """The model's weights cannot come in one layer at a time; loading it first is the way."""


@dataclass(repr=False)
class StreamedModel:
    """A model, and contexts in which some of its weights are in memory.

    Attributes:
        model: its parameters are meta tensors outside of the contexts.
        tokenizer: of the same folder; None where it has none.
        layers: name -> decoder layer, in the order of the stack.
        tables: name -> large embedding outside of the layers.
        on_demand: tables and head, whose weights are in memory from the call of `bring` on.
        device: where the weights go.
        bytes_read: of weights, by all contexts so far.
        came_in: called with the name of a layer whose weights are in memory now, or with another
            name for some of those outside of the layers.
    """

    model: nn.Module
    tokenizer: Any
    layers: dict[str, nn.Module]
    tables: dict[str, nn.Module]
    on_demand: dict[str, nn.Module]
    device: torch.device
    bytes_read: int
    _folder: Path
    # Name of a module of `on_demand` -> its window; those that are tied share one.
    _windows: dict[str, str]
    # By window: the modules that own its parameters, and the tensors of these.
    _owners: dict[str, list[nn.Module]]
    _tensors: dict[str, list[StoredTensor]]
    _config: Any
    # Parameters that the files do not hold: those that are tied to others.
    _missing: frozenset[str]
    _outside: MappedFiles
    _ahead: Ahead
    _open: dict[str, ExitStack] = field(default_factory=dict)
    # Windows that stay open, as the model uses their weights by other ways than their modules.
    _kept: set[str] = field(default_factory=set)
    came_in: Callable[[str], None] = lambda window: None

    def __repr__(self) -> str:
        return f"StreamedModel({type(self.model).__name__} of {str(self._folder)!r})"

    @classmethod
    def open(
        cls, model: nn.Module, tokenizer: Any, folder: Path, dtype: torch.dtype, device: str
    ) -> StreamedModel:
        """The model of a checkpoint, none of whose weights is read yet.

        Args:
            model: made from the checkpoint's configuration, its parameters on the meta device.
            folder: of its safetensors files.
        Raises:
            ValueError: the files do not hold all of its weights.
            NotStreamableError: it has no decoder layers, or they share weights.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.modeling_utils import LoadStateDictConfig

        of_transformers: Any = model
        config = LoadStateDictConfig(
            dtype=dtype,
            dtype_plan=of_transformers._get_dtype_plan(dtype),
            weight_mapping=list[Any](get_model_conversion_mapping(of_transformers)),
            device_map={"": device},
        )
        stored = stored_tensors(folder)
        _require_plain_numbers(stored.values())
        missing = _require_whole(of_transformers, stored, config)
        layers = decoder_layers(model)
        if not layers:
            raise NotStreamableError(
                f"model must have decoder layers to be streamed, got {type(model).__name__} "
                "without a list of them; load it first"
            )
        _require_own_weights(of_transformers, layers)
        _require_stacks(model, layers)
        tables, head = tables_of(model, layers), head_of(model, layers)
        windows = _windows(of_transformers, [*tables, *head])
        owners = _owners(of_transformers, layers, windows)
        return cls(
            model=model,
            tokenizer=tokenizer,
            layers=layers,
            tables=tables,
            on_demand=tables | head,
            device=torch.device(device),
            bytes_read=0,
            _folder=folder,
            _windows={name: windows[name] for name in (*tables, *head)},
            _owners=owners,
            _tensors=_by_window(of_transformers, stored.values(), owners, config),
            _config=config,
            _missing=missing,
            _outside=MappedFiles(folder),
            _ahead=Ahead(lane_to(torch.device(device))),
        )

    def fits_in_memory(self) -> bool:
        """Whether all weights together fit into the memory that can still be allocated."""
        free = available_memory(self.device)
        return free is None or self.bytes_in_memory <= free

    @property
    def windows(self) -> frozenset[str]:
        """What `came_in` is called with."""
        return frozenset(self._owners)

    @property
    def bytes_in_memory(self) -> int:
        """Of all weights together, once they are loaded."""
        values = sum(math.prod(t.shape) for window in self._tensors.values() for t in window)
        return values * self._config.dtype.itemsize

    @contextmanager
    def outside_layers(self) -> Iterator[None]:
        """Inside, the weights outside of the layers are in memory, tables and head on demand."""
        with undone(self._close), self._in(_REST):
            yield

    @contextmanager
    def layer(self, k: int, then: int) -> Iterator[None]:
        """Inside, the weights of layer k are in memory.

        Tables that all layers from here on have no use for are let go, and the head.

        Args:
            then: the layer that is wanted next, or k; the system begins to read it, and to a GPU it
                is on its way.
        """
        name = list(self.layers)[k]
        with_tables = {self._windows[table] for table in self.tables}
        for window in set(self._windows.values()):
            if window in with_tables:
                needed = k <= last_stack_begins(self.layers)
            else:
                needed = self._is_mapped(window)
            if not needed:
                self._let_go(window)
        # Rows of what is outside that other windows looked up.
        self._outside.let_go()
        with self._open.pop(name, None) or self._opened(name):
            if then != k and then < len(self.layers):
                self._begin(list(self.layers)[then])
            yield

    def bring(self, name: str) -> None:
        """Have the weights of a module of `on_demand` in memory, until a layer lets them go."""
        window = self._windows[name]
        if window not in self._open:
            self._open[window] = self._opened(window)

    def close(self) -> None:
        """Let go of tables and head, and of a layer that is on its way."""
        self._ahead.close()
        for window in self._windows.values():
            self._let_go(window)

    @contextmanager
    def beginning(self) -> Iterator[dict[str, str]]:
        """Inside, the model ends after the first layers, which are one of each kind at least.

        Their weights are in memory until the window of each ends, so that they are not read again;
        so are tables and head, until layers let them go.

        Yields:
            The name of each layer -> that of the first of its kind.
        """
        alike = first_of_their_kind(self.layers)
        for name in self.on_demand:
            self.bring(name)
        with (
            direct_uses(self.model, self.on_demand) as used,
            ending_behind(self.model, self.layers, alike.values()) as left,
        ):
            for name in left:
                self._open[name] = self._opened(name)
            yield alike
        self._kept = {self._windows[name] for name in used}

    def _begin(self, layer: str) -> None:
        if layer not in self._open:
            tensors = self._tensors[layer]
            self._outside.want(tensors)
            files = MappedFiles(self._folder)
            self._ahead.begin(layer, {t.name: partial(files.view, t) for t in tensors})

    def _let_go(self, window: str) -> None:
        if window in self._open and window not in self._kept:
            self._open.pop(window).close()

    def _is_mapped(self, window: str) -> bool:
        """Whether its weights are pages of the files, of which the system disposes as it likes."""
        stored = {tensor.torch_dtype for tensor in self._tensors[window]}
        return self.device.type == "cpu" and stored <= {self._config.dtype}

    def _close(self) -> None:
        """Let go of everything, also of what `beginning` left in memory."""
        self._ahead.close()
        while self._open:
            self._open.popitem()[1].close()
        self._outside.close()

    def _opened(self, window: str) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(self._in(window))
        return stack

    @contextmanager
    def _in(self, window: str) -> Iterator[None]:
        owners = self._owners[window]
        inside = window in self.layers
        with _tensors_put_back(owners):
            self._load(window, MappedFiles(self._folder) if inside else self._outside)
            if not inside:
                self._tie()
            for module in owners:
                for parameter in module._parameters.values():
                    if parameter is not None:
                        parameter.requires_grad_(False)
            self.came_in(window)
            yield

    def _tie(self) -> None:
        of_transformers: Any = self.model
        of_transformers.tie_weights(missing_keys=set(self._missing), recompute_mapping=False)

    def _load(self, window: str, files: MappedFiles) -> None:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        of_transformers: Any = self.model
        tensors = self._tensors[window]
        there = self._ahead.take(window)
        if there is None:
            there = {tensor.name: files.view(tensor) for tensor in tensors}
        with bars(False):
            convert_and_load_state_dict_in_model(of_transformers, there, self._config)
        self.bytes_read += sum(tensor.nbytes for tensor in tensors)


@contextmanager
def _tensors_put_back(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Afterwards the modules' own parameters and buffers are those that they had before."""
    before = [(each, dict(each._parameters), dict(each._buffers)) for each in modules]

    def undo() -> None:
        for module, parameters, buffers in before:
            module._parameters.update(parameters)
            module._buffers.update(buffers)

    with undone(undo):
        yield


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made inside have parameters without content; buffers are computed as ever."""
    of_modules: Any = nn.Module
    register = of_modules.register_parameter

    def without_content(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            blank = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
            # Transformers would else draw random values, through many operations each, of nothing.
            blank._is_hf_initialized = True  # type: ignore[attr-defined]
            module._parameters[name] = blank

    def undo() -> None:
        of_modules.register_parameter = register

    with undone(undo):
        of_modules.register_parameter = without_content
        yield


def _require_whole(model: Any, stored: Mapping[str, StoredTensor], config: Any) -> frozenset[str]:
    """ValueError unless the checkpoint has every parameter, in its shape; reads headers alone.

    Returns:
        The parameters that it does not have because they are tied to others.
    """
    from transformers.core_model_loading import convert_and_load_state_dict_in_model

    shapes = {name: tensor.blank() for name, tensor in stored.items()}
    with bars(False), _tensors_put_back(model.modules()):
        info, _ = convert_and_load_state_dict_in_model(
            model, shapes, replace(config, device_map={"": "meta"})
        )
    absent = frozenset(info.missing_keys)
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(info)
    missing = sorted(info.missing_keys)
    if missing:
        raise ValueError(
            f"model must hold all of its weights, got {model.name_or_path!r} without "
            f"{len(missing)} of them, such as {missing[0]!r}, which would be random; use the "
            "whole checkpoint of a language model"
        )
    if info.mismatched_keys:
        name, found, expected = min(info.mismatched_keys)
        raise ValueError(
            f"model must hold weights of the shapes in its config.json, got {name} with "
            f"{list(found)} for {list(expected)}; copy the checkpoint again"
        )
    return absent


def _require_plain_numbers(stored: Iterable[StoredTensor]) -> None:
    for tensor in stored:
        try:
            tensor.torch_dtype  # noqa: B018
        except ValueError:
            raise NotStreamableError(
                f"model must hold plain numbers to be streamed, got {tensor.dtype} in "
                f"{tensor.name!r}; load it first"
            ) from None


def _require_own_weights(model: Any, layers: Mapping[str, nn.Module]) -> None:
    for pair in model.all_tied_weights_keys.items():
        if any(_layer_of(name, layers) for name in pair):
            raise NotStreamableError(
                f"model must have decoder layers with weights of their own to be streamed, got "
                f"{pair[0]} tied to {pair[1]}; load it first"
            )


def _require_stacks(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    try:
        stacks_of(model, layers)
    except ScatteredLayersError as error:
        raise NotStreamableError(
            f"model must have its decoder layers in one list to be streamed, got {error}; load it "
            "first"
        ) from None


def _layer_of(name: str, layers: Mapping[str, nn.Module]) -> str:
    """The layer that a parameter lies in, or ""."""
    parts = name.split(".")
    prefixes = (".".join(parts[:end]) for end in range(1, len(parts)))
    return next((prefix for prefix in prefixes if prefix in layers), "")


def _windows(model: Any, modules: Iterable[str]) -> dict[str, str]:
    """By name: the window of each module, and of those that are tied to it, named after one."""
    pairs = [
        {name.rpartition(".")[0] for name in pair} for pair in model.all_tied_weights_keys.items()
    ]
    found: dict[str, str] = {}
    for first in modules:
        together = {first}
        while more := {name for pair in pairs if pair & together for name in pair} - together:
            together |= more
        for name in together:
            found.setdefault(name, f"({first})")
    return found


def _owners(
    model: Any, layers: Mapping[str, nn.Module], windows: Mapping[str, str]
) -> dict[str, list[nn.Module]]:
    """By window: the modules whose own parameters it brings."""
    found: dict[str, list[nn.Module]] = {
        name: list(layer.modules()) for name, layer in layers.items()
    }
    inside = {module for layer in layers.values() for module in layer.modules()}
    found |= {window: [] for window in (_REST, *windows.values())}
    for name, module in model.named_modules():
        if module not in inside:
            found[windows.get(name, _REST)].append(module)
    return found


def _by_window(
    model: Any,
    stored: Iterable[StoredTensor],
    owners: Mapping[str, Sequence[nn.Module]],
    config: Any,
) -> dict[str, list[StoredTensor]]:
    """The tensors of each window; those of no parameter are left out."""
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    rules = config.weight_mapping or []
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state = model.state_dict()
    found: dict[str, list[StoredTensor]] = {window: [] for window in owners}
    windows = {module: window for window, of in owners.items() for module in of}
    of_module = {name: windows[module] for name, module in model.named_modules()}
    for tensor in stored:
        for of in ((renamings, converters), ([], [])):
            name, _ = rename_source_key(tensor.name, *of, model.base_model_prefix, state)
            if name in state:
                found[of_module[name.rpartition(".")[0]]].append(tensor)
                break
    return found
