"""What belongs to an MLP's unit: its weights by structure, and masks that hold all of them."""

from __future__ import annotations

import re

import pytest
import torch
from tiny_data import batches, make_examples
from tiny_models import CAUSAL_MODELS, HIDDEN, INTERMEDIATE, LAYERS, bert, llama
from torch import nn

import fastdean
from fastdean.coupling.targets.units import unit_layers

UNITS = [3, 17, 63]


def _couple(scored, **options):
    scores = [
        fastdean.score(scored, batches(make_examples(seed), 3), granularity="unit", progress=False)
        for seed in (1, 2)
    ]
    return fastdean.couple(*scores, ratio=0.1, **options)


def _logits(model):
    ids = torch.arange(12).view(2, 6) + 3
    with torch.no_grad():
        return model(input_ids=ids).logits


def _zeroed(weight, index):
    flat = torch.zeros(weight.numel(), dtype=torch.bool)
    flat[index] = True
    return flat.view(weight.shape)


@pytest.mark.parametrize("name", CAUSAL_MODELS)
def test_all_weights_of_the_units_compute_what_their_columns_do(name):
    model = CAUSAL_MODELS[name]()
    clean = _logits(model)
    columns, everything = _couple(model), _couple(model, model=model, unit_weights="all")
    down = columns.names
    assert set(down) < set(everything.names)
    assert all(everything.entries[n].equals(columns.entries[n]) for n in down)
    with columns.applied(model):
        expected = _logits(model)
    with everything.applied(model):
        found = _logits(model)
    assert not torch.allclose(expected, clean, atol=1e-4)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(_logits(model), clean)


@pytest.mark.parametrize("biased", [False, True])
def test_rows_of_gate_and_up_and_their_biases(biased):
    from transformers import LlamaForCausalLM

    model = llama()
    if biased:
        model.config.mlp_bias = True
        model = LlamaForCausalLM(model.config)
    places = unit_layers(model, "model.layers.1.mlp.down_proj.weight").places(torch.tensor(UNITS))
    layers = ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"]
    kinds = ["weight", "bias"] if biased else ["weight"]
    assert list(places) == [f"{layer}.{kind}" for layer in layers for kind in kinds]
    for parameter, index in places.items():
        expected = torch.zeros_like(model.get_parameter(parameter), dtype=torch.bool)
        expected[UNITS] = True
        assert torch.equal(_zeroed(expected, index), expected)


def test_conv1d_has_its_units_in_columns():
    model = CAUSAL_MODELS["gpt2"]()
    places = unit_layers(model, "transformer.h.0.mlp.c_proj.weight").places(torch.tensor(UNITS))
    assert list(places) == ["transformer.h.0.mlp.c_fc.weight", "transformer.h.0.mlp.c_fc.bias"]
    expected = torch.zeros(HIDDEN, INTERMEDIATE, dtype=torch.bool)
    expected[:, UNITS] = True
    assert torch.equal(_zeroed(expected, places["transformer.h.0.mlp.c_fc.weight"]), expected)
    assert places["transformer.h.0.mlp.c_fc.bias"].tolist() == UNITS


class Fused(nn.Module):
    """Gate and up in one projection, in halves or side by side; anything may stand in between."""

    def __init__(self, between=None, *, halves=True):
        super().__init__()
        self.gate_up_proj = nn.Linear(HIDDEN, 2 * INTERMEDIATE)
        self.down_proj = nn.Linear(INTERMEDIATE, HIDDEN)
        self.between = between or nn.Identity()
        self.halves = halves

    def forward(self, x):
        both = self.gate_up_proj(x)
        gate, up = both.chunk(2, -1) if self.halves else (both[..., ::2], both[..., 1::2])
        return self.down_proj(self.between(nn.functional.silu(gate) * up))


def _with_mlp(mlp):
    torch.manual_seed(0)
    model = llama()
    for layer in model.model.layers:
        layer.mlp = mlp()
    return model.eval()


@pytest.mark.parametrize("halves", [True, False])
def test_a_fused_projection_is_read_as_it_computes(halves):
    model = _with_mlp(lambda: Fused(halves=halves))
    places = unit_layers(model, "model.layers.0.mlp.down_proj.weight").places(torch.tensor(UNITS))
    rows = [*UNITS, *(INTERMEDIATE + u for u in UNITS)]
    if not halves:
        rows = [row for u in UNITS for row in (2 * u, 2 * u + 1)]
    assert places["model.layers.0.mlp.gate_up_proj.bias"].tolist() == rows
    columns, everything = _couple(model), _couple(model, model=model, unit_weights="all")
    with columns.applied(model):
        expected = _logits(model)
    with everything.applied(model):
        torch.testing.assert_close(_logits(model), expected, atol=1e-6, rtol=1e-5)


