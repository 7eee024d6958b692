"""The line on top: what it claims, what it does not, and that page and card say the same."""

from __future__ import annotations

import copy
from xml.etree import ElementTree

import pytest
from tiny_results import DEBIASED, make_results

from fastdean.report import render_card, render_report, verdict_line


def change(value, low, high, verdict, p_holm=0.01, key="mean"):
    return {key: value, "low": low, "high": high, "verdict": verdict, "p_holm": p_holm}


def run(**more):
    """No change on fairness, a small one on privacy, none of perplexity; all adjusted."""
    results = make_results(layers=2)
    for topic, own in {
        "fairness": change(0.0041, -0.0019, 0.0103, "no effect beyond noise", 0.8),
        "privacy": change(0.063, 0.011, 0.12, "higher", 0.03),
    }.items():
        results["margins"][topic]["masks"] = {"paper": {**own, "weights": 9}}
    own = change(1.002, 0.9991, 1.0049, "no effect beyond noise", 0.9, key="ratio")
    results["perplexity"]["masks"] = {"paper": {"value": 18.4, **own}}
    results["tests"] = {"tests": 3, "confidence": 0.95, "confidence_of_each": 0.983, "power": 0.8}
    return results | more


def test_a_run_says_awareness_and_price_in_one_line():
    said = "Fairness: no change shown. Privacy: +0.06 nats, small. Price: none shown."
    assert verdict_line(run()) == said
    tree = ElementTree.fromstring(render_report(run()))
    shown = "".join(tree.find(".//div[@class='verdict']/p").itertext())
    assert " ".join(shown.split()) == said
    assert f"**{said}**" in render_card(run())


@pytest.mark.parametrize("p_holm", [0.0501, 0.29, 1.0])
def test_nothing_whose_adjusted_p_exceeds_the_level_is_a_change(p_holm):
    """Whatever the verdict in the file says."""
    results = run()
    results["margins"]["privacy"]["masks"]["paper"]["p_holm"] = p_holm
    results["perplexity"]["masks"]["paper"] |= {"low": 1.1, "verdict": "higher", "p_holm": p_holm}
    assert verdict_line(results) == (
        "Fairness: no change shown. Privacy: no change shown. Price: none shown."
    )
    assert 'class="claims"' not in render_report(results)
    assert "+0.06** " not in render_card(results)


def test_a_change_that_was_not_adjusted_is_said_to_be_that():
    results = run()
    del results["margins"]["privacy"]["masks"]["paper"]["p_holm"]
    assert "Privacy: +0.06 nats, small, not adjusted for other tests." in verdict_line(results)


def test_what_a_random_edit_may_have_done_too_is_said():
    results = run()
    masks = results["margins"]["privacy"]["masks"]
    masks["random"] = change(0.02, -0.01, 0.05, "no effect beyond noise", 0.9)
    assert "Privacy: +0.06 nats, small, not told from random weights." in verdict_line(results)


@pytest.mark.parametrize(
    ("masks", "said"),
    [
        ({}, "Privacy: not measured."),
        ({"paper": change(0.1, None, None, "no verdict from n = 1", None)}, "from n = 1."),
        ({"paper": change(0.3, 0.2, 0.4, "higher")}, "Privacy: +0.30 nats."),
        ({"paper": change(-0.3, -0.4, -0.2, "lower")}, "Privacy: −0.30 nats."),
    ],
)
def test_what_is_known_of_a_set_is_said(masks, said):
    results = run()
    results["margins"]["privacy"]["masks"] = masks
    assert said in verdict_line(results)


def test_the_price_names_everything_that_changed():
    results = run(
        price={
            "Over-refusal, probability": {
                "unit": "%",
                "origin": {"value": 4.0},
                "masks": {"paper": change(6.0, 2.0, 10.0, "higher")},
            },
            "Gender facts": {
                "unit": "%",
                "masks": {"paper": change(-1.0, -3.0, 2.0, "no effect beyond noise", 1.0)},
            },
        }
    )
    own = change(1.38, 1.2, 1.5, "higher", key="ratio")
    results["perplexity"]["masks"]["paper"] = {"value": 25.0, **own}
    assert verdict_line(results).endswith("Price: perplexity +38.0 %; Over-refusal +6.0 points.")
    page, card = render_report(results), render_card(results)
    for heading in ("Over-refusal, probability, %", "Gender facts, %", "Perplexity ratio"):
        assert heading in page and heading in card
    assert "**+6.0** \\[2.0, 10.0\\]" in card and "−1.0 \\[−3.0, 2.0\\]" in card


