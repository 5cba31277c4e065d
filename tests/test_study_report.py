"""The report: from folders alone, with intervals, files of every number, no ranks where intervals overlap."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from jaxlin.command_line import parse_run, to_json
from jaxlin.config import UserError
from jaxlin.evaluation.task import Kept, Result
from jaxlin.runs import write_text
from jaxlin.study.chart import Line, Point, Row, lines_chart, rows_chart
from jaxlin.study.design import Arm, Contrast, Study, Suite
from jaxlin.study.estimates import TEACHER, Estimate, Estimates
from jaxlin.study.figures import figures
from jaxlin.study.limits import limits
from jaxlin.study.report import LIMITS, write_report
from jaxlin.study.results import read_study, write_design
from jaxlin.study.tables import UNDECIDED, entry, tables

GOOD, FAIR, POOR = (f"recommended-60M/{mixer}" for mixer in ("gated_deltanet", "kda", "retnet"))
SHARES = {"gated_deltanet": 0.8, "kda": 0.78, "retnet": 0.3, "teacher": 0.9}
STUDY = Study(
    name="Invented <numbers>",
    arms=(Arm(("gated_deltanet", "kda", "retnet", "gla")), Arm(("gated_deltanet", "retnet"), seeds=(1, 2))),
    settings=("--config", "tiny"),
    suites=(Suite("bear", limit=200),),
    contrasts=(
        Contrast("clear", "Is the first better?", GOOD, POOR, "bear"),
        Contrast("close", "Is it better than the second?", GOOD, FAIR, "bear"),
        Contrast("kl", "Is it nearer to the teacher?", GOOD, POOR, "kl"),
        Contrast("one seed", "And than the second?", GOOD, FAIR, "kl"),
        Contrast("never run", "And than what is not there?", GOOD, "recommended-60M/gla", "bear"),
    ),
)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A study's folder as its runs leave it, but for `gla`, which was not run."""
    folder = tmp_path_factory.mktemp("study")
    write_design(STUDY, folder)
    for trial in STUDY.trials():
        if trial.cell.mixer != "gla":
            write_run(folder / trial.name, trial)
    return folder


def write_run(folder, trial):
    mixer, seed = trial.cell.mixer, trial.seed
    run = parse_run(["--config", "tiny", "--mixer", mixer, "--seed", str(seed), "--teacher", "demo"])
    write_text(folder / "config.json", to_json(run))
    card = {"student_parameters": 140_000_000, "teacher_parameters": 135_000_000, "state_elements_per_layer": [64] * 4,
            "devices": "1 x cpu", "git_commit": "abcdef0123"}  # fmt: skip
    kl = 1 - SHARES[mixer] + 0.001 * seed + (1e-5 if (mixer, seed) == ("retnet", 1) else 0)
    found = {"kl": kl, "perplexity": 30 * math.exp(kl), "agreement": 1 - kl}
    lines = [
        {"step": 10 * n, "stage": n, "tokens": 20_000_000 * n, **{f"heldout_{k}": v for k, v in found.items()}}
        for n in (1, 2, 3)
    ]
    for name, value in {
        "card.json": card,
        "fidelity.json": {**found, "kl": 9.0, "teacher_perplexity": 30.0, "measured_on": "text"},
        "evaluation.json": {"results": {"held_out": {"student": found}}, "held_out_sums": sums_of(found, mixer)},
        "evaluation/bear.json": {},
    }.items():
        write_text(folder / name, json.dumps(value))
    write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 31, "sta')
    for tokens in (20_000_000, 40_000_000) if mixer != "retnet" else ():
        then = {**found, "kl": 2 * kl}
        measured = {"results": {"held_out": {"student": then}}, "held_out_sums": sums_of(then, mixer), "tokens": tokens}
        write_text(folder / f"milestones/{tokens}/evaluation.json", json.dumps(measured))
    kept = Kept(folder / "evaluation")
    for model, share in (("student", SHARES[mixer]), ("teacher", SHARES["teacher"])):
        hits = (np.random.default_rng([seed, len(mixer)]).permutation(200) < 200 * share).astype(float).tolist()
        kept.put(
            model, {"task": "bear", "limit": 200}, Result("bear", {"acc": float(np.mean(hits))}, {"acc": hits}, 200)
        )


