"""Measure a model before and after a mask, on rows of your own.

    python examples/measure_your_own_rows.py ROWS MASK [MODEL]

ROWS is a .csv, .tsv, .json, .jsonl or .parquet file with the columns prompt, response and unsafe: a
question, an answer that should be preferred, and one that should not. Names of other columns are
mapped: my.csv::prompt=question,response=good,unsafe=bad. MASK is a folder of score_and_couple.py.
"""

import sys

import fastdean
from fastdean import evaluation as ev
from fastdean.data import load_rows
from fastdean.models import load_model


def main(source, mask_folder, name="smollm2-135m-instruct"):
    model, tokenizer = load_model(name)
    mask = fastdean.NeuronMask.from_pretrained(mask_folder)
    # Rows that were scored flatter the mask: give others.
    rows = load_rows(source)
    pairs = ev.encode_pairs(rows, tokenizer)

    def measure():
        margins = ev.response_margins(model, pairs)
        return margins, ev.perplexity(model, rows, tokenizer=tokenizer)

    margins, text = measure()
    with mask.applied(model):
        margins_after, text_after = measure()

    # Row by row, after minus before. A change is called one only where its interval and a test
    # agree, from 8 rows on; the control of as many random weights tells what any edit does.
    change = ev.compare_margins(margins, margins_after)
    ratio = ev.compare_perplexity(text, text_after)
    print(f"margin {margins.mean:+.4f} -> {margins_after.mean:+.4f} nats per token")
    print(
        f"  change {change.mean:+.4f} [{change.low:+.4f}, {change.high:+.4f}]: {change.verdict()}"
    )
    print(f"perplexity of the answers {text.value:.2f} -> {text_after.value:.2f}")
    print(f"  ratio {ratio.mean:.4f} [{ratio.low:.4f}, {ratio.high:.4f}]: {ratio.verdict()}")
    return change, ratio


if __name__ == "__main__":
    main(*sys.argv[1:])
