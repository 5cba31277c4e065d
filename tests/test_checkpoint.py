"""Checkpoints: exact restoring, rotation, and what kills, damage and a full disk leave."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlin import checkpoint
from jaxlin.checkpoint import Checkpoints, load_params
from jaxlin.config import UserError

ROOT = Path(__file__).resolve().parent.parent


def make_state(step, size=8):
    """A small training state in which everything depends on `step`."""
    key = jax.random.key(step)
    params = {
        "layers": {
            "mixer": {"q_proj": {"kernel": jax.random.normal(key, (2, size, 4))}, "A_log": jnp.full((2,), step / 3)}
        },
        "embedding": jax.random.normal(key, (size, 16)).astype(jnp.bfloat16),
    }
    optimizer = optax.chain(
        optax.clip(1.0), optax.masked(optax.adamw(1e-3), jax.tree.map(lambda x: x.ndim > 1, params))
    )
    opt_state = optimizer.init(params)
    opt_state = jax.tree.map(lambda x: x + step if jnp.issubdtype(x.dtype, jnp.number) else x, opt_state)
    return {"params": params, "opt_state": opt_state, "rng": jax.random.key_data(key), "count": jnp.int32(step)}


def abstract(state, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def assert_same(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.fixture
def saved(tmp_path):
    """Checkpoints of steps 1, 2 and 3."""
    checkpoints = Checkpoints(tmp_path / "c", keep=3)
    for step in (1, 2, 3):
        checkpoints.save(step, make_state(step), {"step": step})
    return checkpoints


def test_restores_bit_for_bit(tmp_path):
    state, extra = make_state(7), {"stage": 2, "tokens": 10**12, "data": b"\x00\xff", "loss": 0.1, "n": np.int64(3)}
    checkpoints = Checkpoints(tmp_path / "c", keep=1)
    assert checkpoints.latest(abstract(state)) is None and checkpoints.steps() == []
    checkpoints.save(7, state, extra)
    step, loaded, again = Checkpoints(tmp_path / "c", keep=1).latest(abstract(state))
    assert step == 7 and again == extra
    assert_same(loaded, state)
    assert type(loaded["opt_state"]) is type(state["opt_state"])
    assert_same(load_params(tmp_path / "c"), state["params"])
    assert_same(load_params(tmp_path / "c", 7), state["params"])


def test_restores_onto_other_shardings(tmp_path):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.NamedSharding(mesh, jax.P(None, "x"))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    value = {"params": {"w": jax.random.normal(jax.random.key(0), (3, 16))}}
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    checkpoints.save(1, jax.device_put(value, split), {})
    checkpoints.save(2, jax.device_put(value, one), {})
    for step, sharding in ((1, one), (2, split), (1, split)):
        loaded, _ = checkpoints.load(step, abstract(value, sharding))
        assert_same(loaded, value)
        assert loaded["params"]["w"].sharding == sharding


def test_rotation_keeps_the_newest_and_the_milestones(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    for step in range(1, 7):
        checkpoints.save(step, make_state(step), {}, milestone=step in (1, 3))
    assert checkpoints.steps() == [1, 3, 5, 6]
    assert names(tmp_path / "c") == ["1", "3", "5", "6"]
    assert_same(checkpoints.load(3, abstract(make_state(3)))[0], make_state(3))


def test_a_step_can_be_saved_again(saved, tmp_path):
    for value in (8, 9):
        saved.save(3, make_state(value), {"value": value})
    assert saved.steps() == [1, 2, 3] and names(tmp_path / "c") == ["1", "2", "3.2"]
    step, state, extra = saved.latest(abstract(make_state(0)))
    assert step == 3 and extra == {"value": 9}
    assert_same(state, make_state(9))


def test_saving_in_the_background(tmp_path, monkeypatch):
    """As on an accelerator: what goes wrong is raised by the next wait."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    checkpoints.save(1, make_state(1), {})
    checkpoints.save(2, make_state(2), {})
    assert checkpoints.steps() == [1, 2]

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_checksum", full)
        checkpoints.save(3, make_state(3), {})
        with pytest.raises(UserError, match="the disk is full, step 3 was not saved"):
            checkpoints.wait()
    assert names(tmp_path / "c") == ["1", "2"]
    assert_same(checkpoints.latest(abstract(make_state(0)))[1], make_state(2))


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "truncated": lambda folder: os.truncate(largest(folder), largest(folder).stat().st_size - 5),
    "deleted": lambda folder: largest(folder / "opt_state").unlink(),
    "one bit": lambda folder: flip(largest(folder / "params")),
    "manifest": lambda folder: os.truncate(folder / checkpoint.MANIFEST, 40),
    "emptied": lambda folder: shutil.rmtree(folder / "params"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_seen_and_the_one_before_is_used(damage, saved, tmp_path, caplog):
    folder = tmp_path / "c"
    DAMAGE[damage](folder / "3")
    checkpoints = Checkpoints(folder, keep=2)
    step, state, extra = checkpoints.latest(abstract(make_state(0)))
    assert step == 2 and extra == {"step": 2}
    assert_same(state, make_state(2))
    assert len(caplog.records) == 1 and "3 is damaged" in caplog.text and "\n" not in caplog.records[0].getMessage()
    assert_same(load_params(folder), make_state(2)["params"])
    with pytest.raises(UserError, match="the checkpoint is damaged"):
        load_params(folder, 3)
    checkpoints.save(3, make_state(5), {})  # going on replaces it
    assert_same(checkpoints.latest(abstract(make_state(0)))[1], make_state(5))
    assert checkpoints.steps() == [2, 3] and len(names(folder)) == 2


def test_a_damaged_newer_checkpoint_does_not_push_out_good_ones(saved, tmp_path):
    flip(largest(tmp_path / "c" / "3"))
    flip(largest(tmp_path / "c" / "2"))
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    assert checkpoints.latest(abstract(make_state(0)))[0] == 1
    checkpoints.save(2, make_state(2), {})
    assert checkpoints.steps() == [1, 2]
    assert_same(checkpoints.latest(abstract(make_state(0)))[1], make_state(2))


def test_errors_are_one_clear_line(saved, tmp_path):
    state = make_state(1)
    with pytest.raises(UserError, match="no checkpoint of step 9; there are: 1, 2, 3"):
        saved.load(9, abstract(state))
    with pytest.raises(UserError, match="no whole checkpoint"):
        load_params(tmp_path / "absent")
    with pytest.raises(UserError, match=r"embedding is bfloat16\[8, 16\], expected bfloat16\[9, 16\]"):
        saved.latest(abstract(make_state(1, size=9)))
    with pytest.raises(UserError, match=r"lacks params\.new: it is of another model"):
        saved.latest(abstract(state | {"params": state["params"] | {"new": state["count"]}}))
    with pytest.raises(UserError, match=r"unexpected params\.layers\.mixer.A_log"):
        saved.latest(abstract(state | {"params": {"embedding": state["params"]["embedding"]}}))
    with pytest.raises(UserError, match="--keep 0"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(TypeError, match="extra: object"):
        saved.save(4, state, {"x": object()})
    assert names(tmp_path / "c") == ["1", "2", "3"]


SAVE = """
import os, pathlib, signal, sys
from etils import epath
from jaxlin import checkpoint
from tests.test_checkpoint import make_state

def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)

def arm():
    if at == "checksum": checkpoint._checksum = die
    if at == "rename": type(epath.Path("x")).rename = die
    if at == "rotate": checkpoint.Checkpoints._rotate = die
    if at == "delete": type(epath.Path("x")).rmtree = die

folder, at = sys.argv[1:]
checkpoints = checkpoint.Checkpoints(folder, keep=2)
for step in range(1, 1000):
    if step == 4: arm()
    checkpoints.save(step, make_state(step, size=20_000), {"step": step})
    print(step, flush=True)
"""


@pytest.mark.parametrize("at", ["checksum", "rename", "rotate", "delete", "0.02", "0.06", "0.11"])
def test_a_kill_at_any_instant_loses_nothing_saved(at, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", SAVE, str(tmp_path / "c"), at],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    done = 0
    with process.stdout:
        for line in process.stdout:
            done = int(line)
            if at[0] == "0" and done == 4:  # otherwise it kills itself in step 4
                time.sleep(float(at))
                process.kill()
    assert process.wait() == -signal.SIGKILL and done >= 3
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    step, state, extra = checkpoints.latest(abstract(make_state(0, size=20_000)))
    assert step >= done and extra == {"step": step}
    assert_same(state, make_state(step, size=20_000))
    checkpoints.save(step + 1, make_state(step + 1), {})
    assert checkpoints.steps() == [step, step + 1]
    assert names(tmp_path / "c") == sorted([str(step), str(step + 1)])


def assert_full_disk_is_reported(folder):
    """Save until it fails; the last one that was saved must be whole, and nothing half-written left."""
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(1, make_state(1, size=2_000), {})
    for _ in range(2):
        with pytest.raises(UserError, match=rf"{folder}: the disk is full, step 2 was not saved \(step 1 is the last"):
            checkpoints.save(2, make_state(2, size=200_000), {})
        assert names(folder) == ["1"]
    assert_same(checkpoints.latest(abstract(make_state(0, size=2_000)))[1], make_state(1, size=2_000))
    checkpoints.save(3, make_state(3, size=2_000), {})
    assert names(folder) == ["3"]


def test_full_disk(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        assert_full_disk_is_reported(tmp_path / "c")
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_full_quota(tmp_path):
    """The same where a file may not grow any more, which needs no root."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        assert_full_disk_is_reported(tmp_path / "c")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
