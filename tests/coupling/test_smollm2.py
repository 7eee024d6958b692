"""SmolLM2-135M-Instruct against one-example-at-a-time autograd; run by `make test-slow`."""

from __future__ import annotations

import pytest
import torch
from oracle import norm_error, weight_importance

import fastdean
from fastdean.data.examples import encode
from fastdean.data.sources import load_rows
from fastdean.models.loading import DEMO_MODEL, load_model

TOP = 256
NUM_EXAMPLES = 6


@pytest.fixture(scope="module")
def smollm2():
    return load_model(DEMO_MODEL, dtype="float32", device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("target_modules", ["mlp", "self_attn"])
def test_the_top_of_every_matrix_is_that_of_the_loop(smollm2, target_modules):
    model, tokenizer = smollm2
    examples = encode(load_rows("embedded:fairness")[:NUM_EXAMPLES], tokenizer)
    scores = fastdean.score(model, examples, target_modules=target_modules, progress=False)
    pairs = [(example.input_ids, example.labels) for example in examples]
    expected = weight_importance(model, pairs, list(scores), dtype=torch.float32)
    assert len(scores) == (90 if target_modules == "mlp" else 120)
    for name, value in scores.items():
        assert norm_error(value, expected[name]) < 1e-5, name
        ours = set(scores.select(name, TOP).tolist())
        reference = expected[name].flatten()
        theirs = set(reference.topk(TOP).indices.tolist())
        # Two fp32 orders of summation may swap entries that tie with the last one within rounding.
        last = float(reference.topk(TOP).values[-1])
        for index in ours ^ theirs:
            assert abs(float(reference[index]) - last) < 1e-5 * last, (name, index)


@pytest.mark.slow
def test_the_demo_mask_round_trips_and_patches_like_apply(smollm2, tmp_path):
    model, tokenizer = smollm2
    sources = ("embedded:fairness", "embedded:privacy", "embedded:general")
    fair, priv, gen = (
        fastdean.score(
            model, load_rows(s)[:NUM_EXAMPLES], tokenizer=tokenizer, keep_top=1e-4, progress=False
        )
        for s in sources
    )
    mask = fastdean.couple(fair, priv, general=gen, ratio=1e-5)
    assert 0 < len(mask) < 720
    before = {name: model.get_parameter(name).detach().clone() for name in mask.names}
    model.save_pretrained(tmp_path / "model")
    fastdean.patch_checkpoint(tmp_path / "model", mask, tmp_path / "patched")
    tokenizer.save_pretrained(tmp_path / "patched")
    patched, _ = load_model(str(tmp_path / "patched"), dtype="float32", device="cpu")
    with mask.applied(model):
        for (name, applied), theirs in zip(
            model.named_parameters(), patched.parameters(), strict=True
        ):
            assert torch.equal(applied, theirs), name
    for name, weight in before.items():
        assert torch.equal(model.get_parameter(name), weight)


@pytest.mark.slow
def test_both_orders_and_the_weights_on_disk_select_the_same(smollm2, tmp_path):
    model, tokenizer = smollm2
    examples = encode(load_rows("embedded:privacy")[:NUM_EXAMPLES], tokenizer)
    model.save_pretrained(tmp_path / "model", max_shard_size="100MB")
    options = {"keep_top": 1e-3, "progress": False}
    expected = fastdean.score(model, examples, order="batches", **options)
    found = [
        fastdean.score(model, examples, order="layers", **options),
        fastdean.score(tmp_path / "model", examples, **options),
    ]
    for scores in found:
        assert scores.manifest["order"]["by"] == "layers"
        for name, entry in expected.entries.items():
            # 1e-5 and 1e-3 of a matrix.
            for k in (8, len(entry.index)):
                assert torch.equal(scores.select(name, k), expected.select(name, k)), (name, k)
