"""The report: whole, safe to open, right about noise, and legible whatever the results are."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import re
from collections.abc import Iterator
from xml.etree import ElementTree

import pytest
from tiny_results import DEBIASED, MODULES, make_results, mask

from fastdean.report import render_report, write_report
from fastdean.report.estimates import Estimate
from fastdean.report.plots import interval_rows, value_strips

HEADINGS = {
    "glance": "At a glance",
    "masks": "Masks beside each other",
    "words": "In words",
    "coupling": "Coupling per layer and module",
    "overlap": "Overlap against ratio",
    "margins": "Margins before and after",
    "perplexity": "Perplexity",
    "hsic": "Dependence of representations",
    "cost": "Cost",
    "command": "Command",
    "manifest": "Manifest",
}


def parse(page: str) -> ElementTree.Element:
    """The page as a tree. It is written as well-formed XML, so a slip in escaping fails here."""
    return ElementTree.fromstring(page)


def text(node: ElementTree.Element) -> str:
    return " ".join("".join(node.itertext()).split())


def headings(page: str) -> list[str]:
    return [text(node) for node in parse(page).iter("h2") if node.get("class") != "unseen"]


def plots(page: str, section: str | None = None) -> list[ElementTree.Element]:
    """The drawings of the page, or of one section of it."""
    tree = parse(page)
    whole = tree if section is None else tree.find(f".//section[@id='{section}']")
    return [node for node in whole.iter("svg") if node.get("role") == "img"]


def boxes(plot: ElementTree.Element, style: str) -> list[tuple[float, float, float, float]]:
    """x, y, width and height of the plot's boxes of one style."""
    return [
        tuple(float(node.get(key)) for key in ("x", "y", "width", "height"))
        for node in plot.iter("rect")
        if node.get("class") == style
    ]


def cells(page: str, caption: str) -> list[list[str]]:
    """The rows of the table with this beginning of its caption, head included."""
    found = [
        node for node in parse(page).iter("table") if text(node.find("caption")).startswith(caption)
    ]
    return [[text(cell) for cell in row] for row in found[0].iter("tr")]


def test_a_full_report_has_its_sections_in_order():
    page = render_report(make_results())
    order = [*HEADINGS.values()]
    order.insert(order.index("Command"), "Data and options")
    assert headings(page) == [*order, "What these numbers are not"]
    assert text(next(parse(page).iter("h1"))) == "Coupled weights of Small-135M-Instruct"
    assert "21 November 2025, 19:38 UTC" in page
    assert [text(node) for node in parse(page).find(".//ol")] == make_results()["findings"]


@pytest.mark.parametrize("missing", sorted(make_results()))
def test_a_missing_section_is_left_out_and_the_others_stay(missing):
    results = make_results(layers=2)
    del results[missing]
    gone = {HEADINGS[missing]} if missing in HEADINGS else set()
    assert (
        set(headings(render_report(results)))
        == set(headings(render_report(make_results(2)))) - gone
    )


def test_no_results_make_a_page_without_sections():
    assert headings(render_report({})) == []


def test_a_debiased_model_is_shown_before_and_after():
    page = render_report(DEBIASED)
    first = ["At a glance", "Neural collapse", "Bias measures", "Training"]
    assert headings(page)[:4] == first
    metrics = cells(page, "Neural collapse on these words")
    assert metrics[1:] == [
        ["NC3", "mean cosine", "0.1250", "0.2500"],
        ["NC1", "CDNV, exponent 2", "infinite", "–"],
    ]
    assert "2 classes have one mean" in page
    assert "61 classes, each one form of a word (female 30, male 31); 3 words left out" in page
    bias = cells(page, "Measures before and after")
    assert bias[1][:2] == ["CrowS-Pairs percentage points", "no effect beyond noise"]
    assert bias[1][-5:] == ["−1.0", "[−4.0, 2.0]", "–", "–", "262"]
    assert bias[2][:2] == ["SEAT <6>", "not compared"]
    training = cells(page, "Training")
    assert training == [["Step", "Loss", "Base"], ["1", "2.000", "1.000"], ["2", "1.000", "0.5000"]]
    labels = [node.get("aria-label") for node in parse(page).iter("svg") if node.get("aria-label")]
    assert any(
        "(U)NC3 against steps: 0.2000 at step 0, 0.1000 at step 2." in each for each in labels
    )
    assert "an even alignment is not fairness" in page
    assert "makes a model neither smaller nor faster" not in page


