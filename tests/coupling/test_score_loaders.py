"""Everything that may stand for a loader, and every refusal of what may not."""

from __future__ import annotations

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from oracle import norm_error
from tiny_data import batches, make_examples, word_tokenizer
from tiny_models import CAUSAL_MODELS, MAX_TOKENS, VOCAB, bert, llama

import fastdean
from fastdean.coupling.targets.finding import find_targets
from fastdean.data.examples import Example, encode, read_examples

EXAMPLES = make_examples(lengths=(4, 7, 5))


def columns(kind):
    """The examples as rows of unpadded values of `kind`."""
    return [{"input_ids": kind(ids), "labels": kind(labels)} for ids, labels in EXAMPLES]


def as_list(tensor):
    return tensor.tolist()


def padded(side="right", **options):
    return list(batches(EXAMPLES, 2, side, **options))


def torch_dataloader():
    def collate(rows):
        pad = torch.nn.utils.rnn.pad_sequence
        batch = {
            key: pad([row[key] for row in rows], batch_first=True, padding_value=value)
            for key, value in (("input_ids", 0), ("labels", -100))
        }
        mask = pad([torch.ones_like(row["input_ids"]) for row in rows], batch_first=True)
        return {**batch, "attention_mask": mask}

    return torch.utils.data.DataLoader(columns(torch.clone), batch_size=2, collate_fn=collate)


def default_collated(kind):
    """Three examples of equal length through torch's default collation."""
    rows = [{"input_ids": kind(ids[:4]), "labels": kind(labels[:4])} for ids, labels in EXAMPLES]
    return torch.utils.data.DataLoader(rows, batch_size=3)


def hf_dataset(torch_format=False):
    from datasets import Dataset

    dataset = Dataset.from_list(columns(as_list))
    return dataset.with_format("torch") if torch_format else dataset


def batch_encoding():
    from transformers import BatchEncoding

    return [BatchEncoding(batch) for batch in padded()]


def ragged(kind):
    rows = columns(kind)
    return [{key: [row[key] for row in rows] for key in ("input_ids", "labels")}]


LOADERS = {
    "batches": padded,
    "left padding": lambda: padded("left"),
    "padding with an ordinary token": lambda: padded("left", pad=7),
    "generator": lambda: batches(EXAMPLES, 2),
    "one batch, no list": lambda: next(batches(EXAMPLES, 3)),
    "single examples": lambda: columns(torch.clone),
    "single examples of lists": lambda: columns(as_list),
    "numpy examples": lambda: columns(torch.Tensor.numpy),
    "numpy batches": lambda: [{k: v.numpy() for k, v in b.items()} for b in padded()],
    "int32 batches": lambda: [{k: v.int() for k, v in b.items()} for b in padded()],
    "boolean mask": lambda: [
        b | {"attention_mask": b["attention_mask"].bool()} for b in padded("left")
    ],
    "ragged lists": lambda: ragged(as_list),
    "ragged tensors": lambda: ragged(torch.clone),
    "ragged numpy arrays": lambda: ragged(torch.Tensor.numpy),
    "BatchEncoding": batch_encoding,
    "DataLoader": torch_dataloader,
    "datasets.Dataset": hf_dataset,
    "datasets.Dataset of tensors": lambda: hf_dataset(torch_format=True),
    "Example objects": lambda: [Example(*example) for example in EXAMPLES],
}


@pytest.mark.parametrize("kind", LOADERS)
def test_every_kind_of_loader_gives_the_same_examples(kind):
    found = read_examples(LOADERS[kind]())
    assert len(found) == len(EXAMPLES)
    for example, (ids, labels) in zip(found, EXAMPLES, strict=True):
        assert example.input_ids.dtype == example.labels.dtype == torch.int64
        assert torch.equal(example.input_ids, ids) and torch.equal(example.labels, labels)


@pytest.mark.parametrize("kind", [as_list, torch.clone], ids=["lists", "tensors"])
def test_default_collation_is_read_as_the_examples_were(kind):
    found = read_examples(default_collated(kind))
    assert [e.input_ids.tolist() for e in found] == [ids[:4].tolist() for ids, _ in EXAMPLES]
    assert [e.labels.tolist() for e in found] == [labels[:4].tolist() for _, labels in EXAMPLES]


