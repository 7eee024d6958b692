"""What a loader gives beside tokens and labels: divided, carried to the model, or refused by name.

Against one example at a time through the plain model, with exactly what the loader gave it.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracle import norm_error, weight_importance
from tiny_data import batches, make_examples
from tiny_models import HIDDEN, MODELS, VOCAB, bert, gpt2, llama

import fastdean
from fastdean.collapse import CollapseClasses, collapse_metrics
from fastdean.coupling.scoring import score_sets
from fastdean.data.examples import Example, read_examples
from fastdean.evaluation import last_token_states, perplexity, response_margins

EXAMPLES = make_examples(lengths=(4, 9, 2, 7, 12, 5))
TOTAL = sum(len(ids) for ids, _ in EXAMPLES)


def score(model, loader, **options):
    return fastdean.score(model, loader, progress=False, **options)


def assert_scored_as(model, loader, examples, shift=1, **options):
    """`examples`: (input_ids, labels[, inputs]) of each example, as the plain model is given it."""
    scores = score(model, loader, **options)
    assert scores.num_examples == len(examples)
    expected = weight_importance(model, examples, list(scores), shift)
    for name, value in scores.items():
        assert norm_error(value, expected[name]) < 1e-5, name
    return scores


# Rows that hold several examples.


def flattened(examples=EXAMPLES, **options):
    from transformers import DataCollatorWithFlattening

    rows = [{"input_ids": ids.tolist(), "labels": labels.tolist()} for ids, labels in examples]
    return [DataCollatorWithFlattening(return_tensors="pt", **options)(rows)]


def joined(**columns):
    row = {
        "input_ids": torch.cat([ids for ids, _ in EXAMPLES]),
        "labels": torch.cat([labels for _, labels in EXAMPLES]),
        **columns,
    }
    return [{name: column.unsqueeze(0) for name, column in row.items()}]


def numbers(first=0):
    return torch.cat([torch.full_like(ids, i) for i, (ids, _) in enumerate(EXAMPLES, first)])


def lengths_so_far():
    ends = torch.tensor([0] + [len(ids) for ids, _ in EXAMPLES]).cumsum(0)
    return ends.to(torch.int32)


def restarting():
    return torch.cat([torch.arange(len(ids)) for ids, _ in EXAMPLES])


def padded_on(batch, **values):
    return [
        {
            name: torch.nn.functional.pad(column, (0, 5), value=values.get(name, 0))
            for name, column in batch[0].items()
        }
    ]


def ragged_arrays():
    """As `datasets` gives a slice of rows in its NumPy format."""
    columns = {"input_ids": np.empty(len(EXAMPLES), object)}
    columns["labels"] = columns["input_ids"].copy()
    for row, (ids, labels) in enumerate(EXAMPLES):
        columns["input_ids"][row], columns["labels"][row] = ids.numpy(), labels.numpy()
    return [columns]


FLATTENED = {
    "position_ids that restart": lambda: flattened(),
    "seq_idx": lambda: flattened(return_position_ids=False, return_seq_idx=True),
    "cumulative lengths": lambda: flattened(
        return_position_ids=False, return_flash_attn_kwargs=True
    ),
    "everything the collator gives": lambda: flattened(
        return_seq_idx=True, return_flash_attn_kwargs=True
    ),
    "no separator in the labels": lambda: joined(position_ids=restarting()),
    "a mask that numbers them": lambda: joined(attention_mask=numbers(1)),
    "a mask that numbers them, and padding": lambda: padded_on(
        joined(attention_mask=numbers(1)), labels=-100
    ),
    "restarting under a mask": lambda: joined(
        attention_mask=torch.ones(TOTAL), position_ids=restarting()
    ),
    "filled up with zeros": lambda: padded_on(joined(position_ids=restarting()), labels=-100),
    "filled up, positions of -1": lambda: padded_on(
        joined(position_ids=restarting()), labels=-100, position_ids=-1
    ),
    "ragged arrays of arrays": lambda: ragged_arrays(),
    "filled up, seq_idx -1": lambda: padded_on(joined(seq_idx=numbers()), labels=-100, seq_idx=-1),
    "cumulative lengths alone": lambda: [joined()[0] | {"cu_seqlens": lengths_so_far()}],
    "lists": lambda: [{k: v.tolist() for k, v in flattened()[0].items()}],
    "two rows": lambda: flattened(EXAMPLES[:3]) + flattened(EXAMPLES[3:]),
}


@pytest.mark.parametrize("kind", FLATTENED)
def test_rows_of_several_examples_are_read_one_by_one(kind):
    found = read_examples(FLATTENED[kind]())
    assert [example.input_ids.tolist() for example in found] == [i.tolist() for i, _ in EXAMPLES]
    # The collator's own labels leave out the first token of each, which has no prediction anyway.
    for example, (_, labels) in zip(found, EXAMPLES, strict=True):
        assert torch.equal(example.labels[1:], labels[1:])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_rows_of_several_examples_are_scored_one_by_one(name):
    scores = assert_scored_as(MODELS[name](), flattened(), EXAMPLES)
    assert scores.manifest["batching"]["packed"] is True
    separate = score(MODELS[name](), batches(EXAMPLES, 3))
    assert scores.manifest["data"]["sha256"] == separate.manifest["data"]["sha256"]


def test_masked_models_are_scored_example_by_example_too():
    assert_scored_as(bert(), joined(position_ids=restarting()), EXAMPLES, shift=0)


def test_max_length_cuts_each_example_of_a_row():
    cut = [(ids[:5], labels[:5]) for ids, labels in EXAMPLES]
    assert_scored_as(llama(), flattened(), cut, max_length=5)


def test_default_collation_of_flattened_rows():
    row = {
        name: column[0].tolist() for name, column in joined(position_ids=restarting())[0].items()
    }
    loader = torch.utils.data.DataLoader([row, row], batch_size=2)
    assert len(read_examples(loader)) == 2 * len(EXAMPLES)


# What is carried to the model.


def with_column(name, make, examples=EXAMPLES, side="right", fill=0):
    """(padded batches of three with the column, examples as the plain model is given them)."""
    given = [(ids, labels, {name: make(ids)}) for ids, labels in examples]
    loader = list(batches(examples, 3, side))
    for number, batch in enumerate(loader):
        column = torch.full_like(batch["input_ids"], fill)
        rows = given[3 * number : 3 * number + 3]
        column[batch["attention_mask"] == 1] = torch.cat([each[name] for *_, each in rows])
        batch[name] = column
    return loader, given


def halves(ids):
    """0 for the first half of the tokens, 1 for the second: a pair of sentences."""
    return (torch.arange(len(ids)) >= len(ids) // 2).long()


def shifted(ids):
    return torch.arange(len(ids)) + 3


def spread(ids):
    return 2 * torch.arange(len(ids)) + 1


@pytest.mark.parametrize("make", [halves, torch.zeros_like], ids=["pairs", "zeros"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_token_types_reach_the_models_that_name_them(name, make):
    loader, given = with_column("token_type_ids", make)
    if name == "llama":  # its forward does not take them
        given = EXAMPLES
    assert_scored_as(MODELS[name](), loader, given, shift=0 if name == "bert" else 1)


def test_columns_may_be_ragged_lists_and_booleans():
    loader, given = with_column("token_type_ids", halves)
    ragged = [
        {
            "input_ids": [ids.tolist() for ids, *_ in given],
            "labels": [labels.tolist() for _, labels, _ in given],
            "token_type_ids": [(more["token_type_ids"] == 1).tolist() for *_, more in given],
        }
    ]
    (first, *_), booleans = read_examples(loader), read_examples(ragged)
    assert booleans[0].columns["token_type_ids"].dtype == torch.bool
    assert torch.equal(
        booleans[0].columns["token_type_ids"].long(), first.columns["token_type_ids"]
    )


@pytest.mark.parametrize("make", [shifted, spread])
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_positions_of_an_example_s_own_are_kept(name, make):
    for mask in (True, False):
        given = [
            (
                ids,
                labels,
                {"position_ids": make(ids)} | ({"attention_mask": ids * 0 + 1} if mask else {}),
            )
            for ids, labels in EXAMPLES
        ]
        loader = [{"input_ids": ids, "labels": labels, **more} for ids, labels, more in given]
        assert_scored_as(MODELS[name](), loader, given, shift=0 if name == "bert" else 1)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("start", [0, 1])
def test_positions_that_the_padding_has_moved_count_as_given(name, start):
    """Left padding: numbered over the padding, or from the first token with 1 on the padding."""
    loader = list(batches(EXAMPLES, 3, "left"))
    given = []
    for batch in loader:
        mask = batch["attention_mask"]
        over = torch.arange(mask.shape[1]).expand_as(mask)
        batch["position_ids"] = over if start else (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
        for row, kept in enumerate(mask.bool()):
            columns = {name: column[row][kept] for name, column in batch.items()}
            given.append((columns.pop("input_ids"), columns.pop("labels"), columns))
    scores = assert_scored_as(MODELS[name](), loader, given, shift=0 if name == "bert" else 1)
    if not start:  # as the model numbers them itself, so that examples may share batches
        assert scores.manifest["batching"]["packed"] is (name != "bert")


def test_one_row_of_positions_may_stand_for_a_batch():
    ids = torch.stack([torch.arange(5, 12), torch.arange(20, 27)])
    batch = {"input_ids": ids, "labels": ids, "position_ids": spread(ids[0])[None]}
    given = [(row, row, {"position_ids": spread(row)}) for row in ids]
    assert_scored_as(gpt2(), [batch], given)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_a_mask_that_hides_tokens_in_the_middle_stays_in_place(name):
    ids = torch.arange(5, 17)
    labels = ids.clone()
    mask = torch.ones_like(ids)
    mask[5:7] = 0
    labels[5:7] = -100
    pad = torch.nn.functional.pad
    batch = {
        "input_ids": pad(ids, (0, 3)), "labels": pad(ids, (0, 3), value=-100),
        "attention_mask": pad(mask, (0, 3)),
    }  # fmt: skip
    plain = (ids[:9], ids[:9], {})
    loader = [batch, {"input_ids": plain[0], "labels": plain[1]}]
    given = [(ids, labels, {"attention_mask": mask}), plain]
    assert_scored_as(MODELS[name](), loader, given, shift=0 if name == "bert" else 1)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.float16])
def test_masks_of_any_kind_of_number(kind):
    loader = [b | {"attention_mask": b["attention_mask"].to(kind)} for b in batches(EXAMPLES, 3)]
    assert read_examples(loader) == [Example(*example) for example in EXAMPLES]


def test_examples_differ_by_what_they_carry():
    ids = torch.arange(5, 9)
    first, second = (
        Example(ids, ids, {"token_type_ids": column}) for column in (ids * 0, ids * 0 + 1)
    )
    assert first == first.first(4) and first != second and first != Example(ids, ids)
    shas = set()
    for example in (first, second, Example(ids, ids)):
        shas.add(score(bert(), [example]).manifest["data"]["sha256"])
    assert len(shas) == 3
    assert first.first(2).columns["token_type_ids"].tolist() == [0, 0]


# The same reader elsewhere.


def log_likelihood(model, ids, labels, inputs=None):
    rows = {"input_ids": ids, **(inputs or {})}
    with torch.no_grad():
        logits = model(**{k: v[None] for k, v in rows.items()}).logits[0].double()
    kept = labels[1:] != -100
    log_p = logits[:-1].log_softmax(-1)[kept].gather(1, labels[1:][kept][:, None])
    return float(log_p.sum())


def test_perplexity_reads_flattened_rows_and_token_types():
    model = gpt2()
    expected = [-log_likelihood(model, *example) for example in EXAMPLES]
    found = perplexity(model, flattened(), progress=False)
    assert found.nll_sums.tolist() == pytest.approx(expected, rel=1e-5)
    loader, given = with_column("token_type_ids", halves)
    expected = [-log_likelihood(model, *example) for example in given]
    found = perplexity(model, loader, progress=False)
    assert found.nll_sums.tolist() == pytest.approx(expected, rel=1e-5)


def test_margins_and_states_are_of_examples_with_what_they_carry():
    model = gpt2()
    loader, given = with_column("token_type_ids", halves)
    examples = read_examples(loader)
    margins = response_margins(model, [(examples[1], examples[4])], progress=False)
    for value, (ids, labels, inputs) in ((margins.safe, given[1]), (margins.unsafe, given[4])):
        mean = log_likelihood(model, ids, labels, inputs) / int((labels[1:] != -100).sum())
        assert float(value) == pytest.approx(mean, rel=1e-5)
    states = last_token_states(model, examples, progress=False)
    for number, (ids, _, inputs) in enumerate(given):
        rows = {k: v[None] for k, v in {"input_ids": ids, **inputs}.items()}
        with torch.no_grad():
            expected = model.transformer(**rows).last_hidden_state[0, -1]
        torch.testing.assert_close(states[-1, number], expected, rtol=1e-4, atol=1e-5)


def test_collapse_metrics_read_flattened_rows_and_token_types():
    model, ids = gpt2(), sorted({int(i) for each, _ in EXAMPLES for i in each[1:]})[:6]
    classes = CollapseClasses(
        tuple((i,) for i in ids), tuple(str(i) for i in ids), ("all",) * len(ids)
    )
    separate = collapse_metrics(model, batches(EXAMPLES, 3), classes, progress=False).moments
    found = collapse_metrics(model, flattened(), classes, progress=False).moments
    assert torch.equal(found.counts, separate.counts)
    torch.testing.assert_close(found.means, separate.means, rtol=1e-5, atol=1e-6)

    loader, given = with_column("token_type_ids", halves)
    sums = torch.zeros(len(ids), HIDDEN, dtype=torch.float64)
    for tokens, _, inputs in given:
        rows = {k: v[None] for k, v in {"input_ids": tokens, **inputs}.items()}
        with torch.no_grad():
            states = model.transformer(**rows).last_hidden_state[0].double()
        for t, following in enumerate(tokens[1:].tolist()):
            if following in ids:
                sums[ids.index(following)] += states[t]
    found = collapse_metrics(model, loader, classes, progress=False).moments
    expected = sums / found.counts[:, None]
    torch.testing.assert_close(found.means.double(), expected, rtol=1e-4, atol=1e-5)


# Refused by name.


GOOD = torch.arange(5, 9)


class Seeing(torch.nn.Module):
    """What a vision-language model's forward names."""

    def __new__(cls):
        from transformers import LlamaForCausalLM

        class SeeingLlama(LlamaForCausalLM):
            def forward(self, input_ids, pixel_values=None, image_sizes=None, **kwargs):
                return super().forward(input_ids, **kwargs)

        model = llama()
        model.__class__ = SeeingLlama
        return model


