"""Models inside PEFT, built of stand-ins of its structure: names, merging, learned prompts."""

from __future__ import annotations

import pytest
import torch
from oracle import norm_error, weight_importance
from tiny_adapters import Peft, adapted
from tiny_data import batches, make_examples
from tiny_models import LAYERS, llama
from torch import nn

import fastdean
from fastdean.collapse.representations import Representations
from fastdean.coupling.targets.coverage import coverage
from fastdean.coupling.targets.finding import find_targets
from fastdean.evaluation import perplexity
from fastdean.models.adapters import parameter_paths

UP = "model.layers.0.mlp.up_proj"


class TrainedInFull(nn.Module):
    """`peft.utils.ModulesToSaveWrapper`: a trained copy in place of the original."""

    def __init__(self, module):
        super().__init__()
        self.original_module = module
        copy = nn.Linear(module.in_features, module.out_features, bias=False)
        self.modules_to_save = nn.ModuleDict({"default": copy})
        self.active_adapters = ["default"]
        self.disable_adapters = False

    def forward(self, x):
        off = self.disable_adapters
        return (self.original_module if off else self.modules_to_save["default"])(x)


def without_adapters(model):
    """What merge_and_unload() leaves."""
    plain = llama()
    state = {name: model.get_parameter(path) for name, (path, _) in parameter_paths(model).items()}
    plain.load_state_dict(state)
    return plain


def score(model, **options):
    return fastdean.score(model, batches(make_examples(), 3), progress=False, **options)


@pytest.mark.parametrize("state", ["merged", "off"])
def test_a_merged_model_scores_as_the_model_without_adapters(state):
    model = adapted(merged=state == "merged", off=state == "off")
    plain = without_adapters(model)
    scores = score(model, target_modules="all")
    assert list(scores) == [target.parameter for target in find_targets(plain, "all")]
    expected = weight_importance(plain, make_examples(), list(scores))
    assert all(norm_error(scores[name], expected[name]) < 1e-5 for name in scores)
    whole = coverage(plain, find_targets(plain, "all"))
    assert scores.manifest["coverage"] == whole | {"left_out": {}}


@pytest.mark.parametrize("model", [adapted, lambda: adapted().get_base_model()])
@pytest.mark.parametrize("target_modules", ["mlp", "self_attn", ["up_proj"]])
def test_an_adapter_that_is_not_merged_is_refused(model, target_modules):
    with pytest.raises(
        ValueError,
        match=r"model must have its adapters merged, got one on model\.layers\.0\.\S+ that is not; "
        r"merge it first \(PEFT: merge_and_unload\(\)",
    ):
        score(model(), target_modules=target_modules)


def test_layers_without_an_adapter_are_scored_beside_those_with_one():
    model = adapted()
    names = ["gate_proj", "down_proj"]
    scores = score(model, target_modules=names)
    merged = adapted(merged=True)
    expected = score(merged, target_modules=names)
    assert list(scores) == list(expected) and len(scores) == 2 * LAYERS
    assert all(norm_error(scores[name], expected[name]) < 1e-5 for name in scores)


def test_a_module_trained_in_full_counts_as_itself():
    model = llama()
    model.model.layers[0].mlp.up_proj = TrainedInFull(model.model.layers[0].mlp.up_proj)
    wrapper = model.model.layers[0].mlp.up_proj
    (found,) = find_targets(Peft(model), [UP])
    assert found.module is wrapper.modules_to_save["default"]
    assert len(score(Peft(model))) == 3 * LAYERS
    wrapper.disable_adapters = True
    (found,) = find_targets(Peft(model), [UP])
    assert found.module is wrapper.original_module


@pytest.mark.parametrize("granularity", ["weight", "unit"])
def test_masks_name_weights_as_the_merged_checkpoint_does(granularity, tmp_path):
    model = adapted(merged=True)
    plain = without_adapters(model)
    pair = [
        fastdean.score(
            model, batches(make_examples(seed), 3), granularity=granularity, progress=False
        )
        for seed in (1, 2)
    ]
    options = {"unit_weights": "all"} if granularity == "unit" else {}
    mask = fastdean.couple(*pair, ratio=0.1, model=model, **options)
    assert f"{UP}.weight" in mask.names
    ids = torch.arange(12).view(2, 6) + 3
    with torch.no_grad():
        clean = model(input_ids=ids).logits
        with mask.applied(plain), mask.applied(model):
            edited = model(input_ids=ids).logits
            torch.testing.assert_close(edited, plain(input_ids=ids).logits)
        assert not torch.allclose(edited, clean)
        assert torch.equal(model(input_ids=ids).logits, clean)
    plain.save_pretrained(tmp_path / "merged")
    fastdean.patch_checkpoint(tmp_path / "merged", mask, tmp_path / "patched")


def test_a_mask_on_a_weight_under_an_adapter_is_refused():
    pair = [
        fastdean.score(llama(), batches(make_examples(seed), 3), progress=False) for seed in (1, 2)
    ]
    mask = fastdean.couple(*pair, ratio=0.1)
    model = adapted()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(
        ValueError, match=f"model must compute with '{UP}.weight' as it stands, got"
    ):
        mask.apply_(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    off = adapted(off=True)
    weight = off.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    with mask.applied(off):
        assert int((weight == 0).sum()) == len(mask.entries[f"{UP}.weight"])


def prompted():
    model = Peft(llama())
    model.active_peft_config = type(
        "PromptTuningConfig", (), {"is_prompt_learning": True, "peft_type": "PROMPT_TUNING"}
    )()
    return model


def rows():
    return batches(make_examples(), 3)


@pytest.mark.parametrize(
    "run",
    [
        lambda model: fastdean.score(model, rows(), progress=False),
        lambda model: fastdean.score(model, rows(), loss_fn=lambda o, b: o.logits.sum((1, 2))),
        lambda model: perplexity(model, rows()),
        Representations,
    ],
    ids=["score", "score-loss", "perplexity", "representations"],
)
def test_learned_prompts_are_refused_wherever_the_model_is_run(run):
    with pytest.raises(
        ValueError,
        match="model must see the tokens it is given and no others, got one with a learned prompt "
        r"\(PROMPT_TUNING\); use model.get_base_model\(\)",
    ):
        run(prompted())