def test_scores_are_those_of_the_examples_whatever_the_loader():
    model = llama()
    expected = fastdean.score(model, padded(), progress=False)
    for loader in (hf_dataset(), torch_dataloader(), batches(EXAMPLES, 2, "left")):
        scores = fastdean.score(model, loader, progress=False)
        found = scores.manifest["data"]
    for key in ("examples", "tokens", "target_tokens", "sha256"):
        assert found[key] == expected.manifest["data"][key]
        for name in expected:
            assert norm_error(scores[name], expected[name]) < 1e-6


def test_without_a_mask_padding_is_part_of_the_example():
    (batch,) = batches(EXAMPLES[:1], 1)
    del batch["attention_mask"]
    assert len(read_examples([batch])[0]) == len(EXAMPLES[0][0]) + 2


def test_max_length_cuts_rows_and_batches_alike():
    for loader in (padded("left"), columns(as_list), [Example(*e) for e in EXAMPLES]):
        assert [len(e) for e in read_examples(loader, max_length=5)] == [4, 5, 5]


# Text rows. Tokens are words, so that what is a target can be read off.

PAIR = {"prompt": "the cat sat", "response": "yes no yes"}


def words(example, tokenizer):
    """(all tokens, target tokens) of an example as text."""
    targets = example.labels[example.labels != -100]
    return tuple(
        " ".join(tokenizer.convert_ids_to_tokens(ids.tolist()))
        for ids in (example.input_ids, targets)
    )


@pytest.mark.parametrize(
    "template, bos, text, targets",
    [
        ("raw", True, "<s> the cat sat yes no yes", "yes no yes"),
        ("raw", False, "the cat sat yes no yes", "yes no yes"),
        # The released code drops the first token of the response: its BOS, where there is one.
        ("published", True, "<s> the cat sat yes no yes", "yes no yes"),
        ("published", False, "the cat sat no yes", "no yes"),
        ("chat", True, "user : the cat sat </s> assistant : yes no yes </s>", "yes no yes </s>"),
        ("chat", False, "user : the cat sat </s> assistant : yes no yes </s>", "yes no yes </s>"),
    ],
)
def test_templates(template, bos, text, targets):
    tokenizer = word_tokenizer(bos)
    (example,) = encode([PAIR], tokenizer, template=template)
    assert words(example, tokenizer) == (text, targets)
    assert torch.equal(example.labels[-1:], example.input_ids[-1:])


def test_text_rows_are_targets_throughout():
    tokenizer = word_tokenizer()
    (example,) = encode([{"text": "the dog ran"}], tokenizer)
    assert words(example, tokenizer) == ("<s> the dog ran", "<s> the dog ran")


def turns(*pairs):
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def test_every_assistant_turn_of_a_chat_is_a_target():
    tokenizer = word_tokenizer()
    chat = turns(("user", "the cat"), ("assistant", "yes"), ("user", "a dog"), ("assistant", "no"))
    (example,) = encode([chat], tokenizer)
    assert words(example, tokenizer) == (
        "user : the cat </s> assistant : yes </s> user : a dog </s> assistant : no </s>",
        "yes </s> no </s>",
    )


def test_rows_are_scored_as_their_tokens_are():
    tokenizer, model = word_tokenizer(), llama()
    rows = [PAIR, turns(("user", "a dog"), ("assistant", "no")), {"text": "on the mat"}]
    scores = fastdean.score(model, rows, tokenizer=tokenizer, progress=False)
    tokens = [{"input_ids": e.input_ids, "labels": e.labels} for e in encode(rows, tokenizer)]
    expected = fastdean.score(model, tokens, progress=False)
    found = scores.manifest["data"]
    for key in ("examples", "tokens", "target_tokens", "sha256"):
        assert found[key] == expected.manifest["data"][key]
    assert all(torch.equal(scores[name], expected[name]) for name in expected)


