"""collapse_metrics on tiny models: the definitions over one example at a time, however batched."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from collapse_oracle import assert_values, brute_force, nearest_agreement
from tiny_data import batches, make_examples, word_tokenizer
from tiny_models import HIDDEN, INTERMEDIATE, MAX_TOKENS, VOCAB, bert, gpt2, llama
from torch import nn
from two_ranks import WORLD, join_group, leave_group, run_ranks

import fastdean
from fastdean.collapse import CollapseClasses, collapse_metrics, nearest_mean_agreement
from fastdean.collapse.labels import default_shift

MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert}
# Every fourth token is of a class; 95 never occurs.
IDS = (*range(4, 40, 4), 95)
CLASSES = CollapseClasses(
    pieces=tuple((i,) for i in IDS),
    words=tuple(str(i) for i in IDS),
    groups=("all",) * len(IDS),
)
LENGTHS = (30, 9, 41, 2, 25, 17)
EXAMPLES = make_examples(lengths=LENGTHS, vocab=48)
HELD_OUT = make_examples(seed=1, lengths=LENGTHS, vocab=48)


def loader(examples=EXAMPLES, labels=True):
    for batch in batches(examples, 2):
        if not labels:
            del batch["labels"]
        yield batch


def states_of(model, input_ids, features):
    kept = []
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    with torch.no_grad():
        model(input_ids=input_ids[None])
        last = model.base_model(input_ids=input_ids[None]).last_hidden_state
    handle.remove()
    return (last if features == "base" else kept[0])[0]


def rows_by_class(model, examples, features="base", shift=None):
    """{class: [features]} by the definition: one example, one token at a time."""
    shift = ("same" if model.config.model_type == "bert" else "next") if shift is None else shift
    found = defaultdict(list)
    for input_ids, _ in examples:
        states = states_of(model, input_ids, features)
        for t in range(len(input_ids) - (shift != "same")):
            token = int(input_ids[t + (shift != "same")])
            if token in IDS:
                found[IDS.index(token)].append(states[t])
    return found


def weights_of(model):
    return {c: model.get_output_embeddings().weight[i].detach() for c, i in enumerate(IDS)}


def expected_of(model, examples=EXAMPLES, **options):
    return brute_force(rows_by_class(model, examples, **options), weights_of(model))


def hooks_of(model):
    return [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("features", ["base", "head"])
def test_every_value_is_its_definition(name, features):
    model = MODELS[name]()
    found = collapse_metrics(model, loader(), CLASSES, features=features)
    # fp32 models: packing moves the last digits of the states.
    assert_values(found, expected_of(model, features=features), rtol=2e-4)
    assert "1 of 10 classes were not seen" in found.values["nc3_mean"].note


@pytest.mark.parametrize("name", MODELS)
def test_in_double_precision_every_value_is_exact(name):
    model = MODELS[name]().double()
    found = collapse_metrics(model, loader(), CLASSES, held_out=loader(HELD_OUT))
    assert_values(found, expected_of(model), rtol=1e-8)
    nearest = nearest_agreement(
        rows_by_class(model, EXAMPLES), rows_by_class(model, HELD_OUT), weights_of(model)
    )
    assert (found.nearest.agreeing, found.nearest.tokens, found.nearest.left_out) == nearest
    assert found.values["nc4_agreement"].value == nearest[0] / nearest[1]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tokens_per_batch", [1, 64, 10_000])
def test_values_do_not_depend_on_the_grouping(name, tokens_per_batch):
    model = MODELS[name]().double()
    options = {"tokens_per_batch": tokens_per_batch}
    found = collapse_metrics(model, loader(EXAMPLES[::-1]), CLASSES, **options)
    assert_values(found, expected_of(model), rtol=1e-8)


@pytest.mark.parametrize("shift", ["next", "same", "published"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_shift_can_be_chosen(name, shift):
    model = MODELS[name]().double()
    found = collapse_metrics(model, loader(), CLASSES, shift=shift)
    assert_values(found, expected_of(model, shift=shift), rtol=1e-8)


@pytest.mark.parametrize("name", MODELS)
def test_half_precision_models_are_measured_over_their_own_states(name):
    model = MODELS[name]().bfloat16()
    # Each example in a pass of its own, as the oracle has it: the same bits.
    found = collapse_metrics(model, loader(), CLASSES, tokens_per_batch=1)
    assert_values(found, expected_of(model), rtol=1e-8)
    packed = collapse_metrics(model, loader(), CLASSES).values["nc3_mean"].value
    assert packed == pytest.approx(found.values["nc3_mean"].value, abs=0.02)


def test_labels_may_be_left_out_and_prompts_count():
    model = llama().double()
    expected = expected_of(model)
    assert_values(collapse_metrics(model, loader(labels=False), CLASSES), expected, rtol=1e-8)
    single = [{"input_ids": ids.tolist()} for ids, _ in EXAMPLES]
    assert_values(collapse_metrics(model, single, CLASSES), expected, rtol=1e-8)


def test_rows_of_text_are_tokenised():
    tokenizer = word_tokenizer()
    rows = [{"text": "the cat sat on a mat"}, {"prompt": "the dog ran", "response": "on the mat"}]
    classes = CollapseClasses.from_words(
        tokenizer, {"things": ["cat", "mat", "the"]}, casing=False, leading_space=False
    )
    found = collapse_metrics(llama(), rows, classes, tokenizer=tokenizer)
    assert dict(zip(classes.words, found.moments.counts.tolist(), strict=True)) == {
        "cat": 1,
        "mat": 2,
        "the": 3,
    }


def test_what_a_mask_token_hides_counts():
    ids = torch.tensor([5, 8, 3, 12, 9])
    labels = torch.tensor([-100, -100, 16, -100, -100])
    batch = [{"input_ids": ids, "labels": labels}]
    counts = collapse_metrics(bert(), batch, CLASSES).moments.counts
    assert {IDS[c]: n for c, n in enumerate(counts.tolist()) if n} == {8: 1, 16: 1, 12: 1}


def test_text_without_the_classes_is_never_run():
    model, measured = llama(), []

    def refuse(*args):
        if measured:
            pytest.fail("the model was run")

    model.model.register_forward_pre_hook(refuse)
    measured.append(default_shift(model))  # once for a model as it is, on tokens of no text
    text = [{"input_ids": torch.tensor([5, 6, 7])}]
    found = collapse_metrics(model, text, CLASSES, held_out=list(text))
    assert all(metric.value is None and metric.note for metric in found.values.values())
    assert found.nearest.tokens == 0


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_left_as_it_was(name):
    model = MODELS[name]()
    model.base_model.train()
    model.config.use_cache = True
    modes = [module.training for module in model.modules()]
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    collapse_metrics(model, loader(), CLASSES, held_out=loader(HELD_OUT))
    assert [module.training for module in model.modules()] == modes
    assert model.config.use_cache is True and hooks_of(model) == []
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_failure_leaves_no_hook_and_no_mode():
    def failing(states):
        if states.shape[1] == 3:
            raise LookupError("no text of three tokens")
        return states

    model = llama().train()
    model.model.norm.forward = failing
    with pytest.raises(LookupError, match="no text of three tokens"):
        collapse_metrics(model, [{"input_ids": torch.tensor([8, 5, 8])}], CLASSES)
    assert hooks_of(model) == [] and model.training


def test_dropout_is_off():
    model = gpt2().double()
    expected = expected_of(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    assert_values(collapse_metrics(model.train(), loader(), CLASSES), expected, rtol=1e-8)


class Adapted(nn.Module):
    """Around a model as PEFT is: the inner model's forward is called, and never its hooks."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config = inner, inner.config

    def get_base_model(self):
        return self.inner

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def forward(self, *args, **kwargs):
        return self.inner.forward(*args, **kwargs)


