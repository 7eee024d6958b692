"""Five methods: from rows to examples, and the forward passes of each loss.

The losses themselves are in `causal`, `bec`, `mabel`, `ase` and `adept`. The last pass of each is
of the whole model, with gradients, on the language modelling text: a collapse regulariser's term is
of the last pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastdean.debias.adept import adept_loss
from fastdean.debias.ase import ase_loss, diagonal_fisher, elastic_loss, gender_direction
from fastdean.debias.bec import MaskedTokens, mask_tokens, masked_lm_loss
from fastdean.debias.causal import causal_loss
from fastdean.debias.counterfactual import augment
from fastdean.debias.forms import Form
from fastdean.debias.gender_words import GenderWords
from fastdean.debias.mabel import mabel_loss
from fastdean.debias.texts import (
    FEMALE,
    MALE,
    NEUTRAL,
    Text,
    TextBatch,
    TextEncoder,
    collate,
    texts_of,
)
from fastdean.models.adapters import base_model
from fastdean.models.label_shift import label_shift
from fastdean.models.model_state import evaluation_state, input_device, max_tokens, unwrap

_FISHER_BATCHES = 8
_FISHER_BATCH_SIZE = 8
# Most tokens of a text made of listed words, for a model without a limit.
_WORDS_LENGTH = 512
# By `label_shift`.
_KINDS = ("masked", "causal")


@dataclass(frozen=True)
class Material:
    """The arguments of an objective.

    Attributes:
        model, tokenizer: of Hugging Face.
        encoder: text -> tokens.
        words: the gendered words, made from `lists`.
        seed: of random numbers before training.
        form: of the losses that have two.
    """

    model: nn.Module
    tokenizer: Any
    encoder: TextEncoder
    words: GenderWords
    lists: Mapping[str, Any] | None
    seed: int
    form: Form = "published"


class Objective:
    """One method on its rows.

    Attributes:
        fits: the kinds of model it can train, "causal" and "masked".
        examples: `loss` has indices into them.
    """

    fits: ClassVar[frozenset[str]]

    def __init__(self, material: Material, rows: Sequence[Mapping[str, Any]]) -> None:
        self.model = material.model
        self._form = material.form
        self.device = input_device(unwrap(material.model))
        tokenizer = material.tokenizer
        self._pad_id = next(
            (i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0
        )
        self.examples = self._encode(material, rows)

    def loss(self, members: Sequence[int], generator: torch.Generator) -> Tensor:
        """The mean loss of these examples; its random numbers are `generator`'s, of the CPU."""
        raise NotImplementedError

    def _encode(self, material: Material, rows: Sequence[Mapping[str, Any]]) -> list:
        """The texts and their swapped copies."""
        texts_of(rows, ["text"])
        texts = texts_of(augment(rows, lists=material.lists), ["text"])
        return [material.encoder(text) for (text,) in texts]

    def _batch(self, members: Sequence[int]) -> TextBatch:
        return collate([self.examples[i] for i in members], self._pad_id)

    def _outputs(self, input_ids: Tensor, batch: TextBatch, **options: Any) -> Any:
        return self.model(**self._inputs(input_ids, batch), **options)

    def _inputs(self, input_ids: Tensor, batch: TextBatch) -> dict[str, Tensor]:
        attention_mask = batch.attention_mask.to(self.device)
        return {"input_ids": input_ids.to(self.device), "attention_mask": attention_mask}


class Causal(Objective):
    fits = frozenset({"causal"})

    def loss(self, members: Sequence[int], generator: torch.Generator) -> Tensor:
        batch = self._batch(members)
        logits = self._outputs(batch.input_ids, batch, use_cache=False).logits
        moved = batch.to(logits.device)
        return causal_loss(logits, moved.input_ids, moved.attention_mask)


