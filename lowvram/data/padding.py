"""Padding: the share of it that the order leaves, and what packing makes of it, expected from quantiles."""

from __future__ import annotations

from collections.abc import Sequence

from lowvram.data import packed_order
from lowvram.data.order import WINDOW_STEPS, steps_per_epoch

_PACKED_EXAMPLES = 2048  # at most: enough for a step's rows to within 1 %, in 10 ms


def padded_share(
    length_quantiles: Sequence[int], *, micro_batch: int, effective_batch: int, seq_len: int
) -> float:
    """Part of all computed tokens that is padding, 0 to 1, without packing.

    Examples are padded to the longest of their micro-batch, which data/order.py makes of examples of like
    length out of a window of 8 steps; here the window's lengths are evenly spaced in the quantiles.

    Worked example, lengths 1 to 101 spread evenly, micro_batch=2, effective_batch=2, seq_len=1000: a window's
    16 lengths lie 6.25 apart, each pair is padded by 6.25, and of 54.1 computed tokens an example 3.125 are
    padding: 0.058.

    Args:
        length_quantiles: tokens of an example at 0, 1, ... 100 % (`DataStats.length_quantiles`).
        seq_len: where examples are cut.
    """
    lengths = sorted(_spaced(length_quantiles, WINDOW_STEPS * effective_batch, seq_len), reverse=True)
    groups = [lengths[at : at + micro_batch] for at in range(0, len(lengths), micro_batch)]
    return 1 - sum(lengths) / sum(group[0] * len(group) for group in groups)


def rows_per_step(
    length_quantiles: Sequence[int], *, micro_batch: int, effective_batch: int, seq_len: int
) -> float:
    """Expected number of packed rows, of up to micro_batch * seq_len tokens, in a step.

    The order itself is run on a window of lengths evenly spaced in the quantiles.

    Worked example, every example of 100 tokens, micro_batch=2, effective_batch=16, seq_len=250: a row of 500
    tokens takes 4 of them (the third and fourth take the room of a token more), so a step has 4 rows; without
    packing it had 8 micro-batches.

    Args:
        length_quantiles: tokens of an example at 0, 1, ... 100 % (`DataStats.length_quantiles`).
        effective_batch: examples of a step.
        seq_len: where examples are cut.
    """
    steps = max(1, min(packed_order.WINDOW_STEPS, _PACKED_EXAMPLES // effective_batch))
    lengths = [round(length) for length in _spaced(length_quantiles, steps * effective_batch, seq_len)]
    packed = packed_order.packed_steps(
        lengths,
        steps=steps_per_epoch(len(lengths), effective_batch),
        row_tokens=micro_batch * seq_len,
        micro_batch=micro_batch,
        seed=0,
        epoch=1,  # the first epoch's order is special
    )
    return sum(map(len, packed)) / len(packed)


def _spaced(quantiles: Sequence[int], count: int, seq_len: int) -> list[float]:
    """So many lengths, in the middle of as many equal parts of the distribution."""
    places = ((i + 0.5) / count * (len(quantiles) - 1) for i in range(count))
    return [min(_between(quantiles, place), seq_len) for place in places]


def _between(values: Sequence[int], place: float) -> float:
    low = min(int(place), len(values) - 2)
    return values[low] + (place - low) * (values[low + 1] - values[low])
