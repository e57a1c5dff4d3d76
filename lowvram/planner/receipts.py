"""What earlier runs on this device measured: how right the prediction was, and what the context took."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from lowvram.cache import receipts_folder
from lowvram.frozen import Frozen
from lowvram.hardware import Hardware
from lowvram.memory.receipt import Receipt

_MOST_READ = 500  # files, about 0.1 s
_MOST_COMPARED = 50  # of one device, the newest: what older versions predicted says little


class Errors(Frozen):
    """Signed errors of the prediction, measured / predicted - 1: above 0 the prediction was too low."""

    lowest: float
    median: float
    highest: float


class Experience(Frozen):
    """Earlier runs on one device. None: not measured there."""

    n_runs: int = 0  # whose measured peak can be compared with their prediction
    allocated_errors: Errors | None = None
    reserved_errors: Errors | None = None
    context_bytes: int | None = None  # the largest of all runs
    held_bytes: int | None = None  # the most that other programs held when a run began

    @property
    def sentence(self) -> str | None:
        """`3 earlier runs on this card measured -0.4 % to +0.1 % against the predicted reserved peak`."""
        errors = self.reserved_errors
        if errors is None:
            return None
        runs = "1 earlier run" if self.n_runs == 1 else f"{self.n_runs} earlier runs"
        low, high = f"{100 * errors.lowest:+.1f} %", f"{100 * errors.highest:+.1f} %"
        span = low if low == high else f"{low} to {high}"
        return f"{runs} on this card measured {span} against the predicted reserved peak"


def experience_on(hardware: Hardware, folder: Path | None = None) -> Experience:
    """What the receipts in `folder` (the user's cache when None) say about this device.

    The same device has the same name, size and backend.
    """
    here = [r for r in load_receipts(folder) if _is_of(r, hardware)][:_MOST_COMPARED]
    compared = [r for r in here if r.comparable]
    pairs = [(r.measured_peak_allocated_bytes, r.predicted_peak_allocated_bytes) for r in compared]
    return Experience(
        n_runs=len(compared),
        allocated_errors=_errors(pairs),
        reserved_errors=_errors(
            (r.measured_peak_reserved_bytes, r.predicted_peak_reserved_bytes) for r in compared
        ),
        context_bytes=_largest(r.measured_context_bytes for r in here),
        held_bytes=_largest(r.measured_held_bytes for r in here),
    )


def with_experience(hardware: Hardware, experience: Experience) -> Hardware:
    """`hardware` with the context that runs on it really had.

    A probe measures an empty context; kernels and libraries come into it during the first step. So the
    context is the largest that runs measured, and never less than a probe's measurement; where the probe
    could only assume (0.7 GiB), what was measured replaces the assumption, be it more or less. The step's
    predicted bytes are not touched: the replay stays the bound, however much less earlier runs took.
    What others hold stays the probe's figure too: it is of now.
    """
    measured = experience.context_bytes
    if measured is None or hardware.context_bytes == 0:
        return hardware
    context = max(measured, hardware.context_bytes) if hardware.context_measured else measured
    return hardware.model_copy(update={"context_bytes": context, "context_measured": True})


def load_receipts(folder: Path | None = None) -> list[Receipt]:
    """The newest receipts, newest first; files that are no receipts, or another version's, are left out."""
    return list(_readable(folder))


def _readable(folder: Path | None) -> Iterator[Receipt]:
    files: list[Path] = []
    with suppress(OSError, RuntimeError):  # RuntimeError: this user has no home
        files = sorted((folder or receipts_folder()).glob("*.json"), reverse=True)  # named by date
    for file in files[:_MOST_READ]:
        with suppress(OSError, ValueError):  # pydantic's ValidationError is a ValueError
            yield Receipt.model_validate_json(file.read_bytes())


def _is_of(receipt: Receipt, hardware: Hardware) -> bool:
    told = (receipt.device, receipt.device_bytes, receipt.backend)
    return told == (hardware.name, hardware.total_bytes, hardware.backend)


def _errors(pairs: Iterable[tuple[int | None, int]]) -> Errors | None:
    errors = [measured / predicted - 1 for measured, predicted in pairs if measured and predicted]
    if not errors:
        return None
    return Errors(lowest=min(errors), median=statistics.median(errors), highest=max(errors))


def _largest(values: Iterable[int | None]) -> int | None:
    return max((v for v in values if v), default=None)