@pytest.mark.parametrize("section", sorted(DEBIASED))
def test_an_empty_or_partial_section_of_a_debiased_model_is_no_crash(section):
    for content in (
        {"x": None},
        {"history": []},
        {"history": [{}]},
        {"metrics": {"NC3": None}},
        {"y": {}},
    ):
        if section == "bias":
            content = {"y": content if "x" in content else {}}
        assert parse(render_report({section: content})) is not None


def test_a_result_without_a_section_of_its_own_is_still_shown():
    page = render_report({"stereoset": {"icat": 73.25}})
    assert "Other results" in headings(page)
    assert "73.25" in text(parse(page))


def test_the_page_loads_and_runs_nothing():
    page = render_report(make_results())
    tree = parse(page)
    names = {node.tag for node in tree.iter()}
    assert not names & {"script", "img", "iframe", "object", "embed", "form", "base"}
    sources = [
        value
        for node in tree.iter()
        for key, value in node.attrib.items()
        if key in ("href", "src", "srcset", "data", "action") and not value.startswith(("./", "#"))
    ]
    assert sources == ["data:,"]
    assert not re.search(r"url\(|@import|https?:", page)
    (policy,) = (node for node in tree.iter("meta") if node.get("http-equiv"))
    assert policy.get("content").startswith("default-src 'none'")


HOSTILE = (
    "</style></pre><script>alert('x')</script>\"' onload=\"alert(1)\" "
    "javascript:alert(1)&amp;\x00\ud800"
)


def made_hostile(value: object) -> object:
    """`value` with every text in it, keys of open dictionaries included, made hostile."""
    if isinstance(value, str):
        return HOSTILE
    if isinstance(value, list):
        return [made_hostile(item) for item in value]
    if isinstance(value, dict):
        return {key: made_hostile(item) for key, item in value.items()}
    return value


def test_no_string_becomes_markup():
    results = made_hostile(make_results(layers=2))
    for margin in results["margins"].values():
        margin["masks"][HOSTILE] = margin["masks"].pop("paper")
    for key in ("data", "margins", "options", "versions", "files", "manifest"):
        results[key][HOSTILE] = next(iter(results[key].values()))
    results[HOSTILE] = HOSTILE
    page = render_report(results)
    page.encode("utf-8")
    tree = parse(page)
    assert not [node for node in tree.iter() if node.tag == "script"]
    assert not [key for node in tree.iter() for key in node.attrib if key.startswith("on")]
    assert {node.get("href")[:2] for node in tree.iter("a")} == {"./", "#w"}
    assert "alert('x')" in text(tree.find(".//h1"))


@pytest.mark.parametrize("path", ["//elsewhere.example/x", "/etc/passwd", "\\\\host\\share"])
def test_only_relative_paths_become_links(path):
    page = render_report({"files": {"mask": path}})
    assert not list(parse(page).iter("a"))
    assert path in text(parse(page))


def test_a_path_is_quoted_in_its_link():
    link = next(parse(render_report({"files": {"mask": "a b/c#1?.json"}})).iter("a"))
    assert link.get("href") == "./a%20b/c%231%3F.json"


