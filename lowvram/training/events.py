"""Event: something that happened to a run beside its steps, one line of events.jsonl."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Literal

from lowvram.frozen import Frozen

EventKind = Literal["resume", "checkpoint", "out of memory", "proof", "machine", "finish"]


class Event(Frozen):
    """What was said, and when."""

    at: str  # UTC, 2026-11-26T10:11:12+00:00
    kind: EventKind
    step: int  # finished optimizer steps
    text: str

    @classmethod
    def now(cls, kind: EventKind, text: str, step: int) -> Event:
        at = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return cls(at=at, kind=kind, step=step, text=text)
