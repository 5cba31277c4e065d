"""The paper's tables, intervals and ranks, tables and figures."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest

from jaxlin import runs
from jaxlin.command_line import load_config_file, preset
from jaxlin.config import UserError
from jaxlin.evaluation import compare as command
from jaxlin.evaluation import comparison, paper, plots
from jaxlin.evaluation.bootstrap import Draws, Series, ranks, resample
from jaxlin.evaluation.columns import COLUMNS, series
from jaxlin.evaluation.comparison import Model, compare
from jaxlin.evaluation.task import Kept, Result

# ---- the paper


def test_averages_and_recoveries_of_the_paper():
    """Table 5's averages and recoveries follow from its rows; it rounds, so 0.01 is as close as can be asked."""
    for rows in paper.ZERO_SHOT.values():
        assert set(rows) == {"teacher", *paper.MIXER_TITLES}
        for *tasks, average, recovery in rows.values():
            assert np.mean(tasks) == pytest.approx(average, abs=0.0101)
            assert 100 * average / rows["teacher"][-2] == pytest.approx(recovery, abs=0.0301)


def test_tables_of_the_paper_fit_together():
    """Table 4's averages are those of tables 6 (without BEAR) and 7, but for three that do not follow from them."""
    for regime in ("post", "chat"):
        for name, row in paper.INSTRUCTION[regime].items():
            six = np.mean(paper.TUNED_ZERO_SHOT[regime][name][:-1])
            if name == "teacher":
                assert six == pytest.approx({"post": 64.21, "chat": 64.07}[regime], abs=0.01)
            else:
                assert six == pytest.approx(row[0], abs=0.026), name
            if name in paper.TUNED_NIAH[regime]:
                expected = 44.18 if (regime, name) == ("chat", "deltanet") else row[1]
                assert np.mean(paper.TUNED_NIAH[regime][name]) == pytest.approx(expected, abs=0.03), name
    assert all(len(row) == 12 for rows in (paper.NIAH, *paper.TUNED_NIAH.values()) for row in rows.values())


@pytest.mark.parametrize(
    "column, model, parameters, value, table",
    [
        ("arc_easy", "mlstm", 134e6, 54.12, 5),
        ("average", "teacher", 400e6, 53.12, 5),
        ("bear", "kda", 3e9, 31.89, 5),
        ("niah_single_1_2048", "gated_deltanet", 134e6, 81.8, 3),
        ("niah_single_3_4096", "teacher", 134e6, 95.0, 7),
        ("swde", "retnet", 134e6, 9.67, 4),
    ],
)
def test_reference(column, model, parameters, value, table):
    found = paper.reference(column, model, parameters)
    assert (found.value, found.table) == (value, table)


def test_no_reference():
    assert paper.reference("arc_easy", "kda+softmax", 1e8) is None
    assert paper.reference("niah_single_1_8192", "kda", 1e8) is None
    assert paper.reference("longbench_trec", "kda", 1e8) is None


# ---- intervals and ranks


def drawn_from(series, **options):
    """Every series as a column of its own."""
    return {key: Draws.of_column([(1.0, mean)]) for key, mean in resample(series, **options).items()}


def test_interval_covers():
    """The interval of a share is that of the normal approximation."""
    values = [1.0] * 300 + [0.0] * 700
    low, high = drawn_from({"a": Series(values, "x")}, draws=4000)["a"].interval()
    half = 1.96 * np.sqrt(0.3 * 0.7 / 1000)
    assert (low, high) == pytest.approx((0.3 - half, 0.3 + half), abs=0.002)


def test_pairing():
    """A constant difference has next to no width where the prompts were the same, the usual one where they were not."""
    rng = np.random.default_rng(0)
    values = rng.random(400)
    series = {
        name: Series(values - less, prompts)
        for name, less, prompts in (("a", 0, "x"), ("b", 0.02, "x"), ("c", 0.02, "y"))
    }
    drawn = drawn_from(series)
    low, high = (drawn["a"] - drawn["b"]).interval()
    assert 0.01 < low < 0.02 < high < 0.03
    low, high = (drawn["a"] - drawn["c"]).interval()
    assert low < -0.01 and high > 0.05
    assert ranks([drawn["a"], drawn["b"]]) == [(1, 1), (2, 2)]
    assert ranks([drawn["a"], drawn["c"]]) == [(1, 2), (1, 2)]
    np.testing.assert_allclose(drawn_from({"b": series["b"]})["b"].low, drawn["b"].low)  # whatever else is drawn
    assert not np.allclose(drawn_from(series, seed=1)["a"].low, drawn["a"].low)