def extremes() -> dict[str, dict]:
    unmeasured = make_results(layers=3)
    unmeasured["margins"]["fairness"]["masks"]["paper"].update(low=None, high=None)
    unmeasured["margins"]["fairness"]["masks"]["random"].update(
        mean=math.nan, low=math.nan, high=math.nan
    )
    unmeasured["margins"]["privacy"].update(origin={}, confidence=None, unit=None, pairs=None)
    unmeasured["perplexity"]["masks"]["paper"].update(value=math.inf, ratio=math.inf, low=None)
    unmeasured["hsic"]["layers"][1].update(before=None, null_low=math.nan)
    unmeasured["overlap"][0].update(k=0, coupled=0, expected_by_chance=0.0)
    unmeasured["overlap"][1].update(expected_by_chance=math.nan)
    unmeasured["cost"][0].update(seconds=0.0)
    long = make_results(layers=1)
    long["command"] = "fastdean run " + " ".join(f"--option-{i}={'x' * 90}" for i in range(60))
    long["margins"]["fairness"]["masks"]["a name that goes on and on " * 6] = mask(1, -2, 3, 4)
    for row in long["coupling"]["rows"]:
        row["module"] = "a.module.of.a.very.long.name." * 6
    flat = make_results(layers=4)
    for layer in flat["hsic"]["layers"]:
        layer.update(before=0.0, after=0.0, null_low=0.0, null_high=0.0)
    for margin in flat["margins"].values():
        for name in margin["masks"]:
            margin["masks"][name] = mask(0.0, 0.0, 0.0, 0)
    outside = make_results(layers=2)
    outside["coupling"]["rows"][0]["layer"] = None
    bare = make_results(layers=2)
    bare["coupling"] = {"total": bare["coupling"]["total"]}
    bare["overlap"] = bare["overlap"][:1]
    bare["margins"] = {"fairness": {}}
    bare["perplexity"] = {"origin": 18.4}
    bare["hsic"] = {"layers": []}
    experts = make_results(layers=2)
    experts["coupling"]["rows"] = [
        {**row, "module": f"experts.{i}.{row['module']}"}
        for i in range(150)
        for row in experts["coupling"]["rows"]
    ]
    return {
        "1 layer": make_results(layers=1),
        "30 layers": make_results(),
        "80 layers": make_results(layers=80),
        "zero coupled": make_results(layers=4, coupled=False),
        "not measured": unmeasured,
        "long names": long,
        "no spread": flat,
        "no layer": outside,
        "nothing inside": bare,
        "900 matrices": experts,
    }


@pytest.mark.parametrize("name", list(extremes()))
def test_plots_stay_in_their_frames(name):
    page = render_report(extremes()[name])
    assert not re.search(r'="[^"]*\b(nan|inf)\b[^"]*"', re.sub(r'aria-label="[^"]*"', "", page))
    for plot in plots(page):
        _, _, width, height = map(float, plot.get("viewBox").split())
        for x, y in spots(plot):
            assert -1 <= x <= width + 1, (plot.get("aria-label")[:60], x)
            assert -1 <= y <= height + 1, (plot.get("aria-label")[:60], y)


def spots(plot: ElementTree.Element) -> Iterator[tuple[float, float]]:
    """Every corner and end that the plot draws, text with an estimate of its width."""
    for node in plot.iter():
        at = {key: float(value) for key, value in node.attrib.items() if _is_number(value)}
        if node.tag == "rect":
            assert at["width"] > 0 and at["height"] > 0
            yield at["x"], at["y"]
            yield at["x"] + at["width"], at["y"] + at["height"]
        elif node.tag == "line":
            yield at["x1"], at["y1"]
            yield at["x2"], at["y2"]
        elif node.tag == "circle":
            yield at["cx"], at["cy"]
        elif node.tag == "polyline":
            yield from (tuple(map(float, pair.split(","))) for pair in node.get("points").split())
        elif node.tag == "text":
            left, right = extent(node)
            yield left, at["y"]
            yield right, at["y"]


def extent(node: ElementTree.Element) -> tuple[float, float]:
    """Left and right end of a label of 12 px, as wide fonts set it."""
    glyph = 8.2 if "strong" in node.get("class", "") else 7.0
    x, wide = float(node.get("x")), glyph * len(node.text or "")
    shift = {"start": 0.0, "middle": 0.5, "end": 1.0}[node.get("text-anchor")]
    return x - shift * wide, x + (1 - shift) * wide


def _is_number(value: str) -> bool:
    return re.fullmatch(r"-?\d+(\.\d+)?", value) is not None


@pytest.mark.parametrize("name", list(extremes()))
def test_labels_of_a_plot_do_not_overlap(name):
    for plot in plots(render_report(extremes()[name])):
        rows: dict[str, list[tuple[float, float, str]]] = {}
        for node in plot.iter("text"):
            rows.setdefault(node.get("y"), []).append((*extent(node), node.text))
        for row in rows.values():
            row.sort()
            for (_, right, first), (left, _, second) in zip(row, row[1:], strict=False):
                assert right < left, (plot.get("aria-label")[:60], first, second)