def test_rows_come_from_datasets_and_collated_batches_too():
    from datasets import Dataset

    tokenizer, rows = word_tokenizer(), [PAIR, {"prompt": "a dog", "response": "ran"}]
    chats = [turns(("user", "a dog"), ("assistant", "no"))]
    for loader, plain in (
        (Dataset.from_list(rows), rows),
        (torch.utils.data.DataLoader(rows, batch_size=2), rows),
        (Dataset.from_list(chats), chats),
    ):
        found, expected = read_examples(loader, tokenizer=tokenizer), encode(plain, tokenizer)
        assert [words(e, tokenizer) for e in found] == [words(e, tokenizer) for e in expected]


# Refusals.


def score(loader, model=None, **options):
    return fastdean.score(model or llama(), loader, progress=False, **options)


def one(input_ids, labels=None, **more):
    labels = input_ids if labels is None else labels
    return [{"input_ids": input_ids, "labels": labels, **more}]


GOOD = [5, 6, 7, 8]


@pytest.mark.parametrize(
    "loader, error, text",
    [
        ("data.jsonl", TypeError, "loader must be an iterable of batches or rows, got the text"),
        (b"bytes", TypeError, "loader must be an iterable of batches or rows, got the text"),
        (7, TypeError, "loader must be an iterable of batches or rows, got int"),
        ([], ValueError, "loader must yield at least one example, got none; check"),
        ([(torch.ones(2, 3),)], TypeError, "loader must yield dictionaries, got tuple at item 0"),
        ([*one(GOOD), "row"], TypeError, "loader must yield dictionaries, got str at item 1"),
        ([{"input_ids": GOOD}], ValueError, r"give labels beside input_ids, got the keys \['input"),
        ([{"prompt": "a"}], ValueError, r"got the columns \['prompt'\] at item 0; pass tokenizer="),
        (
            one(GOOD, GOOD[:3]),
            ValueError,
            r"labels must have the shape of input_ids at item 0, got",
        ),
        (one(GOOD, attention_mask=[1, 1]), ValueError, "attention_mask must have the shape of"),
        (
            one(GOOD, attention_mask=[0] * 4),
            ValueError,
            "got a row that is padding alone at item 0",
        ),
        (one([]), ValueError, "got a row without tokens at item 0; leave the row out"),
        (one(torch.ones(1, 2, 3).long()), ValueError, r"must have shape \[T\] or \[B, T\], got"),
        (one(torch.rand(2, 3)), ValueError, "input_ids must hold integers, got torch.float32"),
        (one(["the cat"]), ValueError, r"input_ids must hold integers of shape .* tokenise"),
        (one(GOOD, [-100] * 4), ValueError, "example 0 must have at least one target token after"),
        (one(GOOD, [5, -100, -100, -100]), ValueError, "after its first token, got labels that"),
        (one([5]), ValueError, "example 0 must have at least one target token after its first"),
        ([*one(GOOD), *one([5, VOCAB])], ValueError, "must lie in 0..95, got 96 in example 1; use"),
        (one([5, -1], [5, 6]), ValueError, "input_ids must lie in 0..95, got -1 in example 0"),
        (one(GOOD, [5, 6, 7, 99]), ValueError, "labels must lie in 0..95 or be -100, got 99 in"),
        (one(GOOD, [5, 6, 7, -1]), ValueError, "labels must lie in 0..95 or be -100, got -1 in"),
        (
            one([5] * (MAX_TOKENS + 1)),
            ValueError,
            "must have at most 128 tokens .* cut it with max",
        ),
    ],
)
def test_refused_loaders(loader, error, text):
    with pytest.raises(error, match=text):
        score(loader)


def roberta(kind="RobertaForMaskedLM"):
    """Positions are numbered from behind the padding token, 1: 20 of them hold 18 tokens."""
    import transformers

    config = transformers.RobertaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=20,
        pad_token_id=1,
        is_decoder=kind == "RobertaForCausalLM",
    )
    return getattr(transformers, kind)(config).eval()


def test_positions_behind_the_padding_token_hold_fewer_tokens():
    from fastdean.models.model_state import max_tokens

    assert max_tokens(roberta()) == 18
    assert max_tokens(torch.nn.DataParallel(roberta())) == 18
    assert max_tokens(llama()) == max_tokens(bert()) == MAX_TOKENS
    assert max_tokens(torch.nn.Linear(2, 2)) is None
    assert score(one([5] * 18), roberta()).num_examples == 1
    for length in (19, 20):
        with pytest.raises(ValueError, match=f"at most 18 tokens .*, got {length}; cut it with"):
            score(one([5] * length), roberta())


