"""The second paper's table: fair arms, complete records, nothing done twice, honest verdicts."""

from __future__ import annotations

import json

import pytest
import tiny_words
import torch
from scipy import stats
from tiny_folders import write_jsonl
from tiny_models import bert, llama

from benchmarks.harness import environment, models, store
from benchmarks.harness.store import Record
from experiments.debias import encoder, figures, measures, outcome, run, settings, subject
from experiments.debias.__main__ import main
from experiments.debias.figures import MASKED_LOSS, NC3, PERPLEXITY, UNC3
from fastdean.collapse import collapse_metrics
from fastdean.evaluation.classifier import HeadCourse
from fastdean.files.storage import held

ROWS = [{"text": text} for text in tiny_words.TEXTS]
COMMIT = "5" * 40
ARMS = ["base", "none", "words", "random", "frequency"]

pytestmark = pytest.mark.usefixtures("quick_benchmarks")


@pytest.fixture
def files(tmp_path):
    """Toy rows of every source that an encoder needs, by its name."""
    he, she = "the doctor said he works", "the doctor said she works"
    pair = {"stereo_antistereo": "stereo", "bias_type": "gender"}
    crows = [
        {"sent_more": he, "sent_less": she, **pair},
        {"sent_more": she, "sent_less": he, **pair},
    ]
    crows.append({**crows[0], "bias_type": "age"})
    stereo = {"type": "intrasentence", "bias_type": "gender", "context": "the BLANK works"}
    stereo |= {"stereotype": "the man works", "anti-stereotype": "the woman works"}
    stereo |= {"unrelated": "the today works", "target": "work"}
    wino = [{"pro": he, "anti": she, "type": kind} for kind in ("type1", "type2")]
    seat = {
        key: {"category": key, "examples": examples}
        for key, examples in (
            ("targ1", ["he works", "a man works"]), ("targ2", ["she reads", "a woman met"]),
            ("attr1", ["the doctor"]), ("attr2", ["the nurse"]),
        )
    }  # fmt: skip
    bec = [
        {"sentence": f"{who} works with the {job}", "person": who, "gender": gender,
         "occupation": job, "group": "a"}
        for job in ("nurse", "pilot") for who, gender in (("he", "male"), ("she", "female"))
    ]  # fmt: skip
    nli = [
        {"premise": "the nurse works", "hypothesis": f"the {who} works"} for who in ("man", "girl")
    ]
    snli = [{**row, "label": label} for label in (0, 1, 2, -1) for row in nli]
    glue = [{"sentence": text, "label": n % 2} for n, text in enumerate(tiny_words.TEXTS[:6])]
    for folder in ("glue", "seat"):
        (tmp_path / folder).mkdir()
    for part in ("train", "validation"):
        write_jsonl(tmp_path / "glue" / f"cola-{part}.jsonl", glue)
    (tmp_path / "seat" / "sent-weat6.jsonl").write_text(json.dumps(seat))
    found = {
        "training": ROWS, "crows_pairs": crows, "stereoset": [stereo], "winobias": wino,
        "bec_pro": bec, "bias_nli": nli, "snli": snli,
    }  # fmt: skip
    places = {name: write_jsonl(tmp_path / f"{name}.jsonl", rows) for name, rows in found.items()}
    return places | {"seat": tmp_path / "seat", "glue": tmp_path / "glue"}


@pytest.fixture
def command(tmp_path, monkeypatch, files):
    """The study on a tiny encoder, without the tests before it; heads of one epoch."""
    monkeypatch.setattr(models, "load_model", lambda *a: (bert(), tiny_words.tokenizer(), "tiny"))
    monkeypatch.setattr(run, "load_tokenizer", lambda name: None)
    monkeypatch.setattr(run, "cached_commit", lambda name: COMMIT)
    short = settings.Sourced(HeadCourse(1, 1e-3, 8, 16), "a test")
    for name in ("GLUE_HEAD", "NLI_HEAD"):
        monkeypatch.setattr(measures, name, short)
    others = [name for name in run._TASKS if name != "glue:cola"]

    def call(*arguments, method="bec", given=files):
        sources = [f"{name}={path}" for name, path in given.items()]
        flags = ["--no-gate", "--resume", "--device", "cpu", "--out", str(tmp_path / "out")]
        flags += ["--model", "tiny", "--method", method, "--steps", "2", "--seeds", "1"]
        flags += ["--source", *sources, "--without", *others]
        return main(["run", *flags, *arguments])

    return call


def read(tmp_path):
    return list(store.read(tmp_path / "out", run.OP))


