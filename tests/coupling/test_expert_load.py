"""How many tokens each expert was given: counted by the way, the same however a set is scored."""

from __future__ import annotations

import inspect
import json
import re
import sys

import pytest
import torch
from tiny_data import batches, make_examples
from tiny_experts import CHOSEN, EXPERTS, experts_model

import fastdean
from benchmarks.architectures.classes import listed
from benchmarks.architectures.tiny import tiny_model
from fastdean.coupling.results.expert_load import _shared_beside, load_line, load_rows
from fastdean.coupling.targets.survey import survey
from fastdean.coupling.workloads import loss_scale
from fastdean.models.experts.fused import fused_experts

# Of several lengths, so that batches are padded where nothing is packed.
EXAMPLES = make_examples(lengths=(3, 9, 17, 4, 12))


def scored(model, examples=EXAMPLES, **options):
    return fastdean.score(model, batches(examples, 2), progress=False, **options)


def counts_of(scores):
    return {row["name"]: list(map(int, row["counts"].split())) for row in scores.expert_load}


def own_counts(model, examples=EXAMPLES):
    """What the model's own routers choose, one example after the other."""
    found = {}
    handles = []
    for name, module in model.named_modules():
        if fused_experts(module) is None:
            continue
        found[name] = torch.zeros(module.down_proj.shape[0], dtype=torch.int64)

        def count(module, args, name=name):
            chosen = args[1].flatten()
            found[name] += chosen.bincount(minlength=len(found[name]))[: len(found[name])]

        handles.append(module.register_forward_pre_hook(count))
    with torch.no_grad():
        for ids, _ in examples:
            model(ids[None])
    for handle in handles:
        handle.remove()
    return {name: counts.tolist() for name, counts in found.items()}


@pytest.mark.parametrize("order", ["batches", "layers"])
@pytest.mark.parametrize("family", ["Qwen2Moe", "GptOss", "DeepseekV3", "LongcatFlash"])
def test_counts_are_what_the_routers_chose(family, order):
    model = experts_model(family)
    assert counts_of(scored(model, order=order)) == own_counts(model) != {}


def test_experts_that_are_given_every_token_count_those_they_were_chosen_for():
    model = experts_model("Llama4Text")
    tokens = sum(len(ids) for ids, _ in EXAMPLES)
    for row in scored(model).expert_load:
        assert row["tokens"] == tokens


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["experts.down_proj"]},
        {"tokens_per_batch": 1},
        {"keep_top": 0.02, "expert_scope": "tensor"},
        {"order": "batches", "memory_budget": 3 * 4 * 2 * 24 * 32, "keep_top": 0.02},
        {"signs": True},
    ],
)
def test_counts_do_not_depend_on_how_the_set_is_scored(options):
    model = experts_model("Qwen2Moe")
    assert counts_of(scored(model, **options)) == own_counts(model)


def test_a_batch_that_overflows_is_counted_once(monkeypatch):
    model = experts_model("Mixtral").half()
    expected = own_counts(model)
    too_much = loss_scale.LossScale(24)
    monkeypatch.setattr(loss_scale.LossScale, "fitted", lambda *args: too_much)
    assert counts_of(scored(model, tokens_per_batch=20)) == expected


def test_a_row_says_how_even_a_layer_is_and_which_experts_are_shared():
    model = experts_model("Qwen2Moe")
    scores = scored(model, [(torch.tensor([5, 6]), torch.tensor([5, 6]))])
    first, last = scores.expert_load
    assert (first["name"], first["layer"], last["layer"]) == ("model.layers.0.mlp.experts", 0, 1)
    assert first["shared"] == ["model.layers.0.mlp.shared_expert"]
    counts = counts_of(scores)[last["name"]]
    assert (last["experts"], last["tokens"]) == (EXPERTS, 2 * CHOSEN) and sum(counts) == 2 * CHOSEN
    assert last["most"] == max(counts) / sum(counts) and last["least"] == 0
    unseen = [expert for expert, number in enumerate(counts) if not number]
    assert last["number_unseen"] == len(unseen) > 0
    assert str(unseen[0]) in last["unseen"]
    said = load_line(scores.expert_load)
    assert said.startswith(f"2 layers of {EXPERTS} experts: each got 0.0% to ")
    assert said.endswith("got none; shared experts in 2 got every token")
    all_seen = [{**row, "number_unseen": 0, "shared": []} for row in scores.expert_load]
    assert load_line(all_seen).endswith("%)")