def figures_that_begin_alike(key, **numbers):
    """Two of over-refusal and two of BBQ, the first of each lower and the others unchanged."""
    names = [
        "Over-refusal, probability that a benign prompt's answer opens as a refusal",
        "Over-refusal, log-odds of opening as a refusal against opening as an answer",
        "BBQ, accuracy in ambiguous contexts",
        "BBQ, bias score in ambiguous contexts",
    ]
    lower = change(-6.0, -9.0, -2.0, "lower", key=key)
    same = change(0.0, -1.0, 1.0, "no effect beyond noise", 1.0, key=key)
    return {
        name: {"unit": "nats" if "log-odds" in name else "%", **numbers, "moved": (lower, same)[i]}
        for name, i in zip(names, (0, 1, 0, 1), strict=True)
    }


def test_figures_of_one_measure_are_told_apart_and_none_takes_anothers_place():
    table = figures_that_begin_alike("value", neutral=None, before={"value": 9.0})
    rows = {name: {**row, "change": row.pop("moved")} for name, row in table.items()}
    results = {"measures": rows}
    said = "2 of 4 figures changed: Over-refusal, probability −6.0 points; "
    assert verdict_line(results) == f"{said}BBQ, accuracy in ambiguous contexts −6.0 points."
    page = render_report(results)
    for heading in ("Over-refusal, log-odds, nats", "BBQ, bias score in ambiguous contexts, %"):
        assert heading in page


def test_what_fell_and_costs_nothing_is_no_price():
    price = {
        name: {**row, "masks": {"paper": row.pop("moved")}}
        for name, row in figures_that_begin_alike("mean").items()
    }
    told = "Price: BBQ, accuracy in ambiguous contexts −6.0 points. "
    told += "Besides: Over-refusal, probability −6.0 points."
    assert verdict_line(run(price=price)).endswith(told)
    del price["BBQ, accuracy in ambiguous contexts"]
    told = "Price: none shown; Over-refusal, probability −6.0 points."
    assert verdict_line(run(price=price)).endswith(told)


def test_a_mask_that_changed_no_item_is_not_shown_as_certain():
    same = change(0.0, 0.0, 0.0, "no effect beyond noise", 1.0)
    same |= {"changed": 0, "changed_most": 14.2}
    results = run(price={"Gender facts": {"unit": "%", "masks": {"paper": same}}})
    for drawn in (render_report(results), render_card(results)):
        assert "at most 14 % of items change" in drawn and "0, 0" not in drawn
    assert "no effect beyond noise; no item changed" in render_report(results)


def test_what_could_not_be_judged_is_no_free_lunch():
    results = run(price={"Over-refusal, probability": {"masks": {"paper": None}}})
    assert verdict_line(results).endswith("Price: none shown; Over-refusal not judged.")
    del results["perplexity"], results["price"]
    assert verdict_line(results).endswith("Price: not measured.")


def test_no_edit_has_no_verdict_but_that():
    results = make_results(layers=2, coupled=False)
    assert verdict_line(results) == "Edit: none, no weights were selected."


def test_a_training_says_collapse_bias_and_price():
    results = copy.deepcopy(DEBIASED)
    results["collapse"]["metrics"]["unc3_std"] = {"values": {"before": 0.31, "after": 0.12}}
    moved = change(-7.0, -9.0, -5.0, "lower", key="value")
    results["bias"] = {
        "CrowS-Pairs, all": {
            "unit": "%",
            "neutral": 50.0,
            "before": {"value": 61.0, "low": 55.0, "high": 67.0, "n": 262},
            "after": {"value": 54.0, "low": 50.0, "high": 60.0, "n": 262},
            "raw_change": moved,
            "change": {**moved, "verdict": "closer to neutral"},
        }
    }
    own = change(0.9, 0.8, 0.95, "lower", key="ratio")
    results["perplexity"] = {"origin": 9.0, "masks": {"trained": {"value": 8.1, **own}}}
    assert verdict_line(results) == (
        "(U)NC3: 0.310 to 0.120, not tested. CrowS-Pairs: −7.0 points (closer to neutral). "
        "Price: none shown; perplexity −10.0 %."
    )
    card = render_card(results)
    assert "| (U)NC3, std of the words' alignment | not tested | 0 | 0.3100 | 0.1200 |" in card
    assert "| CrowS-Pairs, all % | lower; closer to neutral | 50.00 |" in card
    assert "| Perplexity, general | lower |" in card


