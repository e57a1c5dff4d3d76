"""Choice: the step that is planned: the fastest, the most exact or the longest that fits, by preference."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from lowvram.engine.config import QUANTIZED, StepConfig
from lowvram.planner.conflicts import raise_all, too_short
from lowvram.planner.first_step import Request, with_adapter
from lowvram.planner.initialisation import largest_rank
from lowvram.planner.refusal import refusal
from lowvram.planner.search import Search
from lowvram.planner.space import Candidate
from lowvram.planner.variants import with_length, with_value

_PRECISIONS = ("fp32", "bf16", "fp16", "int8", "nf4")  # from the most exact on


def choose(search: Search, base: StepConfig, request: Request) -> StepConfig:
    """By the user's or the profile's preference; a shorter sequence only where nothing else helps.

    Raises:
        DoesNotFitError: nothing fits, not even shorter, or not shorter than was asked.
        ConfigError: what fits is too short for most of the data's answers.
    """
    prefer = request.wishes.prefer or request.profile.prefer
    if prefer == "context":
        found = _longest(search, base, request)
    elif prefer == "quality":
        found = next(_most_exact(search, base, request), None)
    else:
        found = _fastest(search, base, request)
    return found or _shortened(search, base, request)


def _fastest(search: Search, base: StepConfig, request: Request) -> StepConfig | None:
    """A quantised head changes what the model says a little; a base does so too, but that is the method."""
    some, last = search.candidates(base), request.profile.quantized_head == "last_resort"
    if not last or "head" in search.freedom.pinned:
        return search.fastest_of(some)
    whole = [one for one in some if one.step.levers.head not in QUANTIZED]
    return search.fastest_of(whole) or search.fastest_of(some)


def _longest(search: Search, base: StepConfig, request: Request) -> StepConfig | None:
    """With every lever that saves memory; as long as the card holds, unless data or user say how long.

    Arithmetic may err by a page about which step is the leanest: where that one does not fit, any that does.
    """
    step = search.leanest(base)
    if request.wishes.seq_len is None and request.stats is None:
        longest = search.largest_seq_len(step, search.model.shape.context_limit)
        step = with_length(step, max(longest, step.seq_len))
    return step if search.fits(step) else _fastest(search, base, request)


def _most_exact(search: Search, base: StepConfig, request: Request) -> Iterator[StepConfig]:
    """The least quantised base that fits, however slow; with it the highest rank, then the fastest."""

    def group(one: Candidate) -> tuple[int, bool]:
        return exactness(one.step)

    for _, some in itertools.groupby(sorted(search.candidates(base), key=group), key=group):
        found = search.fastest_of(list(some))
        if found is not None:
            yield from _of_higher_rank(search, base, found, request)
            yield found


def exactness(step: StepConfig) -> tuple[int, bool]:
    """The smaller, the less is quantised: the base first, then the head."""
    return _PRECISIONS.index(step.base_precision), step.levers.head in QUANTIZED


def _of_higher_rank(
    search: Search, base: StepConfig, found: StepConfig, request: Request
) -> Iterator[StepConfig]:
    """The profile's rank doubled up to its largest, the highest first, over a base as exact as `found`'s."""
    profile, wishes = request.profile, request.wishes
    if wishes.rank is not None:
        return
    most = min(profile.largest_rank, largest_rank(base.init, search.model.shape, base.target_modules))
    doublings = itertools.takewhile(lambda rank: rank <= most, (profile.rank << n for n in range(1, 20)))
    for rank in reversed(list(doublings)):
        raised = with_adapter(base, rank, profile, wishes)
        as_exact = [c for c in search.candidates(raised) if exactness(c.step) == exactness(found)]
        if (step := search.fastest_of(as_exact)) is not None:
            yield step


def _shortened(search: Search, base: StepConfig, request: Request) -> StepConfig:
    """The longest that fits with every lever, at its fastest; nobody's --seq-len is shortened."""
    wishes, profile = request.wishes, request.profile
    if wishes.seq_len is None:
        seq_len = search.largest_seq_len(search.leanest(base), base.seq_len, keeps=True)
        if seq_len >= min(profile.smallest_seq_len, base.seq_len):
            if request.stats is not None:
                raise_all(too_short(seq_len, request.stats))
            shorter = with_value(base, "seq_len", min(seq_len, base.seq_len))
            if (found := _fastest(search, shorter, request)) is not None:
                return found
    raise refusal(search, base, request)
