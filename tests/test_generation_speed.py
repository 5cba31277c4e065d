"""The benchmark of generation, tried out on the CPU."""

from __future__ import annotations

import json

import jax
import pytest

from benchmarks import generation_report, generation_speed
from benchmarks.generation_speed import Cell
from jaxlin.config import UserError


@pytest.fixture(autouse=True)
def small(monkeypatch):
    marks = generation_report.Marks(flat=(16, 64), long=32, served=(32, 2))
    monkeypatch.setattr(generation_report, "MARKS", marks)
    monkeypatch.setattr(generation_speed, "BLOCKS", 2)
    monkeypatch.setattr(generation_speed, "QUICK", 0.0)


def call(monkeypatch, out, *args):
    settings = ["--config", "tiny", "--dtype", "float32", "--chunk", "16", "--out", str(out), *args]
    monkeypatch.setattr("sys.argv", ["generation_speed", *settings])
    generation_speed.main()
    return json.loads(out.read_text())


CHOSEN = ["--mixers", "softmax", "retnet", "--lengths", "16", "32", "64", "--batches", "1", "2"]


def test_measures_and_goes_on(monkeypatch, tmp_path, capsys):
    """Nothing in no time; then every cell, the ratios and the table; then nothing is left to do."""
    out = tmp_path / "speed.json"
    nothing = call(monkeypatch, out, *CHOSEN, "--seconds", "0")
    assert {cell["status"] for cell in nothing["cells"]} == {"not run"} and nothing["ratios"] == {}
    monkeypatch.setattr(generation_speed, "QUICK", 1e-9)
    found = call(monkeypatch, out, *CHOSEN)
    assert len(found["cells"]) == 12 and {cell["status"] for cell in found["cells"]} == {"measured"}
    own = found["ratios"]["retnet"]
    assert own["throughput_32k_batch"] == 2 and all(value > 0 for value in own.values())
    assert found["ratios"]["softmax"]["flat"] > 0
    by_cell = {(c["mixer"], c["length"], c["batch"]): c for c in found["cells"]}
    students = {by_cell["retnet", n, b]["state_bytes_per_sequence"] for n in (16, 32, 64) for b in (1, 2)}
    assert len(students) == 1
    assert own["flat"] == (
        by_cell["retnet", 64, 1]["decode_ms_per_token"] / by_cell["retnet", 16, 1]["decode_ms_per_token"]
    )
    assert "retnet" in capsys.readouterr().out
    monkeypatch.setattr(generation_speed.Model, "measure", None)
    assert call(monkeypatch, out, *CHOSEN) == found
    with pytest.raises(UserError, match="was measured with chunk 16, now 32; choose another file"):
        call(monkeypatch, out, *CHOSEN, "--chunk", "32")


def test_out_of_memory(monkeypatch, tmp_path):
    """What does not fit is marked and so is what is larger; the teacher's largest batch is found; others go on."""
    tried = []

    def measure(self, length, batch):
        mixer = self.config.mixer[0]
        tried.append(Cell(mixer, length, batch))
        if mixer == "softmax" and length * batch > 64:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        names = ("prefill_seconds", "prefill_tokens_per_second", "decode_ms_per_token", "decode_tokens_per_second",
                 "state_bytes_per_sequence", "peak_bytes")  # fmt: skip
        return dict.fromkeys(names, 1.0)

    monkeypatch.setattr(generation_speed.Model, "measure", measure)
    found = call(monkeypatch, tmp_path / "speed.json", *CHOSEN, "4", "8")
    status = {(c["mixer"], c["length"], c["batch"]): c["status"] for c in found["cells"]}
    assert status["softmax", 32, 8] == status["softmax", 32, 4] == status["softmax", 64, 8] == "OOM"
    assert status["softmax", 32, 2] == "measured" and found["ratios"]["retnet"]["throughput_32k_batch"] == 2
    assert all(s == "measured" for cell, s in status.items() if cell[0] == "retnet")
    assert Cell("softmax", 64, 8) not in tried
    assert tried.index(Cell("retnet", 32, 2)) < tried.index(Cell("retnet", 16, 2))


@pytest.mark.parametrize(
    "args, words",
    [
        (["--mixers", "rwkv"], "--mixers rwkv: choose among softmax"),
        (["--lengths", "0"], "--lengths 0: give numbers"),
        (["--lengths", "24"], "--lengths 24: must be a multiple of --chunk 16"),
        (["--config", "none"], "--config none"),
    ],
)
def test_refuses(monkeypatch, tmp_path, args, words):
    with pytest.raises(UserError, match=words):
        call(monkeypatch, tmp_path / "speed.json", "--lengths", "16", *args)


def test_foreign_file(monkeypatch, tmp_path):
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(UserError, match="holds something else"):
        call(monkeypatch, tmp_path / "a.json", *CHOSEN)


def test_figure(tmp_path):
    pytest.importorskip("matplotlib")
    figures = {"status": "measured", "decode_ms_per_token": 1.0, "decode_tokens_per_second": 1.0,
               "prefill_tokens_per_second": 2.0}  # fmt: skip
    found = {Cell(m, n, 1): figures for m in ("softmax", "gla") for n in (16, 32)}
    about = {"config": "tiny", "dtype": "float32", "device": "cpu"}
    generation_report.draw(found, about, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
