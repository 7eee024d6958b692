"""The hooks that read a language model's last representations while it runs."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Self, get_args

from torch import Tensor, nn

from fastdean.collapse.output_embedding import output_embedding
from fastdean.models.adapters import base_model, require_no_prompts
from fastdean.models.model_state import unwrap
from fastdean.wording.mendable import StateError

Features = Literal["base", "head"]


class Hook:
    """A hook that does nothing in copies of its module, deep or pickled.

    Nobody could remove it from a copy, and an owner that holds a graph could not be copied at all.
    It is removed by its owner, as an interrupt can lose the handle that torch returns.
    """

    def __init__(self, owner: object, call: Callable[..., Any]) -> None:
        self.owner = owner
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __reduce__(self) -> tuple:
        return _NoHook, ()


def hooked_by(owner: object, modules: Iterable[nn.Module]) -> bool:
    """Whether one of the modules has a hook of this owner."""
    return any(
        isinstance(hook, Hook) and hook.owner is owner
        for module in modules
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for hook in hooks.values()
    )


def remove_hooks_of(owner: object, modules: Iterable[nn.Module]) -> None:
    """Remove every hook of this owner from the modules."""
    for module in modules:
        # The hooks last: after an interrupt a second search finds the rest by them.
        tables: tuple[dict[int, Any], ...]
        for tables in (
            (
                module._forward_hooks_with_kwargs,
                module._forward_hooks_always_called,
                module._forward_hooks,
            ),
            (module._forward_pre_hooks_with_kwargs, module._forward_pre_hooks),
        ):
            for key, hook in [*tables[-1].items()]:
                if isinstance(hook, Hook) and hook.owner is owner:
                    for table in tables:
                        table.pop(key, None)


def _remove_from_live(owner: object, modules: Iterable[weakref.ref[nn.Module]]) -> None:
    remove_hooks_of(owner, [module for ref in modules if (module := ref()) is not None])


class _NoHook:
    """The copy of a `Hook`."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None


