"""Split: which examples are held out, decided by their content and nothing else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from lowvram.data.conversations import Conversation, content_sha256
from lowvram.errors import DataError


def split_held_out(
    conversations: Sequence[Conversation], fraction: float = 0.05, at_most: int = 64, at_least: int = 1
) -> tuple[list[int], list[int]]:
    """Indices to train on and indices held out, each ascending.

    About `fraction` of the rows is held out, between `at_least` and `at_most`, those whose content has the
    smallest digests: the same rows whatever their order, and nearly the same when rows are added. Identical
    rows stay on one side, so that no held-out row was trained on.

    Raises:
        DataError: fewer than two different examples.
    """
    groups = _groups(conversations)
    if len(groups) < 2:
        where = conversations[0].where if conversations else "data:1"
        raise DataError(
            f"{where}: needs at least 2 examples that differ, one of them to hold out; "
            f"has {len(conversations)} rows, {len(groups)} different.",
            "Add examples.",
        )
    wanted = min(max(round(fraction * len(conversations)), at_least), at_most, len(conversations) - 1)
    held = _choose(groups, wanted, at_least)
    return [i for i in range(len(conversations)) if i not in held], sorted(held)


def _groups(conversations: Sequence[Conversation]) -> list[list[int]]:
    """Indices of identical rows, the groups in the order of their digests."""
    by_digest: defaultdict[str, list[int]] = defaultdict(list)
    for index, conversation in enumerate(conversations):
        by_digest[content_sha256(conversation)].append(index)
    return [by_digest[digest] for digest in sorted(by_digest)]


def _choose(groups: list[list[int]], wanted: int, at_least: int) -> set[int]:
    held: set[int] = set()
    for group in groups:
        if len(held) + len(group) <= wanted:
            held.update(group)
    if not held and at_least:
        # Every row has copies: the smallest group is still held out whole.
        smallest: list[int] = min(groups, key=len)
        held.update(smallest)
    return held
