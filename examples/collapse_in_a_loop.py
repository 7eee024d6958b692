"""Train with the collapse regulariser in a plain training loop.

python examples/collapse_in_a_loop.py [MODEL]
"""

import sys

import torch

import fastdean
from fastdean.data import load_rows
from fastdean.debias import augment
from fastdean.models import load_model


def main(name="smollm2-135m-instruct", words="gender", steps=20, batch=4):
    model, tokenizer = load_model(name)
    model.train()

    # A class is one token. Words that the tokenizer splits are left out, and the report names them.
    classes = fastdean.CollapseClasses.from_words(tokenizer, words)
    print(classes.report())

    # Each text and its gender-swapped copy: the base method, which the regulariser comes on top of.
    texts = [row["text"] for row in augment(load_rows("embedded:debias"))]
    tokenizer.padding_side = "right"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)

    values = []
    # While it is attached, the loss that the model computes from its labels has the term in it.
    # A loop with a loss of its own adds `regularizer.term()` to it instead.
    with fastdean.CollapseRegularizer(model, classes, strength=10.0) as regularizer:
        for step in range(steps):
            chosen = texts[step * batch : (step + 1) * batch]
            inputs = tokenizer(chosen, return_tensors="pt", padding=True)
            # -100: padding is no target.
            labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
            loss = model(**inputs, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            # The spread of the cosines between class means and output embeddings: it should fall.
            values.append(regularizer.value)
            print(f"step {step}: loss {loss.item():.4f}, spread {values[-1]:.4f}")
    return model, values


if __name__ == "__main__":
    main(*sys.argv[1:2])
