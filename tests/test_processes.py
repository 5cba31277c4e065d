"""How processes find each other: what is given, what is detected, and what is refused before anything starts."""

from __future__ import annotations

import jax
import pytest

from jaxlin import processes
from jaxlin.config import DistributedConfig, UserError

VARIABLES = [variable for _, variable, _ in processes.SETTINGS]
ALL = DistributedConfig("host:12", 2, 1)


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """What `jax.distributed.initialize` is called with, on a host of no cluster."""
    for variable in (*VARIABLES, "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(variable, raising=False)
    found = []
    monkeypatch.setattr(processes, "_wait_for", lambda coordinator: None)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **options: found.append((args, options)))
    return found


def test_one_process(calls):
    processes.start(DistributedConfig())
    processes.start(DistributedConfig("host:12", 1, 0))
    assert not calls


def test_settings_and_environment(calls, monkeypatch):
    processes.start(ALL)
    for variable, value in zip(VARIABLES, ("host:12", "2", "0"), strict=True):
        monkeypatch.setenv(variable, value)
    processes.start(DistributedConfig(process=1))  # the command line wins
    assert [args for args, _ in calls] == 2 * [("host:12", 2, 1)]
    assert {options["cluster_detection_method"] for _, options in calls} == {"deactivate"}


def test_slurm_needs_nothing(calls, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    processes.start(DistributedConfig())
    assert not calls
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    processes.start(DistributedConfig())
    ((args, options),) = calls
    assert args == (None, None, None) and options["cluster_detection_method"] is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ((None, None, 1), "--distributed.process 1: also needs --distributed.coordinator HOST:PORT and "
                          "--distributed.processes N"),
        (("host:12", 2, None), "--distributed.coordinator host:12: also needs --distributed.process I"),
        (("host", 2, 0), "--distributed.coordinator host: must be HOST:PORT, an address of process 0"),
        (("host:12", 0, 0), "--distributed.processes 0: must be at least 1"),
        (("host:12", 2, 2), "--distributed.process 2: must be from 0 to 1, of 2 processes"),
    ],
)  # fmt: skip
def test_what_is_refused(config, message, calls):
    with pytest.raises(UserError) as error:
        processes.start(DistributedConfig(config[0] or "", *config[1:]))
    assert str(error.value) == message and not calls


def test_a_process_0_that_does_not_answer(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(processes, "WAIT_SECONDS", 0)
    with pytest.raises(UserError, match=r"coordinator localhost:1: process 0 did not answer within 0 s \("):
        processes.start(DistributedConfig("localhost:1", 2, 1))


def test_an_environment_that_makes_no_sense(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES=two: must be a whole number"):
        processes.start(DistributedConfig())


def test_processes_that_do_not_find_each_other(monkeypatch):
    def initialize(*args, **options):
        raise RuntimeError("DEADLINE_EXCEEDED: late\nmore")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(UserError) as error:
        processes.start(ALL)
    assert str(error.value) == (
        "--distributed.coordinator host:12: the processes did not find each other (DEADLINE_EXCEEDED: late)"
    )
