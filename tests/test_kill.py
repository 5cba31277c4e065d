"""One run killed at twenty random instants, saves included, ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlin.checkpoint import load_params

ROOT = Path(__file__).resolve().parent.parent
KILLS = int(os.environ.get("JAXLIN_KILLS", "20"))
STEPS = 80  # of the config `tiny`


def start(folder, environment):
    command = [sys.executable, "train.py", "--config", "tiny", "--run-dir", str(folder)]
    command += ["--log-every", "1", "--save-every", "2"]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def finish(process):
    process.communicate()
    return process.returncode == 0


def progress(folder, since):
    """The last step that was logged after `since`."""
    file = folder / "metrics.jsonl"
    if not file.is_file() or file.stat().st_mtime_ns <= since:
        return 0
    whole = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return json.loads(whole[-1])["step"] if whole else 0


@pytest.mark.slow
def test_twenty_kills(tmp_path):
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_gpu_deterministic_ops=true",  # else GPUs add up rows of a gradient in any order
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert finish(start(whole, environment))
    rng = np.random.default_rng(int(os.environ.get("JAXLIN_KILL_SEED", "0")))
    resumed = []
    for target in np.sort(rng.integers(1, STEPS, KILLS)):
        since, process = time.time_ns(), start(killed, environment)
        while progress(killed, since) < target:
            assert process.poll() is None, f"ended before step {target}"
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.2))  # a step takes less: in the middle of one, of a save, of an evaluation
        process.send_signal(signal.SIGKILL)
        resumed += [line for line in process.communicate()[0].splitlines() if line.startswith("resumed at")]
    assert finish(start(killed, environment))
    print("\n" + "\n".join(resumed))
    assert len(resumed) >= KILLS - 2  # but where nothing was saved yet
    for (path, x), y in zip(
        jax.tree.leaves_with_path(load_params(killed / "checkpoints")),
        jax.tree.leaves(load_params(whole / "checkpoints")),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))