def test_windows_of_text_fit_the_positions_behind_the_padding_token():
    from fastdean.evaluation.perplexity import perplexity_of_text

    model, tokenizer = roberta("RobertaForCausalLM"), word_tokenizer()
    text = "the cat sat on the mat " * 10
    assert perplexity_of_text(model, tokenizer, text, progress=False).window == 18
    with pytest.raises(ValueError, match="at most the model's 18 positions, got 19; leave it out"):
        perplexity_of_text(model, tokenizer, text, window=19)


def test_a_single_token_is_enough_for_a_masked_model():
    scores = score(one([5]), bert())
    assert scores.manifest["data"]["target_tokens"] == 1
    with pytest.raises(ValueError, match="example 0 must have at least one target token, got"):
        score(one(GOOD, [-100] * 4), bert())


@pytest.mark.parametrize(
    "row, options, text",
    [
        ({"question": "a"}, {}, r"row 0 must have the text columns .* got \['question'\]; rename"),
        ({"prompt": "a", "response": None}, {}, "row 0 must have the text columns"),
        (PAIR | {"response": ""}, {}, "row 0 must have at least one target token, got none; its"),
        (PAIR, {"max_length": 4}, "at least one target token within max_length=4, got none"),
        (PAIR, {"max_length": 1}, "max_length must be at least 2 tokens, got 1"),
        (
            PAIR,
            {"template": "alpaca"},
            "template must be one of raw, chat, published, got 'alpaca'; leave it out for 'raw'",
        ),
        (
            {"messages": "the cat"},
            {},
            "row 0 must have a list of {'role', 'content'} dict.* got 'the",
        ),
        ({"messages": [{"from": "human"}]}, {}, "row 0 must have a list of {'role', 'content'}"),
        (turns(("user", "a dog")), {}, "row 0 must have at least one target token, got none"),
    ],
)
def test_refused_rows(row, options, text):
    with pytest.raises(ValueError, match=text):
        score([row], tokenizer=word_tokenizer(), **options)


@pytest.mark.parametrize(
    "row, text",
    [
        ({"messages": []}, "row 0 must be a chat in which something precedes .*, got no turn"),
        (turns(("assistant", "a"), ("user", "the cat")), "row 0 must be .* its first turn an assi"),
        (turns((5, "a"), ("assistant", "the cat")), "row 0 must have text as the role .*got int"),
        (turns(("user", "a"), ("assistant", "\ud800")), "row 0 must have text .*got a lone surro"),
    ],
)
def test_refused_turns(row, text):
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    with pytest.raises(ValueError, match=text):
        score([row], tokenizer=word_tokenizer(chat_template=template))


def test_the_number_of_the_bad_row_is_told():
    with pytest.raises(ValueError, match="row 2 must have"):
        score([PAIR, PAIR, {"prompt": "a"}], tokenizer=word_tokenizer())


