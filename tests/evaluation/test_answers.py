"""Answers of a model: a batch gives what each prompt gets alone, whatever the model does."""

from __future__ import annotations

import random

import pytest
import tiny_models
import torch
from tiny_folders import WORDS, tokenizer
from tiny_models import CAUSAL_MODELS, HIDDEN, INTERMEDIATE, VOCAB

from fastdean.evaluation import generate
from fastdean.evaluation.answers import continuing
from fastdean.evaluation.answers.continuing import ALONE, EQUAL, PADDED, batches
from fastdean.masks import NeuronMask
from fastdean.masks.entries import MaskEntry

LENGTHS = (1, 3, 3, 7, 12, 20)
NEW = 6


def prompts(seed=0):
    chosen = random.Random(seed)
    return [" ".join(chosen.choices(WORDS, k=length)) for length in LENGTHS]


def recurrent_gemma():
    """A recurrent state, which runs over padding."""
    from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

    torch.manual_seed(0)
    config = RecurrentGemmaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=3,
        num_attention_heads=4,
        attention_window_size=16,
        lru_width=HIDDEN,
    )
    return RecurrentGemmaForCausalLM(config).float().eval()


def longrope():
    """Positions that change for all of a batch where the longest row passes 16 tokens."""
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope |= {"original_max_position_embeddings": 16}
    config = Phi3Config(
        **tiny_models._DECODER,
        num_key_value_heads=2,
        original_max_position_embeddings=16,
        rope_parameters=rope,
    )
    return Phi3ForCausalLM(config).float().eval()


def mixed_rows():
    """Rows of a batch that see each other: what no batch may be made of."""
    model = tiny_models.llama()
    embedding = model.get_input_embeddings()
    plain = embedding.forward
    embedding.forward = lambda ids: plain(ids) + plain(ids).mean(0, keepdim=True)
    return model


FAMILIES = {
    **CAUSAL_MODELS,
    "recurrent_gemma": recurrent_gemma,
    "longrope": longrope,
    "mixed rows": mixed_rows,
}


@torch.no_grad()
def oracle(model, tok, prompt, stops, new=NEW):
    """Token by token, one row, no cache."""
    ids = tok(prompt)["input_ids"]
    start = len(ids)
    while len(ids) < start + new and (len(ids) == start or ids[-1] not in stops):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
        ids = [*ids, int(logits[0, -1].float().argmax())]
    new = [token for token in ids[start:] if token not in stops]
    return tok.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_answers_as_each_prompt_by_itself(name):
    model, tok = FAMILIES[name](), tokenizer()
    # Many tokens, so that rows of a batch end at different times.
    stops = [2, *range(40, VOCAB, 3)]
    model.generation_config.eos_token_id = stops
    together = generate(model, tok, prompts(), max_new_tokens=NEW, progress=False)
    alone = [
        generate(model, tok, [each], max_new_tokens=NEW, progress=False)[0] for each in prompts()
    ]
    assert together == alone
    if name != "longrope":  # Its cached keys keep the positions that they were given.
        expected = [oracle(model, tok, each, {*stops}) for each in prompts()]
        assert [each.text for each in together] == expected


@pytest.mark.parametrize(
    "name, way",
    [("gpt2", PADDED), ("gemma2", PADDED), ("recurrent_gemma", EQUAL), ("mixed rows", ALONE)],
)
def test_how_prompts_share_a_batch_is_measured_on_the_model(name, way):
    ids = [tokenizer()(each)["input_ids"] for each in prompts()]
    model = FAMILIES[name]()
    with continuing._state(model), torch.no_grad():
        assert continuing._way(model, ids, [2]) == way


def test_batches_are_of_neighbours_in_length_and_within_their_tokens():
    lengths = [5, 2, 9, 2, 5, 5]
    plan = {"max_new_tokens": 1, "tokens_per_batch": 18}
    assert batches(lengths, way=PADDED, **plan) == [[1, 3, 0], [4, 5], [2]]
    assert batches(lengths, way=EQUAL, **plan) == [[1, 3], [0, 4, 5], [2]]
    assert batches(lengths, way=ALONE, **plan) == [[1], [3], [0], [4], [5], [2]]
    # From 5 tokens on a row would change with the longest of its batch.
    assert batches(lengths, way=PADDED, alike_up_to=5, **plan) == [[1, 3], [0, 4, 5], [2]]
    assert batches([400], way=PADDED, **plan) == [[0]]