@pytest.mark.parametrize(
    ("build", "name", "value"),
    [
        (Seeing, "pixel_values", torch.rand(1, 3, 4, 4)),
        (Seeing, "image_sizes", [[4, 4]]),
        (llama, "inputs_embeds", torch.rand(1, 4, HIDDEN)),
        (llama, "past_key_values", object()),
        (llama, "position_ids", torch.arange(4).expand(3, 1, 4)),
        (gpt2, "encoder_hidden_states", torch.rand(1, 4, HIDDEN)),
        (bert, "token_type_ids", torch.zeros(1, 7)),
    ],
)
def test_what_cannot_be_carried_is_refused_by_name(build, name, value):
    batch = {"input_ids": GOOD[None], "labels": GOOD[None], name: value}
    text = f"inputs of one integer per token, got {name} for example 1, which .* takes in another"
    plain = {"input_ids": GOOD[None], "labels": GOOD[None]}
    with pytest.raises(ValueError, match=text):
        score(build(), [plain, batch])
    with pytest.raises(ValueError, match=name):
        last_token_states(build(), read_examples([plain, batch]), progress=False)


@pytest.mark.parametrize(
    "more",
    [
        {"pixel_values": torch.rand(1, 3, 4, 4)},  # not of this model
        {"text": ["a b"], "id": [7], "category": "x", "source": None, "length": torch.tensor([4])},
        {"special_tokens_mask": torch.zeros(1, 4).long(), "offset_mapping": torch.zeros(1, 4, 2)},
        {"num_items_in_batch": torch.tensor(4), "use_cache": False, "return_dict": False},
        {"past_key_values": None, "inputs_embeds": None, "position_ids": None},
        {"shift_labels": torch.cat([GOOD[1:], torch.tensor([-100])])[None]},
    ],
    ids=["pictures", "texts", "token columns", "how to run", "nothing", "shift_labels"],
)
def test_what_the_model_does_not_take_is_no_matter(more):
    plain = {"input_ids": GOOD[None], "labels": GOOD[None]}
    expected, found = (score(llama(), [batch]) for batch in (plain, plain | more))
    assert expected.manifest["data"] == found.manifest["data"]
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, r"attention_mask must have shape \[T\] or"),
        (
            {"attention_mask": torch.tensor([[0.0, -1.0, 0, 0]])},
            "must hold 0 for padding, .*got -1",
        ),
        ({"attention_mask": torch.full((1, 4), 0.5)}, "attention_mask must hold integers, got"),
        ({"attention_mask": torch.tensor([[1, 2, 2, 1]])}, "one number in two places; give each"),
        ({"seq_idx": torch.tensor([[0, 1]])}, "seq_idx must have the shape of input_ids at item 0"),
        ({"cu_seq_lens_q": torch.tensor([0, 9])}, "cu_seq_lens_q must rise from 0 to at most the"),
        ({"cu_seqlens": torch.tensor([0, 3, 2, 4])}, "cu_seqlens must rise from 0 to at most the"),
        ({"shift_labels": GOOD[None]}, "shift_labels must be labels moved by one place, -100 at"),
    ],
)
def test_what_divides_rows_must_fit_them(more, text):
    with pytest.raises(ValueError, match=text):
        score(llama(), [{"input_ids": GOOD[None], "labels": GOOD[None], **more}])


