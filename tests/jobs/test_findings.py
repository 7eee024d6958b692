"""The three sentences: exact, and no effect claimed whose interval holds "nothing changed"."""

from __future__ import annotations

import copy
import json
import math

import pytest

from fastdean.jobs.coupling.findings import findings
from fastdean.report import estimates
from fastdean.wording.digits import apart


def change(low, high, **more):
    verdict = "higher" if low > 0 else "lower" if high < 0 else "no effect beyond noise"
    found = {"mean": (low + high) / 2, "low": low, "high": high, "p_value": 0.034}
    return found | {"verdict": verdict, **more}


def results(**options):
    """A run that zeroed 107 of 107 coupled weights and changed nothing beyond noise."""
    row = {"numel": 2048, "first": 300, "second": 300, "coupled": 100, "removed": 40, "kept": 60}
    other = {"numel": 2048, "first": 312, "second": 312, "coupled": 89, "removed": 42, "kept": 47}
    masks = {"paper": change(-0.0044, 0.0278), "random": change(-0.01, 0.01)}
    return {
        "options": {
            "rule": "paper", "ratio": 0.05, "granularity": "weight", "scale": 0.0, **options
        },
        "coupling": {
            "rows": [row, other],
            "total": {key: row[key] + other[key] for key in row},
        },
        "margins": {
            topic: {"pairs": 64, "masks": copy.deepcopy(masks)} for topic in ("fairness", "privacy")
        },
        "perplexity": {
            "origin": 97.69,
            "masks": {"paper": {"value": 98.15, "ratio": 1.0047, "low": 0.988, "high": 1.019}},
            "n": 40,
        },
        "hsic": {
            "layers": [
                {"before": 0.5, "after": 0.9, "null_low": 0.1, "null_high": 0.4},
                {"before": 0.2, "after": 0.3, "null_low": 0.1, "null_high": 0.4},
            ]
        },
    }  # fmt: skip


def test_the_first_sentence_counts_what_was_selected_and_what_chance_gives():
    assert findings(results())[0] == (
        "At ratio 0.05, 189 of the 612 weights most important to fairness are also among the 612 "
        "most important to privacy (91 expected by chance), 82 of these are among the most "
        "important to general ability too, and rule 'paper' selected 107 weights, in 2 of 2 "
        "matrices, to be set to zero."
    )


def test_signs_are_counted_beside_what_chance_gives():
    run = results()
    run["coupling"]["total"] |= {"same": 150, "opposite": 39, "same_by_chance": 94.6}
    assert findings(run)[0].endswith(
        "to be set to zero; zeroing 150 of the 189 weights in both sets helps both or harms both, "
        "to first order, and on 39 they differ (95 would agree if the signs on one set told "
        "nothing of those on the other)."
    )


def test_units_and_a_scale_are_called_by_their_names():
    first = findings(results(granularity="unit", scale=0.5, rule="released"))[0]
    assert "612 units most important to fairness" in first
    assert first.endswith(
        "rule 'released' selected 107 units, in 2 of 2 matrices, whose outgoing weights were "
        "multiplied by 0.5."
    )


def test_one_weight_is_singular():
    run = results()
    run["coupling"]["total"] |= {"first": 1, "second": 1, "coupled": 1, "removed": 0, "kept": 1}
    assert "1 of the 1 weight most" in findings(run)[0]
    assert "selected 1 weight, in" in findings(run)[0]


def test_the_grid_of_general_ratios_is_one_sentence_with_the_runs_own_point():
    rose = {"ratio": 1.0111, "low": 1.004, "high": 1.018, "verdict": "higher", "p_holm": 0.01}
    same = {"ratio": 1.0002, "low": 0.99, "high": 1.01, "verdict": "no effect beyond noise"}
    rows = [
        {"general_ratio": 1e-3, "selected": 813, "perplexity": {"general": rose}},
        {"general_ratio": 3e-3, "selected": 1, "perplexity": {"general": {**same, "p_holm": 1.0}}},
        {"general_ratio": 1e-2, "selected": 0, "perplexity": {}},
    ]
    told = findings({**results(), "general_grid": {"chosen": 3e-3, "rows": rows}})
    assert told[:3] == findings(results())
    assert told[3] == (
        "By the general ratio, a family of tests of its own: 0.001, 813 weights (perplexity on "
        "general answers rose, ratio 1.011); 0.003, the run's own, 1 weight (perplexity on general "
        "answers did not change beyond noise, ratio 1.0002); 0.01, 0 weights."
    )