class AdaptedLinear(nn.Module):
    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.weight = base_layer.weight

    def forward(self, x):
        return self.base_layer(x)


def test_adapters_are_looked_through_except_on_the_output_embedding():
    model = llama().double()
    found = collapse_metrics(Adapted(model), loader(), CLASSES)
    assert_values(found, expected_of(model), rtol=1e-8)
    model.lm_head = AdaptedLinear(model.lm_head)
    with pytest.raises(ValueError, match="a plain output embedding, got the adapter AdaptedLinear"):
        collapse_metrics(Adapted(model), loader(), CLASSES)


# What torch's compiler hides from its users, pytest makes an error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not")
@pytest.mark.parametrize("how", ["torch.compile", "module.compile()"])
def test_compiled_models_are_run_uncompiled(how):
    model = compiled = llama().double()
    model.model.layers = model.model.layers[:1]
    expected, graphs = expected_of(model), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    if how == "torch.compile":
        compiled = torch.compile(model, backend=backend)
    else:
        model.compile(backend=backend)
    try:
        with torch.no_grad():
            compiled(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
        before = len(graphs)
        assert before
        assert_values(collapse_metrics(compiled, loader(), CLASSES), expected, rtol=1e-8)
        assert len(graphs) == before
    finally:
        torch.compiler.reset()


def test_a_narrow_output_embedding_is_measured_at_the_head():
    from transformers import AlbertConfig, AlbertForMaskedLM

    config = AlbertConfig(
        vocab_size=VOCAB,
        embedding_size=HIDDEN // 2,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
    )
    model = AlbertForMaskedLM(config).eval()
    with pytest.raises(ValueError, match="the 16 dimensions of the output embedding, got 32; use"):
        collapse_metrics(model, loader(), CLASSES)
    found = collapse_metrics(model, loader(), CLASSES, features="head")
    assert found.values["nc3_mean"].value is not None


def test_what_does_not_fit_is_refused():
    model, text = llama(), list(loader())
    with pytest.raises(ValueError, match="held_out must be other text than loader, got the same"):
        collapse_metrics(model, text, CLASSES, held_out=text)
    too_long = [{"input_ids": torch.full((MAX_TOKENS + 1,), 8)}]
    with pytest.raises(ValueError, match="example 0 must have at most 128 tokens .* got 129; cut"):
        collapse_metrics(model, too_long, CLASSES)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="in floating point, got torch.int8; load it without"):
        collapse_metrics(model, text, CLASSES)