@pytest.mark.parametrize("name", ["1 layer", "not measured", "long names", "no spread"])
def test_no_line_runs_through_a_text(name):
    for plot in plots(render_report(extremes()[name])):
        labels = [(*extent(node), float(node.get("y"))) for node in plot.iter("text")]
        for line in plot.iter("line"):
            x1, x2, y1, y2 = (float(line.get(key)) for key in ("x1", "x2", "y1", "y2"))
            for left, right, base in labels:
                beside = max(x1, x2) < left or min(x1, x2) > right
                # Of 12 px: from the top of capitals to where descenders end.
                above_or_below = max(y1, y2) < base - 9 or min(y1, y2) > base + 3
                assert beside or above_or_below, (plot.get("aria-label")[:60], base)


@pytest.mark.parametrize("layers", [1, 30, 80])
def test_bars_are_as_tall_as_their_counts(layers):
    results = make_results(layers)
    for plot in plots(render_report(results), "coupling"):
        tracks, solid, outlined = (boxes(plot, style) for style in ("track", "solid", "outlined"))
        assert len(tracks) == 3 * layers
        unit = tracks[0][3] / 8  # k is 8 in every matrix
        for key, drawn in (("kept", solid), ("removed", outlined)):
            counts = [row[key] for row in by_module(results) if row[key]]
            assert [round(box[3] / unit, 1) for box in drawn] == pytest.approx(counts, abs=0.1)
        assert min(box[2] for box in tracks) >= 2.5


def by_module(results: dict) -> list[dict]:
    """The rows in the order in which they are drawn: a panel per module, its layers in a row."""
    order = list(MODULES)
    rows = results["coupling"]["rows"]
    return sorted(rows, key=lambda row: (order.index(row["module"]), row["layer"]))


def test_matrices_of_one_module_and_layer_share_a_bar():
    rows = make_results(layers=1)["coupling"]["rows"][:1]
    rows[0].update(kept=2, removed=3, coupled=5)
    page = render_report({"coupling": {"rows": rows * 4}})
    (track,), (solid,) = boxes(plots(page)[0], "track"), boxes(plots(page)[0], "solid")
    assert solid[3] / track[3] == pytest.approx(8 / 32, abs=0.01)
    assert "8 are zeroed" in text(parse(page))


def edited(layers: int = 2, **options: object) -> dict:
    """Results of a run with these options, without the sentences that come with them."""
    results = make_results(layers)
    results["options"].update(options)
    return {k: v for k, v in results.items() if k not in ("title", "findings", "warnings")}


def test_weights_that_were_multiplied_are_not_called_zeroed():
    page = render_report(edited(scale=0.5))
    assert "zeroed" not in page.lower()
    said = text(parse(page).find(".//main"))
    assert "Weights multiplied by 0.5" in said
    assert "are multiplied by 0.5." in said
    assert re.search(r"in both, \d+ multiplied by 0.5", text(plots(page, "coupling")[0]))
    assert cells(page, "Top sets")[0][-1] == "Multiplied by 0.5"
    assert "Weights zeroed" in render_report(edited())


def test_units_are_called_units():
    main = parse(render_report(edited(granularity="unit"))).find(".//main")
    said = text(main)
    assert "Units zeroed" in said
    assert re.search(r"Of [\d,]+ units in each top set", said)
    assert "as many units as rule paper selects" in said
    assert "entries" not in said.lower()
    assert "entries" not in " ".join(node.get("aria-label", "") for node in main.iter())
    by_weight = text(parse(render_report(edited())).find(".//main"))
    assert re.search(r"Of [\d,]+ entries in each top set", by_weight)


@pytest.mark.parametrize("rule", ["released", "union", "first", "second", "random"])
def test_bars_of_another_rule_are_no_parts_of_what_is_coupled(rule):
    results = edited(layers=3, rule=rule)
    kept = 11 if rule == "union" else 7
    for row in results["coupling"]["rows"]:
        row["kept"] = kept
    page = render_report(results)
    for plot in plots(page, "coupling"):
        unit = boxes(plot, "track")[0][3] / 8  # k is 8 in every matrix
        assert [box[3] / unit for box in boxes(plot, "solid")] == pytest.approx([kept] * 9, abs=0.1)
        assert boxes(plot, "outlined") == []
    section = text(next(n for n in parse(page).iter("section") if n.get("id") == "coupling"))
    assert f"Entries that rule {rule} selects, per layer and module" in section
    assert re.search(rf"rule {rule} \([^)]+\) selects [\d,]+ entries, which are zeroed", section)
    assert "in the general set: spared" not in section
    assert ("taller than k" in section) == (kept > 8)


