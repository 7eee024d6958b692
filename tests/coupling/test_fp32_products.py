"""Products of fp32 matrices may be rounded to fewer bits where the caller lets them be.

A CPU without bf16 matrix units keeps fp32, so rounding is done here where torch would allow it.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import tiny_folders
import torch
from oracle import norm_error, weight_importance
from tiny_data import batches, make_examples
from tiny_experts import experts_model, own_importance
from tiny_models import gpt2, llama
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import fastdean
from fastdean.data.examples import Example
from fastdean.models.exact_layout import exact_layout
from fastdean.precision import full_fp32_products

# Bits of the fraction that are left.
BITS = {"tf32": 10, "bf16": 7}
MODELS = {"llama": llama, "gpt2": gpt2, "mixtral": lambda: experts_model("Mixtral")}


def rounded(tensor, bits):
    dropped = 23 - bits
    as_whole = tensor.contiguous().view(torch.int32)
    half = (1 << (dropped - 1)) - 1 + ((as_whole >> dropped) & 1)
    return ((as_whole + half) & -(1 << dropped)).view(torch.float32)


class RoundedProducts(TorchDispatchMode):
    """Does to factors what `torch.set_float32_matmul_precision` allows; counts how often."""

    def __init__(self):
        super().__init__()
        self.times = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        factors = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
        first = factors.get(operation.overloadpacket.__name__)
        bits = BITS.get(torch.backends.mkldnn.matmul.fp32_precision)
        if first is not None and bits and args[first].dtype == torch.float32:
            self.times += 1
            factors = [rounded(each, bits) for each in args[first : first + 2]]
            args = (*args[:first], *factors, *args[first + 2 :])
        return operation(*args, **(kwargs or {}))


@pytest.fixture
def allow():
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def errors(model, examples, scores):
    """Of each weight, against autograd in float64."""
    mixture = hasattr(model.config, "num_experts_per_tok")
    reference = own_importance if mixture else weight_importance
    expected = reference(model.cpu(), examples, list(scores))
    return [norm_error(value.cpu(), expected[name]) for name, value in scores.items()]


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("order", ["batches", "layers"])
@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_model_is_scored_in_the_products_that_the_caller_allows(
    device, name, precision, order, allow
):
    model, examples = MODELS[name](), make_examples(lengths=(20, 33, 17, 40))
    allow(precision)
    rounding = RoundedProducts() if device == "cpu" else nullcontext()
    with rounding:
        scores = fastdean.score(model.to(device), batches(examples, 2), order=order, progress=False)
    assert torch.get_float32_matmul_precision() == precision
    kind = "bf16" if (device, precision) == ("cpu", "medium") else "tf32"
    assert scores.manifest["fp32_products"] == kind
    worst = max(errors(model, examples, scores))
    assert worst < 8 * 2 ** -BITS[kind]
    if device == "cpu":
        assert rounding.times and worst > 2e-5
    allow("highest")
    assert (
        "fp32_products" not in fastdean.score(model, batches(examples, 2), progress=False).manifest
    )


@pytest.fixture
def fresh_accelerate():
    """What accelerate was asked for before in this process is asked for of everybody after."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def prepared(model, device):
    from accelerate import Accelerator

    return Accelerator(cpu=device == "cpu", mixed_precision="bf16").prepare(model)


def casting(model, device):
    """The model, of a class whose forward pass casts."""

    class Casting(type(model)):
        def forward(self, *args, **kwargs):
            with torch.autocast(device, torch.bfloat16):
                return super().forward(*args, **kwargs)

    Casting.__name__ = type(model).__name__
    model.__class__ = Casting
    return model


WAYS = {"in the model's forward pass": prepared, "in the class's forward pass": casting}


