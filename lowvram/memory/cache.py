"""Remembers traced estimates on disk: the same step of the same model is not traced twice."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.cache import traces_folder
from lowvram.engine.config import StepConfig
from lowvram.frozen import write_atomically
from lowvram.memory.estimate import MemoryEstimate, estimate
from lowvram.memory.kernels import Backend, Capability

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_MOST_KEPT = 2000  # files of about 1 kB
_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


def remembered_estimate(
    config: PretrainedConfig, step: StepConfig, backend: Backend, capability: Capability
) -> MemoryEstimate:
    """`estimate`, from disk when the model, the step, our code and the libraries are what they were.

    A model with code of its own is always traced: nothing here knows when that code changes.
    """
    if type(config).__module__.startswith("transformers_modules."):
        return estimate(config, step, backend, capability)
    file = _file(config, step, backend, capability)
    with suppress(OSError, ValueError):  # not there, or written by something else: traced again
        return MemoryEstimate.model_validate_json(file.read_bytes())
    found = estimate(config, step, backend, capability)
    with suppress(OSError):  # a full or read-only disk costs time, not the plan
        file.parent.mkdir(parents=True, exist_ok=True)
        _drop_oldest(file.parent)
        write_atomically(file, found.model_dump_json())
    return found


def _file(config: PretrainedConfig, step: StepConfig, backend: Backend, capability: Capability) -> Path:
    model = config.to_json_string(use_diff=False)
    key = "\n".join((model, step.model_dump_json(), backend, str(capability), _code()))
    return traces_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.json"


@cache
def _code() -> str:
    """Of everything that a trace depends on beside its inputs."""
    rooms = Path(__file__).parents[1]
    files = sorted(f for room in ("engine", "memory") for f in (rooms / room).glob("*.py"))
    digest = hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()
    return " ".join((digest, *(version(name) for name in _LIBRARIES)))


def _drop_oldest(folder: Path) -> None:
    files = list(folder.glob("*.json"))
    too_many = max(len(files) - _MOST_KEPT, 0)
    for file in sorted(files, key=os.path.getmtime)[:too_many] if too_many else ():
        file.unlink(missing_ok=True)