def test_signs_are_counted_where_there_are_any():
    results = edited(rule="paper")
    assert "Signs agree" not in render_report(results)
    for number, row in enumerate(results["coupling"]["rows"]):
        row.update(same=number, opposite=row["coupled"], same_by_chance=number / 2)
    page = render_report(results)
    section = text(next(n for n in parse(page).iter("section") if n.get("id") == "coupling"))
    differ = sum(row["coupled"] for row in results["coupling"]["rows"])
    assert "Zeroing 15 of the coupled entries helps both sets or harms both" in section
    assert (
        f"7.50 would if the signs on one set told nothing of those on the other. On {differ}"
        in (section)
    )
    assert "Signs agree" in section and "Agree by chance" in section


def test_bars_of_the_rule_of_the_paper_add_up_to_what_is_coupled():
    page = render_report(edited(rule="paper"))
    section = text(next(n for n in parse(page).iter("section") if n.get("id") == "coupling"))
    assert "Coupled entries per layer and module" in section
    assert "in both sets and in the general set: spared" in section
    assert boxes(plots(page, "coupling")[0], "outlined")


def test_key_numbers_are_those_of_the_rule_of_the_run():
    results = edited(rule="released")
    strip = text(parse(render_report(results)).find(".//dl"))
    assert "released:" in strip and "paper:" not in strip
    assert "1.021" in strip


def test_the_share_scored_names_the_groups_that_are_not():
    strip = text(parse(render_report(make_results())).find(".//dl"))
    assert "in 90 matrices; left out, wholly or in part: self_attn, router" in strip


def test_overlap_over_ratios_is_not_called_an_edit():
    head = cells(render_report(edited()), "Overlap of")[0]
    assert head[-2:] == ["Also general", "Not general"]


def test_peak_memory_is_that_of_the_process_so_far():
    assert cells(render_report(edited()), "Time and tokens per step")[0][-1] == "Peak memory so far"


@pytest.mark.parametrize(
    "figures",
    [None, {}, dict.fromkeys(("mean", "value", "ratio", "low", "high", "verdict", "weights"))],
    ids=["none", "empty", "nones"],
)
def test_a_mask_that_was_not_measured_is_written_as_dashes(figures):
    results = make_results(layers=2)
    del results["hsic"]
    results["margins"]["privacy"]["masks"]["paper"] = figures
    results["margins"]["fairness"] = None
    results["perplexity"]["masks"]["paper"] = figures
    page = render_report(results)
    assert HEADINGS["hsic"] not in headings(page)
    assert cells(page, "Margins of privacy")[2] == ["paper", "not measured", *["–"] * 4]
    assert cells(page, "Margins of privacy")[4][0] == "released"
    assert cells(page, "Perplexity before")[2] == ["paper", "not measured", *["–"] * 3]


def test_intervals_lie_on_their_side_of_zero_at_their_places():
    results = make_results(layers=1)
    fairness = plots(render_report({"margins": results["margins"]}))[0]
    zero = next(float(n.get("x1")) for n in fairness.iter("line") if n.get("class") == "zero")
    ends = [n for n in fairness.iter("line") if n.get("class") == "whisker"][::3]
    dots = list(fairness.iter("circle"))
    masks = results["margins"]["fairness"]["masks"].values()
    scale = (float(ends[2].get("x2")) - zero) / 0.0352
    for end, dot, expected in zip(ends, dots, masks, strict=True):
        assert float(end.get("x1")) == pytest.approx(zero + scale * expected["low"], abs=0.1)
        assert float(end.get("x2")) == pytest.approx(zero + scale * expected["high"], abs=0.1)
        assert float(dot.get("cx")) == pytest.approx(zero + scale * expected["mean"], abs=0.1)
        excludes = expected["low"] > 0 or expected["high"] < 0
        assert ("filled" in dot.get("class")) == excludes


