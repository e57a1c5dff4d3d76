"""Survey: what else would fit, on other cards, at other lengths and ranks, and by other methods."""

from __future__ import annotations

import itertools
import platform
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from lowvram.engine.config import BasePrecision, Levers, StepConfig
from lowvram.frozen import Frozen
from lowvram.hardware import Hardware, card_of_size
from lowvram.memory.allocator import MIDDLE_SEGMENT, SMALL_SEGMENT
from lowvram.planner.host_memory import longest_on_host
from lowvram.planner.initialisation import largest_rank
from lowvram.planner.levers import LEVERS
from lowvram.planner.profiles import budget, profile_for
from lowvram.planner.search import Freedom, Search
from lowvram.planner.variants import with_kept
from lowvram.units import GiB

if TYPE_CHECKING:
    from lowvram.planner.plan import Plan

CARDS_GIB = (8, 10, 11, 12, 16, 24)
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
_TRACED = (1024, 2048, 8192)  # and the longest; the lengths between lie under the lines between these
_LARGEST_RANK = 1024
_PAGES = MIDDLE_SEGMENT + SMALL_SEGMENT  # 22 MiB: by so much what is reserved may be rounded up


class LengthNeed(Frozen):
    """What one sequence of a length takes with every lever that saves memory, at the plan's rank."""

    seq_len: int
    reserved_bytes: int
    traced: bool  # else on the line between two traced lengths, which memory stays under


class CardFit(Frozen):
    """One card, and the longest sequence that fits it."""

    name: str
    total_bytes: int
    budget_bytes: int
    largest_seq_len: int  # 0: not even the shortest length of the table


class Survey(Frozen):
    """The neighbourhood of a plan."""

    lengths: tuple[LengthNeed, ...]
    cards: tuple[CardFit, ...]
    context_limit: int  # positions that the model knows
    largest_rank: int
    lora_16bit_bytes: int  # reserved, the same step over a 16-bit base
    full_fine_tuning_bytes: int | None  # allocated by plain transformers, 16-bit, AdamW, recompute


def tokens_said(card: CardFit, around: Survey) -> str:
    """The longest sequence on a card; with a + where the table ends and the model does not."""
    longest = around.lengths[-1].seq_len if around.lengths else 0
    more = "+" if longest == card.largest_seq_len < around.context_limit else ""
    return f"{card.largest_seq_len:,}{more}" if card.largest_seq_len else "none"


def survey(plan: Plan, hardware: Hardware, search: Search) -> Survey:
    """Trace the plan's neighbours.

    Args:
        search: of the plan, so that nothing is traced twice.
    """
    cards = _cards(hardware)
    least_bytes = min(budget(card, profile_for(card)) for card in cards)
    on_a_card, step = _on_a_card(search), _as_on_a_card(plan)
    needs = _needs(step, on_a_card, least_bytes)
    smallest = _smallest(on_a_card, step, needs[-1].seq_len)
    on_host = longest_on_host(smallest, search.model.shape, hardware.host_free_bytes)
    return Survey(
        lengths=tuple(n for n in needs if n.seq_len in LENGTHS),
        cards=tuple(_card(card, needs, on_host) for card in cards),
        context_limit=search.model.shape.context_limit,
        largest_rank=_largest_rank(plan, search),
        lora_16bit_bytes=search.reserved_bytes(_sixteen_bit(plan)),
        full_fine_tuning_bytes=_full_fine_tuning_bytes(plan, search),
    )