@pytest.mark.parametrize("hits, n", [(0, 100), (100, 100), (0, 24), (3, 100), (50, 100), (24, 25)])
def test_hits_and_misses(hits, n):
    """Clopper and Pearson's interval, none and all included."""
    found = drawn_from({"a": Series([1.0] * hits + [0.0] * (n - hits), "x")}, draws=20000)["a"].interval()
    exact = binomtest(hits, n).proportion_ci(0.95, method="exact")
    assert found == pytest.approx((exact.low, exact.high), abs=0.004)


def test_differences_of_few():
    """Two zeros are as far apart as their number allows; of prompts that only one got right six decide, five do not."""
    zeros = [0.0] * 100
    drawn = {n: drawn_from({"a": Series([1.0] * n + zeros[n:], "x"), "b": Series(zeros, "x")}) for n in (0, 5, 6)}
    found = {n: (of_n["a"] - of_n["b"]).interval() for n, of_n in drawn.items()}
    assert found[0] == pytest.approx((-0.0362, 0.0362), abs=0.001)
    assert found[5][0] < 0 < found[6][0]


def test_scores_without_bounds():
    """Nothing is added to them; where all are alike there is no interval."""
    drawn = drawn_from({"a": Series([1.0, 5.0] * 50, "x", None), "b": Series([2.0] * 100, "x", None)})
    low, high = drawn["a"].interval()
    assert drawn["a"].low is drawn["a"].high and (low, high) == pytest.approx((3 - 0.392, 3 + 0.392), abs=0.05)
    assert drawn["b"].interval() is None


def test_long_series_are_drawn_in_parts(monkeypatch):
    monkeypatch.setattr("jaxlin.evaluation.bootstrap.CHUNK", 1000)
    found = drawn_from({"a": Series([0.0, 1.0] * 50, "x")}, draws=105)["a"]
    assert found.low.shape == (105,) == found.high.shape and len(set(found.low)) > 10


def equal_tasks(*hits, n):
    """A mean of tasks of n prompts each, with so many hits."""
    series = {task: Series([1.0] * k + [0.0] * (n - k), task) for task, k in enumerate(hits)}
    return Draws.of_column([(1 / len(hits), mean) for mean in resample(series, draws=20000).values()])


def test_tasks_together():
    """A mean of twelve tasks is as sure of none, and decides by as few prompts, as one task with all their prompts."""
    none = equal_tasks(*[0] * 12, n=100)
    assert none.interval() == pytest.approx((0, binomtest(0, 1200).proportion_ci(0.95, method="exact").high), abs=1e-4)
    assert (equal_tasks(2, 2, 1, *[0] * 9, n=100) - none).interval()[0] < 0
    assert (equal_tasks(2, 2, 1, 1, *[0] * 8, n=100) - none).interval()[0] > 0


def test_tasks_of_other_sizes():
    """Nothing right in two tasks: all that may be missed is in the smaller one."""
    series = {n: Series([0.0] * n, n) for n in (20, 2000)}
    drawn = Draws.of_column([(0.5, mean) for mean in resample(series, draws=20000).values()])
    assert drawn.interval() == pytest.approx((0, (1 - 0.025 ** (1 / 20)) / 2), abs=0.002)


# ---- columns and comparison


def test_columns_are_means():
    for column in COLUMNS:
        assert sum(weight for _, _, weight in column.parts) == pytest.approx(1)
    by_name = {column.name: column for column in COLUMNS}
    assert by_name["lambada"].parts == (("lambada_openai", "acc", 0.5), ("lambada_standard", "acc", 0.5))
    weights = {task: weight for task, _, weight in by_name["average"].parts}
    assert weights["lambada_openai"] == pytest.approx(1 / 14) and weights["bear"] == pytest.approx(1 / 7)
    assert "bear" not in {task for task, _, _ in by_name["average without bear"].parts}
    assert len(by_name["niah"].parts) == 12 and len(by_name["longbench"].parts) == 5