def test_many_figures_are_counted_and_those_that_changed_are_named():
    still = change(0.1, -1.0, 1.0, "no effect beyond noise", 1.0, key="value")
    rows = {f"task {n}, acc": {"unit": "%", "before": {}, "raw_change": still, "change": still}
            for n in range(5)}  # fmt: skip
    assert verdict_line({"measures": rows}) == "No change shown in any of 5 figures."
    few = {**still, "verdict": "no verdict from n = 5"}
    of_few = {**rows, "task 4, acc": {"unit": "%", "before": {}, "raw_change": few, "change": few}}
    assert verdict_line({"measures": of_few}) == "No change shown in 4 of 5 figures."
    of_all = {name: row | {"change": few, "raw_change": few} for name, row in rows.items()}
    assert verdict_line({"measures": of_all}) == "No verdict on any of 5 figures."
    moved = change(-3.0, -5.0, -1.0, "lower", key="value")
    rows["task 3, acc"] = {"unit": "%", "before": {}, "raw_change": moved, "change": moved}
    assert verdict_line({"measures": rows}) == "1 of 5 figures changed: task 3 −3.0 points."


def test_judges_and_answers_say_what_changed():
    row = {"judge": "own", "variant": "half", "pairs": 9, "to_safe": 3, "to_unsafe": 0}
    refusals = {k: v for k, v in row.items() if not k.startswith("to")}
    results = {
        "judged": [{"judge": "own", "variant": "original", "answers": 9}],
        "changes": [{**row, "change": change(0.33, 0.1, 0.6, "higher", 0.02)}],
        "refusal_changes": [
            {**refusals, "to_refusing": 1, "to_answering": 0, "change": change(0.1, -0.1, 0.3, "x")}
        ],
    }
    assert verdict_line(results) == (
        "Awareness of half by own: +0.33 of the answers. Refusals of half by own: no change shown."
    )
    still = change(0.0, -0.3, 0.3, "no effect beyond noise", 1.0)
    more = [{**refusals, "judge": f"j{n}", "change": still} for n in range(3)]
    few = {**still, "verdict": "no verdict from n = 5"}
    results["refusal_changes"] = [*more, {**refusals, "judge": "few", "change": few}]
    assert verdict_line(results) == (
        "Awareness of half by own: +0.33 of the answers. No change shown in 3 of 5 comparisons. "
        "Not judged: Refusals of half by few."
    )
    phrases = {"judge": "phrases", "variant": "half", "safe": 0, "unsafe": 0, "unparsed": 0}
    phrases |= {"answers": 9, "refusals": 2, "refusals_by_phrases": 2}
    card = render_card({"judged": [phrases]})
    assert "| phrases | half | 9 | – | – | – | – | – | 2 | 2 |" in card
    variants = {"original": {"prompts": 9}, "half": {"prompts": 9, "changed": 4, "change": still}}
    assert verdict_line({"answers": {"variants": variants}}) == (
        "Half: 4 of 9 answers changed; refusals: no change shown."
    )


def test_text_of_others_stays_text_in_the_card():
    results = run()
    results["title"] = "# a | b\n<script>"
    results["model"]["name"] = "`x` | y"
    results["margins"]["<b>|"] = results["margins"].pop("privacy")
    card = render_card(results)
    assert "<script>" not in card and "<b>" not in card
    tables = [line for line in card.splitlines() if line.startswith("| ")]
    assert len({line.replace("\\|", "").count("|") for line in tables}) == 1
