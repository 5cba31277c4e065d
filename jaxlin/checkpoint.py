"""Checkpoints: Orbax writes the arrays; a manifest, written last, makes them count.

A checkpoint is a folder named after its step, into which Orbax writes `params`, `opt_state` and so on. When that is
done, the manifest is renamed into place: size and CRC-32 of every file, shapes of the leaves, the rest of the state.
A folder without a manifest is what a killed save left. Older checkpoints are deleted only then, manifest first. So a
kill at any instant leaves every saved checkpoint whole, and later damage is seen before anything is loaded.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import logging
import re
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from jaxlin import processes
from jaxlin.config import UserError

MANIFEST = "manifest.json"
NAME = re.compile(r"(\d+)(?:\.(\d+))?")  # step, and attempt where the step was saved before
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_WORDS = ("No space left on device", "Disk quota exceeded", "File too large")
log = logging.getLogger(__name__)
# Orbax's threads log a failure that it then raises here as well; one report is enough.
logging.getLogger("absl").addFilter(lambda record: "_SignalingThread.run() raised" not in record.getMessage())

PyTree = Any
State = dict[str, PyTree]
AbstractState = State | Callable[[dict[str, Any]], State]


class Checkpoints:
    """The checkpoints of one run, in `folder`: the newest `keep`, and the milestones.

    With several processes, all of them call every method, and `folder` is one that they share.
    """

    def __init__(self, folder: Path | str, *, keep: int) -> None:
        if keep < 1:
            raise UserError(f"--keep {keep}: at least 1 checkpoint must be kept")
        self._folder, self._keep = epath.Path(folder).absolute(), keep
        self._damaged: set[str] = set()
        self._newest = ""
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, state: State, extra: dict[str, Any], *, milestone: bool = False) -> None:
        """Save `state`, a dict of pytrees of arrays, and `extra`, JSON (bytes allowed) that is the same everywhere.

        On an accelerator this returns once the arrays have left it; `wait` or the next save reports what went wrong
        since. A milestone is never deleted. Raises UserError when the disk is full; what was saved before stays.
        """
        self._save(step, state, extra, milestone, (self,))

    def _save(
        self, step: int, state: State, extra: dict[str, Any], milestone: bool, complete: Sequence[Checkpoints]
    ) -> None:
        """Save; with that all of `complete` have this step, and delete older ones."""
        self.wait()
        leaves = {key: _flatten(tree) for key, tree in state.items()}
        manifest = {
            "step": step,
            "milestone": milestone,
            "leaves": {key: {name: _spec(leaf) for name, leaf in tree.items()} for key, tree in leaves.items()},
            "extra": [json.dumps(extra, default=_encode)],
        }
        path, response = None, None
        try:
            if processes.is_first():
                self._folder.mkdir(parents=True, exist_ok=True)
                self._sweep()
            attempt = processes.from_first(lambda: self._attempts(step))
            path = self._folder / (f"{step}.{attempt}" if attempt else f"{step}")
            self._newest = path.name
            response = ocp.save_checkpointables_async(path, {key: tree for key, tree in leaves.items() if tree})
        except Exception as error:
            self._fail(step, error)
        arguments = (path, response, manifest, complete)
        self._thread = threading.Thread(target=self._finish, args=arguments, name="checkpoint")
        self._thread.start()
        if jax.default_backend() == "cpu":  # there the arrays never left: the caller may donate them
            self.wait()

    def wait(self) -> None:
        """Wait until the last save is complete; raises what went wrong with it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Complete the last save."""
        self.wait()

    def steps(self) -> list[int]:
        """The steps that were saved, ascending; their files are not looked at."""
        self.wait()
        return sorted(_complete(self._folder))

    def milestones(self) -> list[int]:
        """Those of `steps` that are kept for good."""
        self.wait()
        found = _complete(self._folder)
        return [step for step in sorted(found) if _read_manifest(found[step]).get("milestone")]

    def latest(self, abstract_state: AbstractState) -> tuple[int, State, dict[str, Any]] | None:
        """(step, state, extra) of the newest checkpoint that is whole; each damaged one is reported in one line.

        `abstract_state` may be a function of `extra`, for states whose shape depends on when they were saved.
        """
        found = latest_of_all((self,), (abstract_state,))
        return None if found is None else (found[0], *found[1][0])

    def newest(self) -> int | None:
        """The newest step whose checkpoint is whole."""
        return newest_of_all((self,))

    def extra(self, step: int) -> dict[str, Any]:
        """What was saved beside the state of `step`; {} where that is damaged."""
        return _extra(_read_manifest(_complete(self._folder)[step]))

    def load(self, step: int, abstract_state: AbstractState) -> tuple[State, dict[str, Any]]:
        """(state, extra) of `step`, on the shardings of `abstract_state`'s ShapeDtypeStructs.

        Raises UserError when there is no such checkpoint, when it is damaged, or when it does not fit.
        """
        self.wait()
        _require_whole(self._folder, step)
        return self._load(step, abstract_state)

    def _load(self, step: int, abstract_state: AbstractState) -> tuple[State, dict[str, Any]]:
        path = _complete(self._folder)[step]
        manifest = _read_manifest(path)
        extra = _extra(manifest)
        if callable(abstract_state):
            abstract_state = abstract_state(extra)
        wanted = {key: _flatten(tree) for key, tree in abstract_state.items()}
        _require_fit(path, manifest["leaves"], wanted)
        # Orbax warns about leaves without a sharding.
        one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or one), wanted)
        loaded = ocp.load_checkpointables(path, {key: tree for key, tree in wanted.items() if tree})
        state = {
            key: jax.tree.unflatten(jax.tree.structure(tree), [loaded[key][name] for name in wanted[key]])
            for key, tree in abstract_state.items()
        }
        return state, extra

    def _is_damaged(self, step: int) -> bool:
        path = _complete(self._folder)[step]
        if path.name in self._damaged:  # read and reported already
            return True
        damage = _damage(path)
        if damage:
            self._damaged.add(path.name)  # the next save clears it away
            log.warning("checkpoint %s is damaged (%s): using the one before", path, damage)
        return bool(damage)

    def _attempts(self, step: int) -> int:
        """How often `step` was saved before: its folders are named step, step.1, step.2, ..."""
        found = [NAME.fullmatch(path.name) for path in self._folder.iterdir()] if self._folder.is_dir() else []
        return max((int(match[2] or 0) + 1 for match in found if match and int(match[1]) == step), default=0)

    def _finish(
        self, path: epath.Path, response: Any, manifest: dict[str, Any], complete: Sequence[Checkpoints]
    ) -> None:
        """In the background: wait for Orbax, make the checkpoint count, then delete older ones of `complete`."""
        try:
            try:
                response.result()
                if processes.is_first():
                    manifest["files"] = {str(file.relative_to(path)): _checksum(file) for file in _files(path)}
                    part = path / f"{MANIFEST}.part"
                    part.write_text(json.dumps(manifest))
                    part.rename(path / MANIFEST)
                    for run in complete:
                        run._rotate()
            except Exception as error:
                self._fail(manifest["step"], error)
        except BaseException as error:
            self._error = error

    def _fail(self, step: int, error: Exception) -> None:
        """Clear away a failed save and say why."""
        quiet, deadline = 0, time.monotonic() + 30
        while processes.is_first() and quiet < 3 and time.monotonic() < deadline:
            quiet = 0 if self._sweep() else quiet + 1  # Orbax's other threads go on writing for a moment
            time.sleep(0.1)
        if not _is_full(error):
            raise error
        before = max(_complete(self._folder), default=None)
        left = "none was saved before" if before is None else f"step {before} is the last one saved"
        raise UserError(
            f"{self._folder}: the disk is full, step {step} was not saved ({left}); free some space"
        ) from error

    def _rotate(self) -> None:
        """Delete all but the newest `keep` checkpoints, the milestones and the one just saved."""
        for name in self._damaged:
            _delete(self._folder / name)
        self._damaged.clear()
        complete = _complete(self._folder)
        passing = [step for step in sorted(complete) if not _read_manifest(complete[step]).get("milestone")]
        kept = {complete[step].name for step in complete} - {complete[step].name for step in passing[: -self._keep]}
        for path in self._folder.iterdir():
            if NAME.fullmatch(path.name) and path.name not in kept | {self._newest}:
                _delete(path)

    def _sweep(self) -> bool:
        """Delete what killed and failed saves left behind; returns whether there was anything."""
        found = False
        for path in self._folder.iterdir() if self._folder.is_dir() else ():
            name = path.name.partition(".orbax-checkpoint-tmp")[0]
            if NAME.fullmatch(name) and not (path / MANIFEST).exists():
                found = True
                with contextlib.suppress(OSError):  # another thread is still writing there
                    path.rmtree()
        return found


def save_all(
    runs: Sequence[Checkpoints], step: int, states: Sequence[State], extra: dict[str, Any], *, milestone: bool = False
) -> None:
    """Save the states of runs in lockstep; see `Checkpoints.save`.

    No older checkpoint is deleted before the last run has its new one: a kill at any instant leaves all of them a
    step in common. They are written one after another, since Orbax's barriers between processes do not tell two
    saves at once apart.
    """
    for run in runs:
        run.wait()
    for run, state in zip(runs[:-1], states[:-1], strict=True):
        run._save(step, state, extra, milestone, ())
        run.wait()
    runs[-1]._save(step, states[-1], extra, milestone, runs)


def newest_of_all(runs: Sequence[Checkpoints]) -> int | None:
    """The newest step whose checkpoints are whole in all runs."""
    common = set.intersection(*(set(run.steps()) for run in runs))
    whole = (step for step in sorted(common, reverse=True) if not any(run._is_damaged(step) for run in runs))
    return next(whole, None)


def latest_of_all(
    runs: Sequence[Checkpoints], abstract_states: Sequence[AbstractState]
) -> tuple[int, list[tuple[State, dict[str, Any]]]] | None:
    """The newest step that all runs have whole, and each run's (state, extra); see `Checkpoints.latest`."""

    step = processes.from_first(lambda: newest_of_all(runs))
    if step is None:
        return None
    return step, [run._load(step, state) for run, state in zip(runs, abstract_states, strict=True)]


