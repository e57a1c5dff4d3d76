"""Split: which examples are held out, decided by their content and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from lowvram.data.row_store import Examples, RowStore
from lowvram.errors import DataError

Digests = npt.NDArray[Any]  # numbers, or bytes of one length


def split_store(store: RowStore, fraction: float = 0.05) -> tuple[Examples, Examples]:
    """Examples to train on and examples held out, as `split_held_out` chooses them.

    Raises:
        DataError: fewer than two different examples; where others cannot be used, the first of those.
    """
    sides = split_held_out(store.digests, fraction, store.entry.name, bad=store.first_bad())
    return store.select(sides[0]), store.select(sides[1])


def split_held_out(
    digests: Digests,
    fraction: float = 0.05,
    name: str = "data",
    *,
    at_most: int = 64,
    at_least: int = 1,
    bad: DataError | None = None,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Indices to train on and indices held out, each ascending.

    About `fraction` of the rows is held out, between `at_least` and `at_most`, those whose content has the
    smallest digests: the same rows whatever their order, and nearly the same when rows are added. Identical
    rows stay on one side, so that no held-out row was trained on.

    Args:
        digests: of each row's content.
        name: of the source, for the refusal.
        bad: about rows that cannot be used, for the refusal.

    Raises:
        DataError: fewer than two different examples.
    """
    if not len(digests) or (digests == digests[0]).all():
        which = f"{bad.message} The rest" if bad else f"{name}:1:"
        raise DataError(
            f"{which} needs at least 2 examples that differ, one of them to hold out; "
            f"has {len(digests)} rows, {min(len(digests), 1)} different.",
            bad.remedy if bad else "Add examples.",
        )
    wanted = min(max(round(fraction * len(digests)), at_least), at_most, len(digests) - 1)
    held = np.isin(digests, _choose(np.sort(digests), wanted, at_least))
    return np.flatnonzero(~held), np.flatnonzero(held)


def _choose(ascending: Digests, wanted: int, at_least: int) -> list[Any]:
    """Of groups of identical rows, in the order of their digests, the first that together fit."""
    held, room, smallest = [], wanted, (len(ascending), ascending[0])
    for digest, size in _groups(ascending):
        if size <= room:
            held.append(digest)
            room -= size
        if not room:
            return held
        if size < smallest[0]:
            smallest = (size, digest)
    if not held and at_least:
        return [smallest[1]]  # every row has copies: the smallest group is still held out whole
    return held


def _groups(ascending: Digests) -> Iterator[tuple[Any, int]]:
    """(digest, how often) of each group of copies."""
    at = 0
    while at < len(ascending):
        end = int(np.searchsorted(ascending, ascending[at], side="right"))
        yield ascending[at], end - at
        at = end
