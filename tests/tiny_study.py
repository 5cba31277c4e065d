"""A study of two tiny students, one step a stage, with a benchmark; and two students that train.py refuses."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from jaxlin.evaluation import bear
from jaxlin.study.design import Arm, Contrast, Study, Suite
from tests.quick_xla import QUICK

SETTINGS = (
    "--config", "tiny", "--data.seq-len", "32", "--data.eval-tokens", "128", "--stage1.batch-size", "4",
    "--stage2.batch-size", "4", "--stage3.batch-size", "4", "--log-every", "1", "--save-every", "1",
)  # fmt: skip
GOOD = Arm(mixers=("retnet", "linear_attention"), tokens=(384,))
BAD = Arm(  # a layer that the teacher has not: only train.py finds out
    mixers=("kda", "gla"), variant="nowhere", options=("--stage1.layers", "99"), tokens=(384,)
)
RETNET, LINEAR = "recommended-384/retnet", "recommended-384/linear_attention"
SUBJECTS = 24


def study(data: Path) -> Study:
    """Good and bad arms."""
    return Study(
        name="Tiny",
        settings=SETTINGS,
        arms=(BAD, GOOD),
        suites=(Suite("bear"),),
        contrasts=(
            Contrast("kl", "Is RetNet nearer?", RETNET, LINEAR, "kl"),
            Contrast("bear", "Does RetNet know more?", RETNET, LINEAR, "bear"),
        ),
        milestone_tokens=256,
        data=str(data),
    )


def good(whole: Study) -> Study:
    """The same without what fails."""
    return replace(whole, arms=(GOOD,))


def write_bear(folder: Path) -> Path:
    """BEAR's files with one relation."""
    path = folder / "bear" / "BEAR"
    path.mkdir(parents=True)
    about = {"P1": {"templates": ["[X]: [Y]"], "answer_space_labels": ["a", "b"], "answer_space_ids": ["Q1", "Q2"]}}
    (path / bear.METADATA).write_text(json.dumps(about))
    rows = [{"sub_id": f"Q{i}", "sub_label": f"{i}", "answer_idx": i % 2} for i in range(SUBJECTS)]
    (path / "P1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def environment(cache: Path) -> dict[str, str]:
    """For processes: one device, quick compilation, and what is compiled kept between them."""
    return {
        "XLA_FLAGS": QUICK,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