def sums_of(found, mixer):
    """24 batches, which differ in difficulty for all students alike; of KDA too few for an interval."""
    ease = np.linspace(0.5, 1.5, 24 if mixer != "kda" else 4)
    loss = math.log(found["perplexity"])
    return [
        {
            "tokens": 100,
            "next_tokens": 90,
            "kl": 100 * found["kl"] * e,
            "agree": 100 * found["agreement"],
            "ce": 90 * loss,
        }
        for e in ease
    ]


@pytest.fixture(scope="module")
def estimates(out):
    return Estimates(read_study(out))


def cell(name):
    return next(cell for cell in STUDY.cells() if cell.name == name)


def rows_of(estimates, title):
    """A table's rows: {heading: text}."""
    table = next(table for table in tables(estimates) if table.title == title)
    return [dict(zip(table.headings, (entry.text for entry in row), strict=True)) for row in table.rows]


# ---- intervals


def test_over_examples(estimates):
    """One seed: the bootstrap's interval is that of a share of 200."""
    found = estimates.of(cell(FAIR), "bear")
    error = (0.78 * 0.22 / 200) ** 0.5
    assert found.value == 0.78 and found.seeds == (0,) and found.examples == 200
    assert found.interval == pytest.approx((0.78 - 1.96 * error, 0.78 + 1.96 * error), abs=0.01)
    assert estimates.of(TEACHER, "bear").value == 0.9


def test_over_seeds(estimates):
    """Where all batches of text are alike the interval is Student's over the seeds; there is none of one seed."""
    found = estimates.of(cell(GOOD), "agreement")
    half = 4.303 * 0.001 / 3**0.5
    assert found.value == pytest.approx(0.799) and found.seeds == (0, 1, 2) and found.examples == 24
    assert found.interval == pytest.approx((0.799 - half, 0.799 + half), abs=2e-4)
    assert estimates.of(cell(FAIR), "agreement").interval is None


def test_over_batches_of_text(estimates):
    """KL has the interval of a mean over batches; of fewer than are enough, with one seed, none."""
    low, high = estimates.of(cell(GOOD), "kl").interval
    error = 0.201 * float(np.std(np.linspace(0.5, 1.5, 24))) / 24**0.5
    assert 2 * 1.96 * error < high - low < 2.6 * 1.96 * error
    assert estimates.of(cell(FAIR), "kl").interval is None


def test_differences_are_paired(estimates):
    """By seed: a shift that all seeds share counts for nothing. By prompt: equal answers differ by what n allows."""
    found = estimates.difference(cell(GOOD), cell(POOR), "agreement")
    assert found.value == pytest.approx(0.5, abs=1e-5) and found.is_decided
    assert found.interval == pytest.approx((0.5, 0.5), abs=3e-5)
    assert estimates.difference(cell(GOOD), cell(FAIR), "kl").seeds == (0,)
    same = estimates.difference(cell(FAIR), cell(FAIR), "bear")
    assert same.value == 0 and same.interval == pytest.approx((-0.018, 0.018), abs=0.002) and not same.is_decided


def test_no_rank_where_intervals_overlap(estimates):
    """The first two share the ranks 1 and 2; the third is 3."""
    cells = [cell(name) for name in (GOOD, FAIR, POOR)]
    assert list(estimates.ranks(cells, "bear").values()) == [(1, 2), (1, 2), (3, 3)]
    rows = {row["student"]: row for row in rows_of(estimates, "BEAR")}
    assert rows[GOOD]["rank by BEAR"] == rows[FAIR]["rank by BEAR"] == "1 to 2" and rows[POOR]["rank by BEAR"] == "3"
    assert rows[GOOD]["paper"] == "18.17" and rows["teacher"]["paper"] == "21.84"
    assert rows[GOOD]["recovery"].startswith("88.89 [") and rows[GOOD]["paper's recovery"] == "83.20"