def test_the_model_s_own_settings_are_not_greedy_and_do_not_count():
    model, tok = tiny_models.granite(), tokenizer()
    expected = generate(model, tok, prompts(), max_new_tokens=NEW, progress=False)
    own = model.generation_config
    own.update(do_sample=True, temperature=9.0, repetition_penalty=5.0, min_new_tokens=2)
    own.suppress_tokens = list(range(3, 90))
    model.train()
    assert generate(model, tok, prompts(), max_new_tokens=NEW, progress=False) == expected
    assert model.generation_config is own and own.repetition_penalty == 5.0
    assert model.training and all(module.training for module in model.modules())


def test_an_answer_ends_at_the_tokens_of_the_model_or_the_tokenizer():
    model, tok = tiny_models.granite(), tokenizer()
    (whole,) = generate(model, tok, prompts()[:1], max_new_tokens=8, progress=False)
    assert (whole.tokens, whole.finish) == (8, "length")
    words = whole.text.split()
    third = words[2]
    place = words.index(third)
    model.generation_config.eos_token_id = [2, tok.convert_tokens_to_ids(third)]
    (ended,) = generate(model, tok, prompts()[:1], max_new_tokens=8, progress=False)
    assert (ended.tokens, ended.finish) == (place + 1, "stop")
    # Special tokens are no text; an end token that is a word is.
    assert ended.text == " ".join(words[:place])


def test_the_masked_model_answers_inside_of_its_mask():
    model, tok = tiny_models.llama(), tokenizer()
    head = model.lm_head.weight
    index = torch.arange(head.numel() // 2, head.numel())
    entry = MaskEntry(index, head.detach().flatten()[index].clone(), tuple(head.shape))
    mask = NeuronMask({"lm_head.weight": entry})
    before = generate(model, tok, prompts(), max_new_tokens=3, progress=False)
    with mask.applied(model):
        masked = generate(model, tok, prompts(), max_new_tokens=3, progress=False)
    assert masked != before
    assert generate(model, tok, prompts(), max_new_tokens=3, progress=False) == before


def test_chats_and_rows_with_answers_are_prompts_too():
    from tiny_data import word_tokenizer

    model, tok = tiny_models.llama(), word_tokenizer()
    turns = [{"role": "user", "content": "the cat"}]
    rows = [
        {"messages": turns},
        {"messages": [*turns, {"role": "assistant", "content": "sat"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "the cat"}]}]},
    ]
    found = generate(model, tok, rows, max_new_tokens=3, progress=False)
    (chat,) = generate(
        model, tok, [{"prompt": "the cat", "response": "x"}], template="chat",
        max_new_tokens=3, progress=False,
    )  # fmt: skip
    assert found == [chat] * 3


REFUSED = {
    "none": ({"prompts": []}, "prompts must hold at least one prompt, got none"),
    "no prompt": ({"prompts": [{"q": "a"}]}, "row 0 must have the column 'prompt' or 'messages'"),
    "no answer": ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    "text as a number": ({"max_new_tokens": "8"}, "max_new_tokens must be a number of tokens"),
    "template": (
        {"template": "published"},
        "raw, chat, got 'published'; leave it out for 'raw'",
    ),
    "too long": ({"max_new_tokens": 127}, "row 1 must leave room for 127 new tokens in the model"),
    "batch": ({"tokens_per_batch": 0}, "tokens_per_batch must be a positive number of tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_answered_is_refused_in_one_line(case):
    options, text = REFUSED[case]
    asked = {"prompts": prompts(), "max_new_tokens": 2, **options}
    with pytest.raises((TypeError, ValueError)) as refused:
        generate(tiny_models.llama(), tokenizer(), progress=False, **asked)
    assert text in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("count", [1, 4])
def test_logits_that_are_not_finite_are_no_answer(count):
    model = tiny_models.llama()
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(ValueError, match="model must give finite logits, got NaN or infinity"):
        generate(model, tokenizer(), prompts()[:count], progress=False)


def test_tokens_that_a_model_rules_out_are_allowed():
    model, tok = tiny_models.llama(), tokenizer()
    plain = model.lm_head.forward

    def without_the_first(x):
        logits = plain(x)
        logits[..., 40:] = -torch.inf
        return logits

    model.lm_head.forward = without_the_first
    (found,) = generate(model, tok, prompts()[:1], max_new_tokens=2, progress=False)
    assert found.tokens == 2
    ids = [tok(each)["input_ids"] for each in prompts()]
    with continuing._state(model), torch.no_grad():
        assert continuing._way(model, ids, [2]) == PADDED


def test_a_masked_language_model_does_not_answer():
    with pytest.raises(ValueError, match="model must be a causal language model"):
        generate(tiny_models.bert(), tokenizer(), ["w1"], progress=False)