def test_both_margins_share_a_scale_so_that_they_can_be_compared():
    page = render_report({"margins": make_results(1)["margins"]})
    ticks = [
        [node.text for node in plot.iter("text") if node.get("text-anchor") == "middle"]
        for plot in plots(page)
    ]
    assert ticks[0] == ticks[1]


def test_the_wider_the_sets_the_farther_right_and_chance_is_drawn():
    keys = ("ratio", "k", "coupled", "expected_by_chance", "removed", "kept")
    values = [
        (1e-6, 100, 80, 1e-4, 60, 20),
        (1e-4, 100, 50, 10, 40, 10),
        (1e-5, 100, 40, 0.1, 0, 40),
    ]
    points = [dict(zip(keys, row, strict=True)) for row in values]
    page = render_report({"overlap": points})
    shared, left, chance = (
        [tuple(map(float, pair.split(","))) for pair in node.get("points").split()]
        for node in plots(page)[0].iter("polyline")
    )
    assert shared[1][0] - shared[0][0] == pytest.approx(shared[2][0] - shared[1][0], abs=0.1)
    per_cent = (shared[1][1] - shared[0][1]) / 40
    for line, shares in ((shared, (80, 40, 50)), (left, (20, 40, 10)), (chance, (0, 0.1, 10))):
        heights = [80 - (y - shared[0][1]) / per_cent for _, y in line]
        assert heights == pytest.approx(shares, abs=0.2)
    assert cells(page, "Overlap")[3][4:6] == ["10", "5.00"]
    # A ratio at which no matrix has a candidate is a sentence and no row.
    nothing = dict.fromkeys(keys, 0) | {"ratio": 1e-8}
    for given, rows in (([nothing, *points], 4), ([nothing], 0)):
        page = render_report({"overlap": given})
        assert "No matrix has a candidate at ratio 1e-8." in page
        assert page.count("<table") == bool(rows)
        assert not rows or len(cells(page, "Overlap")) == rows


@pytest.mark.parametrize(
    ("low", "high", "verdict", "said"),
    [
        (-0.1, 0.3, "rises", "no effect beyond noise"),
        (0.0, 0.3, "rises", "no effect beyond noise"),
        (0.1, 0.3, "", "not judged"),
        (-0.3, -0.1, None, "not judged"),
        (0.1, 0.3, "higher", "higher"),
        (0.1, 0.3, "no effect beyond noise", "no effect beyond noise"),
        (0.1, 0.3, "no verdict from n = 5", "no verdict from n = 5"),
        (-0.1, 0.3, "no verdict from n = 5", "no verdict from n = 5"),
        (None, None, "rises", "no verdict without an interval"),
        (None, None, "no verdict from n = 1", "no verdict from n = 1"),
        (math.nan, 0.3, None, "no verdict without an interval"),
    ],
)
def test_an_interval_that_holds_zero_is_never_called_an_effect(low, high, verdict, said):
    masks = {"paper": {"mean": 0.1, "low": low, "high": high, "verdict": verdict, "weights": 9}}
    page = render_report({"margins": {"privacy": {"origin": {"mean": 0.5}, "masks": masks}}})
    row = cells(page, "Margins of privacy")[2]
    assert row[:4] == ["paper", said, "9", "0.6000"]
    assert float(row[4]) == 0.1 and row[4].startswith("+")
    assert f"paper: {said}" in text(parse(page).find(".//dl"))


@pytest.mark.parametrize(
    ("verdict", "filled"),
    [("higher", True), ("no verdict from n = 5", False), ("no effect beyond noise", False)],
)
def test_a_dot_is_filled_by_the_verdict_and_not_by_the_interval_alone(verdict, filled):
    masks = {"paper": {"mean": 0.2, "low": 0.1, "high": 0.3, "verdict": verdict, "weights": 9}}
    (dot,) = plots(render_report({"margins": {"privacy": {"masks": masks}}}))[0].iter("circle")
    assert ("filled" in dot.get("class")) == filled


def test_perplexity_is_judged_against_a_ratio_of_one():
    rows = cells(render_report(make_results(1)), "Perplexity before")
    assert rows[2][1] == "no effect beyond noise"
    assert rows[4][1:] == ["higher", "18.80", "1.021", "[1.014, 1.029]"]


