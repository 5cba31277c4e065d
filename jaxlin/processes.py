"""Several processes of one run: how they find each other, and what only the first one does.

Every process runs the same program on its own devices, and all of them must reach every computation on the whole mesh.
So whatever depends on one process alone (a file, an environment) is decided by the first and told to the others.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxlin.config import DistributedConfig, UserError

T = TypeVar("T")
WAIT_SECONDS = 300  # for process 0 to be there
SHUTDOWN_SECONDS = 60  # a process that ends early waits so long for the others before it ends them too
SETTINGS = (
    ("--distributed.coordinator", "JAX_COORDINATOR_ADDRESS", "HOST:PORT"),
    ("--distributed.processes", "JAX_NUM_PROCESSES", "N"),
    ("--distributed.process", "JAX_PROCESS_ID", "I"),
)


def start(config: DistributedConfig) -> None:
    """Join the other processes, where there are any. Must come before anything that touches devices.

    Raises UserError for settings that are incomplete or impossible, and where the processes do not find each other.
    """
    values = (config.coordinator or None, config.processes, config.process)
    found = [_setting(value, *names[:2]) for value, names in zip(values, SETTINGS, strict=True)]
    missing = [f"{flag} {what}" for value, (flag, _, what) in zip(found, SETTINGS, strict=True) if value is None]
    given = [f"{names[0]} {value}" for value, names in zip(found, SETTINGS, strict=True) if value is not None]
    cluster = _cluster()
    if missing and not cluster:
        if given:
            raise UserError(f"{given[0]}: also needs {' and '.join(missing)}")
        return
    coordinator, count, process = found
    _check(coordinator, count, process)
    if count == 1:
        return
    if coordinator and process:
        _wait_for(coordinator)
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            process,
            cluster_detection_method=None if missing else "deactivate",
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except ValueError as error:
        if cluster == "tpu" and not given:
            return  # a TPU host that belongs to no pod
        raise UserError(f"the processes of this {cluster} job were not found ({error})") from error
    except RuntimeError as error:
        where = f"--distributed.coordinator {coordinator}" if coordinator else f"this {cluster} job"
        raise UserError(f"{where}: the processes did not find each other ({str(error).splitlines()[0]})") from error
    if not is_first():
        logging.getLogger("jaxlin").setLevel(logging.ERROR)  # what the first one says already


def _setting(value: Any, flag: str, variable: str) -> Any:
    """A setting from the command line, or else from the environment."""
    if value is not None or not (text := os.environ.get(variable)):
        return value
    if variable.endswith("ADDRESS"):
        return text
    if not text.isdecimal():
        raise UserError(f"{variable}={text}: must be a whole number, as {flag}")
    return int(text)


def _check(coordinator: str | None, count: int | None, process: int | None) -> None:
    if coordinator is not None and not re.fullmatch(r".+:\d+", coordinator):
        raise UserError(f"--distributed.coordinator {coordinator}: must be HOST:PORT, an address of process 0")
    if count is not None and count < 1:
        raise UserError(f"--distributed.processes {count}: must be at least 1")
    if count is not None and process is not None and not 0 <= process < count:
        raise UserError(f"--distributed.process {process}: must be from 0 to {count - 1}, of {count} processes")


def _wait_for(coordinator: str) -> None:
    """Wait until process 0 answers: JAX itself would end this process with a stack trace."""
    host, port = coordinator.rsplit(":", 1)
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
            return
        except (OSError, OverflowError) as error:
            if time.monotonic() >= deadline:
                where = f"--distributed.coordinator {coordinator}"
                raise UserError(f"{where}: process 0 did not answer within {WAIT_SECONDS} s ({error})") from error
            time.sleep(1)


def _cluster() -> str:
    """The kind of cluster whose processes JAX finds by itself; empty where there is none."""
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:  # srun sets it; a batch script alone has one process
        return "SLURM"
    platforms = os.environ.get("JAX_PLATFORMS", "")
    chips = [*Path("/dev").glob("accel*"), *Path("/dev/vfio").glob("[0-9]*")]
    if chips and importlib.util.find_spec("libtpu") and (not platforms or "tpu" in platforms):
        return "tpu"
    return ""


def is_first() -> bool:
    """Whether this process is the one that prints and writes files."""
    return jax.process_index() == 0


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns in the first process (JSON), in every process; a UserError that it raises there as well."""
    if jax.process_count() == 1:
        return make()
    answer: dict[str, Any] = {}
    if is_first():
        try:
            answer = {"value": make()}
        except UserError as error:
            answer = {"error": str(error)}
    answer = json.loads(_broadcast(json.dumps(answer)))
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["value"]


def _broadcast(text: str) -> str:
    """The first process's `text`."""
    data = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    data = data if is_first() else np.zeros(size, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(data), np.uint8)).decode()


def require_same(what: str, value: str) -> None:
    """Refuse to go on where `value` is not the first process's: the processes would compute different things."""
    theirs = from_first(lambda: value)
    same = multihost_utils.process_allgather(np.int32(theirs == value)) if jax.process_count() > 1 else np.int32(1)
    if not np.all(same):
        others = ", ".join(map(str, np.flatnonzero(np.asarray(same) == 0)))
        raise UserError(f"{what} of process {others} are not those of process 0: give every process the same")


def whole(array: Any) -> np.ndarray:
    """An array on the host, whole, also where other processes hold parts of it. All processes must call this."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable and not array.is_fully_replicated:
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)
