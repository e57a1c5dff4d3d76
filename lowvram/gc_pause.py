"""Pauses Python's cyclic collector, which walks all of torch's million objects each time that it runs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collections() -> Iterator[None]:
    """0.25 s for each one not made: a sixth of the time of a plan whose libraries are imported meanwhile."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