def test_nothing_and_everything():
    """Said as counts, with what the number of examples allows."""

    def said(value, low, high, n):
        return entry(Estimate(value, (low, high), (0,), n, ())).text

    assert said(0.0, 0.0, 0.0362, 100) == "0 of 100 (at most 3.6 %)"
    assert said(1.0, 0.9969, 1.0, 1200) == "1,200 of 1,200 (at least 99.7 %)"
    assert said(0.01, 0.0003, 0.0545, 100) == "1.00 [0.03, 5.45]"


def test_a_recovery_is_no_count(estimates, monkeypatch):
    """A student that scores as its teacher does got no more right than that."""
    monkeypatch.setattr(Estimates, "recovery", lambda *_: Estimate(1.0, (0.93, 1.05), (0,), 100, ()))
    assert {row["recovery"] for row in rows_of(estimates, "BEAR")} == {"", "100.00 [93.00, 105.00]"}


def test_against_tokens(estimates):
    """Milestones and the end, each with its interval over text and seeds, and its files."""
    found = estimates.along(cell(GOOD), "kl")
    assert list(found) == [20_000_000, 40_000_000, 60_000_000]
    assert found[20_000_000].value == pytest.approx(2 * found[60_000_000].value)
    low, high = found[20_000_000].interval
    assert low < 0.402 < high and found[20_000_000].seeds == (0, 1, 2)
    assert found[20_000_000].sources[1] == "recommended-60M-s1/gated_deltanet/milestones/20000000/evaluation.json"
    assert list(estimates.along(cell(POOR), "kl")) == [60_000_000]
    titles = [figure.title for figure in figures(estimates, None)]
    assert "Figure 2: KL to the teacher against tokens" in titles and not any("average" in title for title in titles)


def test_without_milestones(out, tmp_path):
    """Figure 2 has the ends of the stages."""
    shutil.copytree(out, tmp_path / "out", ignore=shutil.ignore_patterns("milestones"))
    drawn = figures(Estimates(read_study(tmp_path / "out")), None)
    notes = {figure.title: figure.note for figure in drawn}
    assert "end of each stage" in notes["Figure 2: perplexity of held-out text against tokens"]


def test_lower_is_better_for_kl(estimates):
    assert list(estimates.ranks([cell(POOR), cell(GOOD)], "kl").values()) == [(2, 2), (1, 1)]


# ---- what is said


def test_questions(estimates):
    rows = {row["question"]: row for row in rows_of(estimates, "Questions")}
    assert rows["clear"]["answer"] == "a is above b" and rows["kl"]["answer"] == "a is below b"
    assert rows["close"]["answer"] == UNDECIDED and " to " in rows["close"]["95 %"]
    low, high = map(float, rows["close"]["95 %"].split(" to "))
    assert low < 0 < high
    assert rows["one seed"]["answer"] == UNDECIDED and rows["one seed"]["95 %"] == "none"
    assert rows["never run"]["answer"] == "not measured"


def test_fidelity(estimates):
    """Before training and after each stage, with intervals over seeds."""
    rows = [row for row in rows_of(estimates, "Fidelity to the teacher") if row["student"] == GOOD]
    assert [row["after"] for row in rows] == ["initialisation", "stage 1", "stage 2", "the end"]
    assert rows[0]["KL, nats a token"].startswith("9.0000 [") and rows[3]["tokens"] == "60,000,000"
    assert re.match(r"0\.2010 \[0\.198., 0\.203.\]", rows[2]["KL, nats a token"])