def test_the_table_has_every_column_of_every_arm_and_nothing_is_done_twice(
    command, tmp_path, capsys, monkeypatch
):
    # Cut off in the first training's measures: its checkpoint is gone on with.
    asked, calls = measures.taken, []
    monkeypatch.setattr(
        measures, "taken",
        lambda name, *a: 1 / 0 if len(calls) == 9 else (calls.append(name), asked(name, *a))[1],
    )  # fmt: skip
    with pytest.raises(ZeroDivisionError):
        command()
    cut = [(row.contender, row["measure"]) for row in read(tmp_path)]
    assert (tmp_path / "out" / "training" / "bec-none-0").exists()
    trained = []
    kept, train = subject.fine_tune, lambda *a, **o: trained.append(o["seed"]) or kept(*a, **o)
    monkeypatch.setattr(subject, "fine_tune", train)
    monkeypatch.setattr(measures, "taken", asked)
    assert command() == 0
    assert trained == [0] * 4
    rows = read(tmp_path)
    assert [(r.contender, r["measure"]) for r in rows[: len(cut)]] == cut
    names = ["held_out", "stereoset", "crows_pairs", "winobias", "seat", "bec_pro", "bias_nli"]
    states = [(arm, 0) for arm in ARMS]
    taken = {(row.contender, row["seed"], row["measure"]) for row in rows}
    assert len(taken) == len(rows) and taken == {
        (*s, n) for s in states for n in (*names, "glue:cola")
    }
    assert not [*(tmp_path / "out" / "training").iterdir()]
    said = capsys.readouterr()
    assert "4 trainings (none, words, random, frequency; 1 seeds) of 2 optimizer steps" in said.err
    text = (tmp_path / "out" / "nc3.md").read_text()
    assert text.strip() in said.out and str(tmp_path) not in text
    for column in ("(U)NC3, std", "StereoSet ICAT", "CrowS-Pairs, % (neutral: 50)", "SEAT weat6",
                   "WinoBias type2", "BEC-Pro", "Bias-NLI T:0.7", "GLUE cola"):  # fmt: skip
        assert f"| {column}" in text
    assert "72.38 with the term" in text and "the paper's settings but for data, steps" in text
    assert "| strength | 100.0 | bec/code/main\\_nc.py" in text
    results = json.loads((tmp_path / "out" / "nc3.json").read_text())
    assert results["settings"]["revision of the model"] == COMMIT
    assert f"| revision of the model | {COMMIT} |" in (tmp_path / "out" / "nc3.md").read_text()
    assert results["family"]["tests"] == 3 * len(results["columns"])
    assert all(test["verdict"] == "no verdict from n = 1" for test in results["tests"])
    assert "Verdicts of a change: none. By paired t tests alone" in text
    assert command() == 0 and len(read(tmp_path)) == len(rows) and len(trained) == 4
    assert command("--without", "bbq", method="causal") == 2
    assert "method must be one of bec, mabel, ase, adept for a masked" in capsys.readouterr().err
    # Other code is other figures.
    monkeypatch.setattr(environment, "sources_checksum", lambda: "other sources")
    assert command("--without", "glue", *names[1:]) == 0
    assert len(read(tmp_path)) == len(rows) + 5


def test_sources_that_are_missing_are_named_all_at_once_before_anything_is_loaded(
    command, tmp_path, files, capsys, monkeypatch
):
    monkeypatch.setattr(models, "load_model", lambda *a: pytest.fail("loaded"))
    monkeypatch.setattr(run, "tests", lambda *a: pytest.fail("the tests run first"))
    asked = []
    monkeypatch.setattr(run, "ask_the_cache_where_unreachable", lambda: asked.append(True))
    given = {name: path for name, path in files.items() if name not in ("seat", "snli")}
    assert command(given={**given, "crows_pairs": tmp_path / "no.csv"}, method="adept") == 2
    error = capsys.readouterr().err
    assert "source must be readable for each of training," in error
    assert "got 3 that are not" in error
    assert "crows_pairs (" in error and "seat (no hub id is known: SEAT, a folder of" in error
    assert "snli (source 'stanfordnlp/snli' must be a file or a reachable data set" in error
    del given["training"]
    assert command("--without", "seat", "bias_nli", given=given, method="adept") == 2
    assert "training (no hub id is known: README: News-Commentary v15" in capsys.readouterr().err
    assert command("--source", "seats=here") == 2 and command("--without", "seats") == 2
    # The libraries would retry for minutes where there is no network.
    assert asked

    def no_such_model(name):
        raise ValueError(f"model must be an existing folder, got {name!r}; check the path")

    monkeypatch.setattr(run, "load_tokenizer", no_such_model)
    assert command() == 2
    assert "model must be an existing folder, got 'tiny'" in capsys.readouterr().err


