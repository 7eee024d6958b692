"""The regulariser in a Hugging Face Trainer trains as a plain loop does."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest
import torch
from regularized import whole
from tiny_classes import rich_batches, some_classes
from tiny_models import bert, llama
from torch import nn
from transformers import Trainer, TrainingArguments
from two_ranks import WORLD, join_group, leave_group, run_ranks

from fastdean import CollapseRegularizer
from fastdean.collapse import trainer_class

STRENGTH = 3.0
RATE = 0.1
STEPS = 3


class Rows(torch.utils.data.Dataset):
    """Batches of one example each, in the order in which a sequential sampler asks for them."""

    def __init__(self, count, seed=0):
        self.batches = list(rich_batches(count, rows=2, seed=seed))

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, place):
        return self.batches[place]


def only(batches):
    (batch,) = batches
    return batch


def regularized(model, **options):
    return CollapseRegularizer(model, some_classes(), STRENGTH, **options)


def arguments(folder, **options):
    return TrainingArguments(
        output_dir=str(folder),
        **{
            "per_device_train_batch_size": 1,
            "learning_rate": RATE,
            "lr_scheduler_type": "constant",
            "optim": "sgd",
            "max_grad_norm": 0.0,
            "max_steps": STEPS,
            "logging_steps": 1,
            "save_strategy": "no",
            "train_sampling_strategy": "sequential",
            "disable_tqdm": True,
            "use_cpu": True,
            **options,
        },
    )


def make_trainer(model, regularizer, args, base=Trainer, **options):
    options = {"train_dataset": Rows(STEPS * 4), "data_collator": only, **options}
    return trainer_class(base)(model=model, args=args, regularizer=regularizer, **options)


def token_losses(logits, labels, shift):
    """Cross-entropy of each target; smoothed targets are the caller's."""
    logits, labels = (logits[:, :-1], labels[:, 1:]) if shift else (logits, labels)
    kept = labels != -100
    return nn.functional.cross_entropy(logits[kept].float(), labels[kept], reduction="none")


def plain_loop(build, accumulation, loss_of, *, by_items, cast=False):
    """SGD by hand: each step's loss is that of all its items, plus the mean of its terms."""
    model = build().train()
    shift = build is not bert
    regularizer = regularized(model)
    batches = Rows(STEPS * 4).batches[: STEPS * accumulation]
    values = []
    for start in range(0, len(batches), accumulation):
        step = batches[start : start + accumulation]
        counts = [int((b["labels"][:, 1:] if shift else b["labels"]).ne(-100).sum()) for b in step]
        for batch, count in zip(step, counts, strict=True):
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                logits = model(**inputs).logits
            share = count / sum(counts) if by_items else 1 / accumulation
            loss = share * loss_of(logits.float(), batch["labels"], shift)
            (loss + regularizer.term() / accumulation).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= RATE * parameter.grad
        model.zero_grad()
        values.append(regularizer.value)
    return dict(model.named_parameters()), values


def mean_loss(logits, labels, shift):
    return token_losses(logits, labels, shift).mean()


def smoothed_loss(logits, labels, shift):
    """The Trainer's own: nine tenths of the target's, one tenth of the mean over the vocabulary."""
    logits, labels = (logits[:, :-1], labels[:, 1:]) if shift else (logits, labels)
    log_probs = logits[labels != -100].log_softmax(-1)
    target = -log_probs.gather(1, labels[labels != -100].unsqueeze(1)).mean()
    return 0.9 * target - 0.1 * log_probs.mean()


def squared_loss(logits, labels, shift):
    return token_losses(logits, labels, shift).square().mean()


def summed_squares(outputs, labels, num_items_in_batch=None):
    losses = token_losses(outputs.logits, labels, True)
    return losses.square().sum() / num_items_in_batch


def assert_same_weights(model, expected, tolerance=1e-5):
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=tolerance)


