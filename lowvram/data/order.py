"""Order: which examples make up each micro-batch of each optimizer step of an epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

from lowvram.data.packed_order import packed_steps

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

    With `packed_tokens` there are as many steps, of rows of at most so many tokens (data/packed_order.py).
    """
    if packed_tokens is not None:
        return packed_steps(
            lengths,
            steps=steps_per_epoch(len(lengths), micro_batch * accumulation),
            row_tokens=packed_tokens,
            micro_batch=micro_batch,
            seed=seed,
            epoch=epoch,
        )
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
    return steps


def steps_per_epoch(n_examples: int, effective_batch: int) -> int:
    """Optimizer steps of every epoch, packed or not."""
    return math.ceil(n_examples / effective_batch)


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
