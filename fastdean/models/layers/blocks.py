"""What a decoder layer is made of: attention, feed-forward block, and groups of other modules.

By structure: a feed-forward block leads from the hidden size to units and back, through matrices
that lie beside each other. Names and types support it where shapes alone would also fit something
else (a state-space mixer, a low-rank gate), and say what is attention.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

FEED_FORWARD = "mlp"
ATTENTION = "self_attn"
ROUTER = "router"

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_FEED_FORWARD_NAME = re.compile(
    r"mlp|ffn|ffw|feed_?forward|(^|_)ffs?(_|\d|$)|expert|moe|intermediate|dense_?relu_?dense",
    re.IGNORECASE,
)
# Types carry the family's name ("Qwen2MoeAttention"), so that "moe" counts only at their end.
_FEED_FORWARD_TYPE = re.compile(
    r"(?i:mlp|ffn|feed_?forward|intermediate|experts?$)|LayerFF$|Mo[eE]$|Mo[eE](Block|Layer)$"
)
_FEED_FORWARD_LEAF = re.compile(
    r"^(fc\w*|c_fc|linear[12]|lin[12]|w[123io]|wi_\d|ffn\w*|(gate_)?up_proj|down_proj)$"
)
_OTHER_NAME = re.compile(
    r"router|gating|mamba|ssm|conv|lstm|rnn|recurrent|hyena|retention|adapter|bottleneck|norm"
    r"|embed|per_layer|lora_",
    re.IGNORECASE,
)
_OTHER_TYPE = re.compile(r"(Router|Gating|Norm|Adapter|Mixer|Mamba\d?|SSM|LRU|LSTM)$")
_ROUTER = re.compile(r"router", re.IGNORECASE)
_GATE = re.compile(r"(^|_)gate$")
_EXPERTS = re.compile(r"expert", re.IGNORECASE)


@dataclass(frozen=True)
class Matrix:
    """A linear map inside a layer: from `inputs` to `outputs` features."""

    inputs: int
    outputs: int


@dataclass(frozen=True)
class Grouping:
    """The matrices of one layer.

    Attributes:
        groups: path in the layer -> name of the group, of the matrices and of every other module
            with parameters, or weights that are buffers, of its own.
        downs: paths of the matrices that lead from a feed-forward block's units back.
    """

    groups: dict[str, str]
    downs: frozenset[str]


@dataclass(frozen=True)
class _Pair:
    """A matrix into units and one back from them, with the module that both lie in."""

    up: str
    down: str
    site: str


@dataclass
class LayerParts:
    """A decoder layer, for `grouping`.

    Attributes:
        layer, name: the layer, and what it is called in the model.
        matrices: path in the layer -> its matrix, in the model's order.
        modules: path in the layer -> module, of all of them.
        hidden_size: as the model's configuration has it, or None.
    """

    layer: nn.Module
    name: str
    matrices: Mapping[str, Matrix]
    modules: Mapping[str, nn.Module]
    hidden_size: int | None

    def __post_init__(self) -> None:
        self._modules = {**self.modules, "": self.layer}
        # A layer may be a block by itself, in a list that says so ("ffns.3").
        self._name = next((p for p in reversed(self.name.split(".")) if not p.isdigit()), "")
        self._hidden = self._width(self.hidden_size)

    def grouping(self) -> Grouping:
        """Which group every matrix of the layer belongs to."""
        attention = {path for path in self.matrices if self._in_attention(path)}
        left = [path for path in self.matrices if path not in attention and not self._other(path)]
        pairs = self._pairs(left)
        members = {path for pair in pairs for path in (pair.up, pair.down)}
        for pair in pairs:
            members |= self._gates_beside(pair, left, members)
        members |= self._chains(left, members)
        if not members and not attention and self._is_plain_stack():
            members = set(left)
        groups = dict.fromkeys(members, FEED_FORWARD) | dict.fromkeys(attention, ATTENTION)
        for path in self.matrices:
            if path not in groups:
                groups[path] = self._other_group(path, attention | members)
        for path, module in self._modules.items():
            # A quantised weight may be a buffer.
            holds = [*module._parameters, *(n for n in module._buffers if "weight" in n)]
            if path not in groups and holds:
                groups[path] = self._group_of_rest(path, attention | members)
        return Grouping(groups, frozenset(self._downs(pairs)))

    def _group_of_rest(self, path: str, known: set[str]) -> str:
        """Of a module that is no matrix: fused experts, a router, a convolution."""
        if self._in_attention(path) or self._is_attention(path):
            return ATTENTION
        if self._is_router(path):
            return ROUTER
        inside = any(self._is_feed_forward(above) for above in (path, *_above(path)))
        if inside and not self._other(path):
            return FEED_FORWARD
        return self._other_group(path, known)

    # What names and types say.

    def _label(self, path: str) -> tuple[str, str]:
        """The last part of a path, and its module's type."""
        name = path.rpartition(".")[2] if path else self._name
        return name, type(self._modules[path]).__name__

    def _is_feed_forward(self, path: str) -> bool:
        name, kind = self._label(path)
        if path == "" and not self._name:
            return False
        by_type = path != "" and _FEED_FORWARD_TYPE.search(kind)
        return bool(_FEED_FORWARD_NAME.search(name) or by_type)

    def _is_feed_forward_leaf(self, path: str) -> bool:
        return bool(_FEED_FORWARD_LEAF.search(path.rpartition(".")[2]))

    def _is_attention(self, path: str) -> bool:
        """Named or typed attention, and no wrapper of an attention and a feed-forward block."""
        if not any(_ATTENTION.search(text) for text in self._label(path)):
            return False
        inside = f"{path}." if path else ""
        below = [other for other in self._modules if other.startswith(inside) and other != path]
        attentions = [
            other for other in below if any(_ATTENTION.search(text) for text in self._label(other))
        ]
        beside = (
            other
            for other in below
            if (self._is_feed_forward(other) or self._is_feed_forward_leaf(other))
            and not any(other == a or other.startswith(f"{a}.") for a in attentions)
        )
        return not (attentions and any(beside))

    def _in_attention(self, path: str) -> bool:
        return any(self._is_attention(above) for above in _above(path))

    def _other(self, path: str) -> bool:
        """What no feed-forward block consists of, whatever its shapes."""
        for above in (path, *_above(path)):
            if above == "" or (above != path and self._is_feed_forward(above)):
                continue
            name, kind = self._label(above)
            if _OTHER_NAME.search(name) or _OTHER_TYPE.search(kind):
                return True
        return self._mixes_tokens(path)

    def _mixes_tokens(self, path: str) -> bool:
        """Below a module with a convolution or a state of its own, and nothing named feed-forward.

        A state shows as parameters that are no layer's weight or bias (A_log, D, dt_bias).
        """
        for above in _above(path):
            if self._is_feed_forward(above):
                return False
            if above == "":
                continue
            module = self._modules[above]
            if any(isinstance(child, nn.modules.conv._ConvNd) for child in module.children()):
                return True
            if any(name not in ("weight", "bias") for name in module._parameters):
                return True
        return False

    # What shapes say.

    def _width(self, hidden_size: int | None) -> int | None:
        """The size most matrices here lead from or to; the model's, where it is one of several.

        The model's alone would not do: layers with a bottleneck are narrower than the model.
        """
        counts: dict[int, int] = {}
        for matrix in self.matrices.values():
            for size in (matrix.inputs, matrix.outputs):
                counts[size] = counts.get(size, 0) + 1
        commonest = [size for size in counts if counts[size] == max(counts.values())]
        return hidden_size if hidden_size in commonest else next(iter(commonest), None)

    def _pairs(self, left: list[str]) -> list[_Pair]:
        """The pairs of feed-forward blocks; what lies deeper pairs first, and only once."""
        named = self._pairs_of(left, self._is_named_pair)
        has_block = named or any(
            self._is_feed_forward(path) and not self._in_attention(path) for path in self._modules
        )
        return named if has_block else self._pairs_of(left, self._is_wide_pair)

    def _pairs_of(
        self, left: list[str], accept: Callable[[str, str, list[str]], bool]
    ) -> list[_Pair]:
        pairs: list[_Pair] = []
        claimed: set[str] = set()
        sites = sorted({site for path in left for site in _above(path)}, key=_depth, reverse=True)
        for site in sites:
            inside = [path for path in left if path not in claimed and _is_below(path, site)]
            found = [
                _Pair(up, down, site)
                for up in inside
                for down in inside
                if up != down and self._fits(up, down) and accept(up, down, inside)
            ]
            pairs += found
            claimed |= {path for pair in found for path in (pair.up, pair.down)}
        return pairs

    def _fits(self, up: str, down: str) -> bool:
        """From a size to units, or twice as many where gate and up are fused, and back to it."""
        first, last = self.matrices[up], self.matrices[down]
        return first.inputs == last.outputs and first.outputs in (last.inputs, 2 * last.inputs)

    def _is_named_pair(self, up: str, down: str, inside: list[str]) -> bool:
        return any(
            self._is_feed_forward_leaf(path)
            or any(self._is_feed_forward(above) for above in _above(path))
            for path in (up, down)
        )

    def _is_wide_pair(self, up: str, down: str, inside: list[str]) -> bool:
        """Without a name: wider than the layer, and with nothing beside it that does not fit."""
        first = self.matrices[up]
        if first.inputs != self._hidden or self.matrices[down].inputs <= self._hidden:
            return False
        return all(
            any(self._fits(path, other) or self._fits(other, path) for other in inside)
            for path in inside
        )

    def _gates_beside(self, pair: _Pair, left: list[str], members: set[str]) -> set[str]:
        """Further matrices of a block between its two sizes, such as a gate on its output."""
        if not any(self._is_feed_forward(above) for above in (pair.site, *_above(pair.site))):
            return set()
        sizes = {self.matrices[pair.up].inputs, self.matrices[pair.down].inputs}
        return {
            path
            for path in left
            if path not in members
            and path.rpartition(".")[0] == pair.site
            and {self.matrices[path].inputs, self.matrices[path].outputs} <= sizes
        }

    def _chains(self, left: list[str], members: set[str]) -> set[str]:
        """Blocks of more than two steps from the hidden size back to it, where a name says so."""
        found: set[str] = set()
        for site in {above for path in left for above in _above(path)}:
            inside = [path for path in left if _is_below(path, site)]
            if not self._is_feed_forward(site) or members & set(inside):
                continue
            given = {self._hidden} | {self.matrices[path].outputs for path in inside}
            taken = {self._hidden} | {self.matrices[path].inputs for path in inside}
            chain = set()
            for path in inside:
                inputs, outputs = self.matrices[path].inputs, self.matrices[path].outputs
                # Twice as many where gate and up are fused.
                follows = inputs in given or 2 * inputs in given
                if follows and (outputs in taken or outputs / 2 in taken):
                    chain.add(path)
            ends = {self.matrices[path].outputs for path in chain}
            starts = {self.matrices[path].inputs for path in chain}
            if len(chain) > 1 and self._hidden in ends and self._hidden in starts:
                found |= chain
        return found

    def _is_plain_stack(self) -> bool:
        """Matrices and activations of torch.nn and nothing else: by itself a part of an MLP."""
        return all(
            type(module).__module__.startswith("torch.nn.")
            and not isinstance(module, (nn.RNNBase, nn.MultiheadAttention))
            for module in self._modules.values()
        )

    def _downs(self, pairs: list[_Pair]) -> Iterator[str]:
        """Of each pair the matrix back to the hidden size: shapes fit in both directions.

        Where units are as many as hidden dimensions, the last one of the block is it.
        """
        order = {path: position for position, path in enumerate(self.matrices)}
        for site in dict.fromkeys(pair.site for pair in pairs):
            here = [pair for pair in pairs if pair.site == site]
            proper = [pair for pair in here if self.matrices[pair.up].inputs == self._hidden]
            for pair in proper or [p for p in here if self._widens(p)] or here:
                if self.matrices[pair.down].inputs != self.matrices[pair.down].outputs:
                    yield pair.down
                elif self.matrices[pair.up].outputs != self.matrices[pair.down].inputs:
                    yield pair.down  # beside a fused gate and up, which tell the direction
                else:
                    yield max((p.down for p in here), key=order.__getitem__)

    def _widens(self, pair: _Pair) -> bool:
        return self.matrices[pair.up].outputs >= self.matrices[pair.up].inputs

    # Everything else, by where it lies.

    def _other_group(self, path: str, known: set[str]) -> str:
        if self._is_router(path):
            return ROUTER
        parts = path.split(".")
        start = 0
        while start < len(parts) - 1:
            prefix = ".".join(parts[: start + 1])
            if not parts[start].isdigit() and not any(_is_below(k, prefix) for k in known):
                break
            start += 1
        name = parts[start]
        # The names of the two known groups mean what they say.
        while name in (FEED_FORWARD, ATTENTION, "all") and start < len(parts) - 1:
            start += 1
            name = f"{name}.{parts[start]}"
        return f"{self._name}.{name}" if name.isdigit() else name

    def _is_router(self, path: str) -> bool:
        for part in (path, *_above(path)):
            if part and any(_ROUTER.search(text) for text in self._label(part)):
                return True
        parent, _, leaf = path.rpartition(".")
        if not parent or not _GATE.search(leaf):
            return False
        children = self._modules[parent].named_children()
        return any(_EXPERTS.search(f"{name} {type(child).__name__}") for name, child in children)


def _above(path: str) -> list[str]:
    """The paths of the modules that a module lies in, the nearest first, "" the layer itself."""
    parts = path.split(".")[:-1] if path else []
    return [".".join(parts[:end]) for end in range(len(parts), -1, -1)]


def _is_below(path: str, site: str) -> bool:
    return site == "" or path.startswith(f"{site}.")


def _depth(site: str) -> int:
    return site.count(".") + 1 if site else 0
