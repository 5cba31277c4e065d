"""What docs/code.md tells a script to do is done here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlin.runs import open_run
from tests.quick_xla import QUICK

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_from_python(tmp_path):
    """A run by the trainer, then a loop of one's own; both leave folders that everything else reads."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/code.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    script = "\n".join([*blocks, "trainer.train()"])  # once more: there is nothing to do
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "runs/mine: finished already, at step 5" in done.stdout
    for folder in ("runs/mine", "runs/loop"):
        run = open_run(tmp_path / folder)
        assert run.student.mixer == ("gla",) and list(run.params()) == ["embed_tokens", "layers", "norm"]
