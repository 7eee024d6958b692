"""How far a sweep over the layers is, for a person who waits for it.

In a terminal a bar, in a log a line for each layer: "score privacy: layer 12 of 32 forward, 1,830
tokens/s, about 14 min left".
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from fastdean.wording.doing import titled
from fastdean.wording.printable import one_line

# What a window of each kind takes beside a forward window once its weights are there, until one of
# its kind was measured. Backward a layer runs once more forward, and its two products of gradients
# take as much each. Weights come in for both alike, which is measured apart.
_SHARES = {"forward": 1.0, "loss": 3.0, "backward": 3.0}

# Shows a text; the share of the sweep that is done; whether a window has just ended.
Show = Callable[[str, float, bool], object]


@dataclass
class SweepProgress:
    """The course of one sweep: `plan` it, then `begin` and `end` each window.

    Args:
        title: what is scored.
        show: called after every batch, and at the end of every window.
        clock: seconds from any moment on.
    """

    title: str
    show: Show
    clock: Callable[[], float] = time.monotonic
    _layers: int = 0
    _lowest: int = 0
    _kind: str = "forward"
    _layer: int = 0
    _began: float = 0.0
    _passed: int = 0
    # Seconds until the weights of this window were there.
    _waited: float = 0.0
    # Of windows that have ended, by kind: the seconds of each, those it waited for its weights, and
    # the tokens of the last.
    _seconds: dict[str, list[float]] = field(default_factory=dict)
    _waits: dict[str, list[float]] = field(default_factory=dict)
    _tokens: dict[str, int] = field(default_factory=dict)

    def plan(self, layers: int, lowest: int) -> None:
        """Say how many layers there are, and which is the last that is run backward.

        Windows that are not begun, as those that an earlier job has finished, count as done.
        """
        self._layers, self._lowest = layers, lowest
        self._began = self.clock()

    def begin(self, kind: str, layer: int) -> None:
        """A window begins: "forward" or "backward" through a layer, or "loss" behind them."""
        self._kind, self._layer, self._passed, self._waited = kind, layer, 0, 0.0
        self._began = self.clock()

    def weights_there(self) -> None:
        """The window's weights are in memory, and its batches begin."""
        self._waited = self.clock() - self._began

    def passed(self, tokens: int) -> None:
        """A batch of so many tokens, padding included, is through the window."""
        self._passed += tokens
        self._tell(ended=False)

    def end(self) -> None:
        """The window has ended."""
        self._seconds.setdefault(self._kind, []).append(self.clock() - self._began)
        self._waits.setdefault(self._kind, []).append(self._waited)
        self._tokens[self._kind] = self._passed
        self._tell(ended=True)

    def _tell(self, ended: bool) -> None:
        spent = self.clock() - self._began
        parts = [self._window()]
        if spent > 0 and self._passed:
            parts.append(f"{self._passed / spent:,.0f} tokens/s")
        left = self._seconds_left(spent, ended)
        if left is not None and not self._is_last(ended):
            parts.append(f"about {_duration(left)} left")
        self.show(f"{self.title}: {', '.join(parts)}", self._share(ended), ended)

    def _window(self) -> str:
        if self._kind == "loss":
            return "loss"
        return f"layer {self._layer + 1} of {self._layers} {self._kind}"

    def _is_last(self, ended: bool) -> bool:
        return ended and not any(self._to_come().values())

    def _to_come(self) -> dict[str, int]:
        """How many windows of each kind come after this one."""
        forward, backward = 0, self._layers - self._lowest
        if self._kind == "forward":
            forward = self._layers - 1 - self._layer
        if self._kind == "backward":
            backward = self._layer - self._lowest
        return {"forward": forward, "loss": int(self._kind == "forward"), "backward": backward}

    def _seconds_left(self, spent: float, ended: bool) -> float | None:
        """None as long as no window was measured."""
        of_each = {kind: self._expected(kind) for kind in _SHARES}
        known = {kind: seconds for kind, seconds in of_each.items() if seconds is not None}
        if not known:
            return None
        later = sum(known[kind] * count for kind, count in self._to_come().items())
        if ended:
            return later
        done = self._done()
        working = spent - self._waited
        here = working * (1 - done) / done if done else max(0.0, known[self._kind] - spent)
        return later + here

    def _expected(self, kind: str) -> float | None:
        """Seconds of a window of this kind, from those that were measured."""
        if kind in self._seconds:
            measured = self._seconds[kind]
            return sum(measured) / len(measured)
        waits = [wait for each in self._waits.values() for wait in each]
        if not waits:
            return None
        seconds = sum(sum(each) for each in self._seconds.values()) - sum(waits)
        shares = sum(_SHARES[each] * len(all_) for each, all_ in self._seconds.items())
        # Nothing comes in for the losses but the head.
        wait = 0.0 if kind == "loss" else sum(waits) / len(waits)
        return wait + _SHARES[kind] * seconds / shares

    def _done(self) -> float:
        """The share of this window's tokens that are through; 0 while nothing is known of it."""
        total = self._tokens.get(self._kind) or max(self._tokens.values(), default=0)
        return min(1.0, self._passed / total) if total else 0.0

    def _share(self, ended: bool) -> float:
        whole = _SHARES["loss"] + self._layers * _SHARES["forward"]
        whole += (self._layers - self._lowest) * _SHARES["backward"]
        left = sum(_SHARES[kind] * count for kind, count in self._to_come().items())
        left += 0 if ended else _SHARES[self._kind] * (1 - self._done())
        return 1 - left / whole


@contextmanager
def sweep_progress(
    what: str, *, shown: bool, clock: Callable[[], float] = time.monotonic
) -> Iterator[SweepProgress]:
    """The progress of scoring `what`, on stderr: a bar where it is a terminal, else lines."""
    title = one_line(titled(what))
    if not shown:
        yield SweepProgress(title, lambda text, share, ended: None, clock)
        return
    from tqdm.auto import tqdm

    in_notebook = any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__)
    if not (sys.stderr.isatty() or in_notebook):
        yield SweepProgress(title, _write_line, clock)
        return
    form = "{percentage:3.0f}%|{bar:20}| {desc}"
    with tqdm(total=1.0, desc=title, bar_format=form, dynamic_ncols=True) as bar:

        def move(text: str, share: float, ended: bool) -> None:
            bar.set_description_str(text, refresh=False)
            bar.update(max(0.0, share - bar.n))

        yield SweepProgress(title, move, clock)


def _write_line(text: str, share: float, ended: bool) -> None:
    if ended:
        print(f"fastdean: {text}", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"