def test_hsic_says_when_its_change_is_within_the_null_band():
    layers = [
        {"layer": 3, "before": 2.0, "after": 1.9, "null_low": 1.0, "null_high": 1.5},
        {"layer": 4, "before": 1.2, "after": 1.2, "null_low": 1.0, "null_high": 1.5},
    ]
    said = text(parse(render_report({"hsic": {"layers": layers}})).find(".//section//p"))
    assert said == (
        "The edit moves HSIC most in layer 3: −0.100, where the null band is 0.500 wide, so that "
        "this is not to be read as an effect. After the edit 1 of 2 layers lie no higher than the "
        "null band, where dependence cannot be told from chance."
    )
    layers[0]["after"] = 1.2
    assert "not to be read" not in render_report({"hsic": {"layers": layers}})


def test_a_report_of_no_coupling_says_so():
    page = render_report(make_results(layers=4, coupled=False))
    assert "No matrix couples fairness and privacy at this ratio." in page
    assert not boxes(plots(page, "coupling")[0], "solid")


def test_very_many_matrices_are_summed_in_the_plot_and_counted_in_the_table():
    page = render_report(extremes()["900 matrices"])
    assert len(boxes(plots(page, "coupling")[0], "track")) == 2
    rows = cells(page, "Top sets")
    assert len(rows) - 2 <= 600
    assert f"{900 - (len(rows) - 2)} of 900 matrices are not listed" in page


def test_the_names_of_a_plots_rows_are_whole_and_broken_between_words():
    name = "fairness, safe by answering as judged by (letters of a judge of long name)"
    rows = [Estimate(name, 0.25, -0.5, 1.0), Estimate("short", 0.0, -0.5, 0.5)]
    plot = ElementTree.fromstring(
        str(interval_rows(rows, "a", no_effect=0.0, axis_name="change", width=360))
    )
    texts = [(float(each.get("y")), each) for each in plot.iter("text")]
    own = [(y, each.text) for y, each in texts if each.get("class") == "strong"]
    assert " ".join(text for _, text in own) == f"{name} short" and len(own) > 2
    # A line below the other, and none over another row's.
    assert all(b - a >= 17 for (a, _), (b, _) in itertools.pairwise(own))
    values = [y for y, each in texts if each.get("class") == "value"]
    assert values[1] == own[-1][0] and own[-2][0] <= values[0] < own[-1][0] - 30
    strips = ElementTree.fromstring(
        str(value_strips([(name, [1.0, 2.0], ("first", "ring"))], "a", 360, "x"))
    )
    shown = [each.text for each in strips.iter("text") if each.get("class") == "strong"]
    assert " ".join(shown) == name


def test_the_command_is_whole_and_the_manifest_is_json():
    results = extremes()["long names"]
    results["manifest"]["note"] = "a < b & c"
    *_, command, manifest = parse(render_report(results)).iter("pre")
    assert "".join(command.itertext()) == results["command"]
    assert json.loads("".join(manifest.itertext())) == results["manifest"]


def test_every_plot_and_table_has_a_name():
    tree = parse(render_report(make_results(layers=2)))
    assert all(len(plot.get("aria-label")) > 40 for plot in tree.iter("svg") if plot.get("role"))
    assert all(plot.get("role") or plot.get("aria-hidden") for plot in tree.iter("svg"))
    assert all(text(table.find("caption")) for table in tree.iter("table"))
    assert all(cell.get("scope") for cell in tree.iter("th"))
    assert tree.get("lang") == "en"


def schemes() -> dict[str, dict[str, str]]:
    style = parse(render_report({})).find(".//style").text
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[:2]
    first, second = (dict(re.findall(r"--(\w+): (#\w{6});", block)) for block in (light, dark))
    return {"light": first, "dark": {**first, **second}}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_sufficient(scheme):
    """WCAG 2.1: 4.5 for text, 3 for what a plot is drawn with."""
    colours = schemes()[scheme]
    pairs = {7: "ink/page ink/raised", 4.5: "quiet/page warning/raised first/page"}
    pairs[3] = "second/page first/track first/band second/band"
    for least, ink, ground in [
        (least, *pair.split("/")) for least, names in pairs.items() for pair in names.split()
    ]:
        assert contrast(colours[ink], colours[ground]) >= least, (ink, ground)