def load_params(folder: Path | str, step: int | None = None) -> dict[str, Any]:
    """The parameters of a checkpoint (the newest whole one, or that of `step`), as nested dicts of NumPy arrays.

    Nothing need be known of the model or the optimizer. Raises UserError when there is none, or it is damaged.
    """
    root = epath.Path(folder).absolute()

    def chosen() -> int:
        if step is not None:
            _require_whole(root, step)
            return step
        whole = (step for step in sorted(_complete(root), reverse=True) if not _damage(_complete(root)[step]))
        if (newest := next(whole, None)) is None:
            raise UserError(f"{root}: there is no whole checkpoint in it; the run's train.py command makes one")
        return newest

    path = _complete(root)[processes.from_first(chosen)]
    specs = _read_manifest(path)["leaves"]["params"]
    wanted = {n: np.broadcast_to(np.zeros((), jax.dtypes.canonicalize_dtype(d)), s) for n, (s, d) in specs.items()}
    params: dict[str, Any] = {}
    for name, leaf in ocp.load_checkpointables(path, {"params": wanted})["params"].items():
        *parents, last = name.split(".")
        at = params
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = leaf
    return params


def _flatten(tree: PyTree) -> dict[str, Any]:
    """The leaves of a pytree of any node types, by their dotted paths."""
    return {jax.tree_util.keystr(p, simple=True, separator="."): x for p, x in jax.tree.leaves_with_path(tree)}