@pytest.mark.parametrize(
    "chat_template, text",
    [
        (None, "tokenizer must have a chat template to encode row 0 as a chat, got none; use"),
        (
            "{{ raise_exception('Roles must alternate') }}",
            "row 0 must be a chat that the tokenizer's template accepts, got its error: Roles must",
        ),
        (
            # Counts the turns first, so that no prefix of the chat is a prefix of its text.
            "{{ 'a ' * messages|length }}{% for m in messages %}{{ m.content }} {% endfor %}",
            "row 0 must be a chat whose turns are rendered one after the other",
        ),
        *(
            (template, "row 0 must be a chat that the tokenizer's template accepts, got its error")
            for template in ("{{ 1 + 'a' }}", "{{ 1 / 0 }}", "{% include 'x' %}")
        ),
    ],
)
def test_refused_chats(chat_template, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        score([PAIR], tokenizer=word_tokenizer(chat_template=chat_template), template="chat")


def test_a_template_whose_last_space_goes_to_the_answer_is_named():
    from tiny_tokenizers import byte_level

    tokenizer = copy.deepcopy(byte_level())
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    row = {"prompt": "the table", "response": "the river"}
    expected = "whose turns share no token, got a template .*assistant: ' before turn 1"
    with pytest.raises(ValueError, match=expected):
        encode([row], tokenizer, template="chat")


@pytest.mark.parametrize(
    "options, text",
    [
        ({"tokens_per_batch": 0}, "tokens_per_batch must be a positive number of tokens, got 0; "),
        ({"keep_top": 0}, "keep_top must be a ratio above 0 and at most 1, got 0; leave"),
        ({"keep_top": 1.5}, "keep_top must be a ratio above 0 and at most 1, got 1.5; leave"),
        ({"keep_top": float("nan")}, "keep_top must be a ratio above 0 and at most 1, got nan"),
        ({"memory_budget": 100}, "memory_budget must hold .* 8,192 bytes for .*, got 100; raise"),
        ({"granularity": "head"}, "granularity must be one of weight, unit, got 'head'"),
        ({"impl": "fast"}, "impl must be one of reference, triton, native, got 'fast'"),
    ],
)
def test_refused_options(options, text):
    with pytest.raises(ValueError, match=text):
        score(one(GOOD), **options)


@pytest.mark.parametrize("name", CAUSAL_MODELS)
def test_a_weight_that_is_nan_is_found_in_the_loss(name):
    model = CAUSAL_MODELS[name]()
    with torch.no_grad():
        # In the MLP: attention kernels may turn NaN scores into zeros.
        find_targets(model)[-1].module.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="loss must be finite, got nan for example 0; check the"):
        score(one(GOOD), model)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_decoder_models_are_refused(kind):
    from transformers import (
        BartConfig,
        BartForConditionalGeneration,
        T5Config,
        T5ForConditionalGeneration,
    )

    if kind == "t5":
        config = T5Config(vocab_size=96, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        model = T5ForConditionalGeneration(config)
    else:
        size = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 16}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        ffn = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
        model = BartForConditionalGeneration(BartConfig(vocab_size=96, **size, **heads, **ffn))
    with pytest.raises(
        ValueError, match=f"model must be a causal or masked .* {type(model).__name__}"
    ):
        score(one(GOOD), model)


def test_models_that_are_no_language_models_are_refused():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got dict; load it first"):
        score(one(GOOD), {"name": "Qwen/Qwen2-7B"})