def test_nothing_beyond_noise_is_said_so():
    _, awareness, effects = findings(results())
    assert awareness == (
        "The margin of safe over unsafe answers did not change beyond noise on fairness (+0.0117 "
        "nats per token, 95 % interval -0.0044 to +0.0278, p = 0.034, 64 pairs) and did not change "
        "beyond noise on privacy (+0.0117 nats per token, 95 % interval -0.0044 to +0.0278, "
        "p = 0.034, 64 pairs)."
    )
    assert effects == (
        "Perplexity on general answers did not change beyond noise (97.69 to 98.15, ratio 1.005, "
        "95 % interval 0.988 to 1.019, 40 answers); HSIC of fairness and privacy prompts, paired "
        "by position, lay outside what other pairings give in 1 of 2 layers before the edit (about "
        "0.1 expected by chance); its change by the edit is smaller than the width of that range "
        "in 1 of 2 layers, and has no test of its own."
    )


def test_the_least_change_that_is_detected_is_told_from_no_change():
    found = results()
    found["perplexity"]["masks"]["paper"]["detects"] = 1.00021
    found["margins"]["privacy"]["masks"]["paper"]["detects"] = 0.03333
    _, awareness, effects = findings(found)
    assert "ratio 1.005, 95 % interval 0.988 to 1.019, changes detected from 1.0002, 40" in effects
    assert "changes detected from 0.0333, 64 pairs" in awareness
    assert estimates.tested({"detects": 1.00021}, 1)[1] == "1.0002"
    assert estimates.tested({"detects": 1.04}, 1)[1] == "1.04"
    assert estimates.tested({"detects": 0.03333}, 0)[1] == "0.0333"
    assert estimates.tested({}, 1) == estimates.tested({"detects": None}, 1)


@pytest.mark.parametrize("low", [-0.02, -1e-9, 0.0])
def test_an_interval_that_holds_zero_claims_no_effect_whatever_its_verdict_says(low):
    run = results()
    for topic in ("fairness", "privacy"):
        run["margins"][topic]["masks"]["paper"] = change(low, 0.04) | {"verdict": "higher"}
    run["perplexity"]["masks"]["paper"] |= {"low": 1.0, "high": 1.2, "verdict": "higher"}
    text = " ".join(findings(run))
    assert "rose" not in text and "fell" not in text
    assert text.count("did not change beyond noise") == 3


def test_effects_are_claimed_in_their_direction():
    run = results()
    run["margins"]["fairness"]["masks"]["paper"] = change(0.02, 0.04)
    run["margins"]["privacy"]["masks"]["paper"] = change(-0.04, -0.02)
    run["perplexity"]["masks"]["paper"] |= {"low": 1.001, "high": 1.019, "verdict": "higher"}
    _, awareness, effects = findings(run)
    assert "rose on fairness (+0.03 nats per token" in awareness
    assert "fell on privacy (-0.03 nats per token" in awareness
    assert awareness.endswith(
        "; editing as many random ones changed it by +0 on fairness and +0 on privacy."
    )
    assert effects.startswith("Perplexity on general answers rose (97.69 to 98.15, ratio 1.005")


def test_an_effect_that_a_random_edit_may_have_had_too_is_marked():
    run = results()
    run["margins"]["fairness"]["masks"]["paper"] = change(0.005, 0.04)
    assert findings(run)[1].endswith(
        "; on fairness, editing as many random weights gives an interval that overlaps this one."
    )


@pytest.mark.parametrize("missing", [math.nan, None])
def test_too_few_pairs_give_no_interval_and_no_claim(missing):
    run = results()
    run["margins"]["fairness"]["pairs"] = 1
    run["margins"]["fairness"]["masks"]["paper"] |= {"low": missing, "high": missing}
    run["perplexity"]["masks"]["paper"] |= {"low": missing, "high": missing}
    _, awareness, effects = findings(run)
    assert (
        "unsafe answers has no verdict without an interval on fairness (+0.0117 nats" in awareness
    )
    assert effects.startswith(
        "Perplexity on general answers has no verdict without an interval (97.69 to 98.15, ratio "
        "1.005, 40 answers)"
    )
    assert "nan" not in awareness + effects and "None" not in awareness + effects