@pytest.mark.parametrize("run", [score, perplexity])
@pytest.mark.parametrize(
    ("name", "more", "text"),
    [
        (
            "gpt2",
            {"position_ids": torch.tensor([125, 126, 127, 128])},
            r"0\.\.127, got 128 in exam",
        ),
        ("bert", {"token_type_ids": torch.tensor([0, 1, 1, 2])}, r"0\.\.1, got 2 in example 1;"),
        ("gpt2", {"input_ids": torch.tensor([5, 6, 7, VOCAB])}, "input_ids must lie in 0..95, got"),
    ],
)
def test_numbers_that_the_model_does_not_know_are_refused(run, name, more, text):
    good = {"input_ids": GOOD[None], "labels": torch.tensor([[-100, 6, 7, 8]])}
    bad = good | {key: value[None] for key, value in more.items()}
    if name == "bert":  # perplexity takes no target that stands visible in its own input
        good, bad = (
            each | {"labels": torch.tensor([[9, -100, -100, -100]])} for each in (good, bad)
        )
    with pytest.raises(ValueError, match=text):
        run(MODELS[name](), [good, bad])


def test_a_bias_of_attention_bounds_the_text_too():
    from transformers import MptConfig, MptForCausalLM

    config = MptConfig(d_model=32, n_heads=4, n_layers=1, max_seq_len=16, vocab_size=VOCAB)
    with pytest.raises(ValueError, match=r"must have at most 16 tokens \(the model's positions\)"):
        score(MptForCausalLM(config), batches(make_examples(lengths=(20, 9)), 2))