def test_a_model_in_training_is_read_as_in_evaluation():
    model = CAUSAL_MODELS["gpt2"]()
    down = "transformer.h.0.mlp.c_proj.weight"
    expected = unit_layers(model, down).places(torch.tensor(UNITS))
    dropout = model.transformer.h[0].mlp.dropout
    dropout.p = 0.5
    model.train()
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    found = unit_layers(model, down).places(torch.tensor(UNITS))
    assert {n: i.tolist() for n, i in found.items()} == {n: i.tolist() for n, i in expected.items()}
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_strides_and_default_device_do_not_matter(name):
    model = CAUSAL_MODELS[name]()
    (down,) = [n for n, _ in model.named_parameters() if re.search(r"0\.mlp\.(down|c)_proj\.w", n)]
    expected = unit_layers(model, down).places(torch.tensor(UNITS))
    for module in model.modules():
        if getattr(module, "weight", None) is not None and module.weight.dim() == 2:
            module.weight.data = module.weight.data.t().contiguous().t()
    units = torch.tensor(UNITS)
    with torch.device("meta"):
        found = unit_layers(model, down).places(units)
    assert {n: i.tolist() for n, i in found.items()} == {n: i.tolist() for n, i in expected.items()}


def test_an_offloaded_mlp_is_refused():
    model = llama()
    model.model.layers[0].mlp.to("meta")
    with pytest.raises(ValueError, match="it is offloaded, and there are no weights to try; use"):
        unit_layers(model, "model.layers.0.mlp.down_proj.weight")


class Two(nn.Module):
    """An MLP that wants another argument."""

    def __init__(self):
        super().__init__()
        self.up_proj = nn.Linear(HIDDEN, INTERMEDIATE)
        self.down_proj = nn.Linear(INTERMEDIATE, HIDDEN)

    def forward(self, x, scale):
        return self.down_proj(self.up_proj(x) * scale)


class Three(Two):
    """An MLP with one layer too many."""

    def __init__(self):
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, INTERMEDIATE)
        self.other_proj = nn.Linear(HIDDEN, INTERMEDIATE)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Fused(nn.LayerNorm(INTERMEDIATE)), "does not do what zeroing its columns does"),
        (Two, r"cannot be run by itself .*'scale'\)"),
        (Three, r"3 layers beside it have \[64, 64, 64\] outputs for 64 units"),
    ],
    ids=["norm-between", "arguments", "three-layers"],
)
def test_an_mlp_that_leaves_it_open_is_refused(make, reason):
    model = _with_mlp(make)
    with pytest.raises(ValueError, match=f"layers.0.mlp.down_proj.weight.*{reason}; use unit_wei"):
        unit_layers(model, "model.layers.0.mlp.down_proj.weight")


def test_an_mlp_spread_over_modules_is_refused():
    with pytest.raises(ValueError, match=r"0 layers beside it have \[\] outputs for 64 units"):
        unit_layers(bert(), "bert.encoder.layer.0.output.dense.weight")
    with pytest.raises(ValueError, match="no layer of the model's MLPs has that name"):
        unit_layers(llama(), "lm_head.weight")


def test_units_are_counted_once(tmp_path):
    model = llama()
    columns, everything = _couple(model), _couple(model, model=model, unit_weights="all")
    units = columns.summary().total["kept"]
    total = everything.summary().total
    assert units > 0 and total["kept"] == units
    assert total["weights"] == len(everything) == 3 * HIDDEN * units == 3 * len(columns)
    assert total["matrices"] == LAYERS + 2 * len(columns.names)
    assert total["first"] == columns.summary().total["first"]
    assert repr(everything).startswith(f"NeuronMask({units} units ({len(everything)} weights)")
    assert "unit_weights" not in columns.manifest
    loaded = fastdean.NeuronMask.from_pretrained(everything.save_pretrained(tmp_path / "mask"))
    assert loaded == everything and loaded.table == everything.table
    assert loaded.manifest["unit_weights"] == "all"


def test_what_all_weights_need():
    model = llama()
    with pytest.raises(ValueError, match="unit_weights must be 'down' or 'all', got 'rows'"):
        _couple(model, unit_weights="rows")
    with pytest.raises(ValueError, match="model must be given with unit_weights='all', got None"):
        _couple(model, unit_weights="all")
    scores = fastdean.score(model, batches(make_examples(1), 3), progress=False)
    with pytest.raises(ValueError, match="for scores of weights, got 'all'; score with granular"):
        fastdean.couple(scores, scores, ratio=0.1, unit_weights="all", model=model)