class Representations:
    """Keeps the last representations and the arguments of each forward pass in a `with` block.

    Or from `attach()` to `remove()`. Equivalent, for "base", and without a second pass:

        features = model.base_model(input_ids, attention_mask).last_hidden_state

    Args:
        model: a Hugging Face language model, also inside PEFT, DistributedDataParallel or
            `torch.compile`. A compiled model fires no hooks added after its first run, except under
            `torch.compiler.set_stance("force_eager")`.
        features: "base", the output of the base model, after its final norm where it has one and,
            in a masked language model, before the transform of the prediction head (as published);
            or "head", the input of the output embedding.
        skip_logits: compute logits of the first position only, for passes without labels.
    Raises:
        ValueError: an unknown place, or one that the model does not have.

    Example:
        ```python
        with Representations(model) as last:
            loss = model(input_ids=input_ids, labels=input_ids).loss
            last.features, last.input_ids
        ```
    """

    def __init__(
        self, model: nn.Module, *, features: Features = "base", skip_logits: bool = False
    ) -> None:
        if features not in get_args(Features):
            raise ValueError(
                f"features must be one of {', '.join(get_args(Features))}, got {features!r}; "
                "'base' is the published choice"
            )
        self._outer = unwrap(model)
        require_no_prompts(self._outer)
        inner = base_model(self._outer)
        self._place = features
        self._bases = _base_modules(inner) if features == "base" else []
        needs_head = skip_logits or features == "head"
        self._head = output_embedding(model) if needs_head else None
        self._pass = _Pass(_argument_names(self._outer, inner), features, skip_logits)
        self._hooked = [self._outer, *self._bases, *([] if self._head is None else [self._head])]
        # The hooks know the pass and not this object: they go with its last user, even where an
        # interrupt kept `__exit__` from its work.
        modules = [weakref.ref(module) for module in self._hooked]
        weakref.finalize(self, _remove_from_live, self._pass, modules).atexit = False

    def attach(self) -> Self:
        """Hook the model, unless it is hooked already."""
        if hooked_by(self._pass, self._hooked):
            return self
        of = self._pass
        try:
            self._outer.register_forward_pre_hook(Hook(of, of.begin), with_kwargs=True)
            self._outer.register_forward_hook(Hook(of, of.end), always_call=True)
            for base in self._bases:
                base.register_forward_hook(Hook(of, of.keep_output))
            if self._head is not None:
                self._head.register_forward_pre_hook(Hook(of, of.at_head))
            return self
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Remove the hooks. The last pass stays readable."""
        # Twice: an interrupt of the first search leaves the second.
        try:
            remove_hooks_of(self._pass, self._hooked)
        finally:
            remove_hooks_of(self._pass, self._hooked)
            self._pass.running = False

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(self, *exc_info: object) -> None:
        self.remove()

    def clear(self) -> None:
        """Drop the tensors of the last pass, and their graph."""
        self._pass.clear()

    @property
    def features(self) -> Tensor:
        """[B, T, D] of the last forward pass, in the model's dtype and with its graph.

        Raises:
            RuntimeError: no pass has run, or it did not reach the place.
            ValueError: the pass did not give one representation for each token.
        """
        if self._pass.arguments is None:
            raise StateError(
                "model must have run while its representations are read, got no forward pass; "
                f"{_COMPILED}"
            )
        features = self._pass.features
        if features is None:
            raise StateError(
                f"model must call its {_PLACES[self._place]} as a module, got a forward pass that "
                f"does not; {_ELSEWHERE[self._place]}; {_COMPILED}"
            )
        tokens = self.input_ids.shape
        if features.shape[:-1] != tokens:
            raise ValueError(
                "model must give one representation for each of its input_ids, "
                f"{list(tokens)}, got {list(features.shape)}; prompt tuning, cut logits and "
                "losses in chunks cannot be read"
            )
        return features

    @property
    def input_ids(self) -> Tensor:
        """int64 [B, T], of the last forward pass.

        Raises: ValueError if it had none, as with `inputs_embeds`.
        """
        input_ids = self._argument("input_ids")
        if input_ids is None:
            raise ValueError(
                "model must be called with input_ids, got none; classes are told apart by token id"
            )
        return input_ids

    @property
    def attention_mask(self) -> Tensor | None:
        """Of the last forward pass."""
        return self._argument("attention_mask")

    @property
    def labels(self) -> Tensor | None:
        """Of the last forward pass."""
        return self._argument("labels")

    def _argument(self, name: str) -> Any:
        return (self._pass.arguments or {}).get(name)


class _Pass:
    """The last forward pass: its arguments and features, which the hooks fill in."""

    def __init__(self, argument_names: Sequence[str], place: Features, skip_logits: bool) -> None:
        self._argument_names, self._place, self._skip_logits = argument_names, place, skip_logits
        self.running = False
        self.clear()

    def clear(self) -> None:
        self.features: Tensor | None = None
        self.arguments: dict[str, Any] | None = None

    def begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if getattr(module, "_is_replica", False):
            raise StateError(
                "model must run whole in one process, got a replica of nn.DataParallel, which sees "
                "a part of the batch; start the job with torchrun or show it one GPU"
            )
        self.features = None
        self.arguments = {**dict(zip(self._argument_names, args, strict=False)), **kwargs}
        self.running = True

    def end(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.running = False

    def keep_output(self, module: nn.Module, args: tuple, output: Any) -> None:
        # Activation checkpointing runs modules again after the outer model's forward has ended.
        # Of nested modules the outermost comes last and stays.
        if self.running:
            last = getattr(output, "last_hidden_state", None)
            self.features = output[0] if last is None else last

    def at_head(self, module: nn.Module, args: tuple) -> tuple | None:
        if not self.running or not args:
            return None
        if self._place == "head":
            self.features = args[0]
        return (args[0][..., :1, :], *args[1:]) if self._skip_logits else None


_COMPILED = (
    "a compiled model fires no hooks added after its first run, so attach before it, or run it "
    "under torch.compiler.set_stance('force_eager')"
)
_PLACES = {"base": "base model", "head": "output embedding"}
_ELSEWHERE = {
    "base": "use features='head'",
    "head": "losses fused with the output embedding bypass it, so use features='base'",
}


def _base_modules(inner: nn.Module) -> list[nn.Module]:
    """The base model, and its decoder where the language model may call that one alone (OPT)."""
    base = getattr(inner, "base_model", None)
    if not isinstance(base, nn.Module) or base is inner:
        raise ValueError(
            f"model must have a base model below its head, got {type(inner).__name__}; load it as "
            "a transformers language model, or use features='head'"
        )
    get_decoder = getattr(base, "get_decoder", None)
    decoder = base if get_decoder is None else get_decoder()
    return [base] if decoder is base or decoder not in {*base.modules()} else [decoder, base]


def _argument_names(*modules: nn.Module) -> list[str]:
    """The names of the positional arguments of the first forward that has `input_ids`."""
    for module in modules:
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        if "input_ids" in names:
            return names
    return []
