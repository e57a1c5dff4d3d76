"""Order: which examples make up each micro-batch of each optimizer step of an epoch."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from itertools import chain
from random import Random

WINDOW_STEPS = 8  # large enough for micro-batches of like length, small enough to stay a shuffle

MicroBatch = list[int]
Step = list[MicroBatch]


def batches_of_epoch(
    lengths: Sequence[int],
    *,
    micro_batch: int,
    accumulation: int,
    seed: int,
    epoch: int,
    packed_tokens: int | None = None,
) -> list[Step]:
    """Optimizer steps of micro-batches of example indices: every index once, the same for the same seed.

    Inside windows of 8 steps examples are sorted by length (in tokens) before they are cut into
    micro-batches, so little is padded; then micro-batches and steps are shuffled. Only the last micro-batch
    and the last step may be short. The longest example comes in the first step of epoch 0: if memory runs
    out, it does so at once and not after hours.

    With `packed_tokens` each step has the same examples, packed into rows of at most so many tokens.
    """
    random = Random(f"lowvram order {seed} {epoch}")  # a string is hashed by sha512: the same everywhere
    indices = list(range(len(lengths)))
    random.shuffle(indices)
    window = WINDOW_STEPS * accumulation * micro_batch
    steps: list[Step] = []
    for at in range(0, len(indices), window):
        micros = _micro_batches(indices[at : at + window], lengths, micro_batch, random)
        steps += [micros[i : i + accumulation] for i in range(0, len(micros), accumulation)]
    _shuffle_whole_steps(steps, micro_batch * accumulation, random)
    if epoch == 0 and steps:
        _longest_first(steps, lengths)
    if packed_tokens is None:
        return steps
    return [pack(chain.from_iterable(step), lengths, packed_tokens, micro_batch) for step in steps]


def pack(
    indices: Iterable[int], lengths: Sequence[int], row_tokens: int, micro_batch: int
) -> list[MicroBatch]:
    """Rows of at most `row_tokens` tokens: the longest example first, each where the least room is left.

    An example beyond the first `micro_batch` of a row takes the room of one token more. It pays for its own
    small tensors, about 2 kB a layer, so that memory is planned by `micro_batch` long examples; and since
    `micro_batch` of the longest always share a row, there are never more rows than there were micro-batches.

    Worked example, row_tokens=20, micro_batch=2, lengths 9 7 5 4 4 2:

        9 7 2      18 tokens, and 1 for the third example: 4 would have made 21
        5 4 4      13 tokens, and 1
    """
    rows: list[MicroBatch] = []
    rooms: list[tuple[int, int]] = []  # ascending: what the next example may take, number of the row
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):
        at = bisect_left(rooms, (lengths[index], 0))
        if at == len(rooms):
            rows.append([])
            rooms.append((row_tokens, len(rows) - 1))
        room, row = rooms.pop(at)
        rows[row].append(index)
        insort(rooms, (room - lengths[index] - (len(rows[row]) >= micro_batch), row))
    return rows


def _micro_batches(window: list[int], lengths: Sequence[int], size: int, random: Random) -> list[MicroBatch]:
    """Micro-batches of like length, shuffled; a short one, of the shortest examples, stays last."""
    by_length = sorted(window, key=lambda index: -lengths[index])
    micros = [by_length[i : i + size] for i in range(0, len(by_length), size)]
    short = [micros.pop()] if len(micros[-1]) < size else []
    random.shuffle(micros)
    return micros + short


def _shuffle_whole_steps(steps: list[Step], step_size: int, random: Random) -> None:
    short = [steps.pop()] if steps and sum(map(len, steps[-1])) < step_size else []
    random.shuffle(steps)
    steps += short


def _longest_first(steps: list[Step], lengths: Sequence[int]) -> None:
    """Swap the longest example's micro-batch with the first one, or only the example if its own is short."""
    longest = max(range(len(lengths)), key=lambda index: lengths[index])
    step, micro = next((s, m) for s in steps for m in s if longest in m)
    first = steps[0][0]
    if len(micro) == len(first):
        at = step.index(micro)
        steps[0][0], step[at] = micro, first
    else:
        micro[micro.index(longest)], first[0] = first[0], longest