class Bec(Objective):
    fits = frozenset({"masked"})

    def __init__(self, material: Material, rows: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(material, rows)
        tokenizer = material.tokenizer
        if tokenizer.mask_token_id is None:
            raise ValueError(
                "tokenizer must have a mask token for masked language modelling, got none; load "
                "the one that belongs to the model"
            )
        self._mask_id = tokenizer.mask_token_id
        self._special_ids = torch.tensor(sorted(tokenizer.all_special_ids))
        # Some vocabularies have more tokens than the model, some models more rows than tokens.
        inner: Any = unwrap(material.model)
        known = range(inner.get_input_embeddings().num_embeddings)
        ids = torch.tensor(sorted({*tokenizer.get_vocab().values()} & {*known}))
        self._random_ids = ids[~torch.isin(ids, self._special_ids)]

    def loss(self, members: Sequence[int], generator: torch.Generator) -> Tensor:
        return self._masked_lm(self._batch(members), generator)

    def _hide(self, batch: TextBatch, generator: torch.Generator) -> MaskedTokens:
        may_hide = ~(batch.special | torch.isin(batch.input_ids, self._special_ids))
        return mask_tokens(
            batch.input_ids,
            may_hide,
            mask_id=self._mask_id,
            random_ids=self._random_ids,
            generator=generator,
        )

    def _masked_lm(self, batch: TextBatch, generator: torch.Generator) -> Tensor:
        masked = self._hide(batch, generator)
        logits = self._outputs(masked.input_ids, batch).logits
        return masked_lm_loss(logits, masked.labels.to(logits.device))


class Mabel(Bec):
    """A sentence's vector is the mean of its last representations over its tokens."""

    def _encode(self, material: Material, rows: Sequence[Mapping[str, Any]]) -> list:
        """Premise, hypothesis and their swapped copies, of each pair in which something is swapped.

        In the others both copies would be the same, and the hypothesis its own negative.
        """
        columns = ["premise", "hypothesis"]
        texts_of(rows, columns)
        examples = []
        for row in rows:
            original, *swapped = texts_of(augment([row], lists=material.lists), columns)
            if swapped:
                examples.append([material.encoder(text) for text in (*original, *swapped[0])])
        if not examples:
            raise ValueError(
                "rows must hold at least one pair with a gendered word, got none; give pairs such "
                "as those of embedded:debias:pairs"
            )
        return examples

    def loss(self, members: Sequence[int], generator: torch.Generator) -> Tensor:
        # Premises, hypotheses, swapped premises, swapped hypotheses.
        columns = zip(*(self.examples[i] for i in members), strict=True)
        batch = collate([text for column in columns for text in column], self._pad_id)
        vectors = self._sentence_vectors(batch).unflatten(0, (4, len(members)))
        p, h, p_swapped, h_swapped = vectors
        mlm = self._masked_lm(batch, generator)
        return mabel_loss(p, h, p_swapped, h_swapped, mlm, form=self._form)

    def _sentence_vectors(self, batch: TextBatch) -> Tensor:
        inner: Any = base_model(unwrap(self.model))
        # Without the head, whose logits would need most of the memory.
        base = getattr(inner, inner.base_model_prefix)
        hidden = base(**self._inputs(batch.input_ids, batch)).last_hidden_state
        weights = batch.attention_mask.to(hidden).unsqueeze(2)
        return (hidden * weights).sum(1) / weights.sum(1)


class Ase(Bec):
    """The stereotype words are the encoder's neutral words, hidden or not."""

    def __init__(self, material: Material, rows: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(material, rows)
        _require_kinds(self.examples, {"neutral": NEUTRAL})
        self._direction = self._gender_direction(material)
        self._parameters = _trained(self.model)
        self._start = _copies(self._parameters)
        self._importance = self._fisher(material.seed)

    def loss(self, members: Sequence[int], generator: torch.Generator) -> Tensor:
        batch = self._batch(members)
        masked = self._hide(batch, generator)
        outputs = self._outputs(masked.input_ids, batch, output_hidden_states=True)
        hidden = outputs.hidden_states[-1]
        stereotypes = hidden[(batch.kinds == NEUTRAL).to(hidden.device)]
        return ase_loss(
            masked_lm_loss(outputs.logits, masked.labels.to(outputs.logits.device)),
            stereotypes,
            self._direction.to(stereotypes),
            elastic_loss(self._parameters, self._start, self._importance),
        )

    def _gender_direction(self, material: Material) -> Tensor:
        """From the known pairs of words, each side read as one text, before training."""
        pairs = _known_pairs(material)
        with evaluation_state(self.model), torch.no_grad():
            sides = [
                torch.cat([self._states(text) for text in _word_texts(material, words)])
                for words in zip(*pairs, strict=True)
            ]
        return gender_direction(*sides)

    def _states(self, text: Text) -> Tensor:
        """The last representations of the text's tokens, without special ones: [N, D]."""
        batch = collate([text], self._pad_id)
        hidden = self._outputs(batch.input_ids, batch, output_hidden_states=True).hidden_states[-1]
        return hidden[0][~text.special.to(hidden.device)]

    def _fisher(self, seed: int) -> dict[str, Tensor]:
        """From the first rows, without dropout; a regulariser ignores a model in eval mode."""
        generator = torch.Generator().manual_seed(seed)
        first = range(len(self.examples))[: _FISHER_BATCHES * _FISHER_BATCH_SIZE]
        starts = first[::_FISHER_BATCH_SIZE]
        batches = (self._batch(first[start : start + _FISHER_BATCH_SIZE]) for start in starts)
        with evaluation_state(self.model), torch.enable_grad():
            losses = (self._masked_lm(batch, generator) for batch in batches)
            return diagonal_fisher(losses, self._parameters)


class Adept(Objective):
    """The neutral words are the encoder's, the attributes its female and male words.

    "published" has the features of all layers together and prototypes without a gradient, "paper"
    the last layer and prototypes with one. The bias term of a pass is 0 without words of both
    genders and two neutral ones: short texts need a `batch_size` of 16 or more.
    """

    fits = frozenset({"causal", "masked"})

    def __init__(self, material: Material, rows: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(material, rows)
        _require_kinds(self.examples, {"neutral": NEUTRAL, "female": FEMALE, "male": MALE})
        self._start = _copies(_trained(self.model))

    def loss(self, members: Sequence[int], generator: torch.Generator) -> Tensor:
        batch = self._batch(members)
        original = self._original(batch)
        outputs = self._outputs(batch.input_ids, batch, output_hidden_states=True)
        hidden = self._features(outputs)
        moved = batch.to(hidden.device)
        tokens = moved.attention_mask.bool()
        attributes = [hidden[moved.kinds == kind] for kind in (FEMALE, MALE)]
        if self._form == "published":
            attributes = [rows.detach() for rows in attributes]
        prototypes = [rows.mean(0) for rows in attributes if len(rows)]
        return adept_loss(
            hidden[moved.kinds == NEUTRAL],
            torch.stack(prototypes) if prototypes else hidden.new_zeros(0, hidden.shape[-1]),
            hidden[tokens],
            original[tokens],
            form=self._form,
        )

    def _features(self, outputs: Any) -> Tensor:
        """[B, T, D] of the last layer; in the published form of all, the embeddings included."""
        states = outputs.hidden_states
        if self._form == "paper":
            return states[-1]
        return torch.cat([layer.to(states[-1].device) for layer in states], dim=2)

    @torch.no_grad()
    def _original(self, batch: TextBatch) -> Tensor:
        """The features [B, T, D] under the weights before training, dropout off."""
        inputs = {**self._inputs(batch.input_ids, batch), "output_hidden_states": True}
        with evaluation_state(self.model):
            outputs = torch.func.functional_call(self.model, self._start, kwargs=inputs)
        return self._features(outputs)


METHODS: dict[str, type[Objective]] = {
    "causal": Causal,
    "bec": Bec,
    "mabel": Mabel,
    "ase": Ase,
    "adept": Adept,
}


def require_method(model: nn.Module, method: str) -> type[Objective]:
    """The objective of that name; ValueError for an unknown one or a model that it cannot train."""
    if method not in METHODS:
        raise ValueError(
            f"method must be one of {', '.join(METHODS)}, got {method!r}; 'bec' and 'causal' are "
            "the plainest, for masked and for causal models"
        )
    kind = _KINDS[label_shift(unwrap(model))]
    if kind not in METHODS[method].fits:
        fitting = ", ".join(name for name, other in METHODS.items() if kind in other.fits)
        raise ValueError(
            f"method must be one of {fitting} for a {kind} language model, got {method!r}; "
            "choose one of them, or a model of the other kind"
        )
    return METHODS[method]


def _known_pairs(material: Material) -> list[tuple[str, str]]:
    """The pairs of which the tokenizer knows both words."""
    unknown = material.tokenizer.unk_token_id
    known = [
        pair
        for pair in material.words.pairs
        if not any(unknown in material.encoder(word).input_ids.tolist() for word in pair)
    ]
    if not known:
        raise ValueError(
            "tokenizer must know both words of at least one pair, got none; give lists with words "
            "of its vocabulary"
        )
    return known


def _word_texts(material: Material, words: Sequence[str]) -> list[Text]:
    """The words as one text, or halved until each text fits the model."""
    limit = max_tokens(material.model) or _WORDS_LENGTH
    encoder = TextEncoder(
        material.tokenizer, material.words, neutral_words=(), max_length=limit + 1
    )

    def read(part: Sequence[str]) -> list[Text]:
        text = encoder(" ".join(part))
        if len(text.input_ids) <= limit:
            return [text]
        if len(part) == 1:
            raise ValueError(
                f"lists must hold words that fit the model's {limit} tokens, got {part[0]!r:.60}; "
                "leave it out"
            )
        half = len(part) // 2
        return [*read(part[:half]), *read(part[half:])]

    return read(words)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _copies(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def _require_kinds(examples: Sequence[Any], kinds: Mapping[str, int]) -> None:
    for name, kind in kinds.items():
        if not any((text.kinds == kind).any() for text in examples):
            raise ValueError(
                f"rows must hold at least one {name} word, got none; give other rows, or lists and "
                "neutral_words that occur in them"
            )