@pytest.mark.parametrize(
    "family, block",
    [
        ("Qwen2Moe", "mlp.shared_expert"),
        ("Qwen3Next", "mlp.shared_expert"),
        ("DeepseekV2", "mlp.shared_experts"),
        ("Glm4Moe", "mlp.shared_experts"),
        ("Llama4Text", "feed_forward.shared_expert"),
        ("NemotronH", "mixer.shared_experts"),
        ("GraniteMoeShared", "shared_mlp"),
        ("GraniteMoeHybrid", "shared_mlp"),
    ],
)
def test_experts_that_every_token_passes_are_told_apart_from_routed_ones(family, block):
    scores = scored(experts_model(family), EXAMPLES[:2])
    rows = scores.expert_load
    layers = {row["name"][: row["name"].index(f".{row['layer']}.") + 2] for row in rows}
    found = {name for row in rows for name in row["shared"]}
    assert rows and found == {f"{layer}.{block}" for layer in layers}
    # Scored, and no experts of the load.
    assert all(any(name.startswith(f"{each}.") for name in scores) for each in found)
    assert not found & {row["name"] for row in rows}
    assert f"shared experts in {len(rows)} got every token" in load_line(rows)


@pytest.mark.slow
def test_shared_experts_of_every_family_of_transformers():
    families = 0
    for listed_class in listed().values():
        source = inspect.getsource(sys.modules[listed_class.model_class().__module__])
        if listed_class.kind != "causal" or "experts" not in source:
            continue
        model = tiny_model(listed_class, 0)
        modules, found = dict(model.named_modules()), survey(model)
        experts = [name for name, module in modules.items() if fused_experts(module)]
        layers = [layer for layer in found.layers if any(f"{layer}." in name for name in experts)]
        called = {name for name in modules if re.search(r"shared_(experts?|mlp)$", name)}
        called = {name for name in called if any(name.startswith(f"{each}.") for each in layers)}
        assert {block for name in experts for block in _shared_beside(name, found)} == called
        families += bool(called)
    assert families > 25


def test_dense_feed_forward_blocks_beside_a_mixture_are_no_shared_experts():
    assert not any(row["shared"] for row in scored(experts_model("LongcatFlash")).expert_load)
    assert not any(row["shared"] for row in scored(experts_model("Mixtral")).expert_load)
    (routed,) = scored(experts_model("DeepseekV3")).expert_load
    assert routed["shared"] == ["model.layers.1.mlp.shared_experts"]


@pytest.mark.parametrize("options", [{}, {"keep_top": 0.02, "order": "layers"}])
def test_experts_without_weights_are_never_unseen(options, tmp_path):
    """A token that LongcatFlash sends to one of them comes back as it is."""
    model = experts_model("LongcatFlash")
    first = model.model.layers[0].mlp.experts.down_proj.shape[0]
    ids = torch.tensor([5, 6])
    scores = scored(model, [(ids, ids)], **options)
    unseen = scores.manifest["unseen_experts"]
    weightless = 0
    for name, entry in scores.entries.items():
        if entry.num_experts:
            weightless += entry.num_experts - first
            reached = {int(at) // entry.competing for at in scores.select(name, 5)}
            assert set(entry.unseen) == set(range(first)) - reached
    assert unseen and weightless == 2
    number = sum(map(len, unseen.values()))
    said = f"{number} of {2 * first} experts' weights unseen"
    assert said in repr(scores)
    scores.save_pretrained(tmp_path / "scores")
    read = fastdean.Scores.from_pretrained(tmp_path / "scores")
    assert said in repr(read) and said in repr(read + read if not options else read)


def test_a_model_without_experts_has_no_load():
    from tiny_models import llama

    scores = scored(llama())
    assert scores.expert_load == [] and "expert_load" not in scores.manifest
    assert load_line([]) == ""


def test_sums_of_scores_and_scores_on_disk_have_their_load(tmp_path):
    model = experts_model("Qwen2Moe")
    one, other = scored(model, EXAMPLES[:2]), scored(model, EXAMPLES[2:])
    both = one + other
    assert both.expert_load == scored(model).expert_load
    both.save_pretrained(tmp_path / "scores")
    read = fastdean.Scores.from_pretrained(tmp_path / "scores")
    assert read.expert_load == both.expert_load
    assert (read + read).expert_load[0]["tokens"] == 2 * both.expert_load[0]["tokens"]


def test_counts_that_are_none_are_refused(tmp_path):
    from resigned import resign

    scored(experts_model("Qwen2Moe")).save_pretrained(tmp_path / "scores")
    file = tmp_path / "scores" / "fastdean_config.json"
    config = json.loads(file.read_text())
    config["manifest"]["expert_load"]["model.layers.0.mlp.experts"]["tokens"] = "3 many"
    file.write_text(json.dumps(config))
    resign(tmp_path / "scores")
    with pytest.raises(ValueError, match="tokens as a text of whole numbers, got '3 many'"):
        fastdean.Scores.from_pretrained(tmp_path / "scores")


def test_the_load_of_a_large_mixture_is_small():
    counts = " ".join(str(number % 97) for number in range(256))
    load = {f"model.layers.{k}.mlp.experts": {"tokens": counts} for k in range(60)}
    assert len(json.dumps(load, indent=2)) < 60_000
    rows = load_rows({"expert_load": load})
    assert [row["layer"] for row in rows] == list(range(60))
    assert rows[0]["unseen"] == "0, 97, 194" and rows[0]["number_unseen"] == 3