@pytest.mark.parametrize("way", ["around the call", *WAYS])
@pytest.mark.parametrize("order", ["batches", "layers"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_model_is_scored_under_autocast(device, name, order, way, fresh_accelerate):
    model, examples = MODELS[name]().to(device), make_examples(lengths=(20, 33, 17, 40))
    around = torch.autocast(device, torch.bfloat16)
    if way in WAYS:
        model, around = WAYS[way](model, device), nullcontext()
    with around:
        scores = fastdean.score(model, batches(examples, 2), order=order, progress=False)
    assert not torch.is_autocast_enabled(device)
    assert scores.manifest["fp32_products"] == "autocast to bfloat16"
    # Another model: float64 is not what an autocast of the model's own lets be.
    assert max(errors(MODELS[name](), examples, scores)) < 8 * 2 ** -BITS["bf16"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", ["high", "medium", "autocast"])
def test_rounding_of_products_is_no_other_layout(name, precision, allow):
    examples = [Example(*each) for each in make_examples()]
    expected = exact_layout(MODELS[name](), examples)
    if precision != "autocast":
        allow(precision)
    with RoundedProducts(), torch.autocast("cpu", torch.bfloat16, precision == "autocast"):
        assert exact_layout(MODELS[name](), examples) == expected


def test_products_that_autocast_casts_further_are_named():
    loader = batches(make_examples(), 2)
    with torch.autocast("cpu", torch.float16):
        scores = fastdean.score(llama().bfloat16(), loader, progress=False)
    assert scores.manifest["fp32_products"] == "autocast to float16"


def test_products_with_weights_that_are_read_layer_by_layer_are_named(tmp_path):
    folder = str(tiny_folders.save_model(tmp_path / "model"))
    with torch.autocast("cpu", torch.bfloat16):
        scores = fastdean.score(folder, batches(make_examples(), 2), keep_top=0.1, progress=False)
    assert scores.manifest["fp32_products"] == "autocast to bfloat16"


class Made(TorchDispatchMode):
    """Notes the memory of tensors in bf16."""

    def __init__(self):
        super().__init__()
        self.memory = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype == torch.bfloat16:
            self.memory.append(StorageWeakRef(made.untyped_storage()))
        return made


def test_autocast_keeps_no_copy_of_the_weights():
    """It would until the caller's block ends: half a model's worth of memory."""
    with torch.autocast("cpu", torch.bfloat16):
        with Made() as made:
            fastdean.score(
                llama(), batches(make_examples(), 2), target_modules="every", progress=False
            )
        kept = sum(not each.expired() for each in made.memory)
    assert made.memory and not kept


def test_blocks_that_overlap_give_the_callers_precision_back(allow):
    """As of two threads: the first one to end is not the last."""
    allow("high")
    one, other = full_fp32_products(), full_fp32_products()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert torch.get_float32_matmul_precision() == "highest"
    other.__exit__(None, None, None)
    assert torch.get_float32_matmul_precision() == "high"


def test_a_precision_of_all_products_stays_one(allow):
    """What follows `torch.backends.fp32_precision` goes on to follow it."""
    allow("highest")
    products = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = torch.backends.fp32_precision
    try:
        for each in products:
            each.fp32_precision = "none"
        torch.backends.fp32_precision = "tf32"
        with full_fp32_products():
            assert [each.fp32_precision for each in products] == ["ieee"] * 2
        assert [each.fp32_precision for each in products] == ["tf32"] * 2
        torch.backends.fp32_precision = "ieee"
        assert [each.fp32_precision for each in products] == ["ieee"] * 2
    finally:
        torch.backends.fp32_precision = before


def test_a_model_may_ask_for_the_older_switch(allow):
    """torch raises where the older and the newer switches disagree."""
    allow("high")
    model, seen = llama(), []
    model.register_forward_pre_hook(
        lambda module, args: seen.append(torch.backends.cuda.matmul.allow_tf32)
    )
    fastdean.score(model, batches(make_examples(), 2), progress=False)
    # In full where it is measured, as the caller allows where it is scored.
    assert set(seen) == {False, True}