def _cards(hardware: Hardware) -> list[Hardware]:
    cards = [card_of_size(gib * GiB, hardware) for gib in CARDS_GIB]
    known = any(abs(card.total_bytes - hardware.total_bytes) < GiB // 4 for card in cards)
    return cards if hardware.backend == "cpu" or known else [*cards, hardware]


def _on_a_card(search: Search) -> Search:
    """All levers free but the base that was asked for. A plan for a CPU has the table of cards too."""
    asked = {name: value for name, value in search.freedom.pinned.items() if name == "base_precision"}
    free = replace(search, freedom=Freedom(asked, tuple(lever.name for lever in LEVERS)))
    if search.hardware.backend != "cpu":
        return free
    return replace(free, hardware=card_of_size(CARDS_GIB[-1] * GiB, search.hardware), _known={})


def _as_on_a_card(plan: Plan) -> StepConfig:
    """The plan's adapter, one sequence at a time; the levers come with the length."""
    own = plan.levers
    on_cpu = plan.device.backend == "cpu"
    levers = Levers(
        double_quantization=own.double_quantization,
        liger=own.liger,
        expandable_segments=platform.system() == "Linux" if on_cpu else own.expandable_segments,
    )
    changes: dict[str, Any] = {"micro_batch": 1, "accumulation": 2, "levers": levers}
    if on_cpu:
        precision = "nf4" if plan.base_precision == "nf4" else "bf16"
        changes |= {"compute_dtype": "bf16", "base_precision": precision}
    return plan.step.model_copy(update=changes)


def _needs(step: StepConfig, search: Search, least_bytes: int) -> list[LengthNeed]:
    """Of the table's lengths as far as the model's positions go.

    Where the longest fits the smallest card, what it needs says enough of the shorter ones.
    """

    def need(seq_len: int) -> int:
        return search.reserved_bytes(_smallest(search, step, seq_len))

    limit = search.model.shape.context_limit
    longest = min(limit, LENGTHS[-1])
    traced = {longest: need(longest)}
    if traced[longest] > least_bytes:
        traced |= {n: need(n) for n in _TRACED if n < longest}
    wanted = sorted({*traced, *(n for n in LENGTHS if n <= limit)})
    return [
        LengthNeed(seq_len=n, reserved_bytes=traced.get(n) or _between(traced, n), traced=n in traced)
        for n in wanted
    ]


def _smallest(search: Search, step: StepConfig, seq_len: int) -> StepConfig:
    """With every lever that saves memory."""
    return search.leanest(step.model_copy(update={"seq_len": seq_len}))


def _between(traced: dict[int, int], seq_len: int) -> int:
    """A page above the line through the traced neighbours; before the first, no more than that.

    The allocated peak is the largest of affine functions, so under the line; reserved bytes come in pages.
    """
    if seq_len < min(traced):
        return traced[min(traced)]
    low = max(n for n in traced if n < seq_len)
    high = min(n for n in traced if n > seq_len)
    return round(traced[low] + (traced[high] - traced[low]) * (seq_len - low) / (high - low)) + _PAGES


def _card(card: Hardware, needs: list[LengthNeed], on_host: int) -> CardFit:
    """`on_host`: the most tokens whose checkpoints this machine's memory takes."""
    room_bytes = budget(card, profile_for(card))
    return CardFit(
        name=card.name,
        total_bytes=card.total_bytes,
        budget_bytes=room_bytes,
        largest_seq_len=min(_largest_seq_len(needs, room_bytes), on_host),
    )


def _largest_seq_len(needs: list[LengthNeed], room_bytes: int) -> int:
    """On the lines between the lengths, whole 64 tokens and a page below them; 0 when none fits."""
    fit = 0
    for low, high in itertools.pairwise(needs):
        if low.reserved_bytes > room_bytes:
            return fit
        if high.reserved_bytes > room_bytes:
            room = max(room_bytes - low.reserved_bytes - _PAGES, 0)
            share = room / (high.reserved_bytes - low.reserved_bytes)
            return low.seq_len + int(share * (high.seq_len - low.seq_len)) // 64 * 64
        fit = high.seq_len
    return fit


def _largest_rank(plan: Plan, search: Search) -> int:
    """The plan's rank doubled as often as it fits, all else as planned but that all layers recompute."""
    limit = min(largest_rank(plan.init, search.model.shape, plan.target_modules), _LARGEST_RANK)

    def fits(rank: int) -> bool:
        step = with_kept(plan.step, 0).model_copy(update={"rank": rank})
        return search.reserved_bytes(step) <= plan.budget_bytes

    rank = _likely_rank(plan, search, limit)
    while rank > plan.rank and not fits(rank):
        rank //= 2
    while 2 * rank <= limit and fits(2 * rank):
        rank *= 2
    return rank


def _likely_rank(plan: Plan, search: Search, limit: int) -> int:
    """By what a parameter of an adapter keeps: weight, gradient and two moments, 16 bytes at the most."""
    rank, room_bytes = plan.rank, plan.budget_bytes - search.reserved_bytes(with_kept(plan.step, 0))
    while 2 * rank <= limit and 16 * plan.n_trainable * (2 * rank // plan.rank - 1) <= room_bytes:
        rank *= 2
    return rank


def _full_fine_tuning_bytes(plan: Plan, search: Search) -> int | None:
    """What a plain transformers loop takes to train every weight; a T5-type model's is not traced."""
    if plan.task_type != "CAUSAL_LM":
        return None
    precision: Literal["bf16", "fp32"] = "fp32" if plan.compute_dtype == "fp32" else "bf16"
    device = search.backend, search.hardware.capability
    return search.model.full_fine_tuning_bytes(plan.seq_len, precision, *device)


def _sixteen_bit(plan: Plan) -> StepConfig:
    precision: BasePrecision = plan.compute_dtype
    return with_kept(plan.step, 0).model_copy(update={"base_precision": precision})
