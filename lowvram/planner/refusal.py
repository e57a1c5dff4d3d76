"""Refusal: nothing fits; what does, with one wish given up at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from lowvram.engine.config import StepConfig
from lowvram.errors import DoesNotFitError
from lowvram.hardware import DEFAULT_HELD_BYTES, Hardware, card_of_size
from lowvram.planner.conflicts import too_short
from lowvram.planner.first_step import Request, with_adapter
from lowvram.planner.profiles import Profile
from lowvram.planner.search import Search
from lowvram.units import GiB, format_bytes

_IN_FLOAT32 = ("adamw", "paged_adamw")  # a paged state counts as on the device: there it is when it is used
_LEANER = {"fp32": "int8", "bf16": "int8", "fp16": "int8", "int8": "nf4"}


def refusal(search: Search, base: StepConfig, request: Request) -> DoesNotFitError:
    """Both numbers, and the nearest plans that fit."""
    step = search.leanest(base)
    needed = search.reserved_bytes(step)
    message = (
        f"{step.seq_len} tokens at rank {step.rank} need {format_bytes(needed)}, "
        f"the budget is {format_bytes(search.budget_bytes)} of {search.hardware.name}."
    )
    on_host = not search.host_has_room(step)
    if on_host:
        message = _host_message(search, step)
    nearest = list(_nearest(search, base, request))
    if on_host and not nearest:
        return DoesNotFitError(message, "Close other programs, or take a smaller model.")
    size = card_for(needed, search.hardware, request.profile)
    if not nearest:
        larger = f"The nearest plan that fits is on a {size} GB card (--vram {size}GB)"
        return DoesNotFitError(message, f"{larger}, or take a smaller model.")
    others = f"; or a {size} GB card (--vram {size}GB)" if not on_host else ""
    return DoesNotFitError(message, f"The nearest plan that fits: {', or '.join(nearest)}{others}")


def _host_message(search: Search, step: StepConfig) -> str:
    free = format_bytes(search.hardware.host_free_bytes)
    return f"{step.seq_len} tokens at rank {step.rank} need more host memory than the {free} that are free."


def _nearest(search: Search, base: StepConfig, request: Request) -> Iterator[str]:
    """Each wish alone moved to the nearest value that fits, all others kept."""
    yield from _shorter(search, base, request)
    wishes = request.wishes
    if wishes.rank is not None and (rank := _lower_rank(search, base, request)):
        yield f"--rank {rank}"
    if wishes.precision is not None and (precision := _leaner_precision(search, base)):
        yield f"--precision {precision}"
    if wishes.optimizer in _IN_FLOAT32 and _fits_without(search, base, "optimizer"):
        yield f"without --optimizer {wishes.optimizer}"
    if wishes.no_offload and _fits(_freer(search, uses_host=True), base):
        yield "without --no-offload"
    if wishes.packing and _fits_without(search, base, "packing"):
        yield "without --packing"
    levers = set(wishes.pinned_levers()) - {"base_precision"}
    if levers and _fits_without(search, base, *levers):
        yield f"without --levers {wishes.levers}"


def _shorter(search: Search, base: StepConfig, request: Request) -> Iterator[str]:
    """But not so short that most answers would be left out."""
    seq_len = search.largest_seq_len(search.leanest(base), base.seq_len, keeps=True)
    empty = request.stats is not None and any(too_short(seq_len, request.stats))
    if 0 < seq_len < base.seq_len and not empty:
        yield f"--seq-len {seq_len}"


def _fits(search: Search, base: StepConfig) -> bool:
    return search.fits(search.leanest(base))


def _fits_without(search: Search, base: StepConfig, *names: str) -> bool:
    pinned = {name: value for name, value in search.freedom.pinned.items() if name not in names}
    return _fits(_freer(search, pinned=pinned), base)


def _freer(search: Search, **changes: Any) -> Search:
    return replace(search, freedom=replace(search.freedom, **changes))


def _lower_rank(search: Search, base: StepConfig, request: Request) -> int:
    """Halved as often as it takes; 0 when rank 1 does not fit either."""
    rank = base.rank // 2
    while rank and not _fits(search, with_adapter(base, rank, request.profile, request.wishes)):
        rank //= 2
    return rank


def _leaner_precision(search: Search, base: StepConfig) -> str | None:
    precision = _LEANER.get(str(search.freedom.pinned.get("base_precision")))
    while precision is not None:
        pinned = search.freedom.pinned | {"base_precision": precision}
        if _fits(_freer(search, pinned=pinned), base):
            return precision
        precision = _LEANER.get(precision)
    return None


def card_for(needed_bytes: int, hardware: Hardware, profile: Profile) -> int:
    """The smallest card, in whole GiB, whose budget holds `needed_bytes`."""
    card = card_of_size(hardware.total_bytes, hardware)
    taken = needed_bytes + card.context_bytes + max(card.held_bytes, DEFAULT_HELD_BYTES)
    return math.ceil(taken / (1 - profile.margin_share) / GiB)
