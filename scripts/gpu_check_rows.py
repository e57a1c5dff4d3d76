"""The rows of gpu_check: what one measurement is about, and the CSV file that grows by them."""

from __future__ import annotations

import csv
import io
import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lowvram.errors import ConfigError
from lowvram.frozen import Frozen, write_atomically
from lowvram.hardware import Hardware

_PACKAGES = ("torch", "transformers", "bitsandbytes", "peft", "lowvram")


class Machine(Frozen):
    """Where a row was measured; its fields are the first columns of every row."""

    gpu: str
    driver: str | None
    torch: str
    transformers: str
    bitsandbytes: str
    peft: str
    lowvram: str

    @classmethod
    def of(cls, hardware: Hardware) -> Machine:
        versions = {name: hardware.versions.get(name, "missing") for name in _PACKAGES}
        return cls(gpu=hardware.name, driver=hardware.driver, **versions)


class Row(Frozen):
    """One measurement; what does not apply is empty.

    `check` is context, cublas, gemm_4bit, attention, dropout (assumed against measured bytes), snapshot and
    replay (a small step), parity (a lever's loss and gradients), recovery (a run on too little memory; a
    resumed one's paged state), tiles (a long step with every lever), answers (a chat and a batch at their
    longest), or plan, largest, beyond, refused, stopped (a model on an emulated card).
    """

    check: str
    card_gib: float | None = None
    model: str | None = None
    phase: str | None = None  # or "all": the highest of all phases
    outcome: str = "ran"
    seq_len: int | None = None
    micro_batch: int | None = None
    rank: int | None = None
    optimizer: str | None = None
    levers: dict[str, Any] | None = None
    budget_bytes: int | None = None
    predicted_allocated_bytes: int | None = None
    measured_allocated_bytes: int | None = None
    predicted_reserved_bytes: int | None = None
    measured_reserved_bytes: int | None = None
    predicted_driver_bytes: int | None = None
    measured_driver_bytes: int | None = None
    assumed_bytes: int | None = None
    measured_bytes: int | None = None
    loss_error: float | None = None  # signed, against the exact step's
    gradient_error: float | None = None  # |g - exact| / |exact| over all adapters
    gradient_limit: float | None = None  # beyond it the outcome is "differs"
    tokens_per_second: float | None = None
    modelled_tokens_per_second: float | None = None  # by the planner's time model, at full length
    note: str | None = None

    @property
    def error(self) -> float | None:
        """Signed, measured / predicted - 1, of reserved bytes or of what was assumed."""
        for measured, predicted in (
            (self.measured_reserved_bytes, self.predicted_reserved_bytes),
            (self.measured_bytes, self.assumed_bytes),
        ):
            if measured is not None and predicted:
                return measured / predicted - 1
        return None


COLUMNS = ("date", *Machine.model_fields, *Row.model_fields)


def append(file: Path, machine: Machine, row: Row, now: datetime | None = None) -> None:
    """Add a row at the end of `file`, whole or not at all; the rows before it stay as they are.

    Raises:
        ConfigError: the file has other columns.
    """
    old = file.read_text(encoding="utf-8") if file.is_file() else ""
    if old and next(csv.reader(io.StringIO(old)), []) != list(COLUMNS):
        raise ConfigError(f"{file} has other columns than gpu_check writes.", "Give another --out.")
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    if not old:
        writer.writeheader()
    date = (now or datetime.now(timezone.utc)).isoformat(timespec="seconds")
    values = {"date": date, **machine.model_dump(), **row.model_dump()}
    if row.levers is not None:
        values["levers"] = json.dumps(row.levers)
    writer.writerow({name: "" if value is None else value for name, value in values.items()})
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, old + text.getvalue())
