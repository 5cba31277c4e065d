"""Plans for TPUs that are not here; those that compile need libtpu."""

from __future__ import annotations

import pytest

from jaxlin.config import UserError, parse_run
from jaxlin.plan import plan


def run(*flags: str):
    return parse_run(["--config", "tiny", "--mesh.fsdp", "2", "--mesh.tensor", "2", *flags])


def test_mistakes():
    with pytest.raises(UserError, match="--plan v9:2x2: the chip must be one of v5e, v5p, v6e"):
        plan(run("--plan", "v9:2x2"))
    with pytest.raises(UserError, match="--plan: --config demo gives no teacher_config"):
        plan(parse_run(["--plan", "v5e:2x2"]))


@pytest.mark.slow
def test_a_step_fits_or_does_not(capsys):
    """Also a step whose kernels are split over rows and heads."""
    pytest.importorskip("libtpu")
    assert plan(run("--plan", "v5e:2x2", "--stage", "1"))
    assert "1 gated_delta_rule_forward, 1 gated_delta_rule_backward" in capsys.readouterr().out
    large = ("--stage2.batch-size", "4096", "--data.seq-len", "8192", "--stage", "2")
    assert not plan(run("--plan", "v5e:2x2", *large))
    assert "Ran out of memory" in capsys.readouterr().out