def _spec(leaf: Any) -> list[Any]:
    return [list(leaf.shape), str(leaf.dtype)]


def _complete(folder: epath.Path) -> dict[int, epath.Path]:
    """The complete checkpoints by step; of several of one step, the last."""
    found: dict[int, tuple[int, epath.Path]] = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        if (match := NAME.fullmatch(path.name)) and (path / MANIFEST).exists():
            step, attempt = int(match[1]), int(match[2] or 0)
            found[step] = max(found.get(step, (-1, path)), (attempt, path))
    return {step: path for step, (_, path) in found.items()}


def _read_manifest(path: epath.Path) -> dict[str, Any]:
    """The manifest; {} if it is damaged."""
    try:
        return json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError):
        return {}


def _extra(manifest: dict[str, Any]) -> dict[str, Any]:
    return json.loads(manifest["extra"][0], object_hook=_decode) if "extra" in manifest else {}


def _files(folder: epath.Path) -> list[epath.Path]:
    """Every file below a folder, in a fixed order."""
    return [file for path in sorted(folder.iterdir()) for file in (_files(path) if path.is_dir() else [path])]


def _checksum(file: epath.Path) -> list[int]:
    """Size and CRC-32."""
    size, crc = 0, 0
    with file.open("rb") as data:
        while part := data.read(1 << 22):
            size, crc = size + len(part), zlib.crc32(part, crc)
    return [size, crc]