@pytest.mark.parametrize("lengths", [(9,), (9, 9)])
def test_logits_of_other_places_than_the_tokens_are_refused(lengths):
    from transformers import PerceiverConfig, PerceiverForMaskedLM

    config = PerceiverConfig(
        num_latents=8, d_latents=16, d_model=32, num_blocks=1, num_self_attends_per_block=1,
        num_self_attention_heads=2, num_cross_attention_heads=2, qk_channels=16, v_channels=16,
        vocab_size=VOCAB, max_position_embeddings=64,
    )  # fmt: skip
    loader = batches(make_examples(lengths=lengths), 2)
    with pytest.raises(ValueError, match=r"^model must give logits for each of its tokens, \[1, "):
        score(PerceiverForMaskedLM(config).eval(), loader, target_modules="all")


def test_text_that_is_too_long_is_refused_wherever_it_is_read():
    ids = torch.arange(300) % VOCAB
    with pytest.raises(ValueError, match=r"must have at most 128 tokens \(the model's positions\)"):
        perplexity(MODELS["gpt2"](), [{"input_ids": ids, "labels": ids}])


@pytest.mark.parametrize(
    "kind",
    ["position_ids that restart", "seq_idx", "cumulative lengths", "a mask that numbers them"],
)
def test_a_loss_of_ones_own_needs_one_example_in_each_row(kind):
    def loss_fn(outputs, batch):
        return outputs.logits.float().pow(2).mean((1, 2))

    text = r"one example in each row when loss_fn is given, got a row of 6 at item 0 \(by"
    with pytest.raises(ValueError, match=text):
        score(llama(), FLATTENED[kind](), loss_fn=loss_fn)
    loader = list(batches(EXAMPLES, 3, "left"))
    for batch in loader:
        mask = batch["attention_mask"]
        batch["position_ids"] = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    assert score(llama(), loader, loss_fn=loss_fn).num_examples == len(EXAMPLES)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"memory_budget": "16GB"}, "memory_budget must be a number of bytes, got '16GB'; give a"),
        ({"memory_budget": True}, "memory_budget must be a number of bytes, got True; give a"),
        ({"tokens_per_batch": "big"}, "tokens_per_batch must be a positive number of tokens, got"),
        ({"tokens_per_batch": 64.5}, "tokens_per_batch must be a positive number of tokens, got"),
        ({"keep_top": "1e-3"}, "keep_top must be a ratio above 0 and at most 1, got '1e-3'; give"),
        ({"keep_top": True}, "keep_top must be a ratio above 0 and at most 1, got True; give a"),
        ({"target_modules": None}, "target_modules must be a text or a list of texts, got None; "),
        ({"target_modules": ["mlp", 3]}, "target_modules must be a text or a list of texts, got "),
        ({"description": None}, "description must be a text, which names the data set, got None"),
    ],
)
def test_an_option_of_another_type_is_told_by_its_name_before_the_loader_is_read(options, told):
    def loader():
        raise AssertionError("the loader was read")
        yield

    with pytest.raises(TypeError, match=f"^{told}"):
        fastdean.score(llama(), loader(), progress=False, **options)


