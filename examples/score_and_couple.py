"""Score a model on three data sets, and find the weights that matter to two of them only.

    python examples/score_and_couple.py [MODEL]

Writes the mask to the folder mask/, for mask_a_checkpoint.py and measure_your_own_rows.py.
"""

import sys

import fastdean
from fastdean.coupling import overlap
from fastdean.data import load_rows, sample_rows
from fastdean.models import load_model


def main(name="smollm2-135m-instruct", ratio=1e-5, examples=32):
    # A folder, a hub id or a .gguf file; this one comes with `make demo`.
    model, tokenizer = load_model(name)

    scores = {}
    for topic in ("fairness", "privacy", "general"):
        # Rows of your own: a list of {"prompt": ..., "response": ...}, or a .csv or .jsonl file.
        rows, _ = sample_rows(load_rows(f"embedded:{topic}"), examples, seed=0)
        # One pass over the rows scores every layer. keep_top drops what `couple` cannot need: a
        # large model's scores take as much memory as its weights, and there are three of them.
        scores[topic] = fastdean.score(model, rows, tokenizer=tokenizer, keep_top=10 * ratio)
    fair, priv, gen = scores.values()

    # Two sets overlap by chance as well: look at this before you read anything into a count.
    for row in overlap(fair, priv, general=gen, ratios=[ratio]):
        print(f"{row['coupled']} coupled, {row['expected_by_chance']:.2g} expected by chance")

    mask = fastdean.couple(fair, priv, general=gen, ratio=ratio)
    print(mask.summary())
    mask.save_pretrained("mask")
    return mask


if __name__ == "__main__":
    main(*sys.argv[1:2])