def test_quantised_weights_are_refused():
    model = llama()
    down = model.model.layers[1].mlp.down_proj
    down.weight = torch.nn.Parameter(down.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(
        ValueError, match="got torch.int8 in model.layers.1.mlp.down_proj.weight; load"
    ):
        score(one(GOOD), model)


# Losses of the caller.


class Classifier(torch.nn.Module):
    """No Hugging Face model: no config, no accessors, an in-place activation, a pooling."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(VOCAB, 8)
        self.layers = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(inplace=True))
            for _ in range(2)
        )
        self.head = torch.nn.Linear(8, 3)

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden.mean(1))


def class_loss(outputs, batch):
    return torch.nn.functional.cross_entropy(outputs, batch["classes"], reduction="none")


def class_batches():
    ids = torch.randint(0, VOCAB, (4, 6), generator=torch.Generator().manual_seed(1))
    classes = torch.tensor([0, 2, 1, 1])
    return [{"input_ids": ids[i : i + 2], "classes": classes[i : i + 2]} for i in (0, 2)]


def test_a_loss_of_ones_own_scores_any_module():
    model = Classifier()
    scores = score(class_batches(), model, loss_fn=class_loss)
    assert list(scores) == ["layers.0.0.weight", "layers.1.0.weight"]
    for name, value in scores.items():
        weight, total = model.get_parameter(name), 0
        for batch in class_batches():
            for ids, label in zip(batch["input_ids"], batch["classes"], strict=True):
                loss = class_loss(model(ids[None]), {"classes": label[None]})
                total = total + torch.autograd.grad(loss.sum(), weight)[0].abs()
        assert norm_error(value, total * weight.detach().abs() / 4) < 1e-5
    assert scores.num_examples == 4
    joined = scores + score(class_batches(), model, loss_fn=class_loss)
    assert joined.manifest["data"]["examples"] == 8


@pytest.mark.parametrize(
    "change, text",
    [
        ({"loader": []}, "loader must yield at least one batch, got none"),
        (
            {"loader": [(1, 2)]},
            r"tensor input_ids \[B, T\] when loss_fn is given, got tuple at item 0",
        ),
        ({"loader": one([5, 6])}, "got list at item 0; collate"),
        ({"loader": one(torch.tensor([5, 6]))}, r"got torch.Size\(\[2\]\) at item 0; collate"),
        (
            {"loss_fn": lambda o, b: class_loss(o, b).mean()},
            r"per example, \[2\], got \[\]; reduce",
        ),
        ({"loss_fn": lambda o, b: 3.0}, r"loss per example, \[2\], got float; reduce"),
        (
            {"loss_fn": lambda o, b: class_loss(o, b) / 0},
            "loss must be finite, got inf for example 0",
        ),
        (
            {"target_modules": ["head"]},
            "head must see every token of the batch once, 12 rows, got 2",
        ),
        (
            {"loss_fn": lambda o, b: class_loss(o, b).detach()},
            "^loss_fn must return losses that depend on the model with gradient, got losses with",
        ),
        (
            {"loss_fn": torch.no_grad()(class_loss)},
            "^loss_fn must return losses that depend on the model with gradient, got losses with",
        ),
        (
            {"loss_fn": lambda o, b: torch.tensor(class_loss(o, b).tolist())},
            "^loss_fn must return losses that depend on the model with gradient, got losses with",
        ),
    ],
)
def test_refused_losses(change, text):
    arguments = {"loader": class_batches(), "loss_fn": class_loss} | change
    with pytest.raises((ValueError, RuntimeError), match=text):
        score(arguments.pop("loader"), Classifier(), **arguments)


def test_a_detached_loss_is_told_whatever_the_model_returns():
    class Wrapped(Classifier):
        def forward(self, input_ids):
            return SimpleNamespace(logits=super().forward(input_ids))

    def loss_fn(outputs, batch):
        return class_loss(outputs.logits, batch).detach()

    with pytest.raises(ValueError, match="^loss_fn must return losses that depend on the model"):
        score(class_batches(), Wrapped(), loss_fn=loss_fn)


def test_a_module_that_takes_no_part_is_still_told_of():
    """Its losses have no gradient either: nothing but the targets begins a graph."""

    class Skipping(Classifier):
        def forward(self, input_ids):
            return self.head(self.embed(input_ids).mean(1))

    with pytest.raises(RuntimeError, match="once per batch, got 0 times; modules"):
        score(class_batches(), Skipping(), loss_fn=class_loss)


def test_an_input_changed_in_place_is_refused():
    class Overwriting(Classifier):
        def forward(self, input_ids):
            hidden = self.embed(input_ids)
            out = self.layers[1](self.layers[0](hidden))
            hidden.zero_()
            return self.head(out.mean(1))

    with pytest.raises(RuntimeError, match="layers.0.0 must have an input that stays as it was"):
        score(class_batches(), Overwriting(), loss_fn=class_loss)


def test_how_rows_became_tokens_is_recorded():
    chat = turns(("user", "the cat"), ("assistant", "sat"))
    rows = [PAIR, PAIR, {"text": "the dog ran"}, chat]
    tokenizer = word_tokenizer()
    data = score(rows, tokenizer=tokenizer).manifest["data"]
    assert data["rendered"] == {"chat": 1, "raw": 2, "text": 1}
    assert data["template"] is None and data["tokenizer"]
    tokens = score(encode([PAIR], tokenizer, template="chat", max_length=9)).manifest["data"]
    assert tokens["rendered"] == {"chat": 1} and "template" not in tokens
    assert score(columns(as_list)).manifest["data"]["rendered"] == {"tokens": 3}
    added = score([PAIR], tokenizer=tokenizer) + score([chat], tokenizer=tokenizer)
    assert added.manifest["data"]["rendered"] == {"chat": 1, "raw": 1}


@pytest.mark.parametrize("template", ["raw", "published"])
def test_messages_are_refused_under_a_template_they_cannot_take(template):
    chat = turns(("user", "the cat"), ("assistant", "sat"))
    with pytest.raises(ValueError, match=f"template must be 'chat' or left out .* '{template}'"):
        encode([chat], word_tokenizer(), template=template)
    assert encode([chat], word_tokenizer())[0].rendered == "chat"


def test_coupling_scores_of_other_renderings_is_warned_of(caplog):
    tokenizer, model = word_tokenizer(), llama()
    options = {"tokenizer": tokenizer, "progress": False}
    raw = fastdean.score(model, [PAIR], **options)
    chat = fastdean.score(model, [PAIR], template="chat", **options)
    other = fastdean.score(model, [{**PAIR, "response": "the dog"}], **options)
    fastdean.couple(raw, other, ratio=0.1)
    assert caplog.text == ""
    fastdean.couple(raw, chat, ratio=0.1)
    assert "did not become tokens alike: first raw (1); second chat (1)." in caplog.text


PARTS = [{"type": "text", "text": "the "}, {"type": "text", "text": "cat", "image": None}]


def test_text_parts_of_a_message_are_its_text():
    tokenizer = word_tokenizer()
    plain = turns(("user", "the cat"), ("assistant", "sat"))
    parts = turns(("user", PARTS), ("assistant", [{"type": "text", "text": "sat"}]))
    for one, other in zip(encode([plain], tokenizer), encode([parts], tokenizer), strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.labels, other.labels)


@pytest.mark.parametrize(
    "content, text",
    [
        (None, "row 1 must have text in every turn, got null in turn 1"),
        ([{"type": "image", "url": "x"}], "row 1 must have text in every turn, got a part of type"),
        ([], "row 1 must have text in every turn, got a list without parts in turn 1"),
        (7, "row 1 must have text in every turn, got int in turn 1"),
    ],
)
def test_turns_without_text_are_refused_by_their_row(content, text):
    good = turns(("user", "the cat"), ("assistant", "sat"))
    with pytest.raises(ValueError, match=text):
        encode([good, turns(("user", "a dog"), ("assistant", content))], word_tokenizer())


def test_default_collated_chats_are_read_as_they_were():
    tokenizer = word_tokenizer()
    chats = [turns(("user", f"the {w}"), ("assistant", "sat")) for w in ("cat", "dog", "cat")]
    collated = torch.utils.data.DataLoader(chats, batch_size=2)
    read = read_examples(collated, tokenizer=tokenizer)
    assert [words(e, tokenizer) for e in read] == [
        words(e, tokenizer) for e in encode(chats, tokenizer)
    ]


def test_default_collated_parts_are_refused():
    chats = [turns(("user", PARTS[:1]), ("assistant", "sat"))] * 2
    collated = torch.utils.data.DataLoader(chats, batch_size=2)
    with pytest.raises(ValueError, match="loader must collate chats of roles and texts, .*=list"):
        read_examples(collated, tokenizer=word_tokenizer())


def test_odd_tokens_of_rows_are_warned_of(caplog):
    score([{"text": "<s> the cat sat"}, PAIR], tokenizer=word_tokenizer(True))
    assert "loader: 1 of 2 examples start with two '<s>' (first: row 0)" in caplog.text


# Rows that cannot be used, left out and counted.

GOOD_ROWS = [{"prompt": "the cat", "response": "ran"}, {"prompt": "a dog", "response": "sat"}]
BAD_ROWS = {
    "an empty response": ({"prompt": "the cat", "response": ""}, "row 1 must have at least one"),
    "no columns": ({"other": 3}, "row 1 must have the text columns"),
    "a null": ({"prompt": None, "response": "ran"}, "row 1 must have the text columns"),
    "an odd turn": ({"messages": [{"role": "user"}]}, "row 1 must have a list of"),
    "no character": ({"prompt": "a\ud800", "response": "ran"}, "row 1 must have text in 'prompt'"),
    "no row": (None, "loader must yield dictionaries, got NoneType at item 1"),
    "turns in columns": ({"messages": [{"role": ["user"], "content": 3}]}, "loader must collate"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_left_out_of_scores_and_counted(name, caplog):
    bad, reason = BAD_ROWS[name]
    model, tokenizer = llama(), word_tokenizer()
    options = {"tokenizer": tokenizer, "progress": False}
    rows = [GOOD_ROWS[0], bad, GOOD_ROWS[1]]
    with pytest.raises((ValueError, TypeError), match=reason):
        fastdean.score(model, rows, **options)
    scores = fastdean.score(model, rows, skip_bad_rows=True, **options)
    (told,) = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert told.startswith(f"loader: 1 row is left out: row 1 ({reason}")
    skipped = scores.manifest["data"]["skipped_rows"]
    assert skipped["count"] == 1 and [row["row"] for row in skipped["first"]] == [1]
    assert skipped["first"][0]["reason"].startswith(reason)
    expected = fastdean.score(model, GOOD_ROWS, skip_bad_rows=True, **options)
    assert "skipped_rows" not in expected.manifest["data"]
    assert scores.num_examples == expected.num_examples == 2
    assert all(torch.equal(scores[each], expected[each]) for each in expected)


def test_examples_that_the_model_cannot_take_are_left_out_too():
    ids = torch.arange(3, 8)
    unseen = torch.tensor([5, -100, -100, -100, -100])  # a target, and nothing in front of it
    good = [{"input_ids": ids, "labels": ids}, {"input_ids": ids[:3], "labels": ids[:3]}]
    long = torch.full((MAX_TOKENS + 1,), 5)
    loader = [
        {"input_ids": ids, "labels": unseen}, good[0], {"input_ids": long, "labels": long}, good[1],
    ]  # fmt: skip
    scores = fastdean.score(llama(), loader, skip_bad_rows=True, progress=False)
    skipped = scores.manifest["data"]["skipped_rows"]
    assert skipped["count"] == 2 and [row["row"] for row in skipped["first"]] == [0, 2]
    expected = fastdean.score(llama(), good, progress=False)
    assert all(torch.equal(scores[each], expected[each]) for each in expected)
    assert scores.manifest["data"]["sha256"] == expected.manifest["data"]["sha256"]


def test_an_example_keeps_its_number_behind_a_row_left_out():
    model, tokenizer = llama(), word_tokenizer()
    (last,) = encode([GOOD_ROWS[1]], tokenizer)
    seen = encode([GOOD_ROWS[0]], tokenizer)[0].input_ids
    token = next(i for i in last.input_ids.tolist() if i not in seen)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    rows = [{"prompt": "the"}, GOOD_ROWS[0], GOOD_ROWS[1]]
    with pytest.raises(ValueError, match="loss must be finite, got nan for example 2; "):
        fastdean.score(model, rows, tokenizer=tokenizer, skip_bad_rows=True, progress=False)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [{"prompt": "the"}] * 2,
            {},
            "got none that can be used: row 0 must have the text columns",
        ),
        (GOOD_ROWS, {"template": "odd"}, "template must be one of raw, chat, published, got 'odd'"),
        (GOOD_ROWS, {"max_length": 1}, "max_length must be at least 2 tokens, got 1"),
        (GOOD_ROWS, {"loss_fn": len}, "skip_bad_rows must be left out with loss_fn"),
    ],
)
def test_what_is_wrong_with_every_row_is_refused(rows, options, message):
    options = {"tokenizer": word_tokenizer(), "skip_bad_rows": True, "progress": False} | options
    with pytest.raises(ValueError, match=message):
        fastdean.score(llama(), rows, **options)


def test_reading_skips_bad_rows_of_collated_batches(caplog):
    batch = {"prompt": ["the", "a", "the"], "response": ["cat", "", "dog"]}
    found = read_examples([batch, batch], tokenizer=word_tokenizer(), skip_bad_rows=True)
    assert len(found) == 4
    assert "loader: 2 rows are left out: row 1 (" in caplog.text and "; row 4 (" in caplog.text


def test_scores_that_are_added_count_the_rows_that_both_left_out():
    options = {"tokenizer": word_tokenizer(), "skip_bad_rows": True, "progress": False}
    bad, model = {"prompt": "the"}, llama()
    one = fastdean.score(model, [bad, *GOOD_ROWS], **options)
    other = fastdean.score(model, [*GOOD_ROWS, bad, bad], **options)
    plain = fastdean.score(model, GOOD_ROWS, **options)
    both = (one + other).manifest["data"]["skipped_rows"]
    assert both["count"] == 3 and [row["row"] for row in both["first"]] == [0, 2, 3]
    assert (plain + one).manifest["data"]["skipped_rows"]["count"] == 1
