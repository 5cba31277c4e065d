"""`python -m jaxlin.kernels.bench`: which rows there are, how rows that fail end, what the tables say."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlin.command_line import parse
from jaxlin.config import UserError
from jaxlin.kernels import bench, bench_compiled, bench_ops, bench_process, bench_report, bench_row, topology_gpu
from jaxlin.kernels.bench import Bench

ABOUT = dict(device="H100", copy_tbs=3.0, matmul_tflops=600.0, versions=dict(jax="0.11.2"))


def part(ms: float, **more: float) -> dict:
    """A timed pass of 0.3 GB, which a copy takes 0.1 ms for."""
    return dict(ms=ms, bytes=3e8, flops=6e9) | more


def row(op: str, implementation: str, shape: str = "1x128x2x64", **more) -> dict:
    return dict(op=op, shape=shape, implementation=implementation, failed={}) | more


ROWS = [
    row("kda", "pallas", forward=part(0.2), both=part(0.5), errors=dict(o=1e-3, dq=2e-3, dg=4e-3)),
    row("kda", "fla", forward=part(0.3, host_ms=0.9), failed=dict(both="RuntimeError: a | b")),
    row("softmax", "cudnn", forward=part(0.1), both=part(1.0)),
    row("mlstm", "pallas", failed=dict(row="Timeout (0:02:30)!")),
    row("kda", "pallas", "step:64x24x32x64", forward=part(0.5, flops=0), errors=dict(o=1e-3, state=0.0)),
    row("kda", "scan", "step:64x24x32x64", forward=part(1.5, flops=0)),
]


def test_command_line():
    settings = parse(Bench, ["--ops", "kda", "--from", "a.json", "b.json", "--jobs", "3"])
    assert settings.ops == ("kda",) and settings.from_ == (Path("a.json"), Path("b.json")) and settings.jobs == 3


def test_every_implementation_gets_its_ops():
    mine, peers, xla = bench.jobs(Bench(steps=("2x2x2x64",)))
    assert len({*mine, *peers, *xla}) == len(mine) + len(peers) + len(xla)
    assert {job.op for job in peers if job.implementation == "mlstm_kernels"} == {"mlstm"}
    assert {job.op for job in mine if job.implementation == "cudnn"} == {"softmax"}
    assert {job.op for job in mine if job.implementation == "pallas"} == set(bench_ops.FAMILIES)
    assert len(mine) == 4 * (7 + 1) + 2 * 7 and len(peers) == 4 * 7 and len(xla) == 4 * 7 + 7


def test_rows_of_a_shape_share_a_gpu(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert bench.gpu_of_each(("a", "b", "c"), 2) == dict(a="0", b="1", c="0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert bench.gpu_of_each(("a", "b", "c"), 2) == dict(a="2", b="5", c="2")


def test_roof_that_binds():
    assert bench_report.roof(part(0.2), ABOUT) == (pytest.approx(0.5), "copy")
    assert bench_report.roof(part(0.2) | dict(flops=9e10), ABOUT) == (pytest.approx(0.75), "matmul")
    assert bench_report.roof(part(0.2), {}) is None


def test_ratios_are_their_time_over_ours():
    found = bench_report.ratios(ROWS, ROWS[0])
    assert found["fla"] == dict(forward=pytest.approx(1.5), both=None)
    assert found["softmax"] == dict(forward=pytest.approx(0.5), both=pytest.approx(2.0))
    assert bench_report.ratios(ROWS, ROWS[1]) == {}


def test_markdown():
    text = bench_report.markdown(dict(about=ABOUT, rows=ROWS))
    assert "| KDA, x FLA | 1.50 \\|  |" in text and "| KDA, x softmax | 0.50 \\| 2.00 |" in text
    assert (
        "| KDA | pallas | 0.200 | 1.50 | 50% | 1.50 | 0.50 | 0.500 | 0.60 | 20% |  | 2.00 | 1.0e-03 | dg 4.0e-03 |"
        in text
    )
    assert "| KDA | FLA | 0.300\\* | 1.00 | 33% |  |  | failed |" in text
    assert "| KDA | pallas | 0.500 | 0.60 | 20% | 3.00 | 1.0e-03 | 0.0e+00 |" in text
    assert "- KDA, 1x128x2x64, FLA, both: `RuntimeError: a / b`" in text
    for table in text.split("\n\n"):  # as many cells in every line
        widths = {line.replace("\\|", "").count("|") for line in table.splitlines() if line.startswith("|")}
        assert len(widths) <= 1, table


def test_later_results_count_where_they_were_timed(tmp_path):
    for name, rows in (("a", ROWS[:2]), ("b", [ROWS[0] | dict(both=part(0.4)), row("kda", "fla")])):
        (tmp_path / name).write_text(json.dumps(dict(about=ABOUT, rows=rows)))
    found = bench.read([tmp_path / "a", tmp_path / "b"])
    assert [r.get("both", {}).get("ms") for r in found["rows"]] == [0.4, None]
    assert found["rows"][1]["forward"]["ms"] == 0.3
    assert [counts for _, counts in found["about"]["runs"]] == [{"fla": 1}, {"pallas": 1}]


def test_shown_without_a_device(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(dict(about=ABOUT, rows=ROWS)))
    bench.main(Bench(from_=(tmp_path / "r.json",), markdown=tmp_path / "r.md"))
    assert (tmp_path / "r.md").read_text().startswith("# The kernels, timed")
    try:
        bench.main(Bench(from_=(tmp_path / "r.json",), plot=tmp_path / "r.png"))
    except UserError as error:
        assert "matplotlib" in str(error)
    else:
        assert (tmp_path / "r.png").stat().st_size


def test_row_of_a_process_that_dies(monkeypatch):
    printed = 'ROW {"op": "kda", "failed": {}, "forward": {"ms": 1.0}}\nROW {"op": "kd\nTimeout (0:02:30)!\nThread 1:'
    monkeypatch.setattr(bench, "in_process", lambda *args, **environment: (False, printed))
    found, _ = bench.Job("kda", "1x128x2x64", "pallas").run(Bench(), float("inf"))
    assert found["forward"]["ms"] == 1.0 and found["failed"] == dict(row="Timeout (0:02:30)!")
    late, _ = bench.Job("kda", "1x128x2x64", "pallas").run(Bench(), 0.0)
    assert "deadline" in late["failed"]["row"]


def test_turn_ends_a_process_that_hangs(tmp_path):
    code = "import sys, time; from jaxlin.kernels.bench_process import turn\nwith turn(False, 0.2): time.sleep(60)"
    start = time.monotonic()
    good, output = bench_process.in_process([sys.executable, "-c", code], 30, TMPDIR=str(tmp_path))
    assert not good and "Timeout (" in output and time.monotonic() - start < 20
    good, output = bench_process.in_process([sys.executable, "-c", "import time; time.sleep(60)"], 0.2)
    assert not good and "no end within" in output


def test_time_of_calls_that_the_host_issues_slowly():
    clock = dict(done=0.0)

    def issue(host: float, device: float):
        time.sleep(host)
        clock["done"] = max(clock["done"], time.perf_counter()) + device

    def wait(_):
        time.sleep(max(0.0, clock["done"] - time.perf_counter()))

    def wait_long(_):
        time.sleep(max(0.0, clock["done"] - time.perf_counter()) + 0.02)

    found = bench_process.milliseconds(lambda: issue(2e-3, 5e-4), wait, lambda: issue(0, 1e-2))
    assert found["ms"] < 1.2 < 2 < found["host_ms"]
    found = bench_process.milliseconds(lambda: issue(1e-4, 2e-3), wait_long, lambda: issue(0, 1e-2))
    assert found.keys() == {"ms"} and found["ms"] < 2.8  # waiting alone is 1 of each of 20 calls
    assert bench_process.milliseconds(lambda: issue(1e-4, 2e-3), wait_long)["ms"] > 2.8


@pytest.mark.parametrize("op", ["retention", "kda", "softmax"])
def test_beginning_of_a_pass_is_that_of_the_beginning(op, monkeypatch):
    """What errors rest on: a cotangent of zero after the first tokens leaves their gradients alone."""
    monkeypatch.setattr(bench_row, "ERROR_TOKENS", 16)
    monkeypatch.setattr(bench_row, "ERROR_HEADS", 1)
    args = bench_ops.inputs(op, (2, 32, 2, 8))
    cotangent = jax.random.normal(jax.random.key(1), args["v"].shape).at[:, 16:].set(0)
    whole = bench_ops.reference(op, args, cotangent)
    start = bench_ops.reference(op, bench_row.beginning(args), bench_row.beginning(cotangent))
    assert ("dg" in start) == (op == "kda")
    for name, x in start.items():
        np.testing.assert_allclose(bench_row.beginning(whole)[name], x, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("op", ["retention", "mlstm", "deltanet"])
def test_step_walks_the_layers(op):
    """The default step and the named scan agree, and hand each layer's o to the next."""
    shape = (2, 1, 2, 8)
    args, states = bench_ops.inputs(op, shape), bench_ops.states(op, shape, 2)
    (after, o), (expected, same) = (jax.jit(bench_ops.walk(op, by))(states, args) for by in ("default", "scan"))
    assert o.shape == (2, 1, 2, 8)
    for x, y in zip(jax.tree.leaves((after, o)), jax.tree.leaves((expected, same)), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), atol=1e-6)