def test_held_out_text_can_be_counted_later():
    model = gpt2()
    whole = collapse_metrics(model, loader(), CLASSES, held_out=loader(HELD_OUT))
    metrics = collapse_metrics(model, loader(EXAMPLES[:3]), CLASSES)
    metrics += collapse_metrics(model, loader(EXAMPLES[3:]), CLASSES)
    counted = [
        nearest_mean_agreement(model, loader(part), CLASSES, metrics)
        for part in (HELD_OUT[:2], HELD_OUT[2:])
    ]
    assert counted[0] + counted[1] == whole.nearest
    fewer = CollapseClasses(CLASSES.pieces[:2], CLASSES.words[:2], CLASSES.groups[:2])
    with pytest.raises(ValueError, match="those of metrics, 10 classes, got 2"):
        nearest_mean_agreement(model, loader(), fewer, metrics)


def measured_on(rank):
    """What one rank of a job finds: NC4 against the means of all ranks."""
    model = llama().double()
    # The second rank sees fewer classes, and none of some that the first sees.
    mine = slice(0, 5) if rank == 0 else slice(5, 6)
    metrics = collapse_metrics(model, loader(EXAMPLES[mine]), CLASSES).across_ranks()
    held_out = loader(HELD_OUT[rank::WORLD])
    nearest = nearest_mean_agreement(model, held_out, CLASSES, metrics).across_ranks()
    return metrics.with_nearest(nearest)


def worker(rank, folder):
    join_group(rank, folder)
    metrics = measured_on(rank)
    leave_group(rank, folder, {"means": metrics.moments.means, **metrics.to_dict()})


def test_two_ranks_find_what_one_finds(tmp_path):
    first, second = run_ranks(worker, tmp_path)
    assert torch.equal(first.pop("means"), second.pop("means"))
    assert first == second
    model = llama().double()
    whole = collapse_metrics(model, loader(), CLASSES, held_out=loader(HELD_OUT)).to_dict()
    assert first["counts"] == whole["counts"] and first["nearest"] == whole["nearest"]
    for name, metric in whole["values"].items():
        assert first["values"][name]["value"] == pytest.approx(metric["value"], rel=1e-9), name


def test_the_public_name_is_this_function():
    assert fastdean.collapse_metrics is collapse_metrics


def test_tokens_per_batch_must_be_a_number():
    text = "^tokens_per_batch must be a positive number of tokens, got 'big'; give an integer"
    with pytest.raises(TypeError, match=text):
        collapse_metrics(llama(), batches(EXAMPLES, 2), CLASSES, tokens_per_batch="big")
