"""Split: which examples are held out, decided by their content and nothing else."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lowvram.errors import DataError


def split_held_out(
    digests: npt.NDArray[np.bytes_],
    fraction: float = 0.05,
    name: str = "data",
    *,
    at_most: int = 64,
    at_least: int = 1,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Indices to train on and indices held out, each ascending.

    About `fraction` of the rows is held out, between `at_least` and `at_most`, those whose content has the
    smallest digests: the same rows whatever their order, and nearly the same when rows are added. Identical
    rows stay on one side, so that no held-out row was trained on.

    Args:
        digests: of each row's content, all equally long.
        name: of the source, for the refusal.

    Raises:
        DataError: fewer than two different examples.
    """
    _, group_of, sizes = np.unique(digests, return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        raise DataError(
            f"{name}:1: needs at least 2 examples that differ, one of them to hold out; "
            f"has {len(digests)} rows, {len(sizes)} different.",
            "Add examples.",
        )
    wanted = min(max(round(fraction * len(digests)), at_least), at_most, len(digests) - 1)
    held = np.isin(group_of, _choose(sizes, wanted, at_least))
    return np.flatnonzero(~held), np.flatnonzero(held)


def _choose(sizes: npt.NDArray[np.int64], wanted: int, at_least: int) -> list[int]:
    """Of groups of identical rows, in the order of their digests, the first that together fit."""
    held, room = [], wanted
    for group, size in enumerate(sizes.tolist()):
        if size <= room:
            held.append(group)
            room -= size
        if not room:
            break
    if not held and at_least:
        return [int(sizes.argmin())]  # every row has copies: the smallest group is still held out whole
    return held
