"""Draws a plan's charts as inline SVG: the card's memory in one bar, needed memory over context length."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from html import escape

from lowvram.frozen import Frozen
from lowvram.planner.plan import Plan
from lowvram.planner.survey import CardFit, LengthNeed, Survey
from lowvram.units import GiB, format_bytes, printable

_BAR = 44  # pixels high
_HEIGHT = 320
_FLOOR = 292  # y of zero bytes; the axis is written below
_LEFT, _RIGHT = 5.0, 95.0  # per cent of the width
_LABEL_APART = 14  # pixels between two labels of one column
_LABEL_COLUMN = 62  # pixels from one column of labels to the next
_COLORS = 9


class Segment(Frozen):
    """A part of the card's memory; `css` names its colour."""

    name: str
    n_bytes: int
    css: str


def segments(plan: Plan) -> list[Segment]:
    """The whole card, from what the driver takes to what stays free."""
    estimate, device = plan.estimate, plan.device
    held = device.held_bytes
    if device.backend in ("cpu", "mps"):  # there the others' share is told by what is free
        held = device.total_bytes - device.free_bytes
    parts = [Segment(name="context", n_bytes=device.context_bytes, css="context")]
    parts.append(Segment(name="held by others", n_bytes=held, css="held"))
    for index, (name, n_bytes) in enumerate(estimate.components_bytes.items()):
        parts.append(Segment(name=name.replace("_", " "), n_bytes=n_bytes, css=f"c{index % _COLORS}"))
    lost = estimate.peak_reserved_bytes - estimate.peak_allocated_bytes
    parts.append(Segment(name="fragmentation", n_bytes=lost, css="lost"))
    free = device.total_bytes - sum(part.n_bytes for part in parts)
    return [*parts, Segment(name="free", n_bytes=max(free, 0), css="free")]


def memory_bar(plan: Plan) -> str:
    """One stacked bar; a line marks the card's end when the plan needs more than it has."""
    parts = segments(plan)
    whole = max(sum(part.n_bytes for part in parts), 1)
    left, drawn = 0.0, []
    for part in parts:
        width = 100 * part.n_bytes / whole
        title = escape(f"{part.name}: {format_bytes(part.n_bytes)}")
        place = f'x="{left:.3f}%" y="0" width="{width:.3f}%" height="{_BAR}"'
        drawn.append(f'<rect class="part {part.css}" {place}><title>{title}</title></rect>')
        left += width
    end = 100 * plan.device.total_bytes / whole
    if end < 99.9:
        drawn.append(f'<line class="end" x1="{end:.3f}%" x2="{end:.3f}%" y1="0" y2="{_BAR}"/>')
    label = escape(printable(f"Memory of {plan.device.name} by component"))
    return _svg(_BAR, label, drawn)


def length_chart(survey: Survey) -> str:
    """Needed bytes over context length, with a line for what each card leaves; "" without lengths."""
    needs = survey.lengths
    if not needs:
        return ""
    budgets = [card.budget_bytes for card in survey.cards]
    top = max(1.15 * max(budgets, default=0), 1.15 * needs[0].reserved_bytes)
    drawn = [*_axis(needs), *_card_lines(survey.cards, top), *_curve(needs, top)]
    return _svg(_HEIGHT, "Needed memory over context length, against the cards", drawn)


def _svg(height: int, label: str, drawn: Sequence[str]) -> str:
    body = "\n".join(drawn)
    return f'<svg role="img" aria-label="{label}" width="100%" height="{height}">\n{body}\n</svg>'


def _x(seq_len: int, needs: Sequence[LengthNeed]) -> float:
    """Per cent; every doubling is as wide as the next."""
    low, high = math.log2(needs[0].seq_len), math.log2(needs[-1].seq_len)
    share = (math.log2(seq_len) - low) / (high - low) if high > low else 0.5
    return _LEFT + share * (_RIGHT - _LEFT)


def _y(n_bytes: float, top: float) -> float:
    return _FLOOR * (1 - n_bytes / top)


def _axis(needs: Sequence[LengthNeed]) -> Iterator[str]:
    yield f'<line class="axis" x1="0" x2="100%" y1="{_FLOOR}" y2="{_FLOOR}"/>'
    for need in needs:
        x = _x(need.seq_len, needs)
        text = f"{need.seq_len // 1024}k" if need.seq_len >= 1024 else str(need.seq_len)
        yield f'<text class="tick" x="{x:.2f}%" y="{_FLOOR + 18}">{text}</text>'


def _card_lines(cards: Sequence[CardFit], top: float) -> Iterator[str]:
    """Lines, then labels over them; labels that would overlap move to the next column to the right."""
    labels, lowest = [], list[float]()  # lowest: y of the last label of each column
    for card in sorted(cards, key=lambda card: card.budget_bytes):
        y = _y(card.budget_bytes, top)
        free = (i for i, last in enumerate(lowest) if last - y >= _LABEL_APART)
        column = next(free, len(lowest))
        lowest[column : column + 1] = [y]
        yield f'<line class="card" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>'
        label = f"{card.total_bytes / GiB:.3g} GB"
        labels.append(
            f'<text class="cardname" x="{column * _LABEL_COLUMN + 2}" y="{y + 4:.1f}">{label}</text>'
        )
    yield from labels


def _curve(needs: Sequence[LengthNeed], top: float) -> Iterator[str]:
    points = [(_x(n.seq_len, needs), _y(n.reserved_bytes, top)) for n in needs]
    for (x1, y1), (x2, y2) in itertools.pairwise(points):
        yield f'<line class="need" x1="{x1:.2f}%" y1="{y1:.1f}" x2="{x2:.2f}%" y2="{y2:.1f}"/>'
    for need, (x, y) in zip(needs, points, strict=True):
        css = "traced" if need.traced else "between"
        title = (
            f"{need.seq_len:,} tokens: {'' if need.traced else 'at most '}{format_bytes(need.reserved_bytes)}"
        )
        yield f'<circle class="{css}" cx="{x:.2f}%" cy="{y:.1f}" r="5"><title>{title}</title></circle>'