def test_a_row_in_its_process(tmp_path):
    command = [sys.executable, "-m", "jaxlin.kernels.bench_row", "linear_attention", "1x64x2x8", "chunked", "100"]
    _, output = bench_process.in_process(command, 100, TMPDIR=str(tmp_path))
    found = bench.last_row(output)
    assert found is not None and not found["failed"], output
    assert found["forward"]["ms"] > 0 and found["both"]["bytes"] == 2 * found["forward"]["bytes"]
    assert set(found["errors"]) == {"o", "dq", "dk", "dv"} and max(found["errors"].values()) < 1e-2


@pytest.mark.slow
@pytest.mark.skipif(topology_gpu.compiler() is None, reason="needs XLA's compiler for GPUs: pip install -e '.[gpu]'")
def test_compiled_for_a_gpu_that_is_not_here(capsys):
    """The mLSTM in parts: nothing of XLA's around its kernels moves more than reading o and its cotangent once."""
    settings = bench_compiled.Settings(ops=("mlstm",), shapes=("1x32768x32x64",), around=1)
    bench_compiled.main(settings)
    _, forward, _, both, largest = capsys.readouterr().out.splitlines()
    assert forward.split()[:4] == ["mlstm", "1x32768x32x64", "forward", "2"]
    assert both.split()[2:4] == ["both", "4"]
    size, _, name, *_ = largest.split()
    assert float(size) < 1.1 * 2 * 32768 * 32 * 64 * 2 / 1e6
    assert "transpose" not in name  # whose threads would each sum 64
    with pytest.raises(UserError, match="--ops nothing: expected any of linear_attention"):
        bench_compiled.main(bench_compiled.Settings(ops=("nothing",)))
