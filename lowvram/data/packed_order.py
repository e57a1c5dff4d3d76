"""Packed order: an epoch's examples packed into full rows, dealt out to steps of nearly equal tokens."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import pairwise
from random import Random

WINDOW_STEPS = 64  # packed together: enough examples that rows fill to 99 %
_WINDOW_EXAMPLES = 4096  # at most, however large the steps: the time of a window grows no further
_OVERFULL = 0.02  # of a row: a further row in a few steps is cheaper than a further row in each
_LONGER = 1.01  # rows, where rows as long as a step needs came out a few too many
_CLOSING = 3  # a row takes examples at random until it has no room for three of the longest
_PAIRS = 8  # looked at before a row is closed: 16 fill no more

Row = list[int]


def packed_steps(
    lengths: Sequence[int], *, steps: int, row_tokens: int, micro_batch: int, seed: int, epoch: int
) -> list[list[Row]]:
    """`steps` optimizer steps of packed rows: every index once, the same for the same seed and epoch.

    The shuffled examples are cut into windows of up to 64 steps. Those of a window are packed into rows
    (`pack`), and the rows are dealt out, the longest first, each to the step that has the fewest tokens so
    far. If a step's tokens need R rows, each of these is filled to an R-th of them and no further, for a last
    row that is nearly empty is a pass all the same: so rows are alike and steps have equal tokens. Within a
    window steps are shuffled, and so are the windows. The longest example comes first in epoch 0: if memory
    runs out, it does so at once and not after hours.

    Worked example, 16 examples a step of 190 tokens each, rows of at most 2,048: a step's 3,040 tokens need 2
    rows, so 128 rows of about 1,520 are packed from the 1,024 examples of a window.

    Args:
        lengths: tokens of each example, none above `row_tokens`.
        steps: at most as many as there are examples.
        row_tokens: most tokens of a row, by the rule of `pack`.
    """
    random = Random(f"lowvram packed order {seed} {epoch}")  # a string is hashed by sha512: alike everywhere
    indices = list(range(len(lengths)))
    random.shuffle(indices)
    windows = [
        _window(indices[first:end], lengths, n_steps, row_tokens, micro_batch, random)
        for first, end, n_steps in _windows(len(indices), steps)
    ]
    random.shuffle(windows)
    ordered = [step for window in windows for step in window]
    if epoch == 0 and ordered:
        _longest_first(ordered, lengths)
    return ordered


def pack(
    indices: Iterable[int],
    lengths: Sequence[int],
    row_tokens: int,
    micro_batch: int,
    random: Random | None = None,
) -> list[Row]:
    """Rows of at most `row_tokens` tokens, each begun by the longest example left and closed by a best fit.

    Between them come examples at random, so that the last rows have short and long ones to choose from like
    the first. Plain best-fit decreasing keeps the short ones to the end, where nothing fits any more: on
    GSM8K's 1,255 examples in rows of 2,048 it needs 138 rows, this 136, which are 99.4 % full.

    An example beyond the first `micro_batch` of a row takes the room of one token more. It pays for its own
    small tensors, about 2 kB a layer, so that memory is planned by `micro_batch` long examples. An example
    longer than `row_tokens` has a row of its own. Without `random` the rows are always the same.

    Worked example, row_tokens=20, micro_batch=2, lengths 9 7 5 4 4 2:

        9 7 2      18 tokens, and 1 for the third example: 4 would have made 21
        5 4 4      13 tokens, and 1
    """
    random = random or Random("lowvram pack")
    left = sorted((lengths[i], i) for i in indices)
    rows: list[Row] = []
    while left:
        length, index = left.pop()
        row, room = [index], row_tokens - length
        while left and left[0][0] <= room - (len(row) >= micro_batch):
            room -= len(row) >= micro_batch
            if room > _CLOSING * left[-1][0]:
                at = int(random.random() * len(left))
            else:
                at = _best_fit(left, room, len(row) + 1 >= micro_batch, random)
            length, index = left.pop(at)
            row.append(index)
            room -= length
        rows.append(row)
    return rows


def _best_fit(left: list[tuple[int, int]], room: int, beyond: bool, random: Random) -> int:
    """Place of the example that fills `room` best, alone or with a second one: of some pairs, and at once.

    `beyond`: the second takes the room of one token more.
    """
    end = bisect_left(left, (room + 1, 0))
    found, least = end - 1, room - left[end - 1][0]
    for _ in range(_PAIRS):
        if not least:
            break
        first = int(random.random() * end)
        rest = room - left[first][0] - beyond
        second = bisect_left(left, (rest + 1, 0)) - 1
        if second >= 0 and second != first and rest - left[second][0] < least:
            found, least = first, rest - left[second][0]
    return found


def _windows(n_examples: int, steps: int) -> list[tuple[int, int, int]]:
    """(first, end, steps) of each window; steps and examples are spread evenly, so that none is short."""
    a_window = min(WINDOW_STEPS, max(1, _WINDOW_EXAMPLES * steps // max(n_examples, 1)))
    count = math.ceil(steps / a_window)
    ends = [steps * number // count for number in range(count + 1)]
    return [
        (n_examples * before // steps, n_examples * after // steps, after - before)
        for before, after in pairwise(ends)
    ]


def _window(
    indices: list[int],
    lengths: Sequence[int],
    n_steps: int,
    row_tokens: int,
    micro_batch: int,
    random: Random,
) -> list[list[Row]]:
    """The steps of one window, in no order."""
    n_rows, target = _target(indices, lengths, n_steps, row_tokens, micro_batch)
    for longer in (1.0, _LONGER):
        rows = pack(indices, lengths, min(row_tokens, int(longer * target)), micro_batch, random)
        rows = _spread(rows, n_rows * n_steps, lengths, row_tokens, micro_batch)
        if len(rows) <= n_rows * n_steps:
            break
    while len(rows) < n_steps:  # a few examples of very different lengths
        rows.append([max(rows, key=len).pop()])
    for row in rows:
        random.shuffle(row)
    random.shuffle(rows)
    steps = _dealt(rows, lengths, n_steps)
    random.shuffle(steps)
    return steps


def _target(
    indices: list[int], lengths: Sequence[int], n_steps: int, row_tokens: int, micro_batch: int
) -> tuple[int, int]:
    """Rows that a step needs, and how long each of them is when they are alike."""
    tokens, examples = sum(lengths[i] for i in indices) / n_steps, len(indices) / n_steps
    rows = 1
    for _ in range(2):  # an example beyond the first of a row takes the room of one token more
        room = tokens + max(examples - rows * micro_batch, 0)
        rows = max(1, math.ceil(room / row_tokens - _OVERFULL))
    return rows, min(row_tokens, max(1, int(room / rows)))


def _spread(
    rows: list[Row], n_rows: int, lengths: Sequence[int], row_tokens: int, micro_batch: int
) -> list[Row]:
    """At most `n_rows`, if the examples of those beyond fit into the others, the emptiest first."""
    ordered = sorted(rows, key=lambda row: -sum(lengths[i] for i in row))
    kept, dissolved = ordered[:n_rows], ordered[n_rows:]
    loads = [(sum(lengths[i] for i in row) + max(len(row) - micro_batch, 0), n) for n, row in enumerate(kept)]
    heapq.heapify(loads)
    beyond: list[int] = []
    for index in sorted((i for row in dissolved for i in row), key=lambda i: -lengths[i]):
        load, number = loads[0]
        load += lengths[index] + (len(kept[number]) >= micro_batch)
        if load > row_tokens:
            beyond.append(index)
            continue
        kept[number].append(index)
        heapq.heapreplace(loads, (load, number))
    return kept + pack(beyond, lengths, row_tokens, micro_batch)


def _dealt(rows: list[Row], lengths: Sequence[int], n_steps: int) -> list[list[Row]]:
    """Each row, the longest first, to the step with the fewest tokens; rows as long are in random order."""
    steps: list[list[Row]] = [[] for _ in range(n_steps)]
    loads = [(0, number) for number in range(n_steps)]
    sized = sorted(((sum(lengths[i] for i in row), row) for row in rows), key=lambda pair: -pair[0])
    for tokens, row in sized:
        load, number = loads[0]
        steps[number].append(row)
        heapq.heapreplace(loads, (load + tokens, number))
    return steps


def _longest_first(steps: list[list[Row]], lengths: Sequence[int]) -> None:
    """Move the longest example's step, row and itself to the front."""
    longest = max(range(len(lengths)), key=lambda index: lengths[index])
    at, step = next((n, s) for n, s in enumerate(steps) for row in s if longest in row)
    steps[0], steps[at] = steps[at], steps[0]
    number = next(n for n, row in enumerate(step) if longest in row)
    step[0], step[number] = step[number], step[0]
    place = step[0].index(longest)
    step[0][0], step[0][place] = longest, step[0][0]
