"""Plans for devices that are not here; those that compile for TPUs need libtpu."""

from __future__ import annotations

import jax
import pytest

from jaxlin import placement, sharding
from jaxlin.command_line import parse_run
from jaxlin.config import MeshConfig, UserError
from jaxlin.kernels import topology, topology_gpu
from jaxlin.plan import held_bytes, leanest_mesh, plan

TINY_TEACHER = parse_run(["--config", "tiny"]).teacher_config


def run(*flags: str):
    return parse_run(["--config", "tiny", "--mesh.fsdp", "2", "--mesh.tensor", "2", *flags])


def test_mistakes():
    others = "the chip must be one of v5e, v5p, v6e, tpu7x, GPUs as h100:8, h200:8, or gpu"
    with pytest.raises(UserError, match=f"--plan v9:2x2: {others}"):
        plan(run("--plan", "v9:2x2"))
    for wrong in ("h100", "h100:0", "h200:2x", "h100:8x2x2"):
        with pytest.raises(
            UserError, match=f"--plan {wrong}: give the GPUs of a host, h100:8 or h200:8, or hosts x GPUs"
        ):
            plan(run("--plan", wrong))
    with pytest.raises(UserError, match="--plan: --config demo gives no teacher_config"):
        plan(parse_run(["--plan", "v5e:2x2"]))
    with pytest.raises(UserError, match="--plan gpu: JAX finds no GPU here, only cpu"):
        plan(run("--plan", "gpu"))


@pytest.mark.parametrize(("kind", "chip"), [("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v6 lite", "v6e")])
def test_rates_of_a_device(kind, chip):
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    assert topology.chip_of(device) == topology.CHIPS[chip]
    assert topology.chip_of(jax.devices()[0]) is None


def test_the_leanest_mesh():
    """Split over all devices, by rows where they divide the batch; the rest by heads, where they divide those."""
    devices = jax.devices()
    assert len(devices) == 8

    def held(config):
        return held_bytes(tiny, sharding.make_mesh(config, devices))

    tiny = parse_run(["--config", "tiny", "--stage1.batch-size", "8", "--stage2.batch-size", "8"])
    whole, split, mixed = MeshConfig(8), MeshConfig(1, 8), MeshConfig(1, 4, 2)
    assert held(whole) > 6 * held(split)
    assert held(whole) > 8 * 272 * 64 * 4
    assert leanest_mesh(tiny, devices, sharding.make_mesh(whole, devices)) == split
    assert leanest_mesh(tiny, devices, sharding.make_mesh(split, devices)) is None
    fours = parse_run(["--config", "tiny"])  # of 4 rows in stages 1 and 2
    assert leanest_mesh(fours, devices, sharding.make_mesh(whole, devices)) == mixed


def test_several_students_hold_one_teacher():
    """Memory of two students at once is that of two runs, but for a teacher."""
    mesh = sharding.make_mesh(MeshConfig(8), jax.devices())
    teacher = placement.parameters(TINY_TEACHER, TINY_TEACHER.dtype, mesh)
    held = [held_bytes(parse_run(["--config", "tiny", "--mixer", m]), mesh) for m in ("gla", "kda", "gla,kda")]
    assert held[2] == held[0] + held[1] - sum(4 * a.size for a in jax.tree.leaves(teacher))


def test_gpus_of_several_hosts():
    """The slowest link counts: between hosts there is a network card for each GPU."""
    assert topology_gpu.chip("h100:8") == topology_gpu.chip("h100:1x8") == topology.GPUS["h100"]
    assert topology_gpu.chip("h200:2x8").network_gb_per_s == 50


def test_without_the_compiler(monkeypatch):
    monkeypatch.setattr(topology_gpu, "compiler", lambda: None)
    with pytest.raises(UserError, match=r"--plan h200:4: needs XLA's compiler for GPUs: pip install 'jaxlin\[gpu\]'"):
        plan(run("--plan", "h200:4"))


@pytest.mark.slow
@pytest.mark.skipif(topology_gpu.compiler() is None, reason="needs XLA's compiler for GPUs: pip install -e '.[gpu]'")
def test_gpus_that_are_not_here(capsys):
    assert plan(run("--plan", "h200:4", "--stage", "3", "--dtype", "bfloat16"))
    printed = capsys.readouterr().out
    assert "1 gated_delta_rule_intra" in printed and "1 gated_delta_rule_fwd" in printed
    assert "all-gather" in printed


@pytest.mark.slow
def test_a_step_fits_or_does_not(capsys):
    """Also a step whose kernels are split over rows and heads; and what is said of one that does not fit."""
    pytest.importorskip("libtpu")
    assert plan(run("--plan", "v5e:2x2", "--stage", "1"))
    printed = capsys.readouterr().out
    assert "1 gated_delta_rule_forward, 1 gated_delta_rule_backward" in printed
    assert "8,192 tokens: 0.0 hours" in printed
    assert "all-gather" in printed
    large = ("--stage2.batch-size", "4096", "--data.seq-len", "8192", "--stage", "2")
    assert not plan(run("--plan", "v5e:2x2", *large))
    printed = capsys.readouterr().out
    assert "Ran out of memory" in printed
    assert "holds least on each is --mesh.data 1 --mesh.fsdp 4 --mesh.tensor 1" in printed
    assert "a larger --stage2.accumulation" in printed


@pytest.mark.slow
def test_the_nearest_mesh_that_fits(capsys):
    """A teacher of 1.7B on four chips: whole on each of them it does not fit."""
    pytest.importorskip("libtpu")
    assert not plan(parse_run(["--config", "smollm2_1_7b", "--plan", "v5e:2x2", "--stage", "2"]))
    printed = capsys.readouterr().out
    assert "holds least on each is --mesh.data 1 --mesh.fsdp 4 --mesh.tensor 1" in printed
    assert "stage 2: fits" in printed