def test_no_data_set_is_refused():
    with pytest.raises(ValueError, match="^loaders must have at least one data set, got none"):
        score_sets(llama(), {}, progress=False)


def test_max_length_must_be_a_number_of_tokens():
    with pytest.raises(TypeError, match="^max_length must be a number of tokens, got '8'; give"):
        fastdean.score(llama(), [], max_length="8", progress=False)


def test_a_budget_of_no_bytes_is_none():
    """NaN is neither above nor below what the sums take."""
    with pytest.raises(ValueError, match="^memory_budget must hold the sums of .* got nan; raise"):
        fastdean.score(llama(), [], memory_budget=float("nan"), progress=False)


def test_numbers_of_other_libraries_are_numbers():
    model, rows = llama(), list(batches(make_examples(lengths=(4, 6)), 2))
    plain = fastdean.score(model, rows, keep_top=0.5, tokens_per_batch=8, progress=False)
    options = {"keep_top": np.float32(0.5), "tokens_per_batch": np.int64(8), "memory_budget": 1e9}
    found = fastdean.score(model, rows, progress=False, **options)
    assert all(torch.equal(plain[name], found[name]) for name in plain)


@pytest.mark.parametrize("flag", ["signs", "deterministic"])
def test_a_text_is_no_flag(flag):
    with pytest.raises(TypeError, match=f"^{flag} must be True or False, got 'no'; give one"):
        score(llama(), batches(make_examples(), 4), **{flag: "no"})
