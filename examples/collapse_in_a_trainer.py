"""Train with the collapse regulariser in a Hugging Face Trainer, and measure what it did.

python examples/collapse_in_a_trainer.py [MODEL]
"""

import sys

from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

import fastdean
from fastdean.collapse import trainer_class
from fastdean.data import load_rows
from fastdean.debias import augment
from fastdean.models import load_model


def main(name="smollm2-135m-instruct", words="gender", steps=20, out="trained"):
    model, tokenizer = load_model(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    classes = fastdean.CollapseClasses.from_words(tokenizer, words)

    rows = load_rows("embedded:debias")
    # Measured on text that is not trained on: on the training text anything falls.
    training, other = augment(rows[:140]), rows[140:]
    before = fastdean.collapse_metrics(model, other, classes, tokenizer=tokenizer)

    arguments = TrainingArguments(
        out,
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=2e-5,
        logging_steps=5,  # "collapse" stands beside "loss" in the log
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
    )
    # trainer_class also takes TRL's trainers. It divides the term over an accumulation and keeps
    # its statistics in the checkpoints, which a loop of your own has to see to itself.
    with fastdean.CollapseRegularizer(model, classes, strength=10.0) as regularizer:
        trainer_class(Trainer)(
            model,
            arguments,
            train_dataset=[tokenizer(row["text"]) for row in training],
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
            regularizer=regularizer,
        ).train()

    after = fastdean.collapse_metrics(model, other, classes, tokenizer=tokenizer)
    for metric in ("unc3_std", "nc3_mean"):
        print(f"{metric}: {before.values[metric].value} -> {after.values[metric].value}")
    return before, after


if __name__ == "__main__":
    main(*sys.argv[1:2])