def test_limits(estimates):
    """Missing runs, single seeds, budgets, the teacher and open questions are named."""
    said = "\n".join(limits(estimates))
    assert "Not run: recommended-60M-s0/gla." in said
    assert "One seed: recommended-60M/kda." in said
    assert "60M tokens are 0.02 of the paper's 3B" in said
    assert "weights of about 4.5 bits" in said and "first 200 examples" in said
    assert "5 questions are asked at 95 % each" in said
    assert "Is it better than the second? By BEAR: not decidable at this budget." in said


def test_budgets_beyond_the_papers(out, tmp_path):
    study = replace(STUDY, arms=(Arm(("gla",), tokens=(6_000_000_000,)),), contrasts=(), notes=("Mind the gap.",))
    write_design(study, tmp_path)
    said = limits(Estimates(read_study(tmp_path)))
    assert "6000M tokens are 2 times the paper's 3B: scores above its own are no surprise." in said
    assert "Mind the gap." in said


# ---- the page


class Page(HTMLParser):
    """Cells with their files; what would be loaded from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.cells, self.marks, self.loaded, self._open = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.loaded += [tag] * (tag in ("script", "link", "img") or "href" in named or "src" in named)
        if tag == "td":
            self._open = named.get("data-source", "")
        if tag == "circle" and "data-source" in named:
            self.marks.append(named["data-source"])

    def handle_data(self, data):
        if self._open is not None:
            self.cells.append((data, self._open.split()))

    def handle_endtag(self, tag):
        self._open = None if tag == "td" else self._open


def test_every_number_has_its_files(out):
    """In the page, which needs nothing else, and in Markdown."""
    markdown, page = (path.read_text() for path in write_report(out))
    parsed = Page(page)
    assert not parsed.loaded and page.count("<svg") >= 3 and "Invented &lt;numbers&gt;" in page
    files = {file for _, sources in parsed.cells for file in sources} | {
        f for mark in parsed.marks for f in mark.split()
    }
    assert len(files) > 20 and all((out / file).is_file() for file in files)
    for text, sources in parsed.cells:
        if re.search(r"\d\.\d|\d,\d{3}", text) and not sources:
            assert text in PAPERS or text == "", text
    for file in files:
        assert f"`{file}`" in markdown or file.endswith("evaluation.json")
    assert LIMITS in markdown and UNDECIDED in markdown and "report.html: Figure 1" in markdown


PAPERS = {"18.17", "23.11", "21.54", "21.84", "83.20", "105.82", "98.63"}  # table 5, BEAR at 135M: scores, recoveries


def test_a_folder_without_a_study(tmp_path):
    with pytest.raises(UserError, match=r"no study there \(study.json is missing\)"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_speed(out, tmp_path):
    """Figure 3 from the benchmark's file; another file is refused."""
    cells = [
        {"mixer": mixer, "length": length, "batch": batch, "status": "measured",
         "prefill_tokens_per_second": 1e5 / batch, "decode_tokens_per_second": 1e3}
        for mixer in ("kda", "softmax") for length in (512, 1024) for batch in (1, 8)
    ]  # fmt: skip
    speed = tmp_path / "speed.json"
    speed.write_text(json.dumps({"cells": [*cells, {"mixer": "kda", "length": 2048, "batch": 1, "status": "OOM"}]}))
    _, page = write_report(out, speed)
    assert page.read_text().count("Figure 3: ") >= 2
    speed.write_text("{}")
    with pytest.raises(UserError, match=r"not a file of benchmarks.generation_speed"):
        write_report(out, speed)


def test_charts():
    """Marks lie inside the frame and in order; a logarithmic axis leaves out what it cannot show."""
    chart = rows_chart("t", "x", [Row("a", Point(1, 0, (0.5, 1.5))), Row("b", Point(2, 0), 3.0), Row("c", Point(2, 0))])
    places = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', chart)]
    assert len(places) == 4 and places[0] < places[2] == places[3] < places[1]
    lines = lines_chart("t", "x", "y", [Line("a", (Point(0, 1), Point(10, 1), Point(1000, 5)))], log=True)
    assert lines.count("<circle") == 2
    assert lines_chart("t", "x", "y", []) == ""