LOSSES = {
    "the model's": ({}, {}, mean_loss),
    "smoothed labels": ({"label_smoothing_factor": 0.1}, {}, smoothed_loss),
    "compute_loss_func": ({}, {"compute_loss_func": summed_squares}, squared_loss),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_trajectory_is_that_of_a_plain_loop(tmp_path, loss, accumulation):
    settings, options, loss_of = LOSSES[loss]
    model = llama()
    args = arguments(tmp_path, gradient_accumulation_steps=accumulation, **settings)
    trainer = make_trainer(model, regularized(model), args, **options)
    trainer.train()
    expected, values = plain_loop(llama, accumulation, loss_of, by_items=True)
    assert_same_weights(model, expected)
    logged = [entry["collapse"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(values, rel=1e-4)


class Unscaled(Trainer):
    """As for models whose forward takes no num_items_in_batch: each batch's loss is its mean."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False


def test_where_the_trainer_divides_by_the_accumulation_the_term_is_divided_once(tmp_path):
    model = llama()
    args = arguments(tmp_path, gradient_accumulation_steps=4)
    make_trainer(model, regularized(model), args, base=Unscaled).train()
    assert_same_weights(model, plain_loop(llama, 4, mean_loss, by_items=False)[0])


def test_a_masked_model_trains_as_a_plain_loop(tmp_path):
    model = bert()
    # BERT takes num_items_in_batch and does not look at it; so the Trainer divides by the batches.
    model.accepts_loss_kwargs = False
    args = arguments(tmp_path, gradient_accumulation_steps=2)
    make_trainer(model, regularized(model), args).train()
    assert_same_weights(model, plain_loop(bert, 2, mean_loss, by_items=False)[0])


def test_an_accumulation_that_the_epoch_cuts_short_has_its_own_mean(tmp_path):
    model, plain = llama(), llama().train()
    args = arguments(tmp_path, gradient_accumulation_steps=4, max_steps=-1, num_train_epochs=1)
    rows = Rows(5)
    make_trainer(model, regularized(model), args, train_dataset=rows).train()
    regularizer = regularized(plain)
    for group in (rows.batches[:4], rows.batches[4:]):
        total = sum(int(batch["labels"][:, 1:].ne(-100).sum()) for batch in group)
        for batch in group:
            with regularizer.held():
                outputs = plain(**batch, num_items_in_batch=total)
            (outputs.loss + regularizer.term() / len(group)).backward()
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter -= RATE * parameter.grad
        plain.zero_grad()
    assert_same_weights(model, dict(plain.named_parameters()))


def test_the_plain_trainer_needs_nothing_but_attaching(tmp_path):
    model, plain = llama(), llama().train()
    regularized(model)
    args = arguments(tmp_path, gradient_accumulation_steps=4, max_steps=2)
    Trainer(model=model, args=args, train_dataset=Rows(8), data_collator=only).train()
    regularizer = regularized(plain)
    for group in (Rows(8).batches[:4], Rows(8).batches[4:]):
        counts = [int(batch["labels"][:, 1:].ne(-100).sum()) for batch in group]
        for batch, count in zip(group, counts, strict=True):
            with regularizer.held():
                loss = plain(**batch).loss
            ((loss + regularizer.term()) * count / sum(counts)).backward()
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter -= RATE * parameter.grad
        plain.zero_grad()
    assert_same_weights(model, dict(plain.named_parameters()))


def test_accelerate_needs_nothing_but_attaching():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, plain = llama().train(), llama().train()
    regularized(model)
    regularizer = regularized(plain)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    batches = Rows(4).batches
    for batch in batches:
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    for group in (batches[:2], batches[2:]):
        for batch in group:
            with regularizer.held():
                loss = plain(**batch).loss
            ((loss + regularizer.term()) / 2).backward()
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter -= RATE * parameter.grad
        plain.zero_grad()
    assert_same_weights(model, dict(plain.named_parameters()))


def test_autocast_to_bf16_trains_as_a_plain_loop_under_it(tmp_path):
    model = llama()
    make_trainer(model, regularized(model), arguments(tmp_path, bf16=True)).train()
    expected, _ = plain_loop(llama, 1, mean_loss, by_items=True, cast=True)
    assert_same_weights(model, expected, tolerance=1e-3)


def checkpointing():
    """Activation checkpointing, by the name that this release of transformers has for it."""
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    new, old = "activation_checkpointing", "gradient_checkpointing"
    return {new if new in fields else old: True}


def test_activation_checkpointing_changes_nothing(tmp_path):
    model, plain = llama(), llama()
    regularizers = regularized(model), regularized(plain)
    make_trainer(model, regularizers[0], arguments(tmp_path, **checkpointing())).train()
    make_trainer(plain, regularizers[1], arguments(tmp_path)).train()
    assert_same_weights(model, dict(plain.named_parameters()))
    assert torch.equal(regularizers[0].state.counts, regularizers[1].state.counts)


def test_strength_zero_leaves_every_bit(tmp_path):
    model, plain = llama(), llama()
    regularizer = CollapseRegularizer(model, some_classes(), 0)
    args = arguments(tmp_path, gradient_accumulation_steps=2)
    make_trainer(model, regularizer, args).train()
    Trainer(model=plain, args=args, train_dataset=Rows(STEPS * 4), data_collator=only).train()
    for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(found, expected)
    assert regularizer.value > 0


def test_the_schedule_counts_the_optimizers_steps(tmp_path):
    asked = []

    def schedule(step):
        asked.append(step)
        return 1.0

    model = llama()
    args = arguments(tmp_path, gradient_accumulation_steps=2)
    make_trainer(model, regularized(model, schedule=schedule), args).train()
    assert asked == [0, 0, 1, 1, 2, 2]


def test_evaluation_adds_nothing_and_logs_no_collapse(tmp_path):
    model = llama()
    regularizer = regularized(model)
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=1)
    trainer = make_trainer(model, regularizer, args, eval_dataset=Rows(2, seed=9))
    trainer.train()
    assert regularizer.step == STEPS
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == STEPS and not any("collapse" in entry for entry in evaluated)
    model.eval()
    rows = Rows(2, seed=9).batches
    with torch.no_grad():
        losses = [
            token_losses(model(**batch).logits, batch["labels"], True).mean().item()
            for batch in rows
        ]
    assert evaluated[-1]["eval_loss"] == pytest.approx(sum(losses) / 2, rel=1e-4)


def test_resuming_takes_the_statistics_up_again(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "optim": "adamw_torch"}
    saving |= {"learning_rate": 1e-2}
    whole = llama()
    regularizer = regularized(whole)
    make_trainer(whole, regularizer, arguments(tmp_path, **saving)).train()
    folder = tmp_path / "checkpoint-2" / "collapse_regularizer"
    assert sorted(file.name for file in folder.iterdir()) == [
        "collapse.safetensors",
        "fastdean_config.json",
    ]
    assert json.loads((folder / "fastdean_config.json").read_text())["step"] == 2

    resumed = llama(seed=1)
    again = regularized(resumed)
    trainer = make_trainer(resumed, again, arguments(tmp_path / "again", **saving))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (again.step, regularizer.step) == (4, 4)
    assert torch.equal(again.state.counts, regularizer.state.counts)
    for found, expected in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(found, expected)


class Dealt(Rows):
    """What the ranks get in turn: of each step every rank has a batch."""

    def __init__(self):
        of_ranks = [Rows(STEPS, seed=seed).batches for seed in range(WORLD)]
        self.batches = [batch for step in zip(*of_ranks, strict=True) for batch in step]


SAVING = {"save_strategy": "steps", "save_steps": 2}


def in_trainers(rank, folder):
    """Under DistributedDataParallel, and resumed from what one rank saved; sharded on loading."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    os.environ |= dict(zip(names, map(str, (rank, rank, WORLD, WORLD)), strict=True))
    join_group(rank, folder)
    # Tensor parallel takes GPUs in accelerate.
    config = DistributedConfig(fsdp_size=WORLD)
    sharded = AutoModelForCausalLM.from_pretrained(folder / "llama", distributed_config=config)
    found = {}
    for name, model in {"ddp": llama(), "again": llama(seed=1), "fsdp": sharded}.items():
        saving = {} if model is sharded else SAVING
        regularizer = regularized(model, **LIVE)
        args = arguments(folder / name, **saving)
        trainer = make_trainer(model, regularizer, args, train_dataset=Dealt())
        resumed = {"resume_from_checkpoint": str(folder / "ddp" / "checkpoint-2")}
        trainer.train(**resumed if name == "again" else {})
        found[name] = {
            "weights": {n: whole(p) for n, p in model.named_parameters()},
            "state": regularizer.state_dict(),
        }
    leave_group(rank, folder, found)


LIVE = {"mode": "window", "decay": 0.5, "detach_features": False}


@pytest.mark.slow
def test_trainers_on_several_ranks_train_as_one_does(tmp_path):
    llama().save_pretrained(tmp_path / "llama")
    ranks = run_ranks(in_trainers, tmp_path)
    dealt = Dealt().batches
    joined = [
        {name: torch.cat([batch[name] for batch in dealt[k : k + WORLD]]) for name in dealt[0]}
        for k in range(0, len(dealt), WORLD)
    ]
    model = llama()
    regularizer = regularized(model, **LIVE)
    rows = Rows(0)
    rows.batches = joined
    make_trainer(model, regularizer, arguments(tmp_path), train_dataset=rows).train()
    expected = dict(model.named_parameters())
    for name in ("ddp", "again", "fsdp"):
        for found in ranks:
            for weight, value in found[name]["weights"].items():
                torch.testing.assert_close(value, expected[weight], rtol=1e-4, atol=1e-5)
            state = found[name]["state"]
            assert torch.equal(state["counts"], regularizer.state.counts)
            assert torch.equal(state["sums"], ranks[0][name]["state"]["sums"])
            assert state["step"] == STEPS
    first = ranks[0]
    assert torch.equal(first["again"]["state"]["sums"], first["ddp"]["state"]["sums"])


def test_resuming_without_statistics_says_what_to_do(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    args = arguments(tmp_path, **saving)
    Trainer(model=llama(), args=args, train_dataset=Rows(8), data_collator=only).train()
    model = llama()
    trainer = make_trainer(model, regularized(model), args)
    with pytest.raises(ValueError, match="resume_from_checkpoint must hold the statistics .* load"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"statistic": "mean"}, "statistic"),
        ({"mode": "window"}, "mode"),
        ({"schedule": lambda step: 0.5}, "schedule"),
    ],
)
def test_resuming_with_another_regulariser_is_refused(tmp_path, options, named):
    args = arguments(tmp_path, save_strategy="steps", save_steps=1, max_steps=2)
    model = llama()
    make_trainer(model, regularized(model), args).train()
    other = llama()
    trainer = make_trainer(other, regularized(other, **options), args)
    with pytest.raises(ValueError, match=f"regulariser with the same {named}, got another"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_regulariser_of_another_model_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="must be attached to the model that is trained, .* model_init"
    ):
        make_trainer(llama(), regularized(llama()), arguments(tmp_path))


def test_a_removed_regulariser_is_refused(tmp_path):
    model = llama()
    regularizer = regularized(model)
    regularizer.remove()
    with pytest.raises(ValueError, match="regularizer must be attached, got one after remove"):
        make_trainer(model, regularizer, arguments(tmp_path))


def test_something_else_for_a_regulariser_is_refused(tmp_path):
    with pytest.raises(TypeError, match="regularizer must be a CollapseRegularizer, got float"):
        make_trainer(llama(), 10.0, arguments(tmp_path))


@pytest.mark.parametrize("base", [nn.Linear, "Trainer"])
def test_something_else_for_a_trainer_is_refused(base):
    with pytest.raises(TypeError, match="base must be transformers.Trainer or a class derived"):
        trainer_class(base)


def test_the_class_is_named_after_its_base():
    assert trainer_class(Trainer).__name__ == "CollapseTrainer"
    assert trainer_class(Unscaled).__name__ == "CollapseUnscaled"
    assert issubclass(trainer_class(Unscaled), Unscaled)