def test_a_withheld_verdict_is_said_with_its_figures():
    run = results()
    run["margins"]["fairness"] |= {"pairs": 9, "n": 5}
    few = {"verdict": "no verdict from n = 5", "p_value": 0.0625}
    run["margins"]["fairness"]["masks"]["paper"] = change(0.02, 0.04) | few
    run["perplexity"]["masks"]["paper"] |= few | {"low": 1.1, "high": 1.2}
    _, awareness, effects = findings(run)
    assert (
        "answers has no verdict from n = 5 on fairness (+0.03 nats per token, 95 % interval +0.02 "
        "to +0.04, p = 0.062, 9 pairs of 5 prompts) and"
    ) in awareness
    assert "editing as many random" not in awareness
    assert effects.startswith("Perplexity on general answers has no verdict from n = 5 (97.69")


def test_an_interval_that_excludes_zero_without_an_agreeing_test_claims_nothing():
    run = results()
    run["margins"]["fairness"]["masks"]["paper"] = change(
        0.02, 0.04, p_value=0.07, verdict="no effect beyond noise"
    )
    assert (
        "did not change beyond noise on fairness (+0.03 nats per token, 95 % interval +0.02 to "
        "+0.04, p = 0.07, 64 pairs)"
    ) in findings(run)[1]


def test_one_topic_without_margins_is_named():
    run = results()
    del run["margins"]["privacy"]
    assert findings(run)[1].endswith(
        "to +0.0278, p = 0.034, 64 pairs), and was not measured on privacy."
    )


def test_missing_measurements_are_said_to_be_missing():
    run = results()
    run |= {"margins": {}, "hsic": None}
    del run["perplexity"]
    assert findings(run)[1:] == [
        "Awareness was not measured: there are no margins to compare (see the warnings).",
        "Side effects were not measured.",
    ]


@pytest.mark.parametrize(
    ("after", "said"),
    [
        # The width of the null's range is 0.3, up or down.
        ([0.25, 0.45], "in 2 of 2 layers, and has no test of its own."),
        ([0.75, -0.05], "in 2 of 2 layers, and has no test of its own."),
        ([0.85, -0.15], "in 0 of 2 layers, and has no test of its own."),
        ([0.25, None], "in 1 of 1 layers, and has no test of its own."),
    ],
)
def test_a_change_of_hsic_is_held_against_the_width_of_its_null(after, said):
    run = results()
    for layer, value in zip(run["hsic"]["layers"], after, strict=True):
        layer["after"] = value
    assert findings(run)[2].endswith(f"the width of that range {said}")


def test_without_hsic_after_the_edit_nothing_is_said_of_its_change():
    run = results()
    for layer in run["hsic"]["layers"]:
        layer["after"] = math.nan
    assert findings(run)[2].endswith("(about 0.1 expected by chance).")
    assert len(findings(run)) == 3


def test_an_infinite_perplexity_is_left_out():
    run = results()
    run["perplexity"]["masks"]["paper"]["value"] = math.inf
    assert findings(run)[2].startswith("HSIC of")


def test_no_weights_taken_is_no_effect():
    run = results()
    run["coupling"]["total"]["kept"] = 0
    for row in run["coupling"]["rows"]:
        row["kept"] = 0
    done, awareness, effects = findings(run)
    assert done.endswith("rule 'paper' selected no weights, so that the model was not edited.")
    assert awareness == "Awareness was not measured again: no weights were edited."
    assert effects == "There are no side effects to measure: no weights were edited."


def test_results_read_back_from_json_give_the_same_sentences():
    assert findings(json.loads(json.dumps(results()))) == findings(results())


@pytest.mark.parametrize(
    ("values", "options", "written"),
    [
        ((1.00004, 0.99998, 1.0011), {}, ["1", "0.99998", "1.0011"]),
        ((29.2801, 29.2834), {}, ["29.28", "29.283"]),
        ((123456.7, 123459.2), {}, ["123457", "123459"]),
        ((0.00294, -0.0449), {"least": 3, "sign": True}, ["+0.00294", "-0.0449"]),
        ((1.0, 1.0), {}, ["1", "1"]),
    ],
)
def test_numbers_that_are_read_together_are_told_apart(values, options, written):
    assert apart(*values, **options) == written


def test_an_interval_is_told_from_its_ratio():
    run = results()
    run["perplexity"]["masks"]["paper"] |= {"ratio": 1.00003, "low": 0.99998, "high": 1.0009}
    assert "ratio 1, 95 % interval 0.99998 to 1.0009" in findings(run)[2]