def result(task, metric, shares, *, n=200, note="", prompts="p", seed=0):
    """A result whose examples are right with a share of `shares`, in one order for all models."""
    order = np.random.default_rng(seed).permutation(n)
    values = (order < shares * n).astype(float)
    return Result(
        task,
        {metric: float(values.mean())},
        {metric: values.tolist()},
        n,
        note,
        prompts_sha256=prompts,
    )


def zero_shot(share, **options):
    """All zero-shot tasks at one share."""
    metrics = {task: metric for column in COLUMNS if column.name == "average" for task, metric, _ in column.parts}
    return {task: result(task, metric, share, **options) for task, metric in metrics.items()}


def test_variants_of_one_passage_are_drawn_together():
    """LAMBADA's two with equal answers are as certain as one; of other numbers of examples they are independent."""
    widths = {}
    for name, results in (("equal", zero_shot(0.5)), ("one shorter", zero_shot(0.5))):
        if name != "equal":
            results["lambada_standard"] = result("lambada_standard", "acc", 0.5, n=100)
        means = resample(series(results))
        low, high = next(c for c in COLUMNS if c.name == "lambada").draws(means).interval()
        widths[name] = high - low
    low, high = Draws.of_column([(1.0, means["lambada_openai", "acc"])]).interval()
    assert widths["equal"] == pytest.approx(high - low, abs=0.002)
    assert widths["one shorter"] < 0.95 * widths["equal"]


def models():
    teacher = Model("teacher of a", "teacher", zero_shot(0.8), parameters=135e6)
    same = Model("teacher of b", "teacher", zero_shot(0.8), parameters=135e6)
    return [
        Model("a", "linear_attention", zero_shot(0.4), teacher, 135e6, 1_000_000),
        Model("b", "gated_deltanet", zero_shot(0.6), same, 135e6, 2_000_000),
        Model("c", "kda+softmax", zero_shot(0.6, prompts="others", seed=3), same, 135e6, 2_000_000),
    ]


def test_compare():
    lines = {(line.column, line.label): line for line in compare(models())}
    assert [line.label for line in compare(models()) if line.column == "piqa"] == ["teacher of a", "b", "c", "a"]
    worst, better = lines["arc_easy", "a"], lines["arc_easy", "b"]
    assert worst.score == pytest.approx(0.4) and worst.recovery == pytest.approx(0.5) and worst.n == 200
    assert worst.interval[0] < 0.4 < worst.interval[1]
    assert worst.recovery_interval[0] < 0.5 < worst.recovery_interval[1]
    assert worst.rank == (3, 3) and better.rank == (1, 2) == lines["arc_easy", "c"].rank
    assert worst.paper.value == 42.85 and worst.paper_recovery == pytest.approx(42.85 / 58.67)
    assert lines["arc_easy", "c"].paper is None and lines["arc_easy", "teacher of a"].rank is None
    assert lines["average", "b"].recovery == pytest.approx(0.75) and lines["average", "b"].n == 8 * 200
    whole, one = lines["average", "b"].interval, better.interval
    assert whole[1] - whole[0] < one[1] - one[0]
    assert not any(line.column.startswith("niah") for line in lines.values())


def test_without_scores_of_examples():
    a, b, _ = models()
    bare = replace(b, results={task: replace(r, per_example={}) for task, r in b.results.items()})
    lines = {(line.column, line.label): line for line in compare([a, bare])}
    assert lines["piqa", "b"].interval is None is lines["piqa", "b"].recovery_interval
    assert lines["piqa", "b"].recovery == pytest.approx(0.75)
    assert lines["piqa", "a"].rank is None and lines["piqa", "a"].interval


def test_no_interval_where_it_would_mislead():
    """Of few examples there is none; none right of many may be more than 0, and no rank."""
    few = {"swde": result("swde", "contains", 0.5, n=10)}
    alike = {"gsm8k": result("gsm8k", "exact_match_strict_match", 0.0)}
    pair = [Model(label, "kda", few | alike) for label in ("a", "b")]
    lines = {(line.column, line.label): line for line in compare(pair)}
    assert lines["swde", "a"].interval is None is lines["swde", "a"].rank
    assert lines["gsm8k", "a"].interval == pytest.approx((0, 0.018), abs=0.002)
    assert lines["gsm8k", "a"].rank == (1, 2)


