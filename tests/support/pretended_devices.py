"""Two devices that are played by one: what lies on them is known by name, and may not be mixed.

What a real device refuses is refused here: an operation on tensors of both. Tensors that no
operation has made of either are on neither; so is what was sent to a device by name, which the one
that plays both cannot tell.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


class Devices(TorchDispatchMode):
    """Inside, every operation is looked at.

    Attributes:
        mixed: names of operations that were given tensors of several devices.
    """

    def __init__(self):
        super().__init__()
        self.mixed = []
        self._where = {}

    def __enter__(self):
        self._to, self._cpu = Tensor.to, Tensor.cpu
        Tensor.to, Tensor.cpu = self._sending(Tensor.to), self._sending(Tensor.cpu)
        return super().__enter__()

    def __exit__(self, *raised):
        Tensor.to, Tensor.cpu = self._to, self._cpu
        return super().__exit__(*raised)

    def _sending(self, method):
        def sent(tensor, *args, **kwargs):
            given = (*args, *kwargs.values())
            made = method(tensor, *args, **kwargs)
            if method is self._cpu or any(isinstance(g, torch.device | str) for g in given):
                return _Moved.apply(made, self, None)
            return made

        return sent

    def put(self, tensor, device):
        storage = tensor.untyped_storage()
        key = storage._cdata
        self._where[key] = device, weakref.ref(storage, lambda _: self._where.pop(key, None))

    def of(self, tensor):
        return self._where.get(tensor.untyped_storage()._cdata, (None, None))[0]

    def put_model(self, model, layers_on):
        """Each layer, and what comes after it, where `layers_on` says; as accelerate spreads it."""
        layers = model.model.layers
        for weight in (*model.model.embed_tokens.parameters(), *model.model.rotary_emb.buffers()):
            self.put(weight, layers_on[0])
        for layer, device in zip(layers, layers_on, strict=True):
            for weight in layer.parameters():
                self.put(weight, device)
            layer.forward = self._moving(layer.forward, device)
        for weight in (*model.model.norm.parameters(), *model.lm_head.parameters()):
            self.put(weight, layers_on[-1])
        return model

    def _moving(self, forward, device):
        def moved(*args, **kwargs):
            given = tree_map_only(Tensor, lambda t: _Moved.apply(t, self, device), (args, kwargs))
            return forward(*given[0], **given[1])

        return moved

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        # A number by itself goes everywhere.
        found = {self.of(tensor) for tensor in given if tensor.dim()} - {None}
        if len(found) > 1:
            self.mixed.append(str(func))
        made = func(*args, **(kwargs or {}))
        for device in found:
            for tensor in tree_leaves(made):
                if isinstance(tensor, Tensor):
                    self.put(tensor, device)
        return made


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, devices, device):
        ctx.devices, ctx.before = devices, devices.of(tensor)
        copy = _on_none(tensor)
        if device is not None:
            devices.put(copy, device)
        return copy

    @staticmethod
    def backward(ctx, grad):
        copy = _on_none(grad)
        if ctx.before is not None:
            ctx.devices.put(copy, ctx.before)
        return copy, None, None


def _on_none(tensor):
    """A copy that no operation has made of the tensor."""
    return torch.from_numpy(tensor.detach().numpy().copy())