def contrast(one: str, other: str) -> float:
    lights = sorted((luminance(one), luminance(other)))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_rendering_does_not_change_its_input():
    results = make_results(layers=2)
    before = copy.deepcopy(results)
    assert render_report(results) == render_report(results)
    assert results == before


def test_write_report_writes_the_page_and_nothing_else(tmp_path):
    path = write_report(make_results(layers=1), str(tmp_path / "report.html"))
    assert path.read_bytes().decode("utf-8") == render_report(make_results(layers=1))
    assert os.listdir(tmp_path) == ["report.html"]


@pytest.mark.parametrize("where", ["rendering", "renaming"])
def test_a_failure_leaves_the_earlier_report(tmp_path, monkeypatch, where):
    path = tmp_path / "report.html"
    path.write_text("earlier")
    results = make_results(layers=1)
    if where == "rendering":
        results["coupling"] = []
    else:
        monkeypatch.setattr(os, "replace", _no_space)
    with pytest.raises((TypeError, OSError)):
        write_report(results, path)
    assert path.read_text() == "earlier"
    assert os.listdir(tmp_path) == ["report.html"]


def _no_space(*_: object) -> None:
    raise OSError("no space left on device")


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(TypeError, match=r"results must be a dict, got list; pass the results of"):
        render_report([])
    with pytest.raises(
        TypeError, match=r"results.overlap must be null or a list, got {}; leave it out if there is"
    ):
        render_report({"overlap": {}})
    with pytest.raises(
        FileNotFoundError, match=r"path must be in an existing folder, got .*; create .*absent"
    ):
        write_report({}, tmp_path / "absent" / "report.html")


# Load per expert.


def load_rows(layers, experts):
    counts = [(7 * n) % 13 for n in range(experts)]
    total = sum(counts)
    return [
        {
            "name": f"model.layers.{k}.mlp.experts",
            "layer": k,
            "experts": experts,
            "tokens": total,
            "least": 0.0,
            "median": 6 / total,
            "most": 12 / total,
            "number_unseen": counts.count(0),
            "unseen": "0, 13",
            "shared": [f"model.layers.{k}.mlp.shared_expert"],
            "counts": " ".join(map(str, counts)),
        }
        for k in range(layers)
    ]


def test_the_load_of_experts_is_a_table_and_a_strip_for_each_set():
    page = render_report({"expert_load": {"toxic<b>": load_rows(2, 14), "chat": load_rows(2, 14)}})
    assert headings(page) == ["Load per expert"]
    head, first, _ = cells(page, "Tokens of toxic<b> by expert")
    assert head[:6] == ["Layer", "Experts", "Routed tokens", "Least", "Median", "Most"]
    assert first == ["0", "14", "78", "0 %", "7.69 %", "15.4 %", "", "0, 13"]
    assert "2 shared experts beside them" in page
    strips = [plot for plot in plots(page) if plot.get("class") == "cells"]
    assert len(strips) == 4 and strips[0].get("viewBox") == "0 0 14 1"
    kinds = {path.get("class"): path.get("d") for path in strips[0].iter("path")}
    # Shares of an even 5.6 tokens: 0 7 1 8 2 9 3 10 4 11 5 12 6 0.
    assert kinds["load little"] == "M2 0H3V1H2ZM4 0H5V1H4Z"
    assert kinds["load much"] == "M11 0H12V1H11Z"
    assert strips[0].get("aria-label").startswith("2 experts without a token, 2 below half")


def test_the_load_of_a_large_mixture_takes_little_of_the_page():
    load = {name: load_rows(60, 256) for name in ("fairness", "privacy", "general")}
    assert len(render_report({"expert_load": load})) < 1_500_000


def test_a_load_that_says_little_is_shown_as_far_as_it_goes():
    page = render_report({"expert_load": {"a": [{"name": "mlp"}], "b": None, "c": []}})
    assert cells(page, "Tokens of a by expert")[1] == ["mlp", *["–"] * 6, "none"]
    rows = [{**row, "counts": "3 many"} for row in load_rows(1, 4)]
    assert cells(render_report({"expert_load": {"a": rows}}), "Tokens of a")[1][6] == "–"