def test_an_interrupt_is_one_line(command, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run", interrupted)
    assert command() == 130
    assert "interrupted; the same command with --resume goes on" in capsys.readouterr().err


def test_each_method_trains_on_what_it_reads(files, tmp_path):
    pairs = [{"premise": "a", "hypothesis": "b", "label": label} for label in (0, 1, "entailment")]
    path = str(write_jsonl(tmp_path / "pairs.jsonl", pairs))
    assert measures._training_rows("mabel", [path, path]) == [
        {"premise": "a", "hypothesis": "b"}
    ] * 4  # fmt: skip
    lines = tmp_path / "news.txt"
    lines.write_text("She met the nurse\n\nprices fell\nthe nurse slept\n")
    assert [row["text"] for row in measures._training_rows("adept", [str(lines)])] == [
        "She met the nurse", "the nurse slept",
    ]  # fmt: skip
    folder = tmp_path / "wino"
    folder.mkdir()
    for side, who in (("pro", "he"), ("anti", "she")):
        (folder / f"{side}_stereotyped_type1.txt.dev").write_text(f"1 [The cook] said [{who}] ran.")
    assert measures._training_rows("ase", [str(folder)]) == [{"text": "The cook said he ran."}]
    for method, each in settings.PUBLISHED.items():
        assert all(entry.source for name, entry in vars(each).items() if name != "departures"), (
            method
        )


def test_every_arm_starts_from_the_same_weights_and_the_seed_is_the_trainings():
    model, tokenizer = llama(), tiny_words.tokenizer()
    given = subject.Subject(model, tokenizer, "tiny", ROWS[:7], ROWS[7:])
    course = {"steps": 2, "batch_size": 4, "learning_rate": 1e-2}

    def end(name, seed):
        given.train(subject.Arm(name, 5.0, seed), "causal", **course)
        return figures.metrics_of(figures.held_out_figures(given))["figures"]

    none, words = end("none", 0), end("words", 0)
    assert end("words", 0) == words != none != end("none", 1)
    assert list(none) == [UNC3, NC3, PERPLEXITY]


@pytest.mark.parametrize("shift", [None, "published"])
def test_collapse_is_that_of_the_gender_words_on_the_held_out_text(shift):
    model, tokenizer = bert(), tiny_words.tokenizer()
    given = subject.Subject(model, tokenizer, "tiny", ROWS[:2], ROWS[2:], shift)
    found = figures.held_out_figures(given)
    options = {"tokenizer": tokenizer, "progress": False, "shift": shift}
    expected = collapse_metrics(model, ROWS[2:], given.words(), **options).values
    assert found[UNC3].value == pytest.approx(expected["unc3_std"].value)
    assert found[NC3].value == pytest.approx(expected["nc3_mean"].value)
    assert found == figures.held_out_figures(given)
    examples = figures.encode(given.held_out, tokenizer)
    for example in figures.with_hidden_tokens(examples, tokenizer):
        hidden = example.labels != -100
        assert 1 <= int(hidden.sum()) <= 2
        assert (example.input_ids[hidden] == tokenizer.mask_token_id).all()


def test_the_encoder_learns_the_text_and_knows_its_words_swapped_too(monkeypatch):
    monkeypatch.setattr(encoder, "_other_texts", lambda: [])
    monkeypatch.setattr(encoder, "HIDDEN", 32)
    texts = ["she met the Doctor .", "a poet slept ."]
    device = torch.device("cpu")
    state = torch.get_rng_state()

    def loss(steps):
        model, tokenizer = encoder.trained_encoder(texts, ["his aunt"], steps, device)
        assert not model.training
        assert {"[UNK]"}.isdisjoint(tokenizer.tokenize("he met the doctor . her uncle plumber"))
        rows = [{"text": text} for text in texts]
        given = subject.Subject(model, tokenizer, "encoder", rows, rows)
        return figures.held_out_figures(given)[MASKED_LOSS].value

    untrained, trained = loss(1), loss(30)
    assert trained < untrained - 0.5
    assert torch.equal(torch.get_rng_state(), state)
    assert loss(30) == trained


def records(values, neutral=None, measure="crows_pairs", column="CrowS-Pairs"):
    """arm -> the value of each seed, as records of one column."""
    known = next(store.read(store.RESULTS, "debias")).environment
    own = {"model": "m", "method": "bec", "data": ["d", "0"], "not the paper's": []}
    return [
        Record(
            "nc3", "a case", arm,
            {"settings": own, "seed": seed, "measure": measure},
            metrics={"figures": {column: value}, "units": {column: ""}}
            | {"neutral": {column: neutral}},
            environment=known,
        )
        for arm, found in values.items() for seed, value in enumerate(found)
    ]  # fmt: skip


def test_eight_seeds_that_agree_are_a_verdict_and_five_are_a_t_test():
    def judged(seeds, **options):
        wobble = [0.01 * seed for seed in range(seeds)]
        words = [40.0 - w + 0.002 * w**2 for w in wobble]
        values = {"none": [50.0 + w for w in wobble], "words": words, "random": words}
        columns = outcome.columns_of(records(values, **options))
        return values, outcome.tests_of(columns)

    values, (family, found) = judged(8)
    against_none, against_random = (found["CrowS-Pairs", arm] for arm in ("none", "random"))
    assert family.tests == 3 and against_none["verdict"] == "lower"
    assert against_none["p_holm"] == pytest.approx(3 * 2 / 2**8)
    assert against_random["verdict"] == "no effect beyond noise" and len(found) == 2
    expected = stats.ttest_rel(values["words"], values["none"]).pvalue
    assert against_none["p_t"] == pytest.approx(expected)
    assert against_none["p_t_holm"] == pytest.approx(3 * expected)
    # From 50 to 40, where 50 is neutral: farther; and of five seeds no verdict.
    assert judged(8, neutral=50.0)[1][1]["CrowS-Pairs", "none"]["verdict"] == "farther from neutral"
    five = judged(5)[1][1]["CrowS-Pairs", "none"]
    assert five["verdict"] == "no verdict from n = 5" and five["p_t_holm"] < 1e-5
    assert five["by_t"] == "lower" and against_random["by_t"] is None
    four = judged(4)[1][1]["CrowS-Pairs", "none"]
    assert four["p_t_holm"] < 0.05 and four["by_t"] is None
    assert outcome.seeds_for_a_verdict(3) == 8 and outcome.seeds_for_a_verdict(60) == 12
    text = outcome.as_markdown(records(values))
    assert "of a change: CrowS-Pairs: lower. By paired t tests alone" in text


def test_seeds_that_are_all_alike_are_not_told_as_certainty():
    same = [50.0] * 8
    text = outcome.as_markdown(records({"none": same, "words": same}))
    assert "| +0 (alike in all 8 seeds) | none | 1 | no effect beyond noise |" in text
    # The steps that were given take the place of the epochs.
    settings = {"method": "bec", "data": ["d", "0"], "steps": 4, "not the paper's": ["steps"]}
    names = [name for name, *_ in outcome._sources(settings)]
    assert "steps" in names and "epochs" not in names


def test_before_training_heads_alone_are_measured_for_every_seed(command, tmp_path):
    measured = ("stereoset", "crows_pairs", "winobias", "seat", "bec_pro", "bias_nli")
    assert command("--seeds", "2", "--without", *measured) == 0
    base = [(row["seed"], row["measure"]) for row in read(tmp_path) if row.contender == "base"]
    assert base == [(0, "held_out"), (0, "glue:cola"), (1, "glue:cola")]


def test_figures_of_another_model_of_the_same_name_are_not_taken_for_its_own(
    command, tmp_path, capsys
):
    measured = ("stereoset", "crows_pairs", "winobias", "seat", "bec_pro", "bias_nli", "glue")

    def of(folder, weights):
        model = tmp_path / folder / "a|b"
        model.mkdir(parents=True)
        (model / "model.safetensors").write_bytes(weights)
        assert command("--model", str(model), "--without", *measured) == 0
        return len(read(tmp_path))

    first = of("one", b"1")
    assert of("copy", b"1") == first and of("two", b"2") == 2 * first
    # The name of a model breaks out of no cell and no heading.
    text = (tmp_path / "out" / "nc3.md").read_text()
    assert text.startswith("# a\\|b, bec") and "a|b" not in text.partition("--model")[0]
    with held(tmp_path / "out", "out"):
        capsys.readouterr()
        assert command("--without", *measured) == 2
    assert "out must not be in use, got" in capsys.readouterr().err


def test_glue_has_a_mean_of_the_seeds_that_have_every_task():
    rows = records({"none": [60.0, 80.0]}, measure="glue:rte", column="GLUE rte")
    rows += records({"none": [70.0]}, measure="glue:cola", column="GLUE cola")
    columns = outcome.columns_of(rows)
    assert columns["GLUE mean of 2"].values["none"] == {0: 65.0}