def _damage(path: epath.Path) -> str:
    """What is wrong with a checkpoint's files; empty if nothing is."""
    manifest = _read_manifest(path)
    if "files" not in manifest:
        return f"{MANIFEST} is unreadable"
    for name, expected in manifest["files"].items():
        try:
            found = _checksum(path / name)
        except OSError:
            return f"{name} is missing or unreadable"
        if found != expected:
            size = f"is {found[0]} bytes instead of {expected[0]}" if found[0] != expected[0] else "has changed"
            return f"{name} {size}"
    return ""


def _require_whole(folder: epath.Path, step: int) -> None:
    complete = _complete(folder)
    if step not in complete:
        known = ", ".join(map(str, sorted(complete))) or "none"
        raise UserError(f"{folder}: no checkpoint of step {step}; there are: {known}")
    if damage := _damage(complete[step]):
        raise UserError(f"{complete[step]}: the checkpoint is damaged ({damage}); use another step")


def _require_fit(path: epath.Path, saved: dict[str, dict[str, Any]], wanted: dict[str, dict[str, Any]]) -> None:
    """Refuse a checkpoint of another model or optimizer."""
    for key, tree in wanted.items():
        for name in sorted(saved.get(key, {}).keys() ^ tree.keys()):
            lack = "lacks" if name in tree else "has the unexpected"
            raise UserError(f"{path}: the checkpoint {lack} {key}.{name}: it is of another model or configuration")
        for name, leaf in tree.items():
            if _spec(leaf) != saved[key][name]:
                shape, dtype = saved[key][name]
                raise UserError(
                    f"{path}: {key}.{name} is {dtype}{shape}, expected {leaf.dtype}{list(leaf.shape)}:"
                    " it is of another model or configuration"
                )


def _delete(path: epath.Path) -> None:
    """Delete a checkpoint, manifest first, so that half of it never counts."""
    (path / MANIFEST).unlink(missing_ok=True)
    path.rmtree()


def _is_full(error: BaseException | None) -> bool:
    """Whether the disk being full is behind an error, however wrapped."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno in FULL) or any(words in str(error) for words in FULL_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def _encode(value: Any) -> Any:
    """JSON for what it does not know: bytes and NumPy's scalars."""
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode()}
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"extra: {type(value).__name__} cannot be saved as JSON")


def _decode(value: dict[str, Any]) -> Any:
    return base64.b64decode(value["base64"]) if value.keys() == {"base64"} else value