# ---- the command


@pytest.fixture
def folders(tmp_path):
    """Two run folders with kept results, and one of a teacher alone."""
    config = load_config_file("tiny", preset("recommended"))
    for label, mixer, share in (("a", "retnet", 0.4), ("b", "kda", 0.6)):
        config = replace(config, mixer=mixer, run_dir=str(tmp_path / label))
        run = runs.new_run(config, config.teacher_config)
        for name, results in (("teacher", zero_shot(0.8, note="local files")), ("student", zero_shot(share))):
            keep(run.folder / "evaluation", name, results)
    keep(tmp_path / "alone", "teacher", zero_shot(0.8))
    return tmp_path


def keep(folder, name, results):
    for task, found in results.items():
        Kept(folder).put(name, {"task": task}, found)


def call(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, args)])
    command.main()


def test_command(folders, monkeypatch, capsys):
    out = folders / "compare.md"
    monkeypatch.setenv("COLUMNS", "200")
    call(monkeypatch, folders / "a", folders / "b", "--markdown", out, "--draws", 200)
    shown = capsys.readouterr().out
    assert "teacher of a" in shown and "teacher of b" not in shown and "local files" in shown
    rows = [line.split(" | ") for line in out.read_text().splitlines() if line.startswith("|")]
    assert {len(row) for row in rows} == {10}
    column = next(i for i, row in enumerate(rows) if row[0] == "| winogrande")
    teacher, best, other = rows[column : column + 3]
    assert teacher[1:3] == ["teacher of a", "80.00"] and best[1:3] == ["b", "60.00"] and best[4] == "75.0%"
    assert best[6] == "1" and other[6] == "2" and other[7] == "53.35"  # the tiny teacher is nearest to 140M
    assert "SmolLM2 140M, 3B tokens (table 5)" in out.read_text()


def test_teacher_alone(folders, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    call(monkeypatch, folders / "alone", "--draws", 100)
    assert "teacher of alone" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args, words",
    [
        (("absent",), "absent: no results of benchmarks"),
        ((), "give one run folder or more"),
        (("a", "--confidence", "1"), "--confidence 1.0: must be between 0 and 1"),
        (("a", "--draws", "10"), "--draws 10: must be at least 100"),
    ],
)
def test_command_refuses(monkeypatch, args, words):
    with pytest.raises(UserError, match=words):
        call(monkeypatch, *args)


def test_read(folders):
    model = comparison.read(folders / "b")
    assert (model.label, model.name, model.teacher.label) == ("b", "kda", "teacher of b")
    config = json.loads((folders / "b" / "config.json").read_text())
    assert model.tokens == sum(config[f"stage{i}"]["tokens"] for i in (1, 2, 3)) and model.parameters > 1000
    assert {field.name for field in dataclasses.fields(model)} >= {"results", "tokens"}


def test_figures_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="--plots needs matplotlib: pip install matplotlib"):
        plots.draw(models(), tmp_path)


def test_figures(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    needles = {
        f"niah_single_{k}_{n}": result(f"niah_single_{k}_{n}", "acc", 0.5, n=10) for k in (1, 2) for n in (512, 8192)
    }
    a, b, c = models()
    b = replace(b, results=b.results | needles)
    written = plots.draw([a, b, c], tmp_path / "figures")
    assert [path.name for path in written] == ["figure1.png", "figure2.png", "niah.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    with pytest.raises(UserError, match="neither the zero-shot tasks nor the needles"):
        plots.draw([Model("x", "kda", {})], tmp_path)


def test_figures_compare_the_same_tasks():
    a, b, c = models()
    values, tasks = plots.averages([a, b])
    assert tasks == 7 and values[b] == pytest.approx(60)
    bare = replace(c, results={task: found for task, found in c.results.items() if task != "bear"})
    values, tasks = plots.averages([a, bare])
    assert tasks == 6 and set(values) == {a, bare}
