"""The benchmark of training steps, tried out on the CPU."""

import json

from benchmarks import training_step


def test_two_students(monkeypatch, capsys):
    settings = "--config tiny --mixer retnet,linear_attention --stage 1 --stage1.batch-size 8 --data.seq-len 16"
    monkeypatch.setattr("sys.argv", ["training_step", *settings.split()])
    monkeypatch.setattr(training_step, "REPEATS", 1)
    training_step.main()
    line, found = capsys.readouterr().out.splitlines()
    found = json.loads(found)
    assert line.startswith("tiny, retnet,linear_attention, stage 1, 8 x cpu: ")
    assert len(found["loss"]) == 2 and found["planned_gib"] > 0
    assert found["tokens_per_second"] == 8 * 16 / (found["milliseconds"] / 1e3)
