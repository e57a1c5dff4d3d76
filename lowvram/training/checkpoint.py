"""Checkpoints: everything that resuming needs, whole on disk or not there, checked before it is trusted.

    checkpoints/step-000060/
      adapter.safetensors     the adapter's weights, under their own names
      optimizer.safetensors   every other tensor, under its place: optimizer/state/0/exp_avg, rng/torch
      state.json              every other value, with a reference where a tensor belongs
      manifest.json           size and sha256 of the three; written last

Nothing is pickled, so a checkpoint from a stranger can do no more than be wrong.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lowvram.errors import NO_ROOM, ConfigError, DoesNotFitError
from lowvram.file_hash import file_sha256
from lowvram.frozen import Frozen
from lowvram.shell import typed
from lowvram.training.json_values import decode, encode
from lowvram.units import format_bytes

FORMAT = 1
ADAPTER = "adapter.safetensors"
TENSORS = "optimizer.safetensors"
STATE = "state.json"
MANIFEST = "manifest.json"
FILES = (ADAPTER, TENSORS, STATE)

_NAME = re.compile(r"step-(\d{6,})")
# A step that is saved again sets its first checkpoint aside until the new one is in place.
_SET_ASIDE = re.compile(r"\.step-(\d{6,})\.old")
_UNFINISHED = re.compile(r"\.step-\d{6,}\.tmp")
_OS_ERROR = re.compile(r"os error (\d+)\)")  # how safetensors tells an error number
_WINDOWS_DISK_FULL = 112  # ERROR_DISK_FULL


@dataclass
class CheckpointState:
    """All that the loop needs to go on as if it had never stopped. Tensors are on the CPU once loaded."""

    step: int  # finished optimizer steps
    epoch: int
    step_in_epoch: int  # the data cursor
    plan_sha256: str
    adapter: dict[str, torch.Tensor]
    optimizer: dict[str, Any]  # torch.optim.Optimizer.state_dict()
    scheduler: dict[str, Any]
    rng: dict[str, Any]  # collect_rng()
    extra: dict[str, Any]


class _File(Frozen):
    size: int
    sha256: str


class _Manifest(Frozen):
    format: int
    files: dict[str, _File]


def collect_rng() -> dict[str, Any]:
    """The state of every random generator that training draws from."""
    numpy: Any = np.random.get_state(legacy=False)
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    rng = {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state()}
    if _cuda_in_use():
        rng["cuda"] = torch.cuda.get_rng_state_all()
    return rng


def restore_rng(rng: Mapping[str, Any]) -> None:
    """Sets every generator back. A machine with fewer GPUs than the one that saved uses the first states."""
    random.setstate(rng["python"])
    key = np.array(rng["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state({**rng["numpy"], "state": {**rng["numpy"]["state"], "key": key}})
    torch.set_rng_state(rng["torch"])
    if torch.cuda.is_available():
        for device, state in zip(range(torch.cuda.device_count()), rng.get("cuda", []), strict=False):
            torch.cuda.set_rng_state(state, device)


def _cuda_in_use() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def save(folder: Path, state: CheckpointState, keep: int = 2, best_step: int = 0) -> Path:
    """Writes `folder`/step-000123, then removes what is older than the newest `keep`, but not `best_step`'s.

    A kill at any moment leaves the earlier checkpoints, and this one whole or not at all. Checkpoints of
    later steps are removed: the run has gone back behind them, and resuming from one would undo that.

    Args:
        best_step: whose checkpoint stays however old it is; 0: none. A best one that `state` replaces goes
            only when `state` is in place.

    Raises:
        DoesNotFitError: the disk is full; the earlier checkpoints are untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _sync_folder(folder.parent)
    _remove_unfinished(folder)
    path = folder / f"step-{state.step:06d}"
    temporary = _hidden(path, "tmp")
    try:
        temporary.mkdir()
        _write(temporary, state)
        _put_in_place(temporary, path)
    except BaseException as error:
        # Asked before the unfinished files give back what they took.
        full = _disk_full(folder, state) if error_number(error) in NO_ROOM else None
        shutil.rmtree(temporary, ignore_errors=True)
        if full is not None:
            raise full from error
        raise
    _prune(folder, state.step, max(1, keep), best_step)
    return path


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are all as they were written, and why newer ones were passed over."""
    notes: list[str] = []
    for path in _checkpoints(folder):
        problem = _problem(path)
        if problem is None:
            return path, notes
        notes.append(f"{path.name} {problem}")
    return None, notes


def newest_step(folder: Path) -> int:
    """Of the newest checkpoint, be it whole or not; 0 without any."""
    return max(map(_step, _checkpoints(folder)), default=0)


def set_aside(folder: Path, chosen: Path | None) -> None:
    """Names that nothing here reads or removes for what `newest` passed over for `chosen`: somebody may mend
    it, or may read it with the lowvram that wrote it."""
    for path in _checkpoints(folder):
        if path == chosen:
            return
        aside, number = folder / f"step-{_step(path):06d}.unread", 1
        while aside.exists():
            number += 1
            aside = aside.with_suffix(f".unread-{number}")
        path.rename(aside)


def of_step(folder: Path, step: int) -> tuple[Path | None, str]:
    """The whole checkpoint of `step`; or None, and what is wrong with it."""
    reason = "is gone"
    for path in _checkpoints(folder):
        if _step(path) == step:
            problem = _problem(path)
            if problem is None:
                return path, ""
            reason = problem
    return None, f"The checkpoint of step {step} {reason}"


def n_bytes(path: Path) -> int:
    """Of all files of the checkpoint at `path`."""
    return sum(file.stat().st_size for file in path.iterdir())


def read_values(path: Path) -> dict[str, Any]:
    """`step` and `extra` of the checkpoint at `path`, where `extra` holds no tensor; nothing is checked."""
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    return {name: decode(value, {}) for name, value in state["dict"] if name in ("step", "extra")}


def what_is_safe(folder: Path) -> str:
    """One sentence for a run that stops early: where a resume will go on."""
    path, notes = newest(folder)
    if path is None and notes:
        return f"No checkpoint is whole: {'; '.join(notes)}."
    if path is None:
        return "There is no checkpoint yet: a resume begins at the first step."
    return f"The checkpoint of step {_step(path)} is whole: a resume goes on from there."


def load(path: Path) -> CheckpointState:
    """Reads the checkpoint at `path`, exactly as it was saved.

    Raises:
        ConfigError: it is not whole.
    """
    problem = _problem(path)
    if problem is not None:
        raise ConfigError(f"{path} {problem}.", f"lowvram resume {typed(path.parent.parent)}")
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    values = decode(state, _read_tensors(path / TENSORS))
    adapter = _read_tensors(path / ADAPTER)
    values["adapter"] = {name: adapter[name] for name in values["adapter"]}
    return CheckpointState(**values)


# Writing


def _write(folder: Path, state: CheckpointState) -> None:
    values = {**vars(state), "adapter": list(state.adapter)}  # safetensors sorts them: keep their order
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(encode(values, "", tensors))
    save_file(_own_memory(state.adapter), folder / ADAPTER)
    save_file(_own_memory(tensors), folder / TENSORS)
    (folder / STATE).write_text(text, encoding="utf-8")
    for name in FILES:
        _sync_file(folder / name)
    files = {name: _describe(folder / name) for name in FILES}
    manifest = _Manifest(format=FORMAT, files=files)
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
    _sync_file(folder / MANIFEST)
    _sync_folder(folder)


def _own_memory(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """CPU tensors that share no storage, as safetensors asks: a view or a tied tensor is copied."""
    result: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        result[name] = tensor
    return result


def _put_in_place(temporary: Path, path: Path) -> None:
    aside = _hidden(path, "old")
    if path.exists():
        # No system renames over a folder with files in it. `newest` knows the name of the one set aside,
        # so that a kill between the two renames loses nothing.
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    temporary.rename(path)
    _sync_folder(path.parent)


def _prune(folder: Path, step: int, keep: int, best_step: int) -> None:
    """One that was set aside goes as well: its step is in place again, or it is the best, which stays."""
    done = [path for path in _checkpoints(folder) if path.name.startswith("step-")]
    kept = [path for path in done if _step(path) <= step][:keep]
    kept += [path for path in _checkpoints(folder) if _step(path) == best_step][:1]
    for path in _checkpoints(folder):
        if path not in kept:
            _remove(path)


def _remove(path: Path) -> None:
    """Removes a checkpoint. Under its own name it is never there in part. A file that is in use, as
    Windows has them, stays: the next save tries again."""
    doomed = _hidden(path, "tmp") if path.name.startswith("step-") else path
    with suppress(OSError):
        path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _remove_unfinished(folder: Path) -> None:
    for path in folder.iterdir():
        if _UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _sync_file(path: Path) -> None:
    with path.open("rb+") as handle:  # Windows syncs only what is open for writing
        os.fsync(handle.fileno())


def _sync_folder(path: Path) -> None:
    """Makes the names in `path` survive a power cut. Windows cannot open a folder, and needs no such call."""
    if sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def error_number(error: BaseException) -> int | None:
    """The system's error number; None when the error is none of the system's."""
    if isinstance(error, OSError):
        return error.errno
    found = _OS_ERROR.search(str(error)) if isinstance(error, SafetensorError) else None
    if found is None:
        return None
    number = int(found.group(1))
    return errno.ENOSPC if sys.platform == "win32" and number == _WINDOWS_DISK_FULL else number


def _disk_full(folder: Path, state: CheckpointState) -> DoesNotFitError:
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(encode(vars(state), "", tensors))
    needed = format_bytes(sum(tensor.nbytes for tensor in tensors.values()) + len(text))
    free = format_bytes(shutil.disk_usage(folder).free)
    return DoesNotFitError(
        f"The disk is full: the checkpoint of step {state.step} needs {needed}, and {folder} had "
        f"{free} free when writing it failed. {what_is_safe(folder)}",
        f"Free {needed} or more, then: lowvram resume {typed(folder.parent)}",
    )


# Reading


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first; of the same step, the one in place before the one set aside."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:  # tells folders even where they may not be looked into
        names = [folder / entry.name for entry in entries if entry.is_dir()]
    names = [path for path in names if _matches(path)]
    return sorted(names, key=lambda path: (_step(path), path.name), reverse=True)


def _matches(path: Path) -> re.Match[str] | None:
    return _NAME.fullmatch(path.name) or _SET_ASIDE.fullmatch(path.name)


def _step(path: Path) -> int:
    match = _matches(path)
    return int(match.group(1)) if match else -1


def _hidden(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{ending}")


def _problem(path: Path) -> str | None:
    """What is wrong with the checkpoint at `path`, to be said after its name; None when it is whole.

    What this user may not read, a disk does not give, or another lowvram wrote, is not called damaged.
    """
    try:
        content = (path / MANIFEST).read_bytes()
    except OSError as error:
        return _unread(MANIFEST, error)
    if (written := _format(content)) not in (None, FORMAT):
        return f"is of format {written}, this lowvram reads format {FORMAT}"
    try:
        manifest = _Manifest.model_validate_json(content)
    except ValueError:
        return f"is damaged: {MANIFEST} holds something else"
    if set(manifest.files) != set(FILES):
        return f"is damaged: {MANIFEST} lists other files"
    problems = (_file_problem(path / name, entry) for name, entry in manifest.files.items())
    return next((problem for problem in problems if problem), None)


def _format(content: bytes) -> Any:
    """Of a manifest, whose other lines another format may have otherwise; None where it says none."""
    with suppress(ValueError, AttributeError):
        return json.loads(content).get("format")
    return None


def _file_problem(path: Path, expected: _File) -> str | None:
    try:
        size = path.stat().st_size
        if size != expected.size:
            return f"is damaged: {path.name} has {size} bytes instead of {expected.size}"
        return None if _describe(path) == expected else f"is damaged: {path.name} has a wrong hash"
    except OSError as error:
        return _unread(path.name, error)


def _unread(name: str, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"is damaged: {name} is missing"
    return f"cannot be read: {name}: {error.strerror}"


def _describe(path: Path) -> _File:
    return _File(size=path.stat().st_size, sha256=file_sha256(path))


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Copies: as safetensors gives the tensors they may be views of the file, which is pruned later."""
    with safe_open(path, framework="pt", device="cpu") as handle:
        return {name: handle.get_tensor(name).clone() for name in handle.keys()}  # noqa: SIM118
