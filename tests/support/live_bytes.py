"""How many bytes of tensors are alive, and the most there were at a time."""

from __future__ import annotations

import weakref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the memory of tensors that operations make inside; what was there before is free.

    Attributes:
        peak: the most bytes that were alive at a time.
    """

    def __init__(self):
        super().__init__()
        self.peak = self._alive = 0
        self._known = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._note(tensor, counted=False)
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._note(tensor, counted=True)
        return made

    def _note(self, tensor, counted):
        storage = tensor.untyped_storage()
        if storage.device.type == "meta" or storage._cdata in self._known:
            return
        size = storage.nbytes() if counted else 0
        self._alive += size
        self.peak = max(self.peak, self._alive)
        key = storage._cdata

        def gone(_):
            self._known.pop(key, None)
            self._alive -= size

        self._known[key] = weakref.ref(storage, gone)
