"""The hooks that read a language model's last representations while it runs.

The only code of this room that hooks a module to look at tokens; modules are never replaced.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Self, get_args

from torch import Tensor, nn

from fastdean.models.adapters import require_no_prompts
from fastdean.models.model_state import unwrap
from fastdean.wording.mendable import StateError

Features = Literal["base", "head"]


class Hook:
    """A hook that its module's copies, deep or pickled, are without: theirs does nothing.

    Otherwise a copied model would be hooked by a copy of `owner` that nobody holds and nobody can
    remove; and an owner that holds tensors with a graph could not be copied at all.

    A hook is found again by its owner: the handle that torch returns can be lost to an interrupt
    before it is kept.
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
        _remove(
            owner,
            module._forward_hooks,
            module._forward_hooks_with_kwargs,
            module._forward_hooks_always_called,
        )
        _remove(owner, module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)


def _remove_from_live(owner: object, modules: Iterable[weakref.ref[nn.Module]]) -> None:
    remove_hooks_of(owner, [module for ref in modules if (module := ref()) is not None])


def _remove(owner: object, hooks: dict[int, Any], *flags: dict[int, bool]) -> None:
    for key, hook in [*hooks.items()]:
        if isinstance(hook, Hook) and hook.owner is owner:
            # Last from where the next search looks.
            for flag in flags:
                flag.pop(key, None)
            hooks.pop(key, None)


class _NoHook:
    """What a copy of a `Hook` is."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None


class Representations:
    """Inside a `with` block, or from `attach()` to `remove()`: what a forward pass made of its
    tokens.

    Equivalent, for "base", and without a second pass:

        features = model.base_model(input_ids, attention_mask).last_hidden_state

    Args:
        model: a Hugging Face language model, also inside PEFT, DistributedDataParallel or
            `torch.compile`. A compiled model must not have run before `attach()`: it fires no
            hooks that came later, except under `torch.compiler.set_stance("force_eager")`.
        features: "base", the output of the base model, after its final norm where it has one and,
            in a masked language model, before the transform of the prediction head (as published);
            or "head", what enters the output embedding.
        skip_logits: the output embedding is given the first position only, for passes without
            labels whose logits nobody reads.
    Raises:
        ValueError: `features` is another word, or the model has no such place.

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
        inner = language_model(model)
        self._place = features
        self._bases = _base_modules(inner) if features == "base" else []
        needs_head = skip_logits or features == "head"
        self._head = output_embedding(model) if needs_head else None
        self._pass = _Pass(_argument_names(self._outer, inner), features, skip_logits)
        self._hooked = [self._outer, *self._bases, *([] if self._head is None else [self._head])]
        # The hooks know the pass and not this object: with its last user it goes, and they go with
        # it, even where an interrupt kept `__exit__` from its work.
        modules = [weakref.ref(module) for module in self._hooked]
        weakref.finalize(self, _remove_from_live, self._pass, modules).atexit = False

    def attach(self) -> Self:
        """Start to listen to the model; without effect while attached."""
        if hooked_by(self._pass, self._hooked):
            return self
        try:
            self._register()
            return self
        except BaseException:
            self.remove()
            raise

    def _register(self) -> None:
        of = self._pass
        self._outer.register_forward_pre_hook(Hook(of, of.begin), with_kwargs=True)
        self._outer.register_forward_hook(Hook(of, of.end), always_call=True)
        for base in self._bases:
            base.register_forward_hook(Hook(of, of.keep_output))
        if self._head is not None:
            self._head.register_forward_pre_hook(Hook(of, of.at_head))

    def remove(self) -> None:
        """Leave no hook behind. What the last pass gave stays readable."""
        # Looked for twice: an interrupt of the first search leaves the second.
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
        """Let go of the tensors of the last pass, and of the graph that hangs on them."""
        self._pass.clear()

    @property
    def features(self) -> Tensor:
        """[B, T, D] of the last forward pass, in the dtype of the model and with its graph.

        Raises:
            RuntimeError: no pass has run since, or it did not reach the place that is read.
            ValueError: the pass gave anything but one representation for each token.
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
        """int64 [B, T], as the last forward pass was given them.

        Raises: ValueError if it was given none, as with `inputs_embeds`.
        """
        found = self._argument("input_ids")
        if found is None:
            raise ValueError(
                "model must be called with input_ids, got none; classes are told apart by token id"
            )
        return found

    @property
    def attention_mask(self) -> Tensor | None:
        """As the last forward pass was given it."""
        return self._argument("attention_mask")

    @property
    def labels(self) -> Tensor | None:
        """As the last forward pass was given them."""
        return self._argument("labels")

    def _argument(self, name: str) -> Any:
        return (self._pass.arguments or {}).get(name)


class _Pass:
    """What the hooks hand over of the last forward pass."""

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
        # Activation checkpointing runs modules again during the backward pass, after the outer
        # model's forward has ended. Of nested modules the outermost comes last and stays.
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


def language_model(model: nn.Module) -> nn.Module:
    """The transformers model inside `torch.compile`, parallel wrappers and PEFT."""
    outer = unwrap(model)
    return outer.get_base_model() if hasattr(outer, "get_base_model") else outer


def output_embedding(model: nn.Module) -> nn.Module:
    """The module whose weight [V, D] turns representations into logits.

    Raises: ValueError if the model has none.
    """
    inner = language_model(model)
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if head is None:
        raise ValueError(
            f"model must have an output embedding, got {type(inner).__name__} without one; load it "
            "as a causal or masked language model"
        )
    return head


def _base_modules(inner: nn.Module) -> list[nn.Module]:
    """The base model, and its decoder where the language model may call that one alone (OPT)."""
    base = getattr(inner, "base_model", None)
    if not isinstance(base, nn.Module) or base is inner:
        raise ValueError(
            f"model must have a base model below its head, got {type(inner).__name__}; load it as "
            "a transformers language model, or use features='head'"
        )
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else base
    return [base] if decoder is base or decoder not in {*base.modules()} else [decoder, base]


def _argument_names(*modules: nn.Module) -> list[str]:
    """The names of the positional arguments of the first forward that has `input_ids`."""
    for module in modules:
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        if "input_ids" in names:
            return names
    return []
