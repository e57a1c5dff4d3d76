"""Remembers on disk what was found out about a model: nothing is built or traced twice."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import TypeAdapter

from lowvram.cache import traces_folder
from lowvram.engine.config import StepConfig
from lowvram.engine.shape import ModelShape, shape_of
from lowvram.engine.source import ModelSource
from lowvram.frozen import write_atomically
from lowvram.memory.estimate import MemoryEstimate, estimate
from lowvram.memory.layers import period_of
from lowvram.memory.trace import Backend, Capability

_MOST_KEPT = 2000  # files of about 1 kB
_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
_OPTIONAL = ("liger-kernel",)  # what its kernels keep is its Python's choice; Triton allocates nothing
Found = TypeVar("Found")


@dataclass(frozen=True)
class RememberedModel:
    """A model's shape and the memory of its steps; torch is imported only for what is not known yet.

    Remembered is what was found for the same config.json by the same code with the same libraries. A model
    that may bring code of its own is looked at anew each time: nothing here knows when that code changes.
    """

    source: ModelSource

    @cached_property
    def shape(self) -> ModelShape:
        """Raises: ConfigError when there is no such model or lowvram cannot train it."""
        return self._recall(ModelShape, "shape", lambda: shape_of(self.source.config))

    @cached_property
    def layer_period(self) -> int:
        """Layers after which they repeat; 0 where a trace has to run them all."""
        return self._recall(int, "period", lambda: period_of(self.source.config) or 0)

    def estimate(self, step: StepConfig, backend: Backend, capability: Capability) -> MemoryEstimate:
        """`memory.estimate.estimate` of this model."""
        question = f"step {step.model_dump_json()} {backend} {capability}"
        return self._recall(
            MemoryEstimate, question, lambda: estimate(self.source.config, step, backend, capability)
        )

    def full_fine_tuning_bytes(
        self, seq_len: int, precision: Literal["bf16", "fp32"], backend: Backend, capability: Capability
    ) -> int:
        """Allocated by plain transformers that trains every weight with AdamW and recomputes activations."""

        def traced() -> int:
            from lowvram.memory.plain import PlainStep, plain_peak_bytes

            plain = PlainStep(
                method="full", precision=precision, seq_len=seq_len, checkpointing="non-reentrant", clips=True
            )
            return plain_peak_bytes(self.source.config, plain, backend, capability)

        return self._recall(int, f"full {seq_len} {precision} {backend} {capability}", traced)

    def _recall(self, kind: type[Found], question: str, find: Callable[[], Found]) -> Found:
        model = self.source.fingerprint
        if model is None:
            return find()
        key = "\n".join((model, question, _code()))
        file = traces_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.json"
        answer: TypeAdapter[Found] = TypeAdapter(kind)
        with suppress(OSError, ValueError):  # not there, or written by something else: found out again
            return answer.validate_json(file.read_bytes())
        found = find()
        with suppress(OSError):  # a full or read-only disk costs time, not the plan
            file.parent.mkdir(parents=True, exist_ok=True)
            _drop_oldest(file.parent)
            write_atomically(file, answer.dump_json(found).decode())
        return found


@cache
def _code() -> str:
    """Of everything that an answer depends on beside its question."""
    rooms = Path(__file__).parents[1]
    files = sorted(f for room in ("engine", "memory") for f in (rooms / room).glob("*.py"))
    digest = hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()
    return " ".join((digest, *(version(name) for name in _LIBRARIES), *map(_version_or_none, _OPTIONAL)))


def _version_or_none(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return f"no {name}"


def _drop_oldest(folder: Path) -> None:
    files = list(folder.glob("*.json"))
    too_many = max(len(files) - _MOST_KEPT, 0)
    for file in sorted(files, key=os.path.getmtime)[:too_many] if too_many else ():
        file.unlink(missing_ok=True)
