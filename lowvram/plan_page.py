"""Writes a plan as one HTML page for a browser: no script, no request, nothing unescaped."""

from __future__ import annotations

from collections.abc import Iterable

from lowvram import __version__
from lowvram.html_page import document, items, note, pairs, section, text
from lowvram.plan_chart import length_chart, memory_bar, segments
from lowvram.planner.plan import Plan
from lowvram.planner.survey import CardFit, LengthNeed, Survey, tokens_said
from lowvram.planning import Planned, needs_on_disk
from lowvram.units import GiB, format_bytes, format_count, format_seconds


def page(planned: Planned) -> str:
    """The whole page."""
    plan, survey = planned.plan, planned.survey
    body = [
        _head(plan),
        section("Memory at the peak", memory_bar(plan), _legend(plan)),
        *(_neighbourhood(plan, survey) if survey else ()),
        section("What else it takes", pairs(_needs(planned))),
        section("Choices", items(plan.reasons)),
        f"<footer>lowvram {__version__}: predicted by running the training step on meta tensors.</footer>",
    ]
    return document(f"lowvram plan: {plan.model}", body, _STYLE)


def _head(plan: Plan) -> str:
    css, word = ("yes", "fits") if plan.fits else ("no", "does not fit")
    left = plan.budget_bytes - plan.estimate.peak_reserved_bytes
    spare = f"{format_bytes(left)} of the budget left" if left >= 0 else f"{format_bytes(-left)} too much"
    verdict = f'<p class="verdict"><b class="{css}">{word}</b> {text(plan.device.name)}, {spare}</p>'
    return f"<header><h1>{text(plan.model)}</h1>{verdict}{pairs(_facts(plan))}</header>"


def _facts(plan: Plan) -> list[tuple[str, str]]:
    facts = [
        ("parameters", format_count(plan.n_parameters)),
        ("trainable", f"{format_count(plan.n_trainable)}, rank {plan.rank}"),
        ("planned context", f"{plan.seq_len:,} tokens"),
        ("longest context", plan.longest_context),
        ("a step", f"{format_seconds(plan.seconds_per_step)} (modelled)"),
    ]
    if plan.data:
        eta = format_seconds(plan.seconds_per_step * plan.total_steps)
        facts += [("data", plan.data), ("steps", f"{plan.total_steps:,}, about {eta} (modelled)")]
    return facts


def _legend(plan: Plan) -> str:
    """The bar's colours with their numbers, then the totals."""
    estimate = plan.estimate
    rows = [_legend_row(plan, part.name, part.n_bytes, "", part.css) for part in segments(plan)]
    totals = {
        "allocated": estimate.peak_allocated_bytes,
        "reserved": estimate.peak_reserved_bytes,
        "budget": plan.budget_bytes,
        "card": plan.device.total_bytes,
    }
    rows += [_legend_row(plan, name, n_bytes, "sum") for name, n_bytes in totals.items()]
    table = f'<table class="legend"><tbody>{"".join(rows)}</tbody></table>'
    return table + note(f"The peak is at {estimate.peak_moment}. Free memory beyond the budget is margin.")


def _legend_row(plan: Plan, name: str, n_bytes: int, row_css: str, css: str = "") -> str:
    share = f"{100 * n_bytes / max(plan.device.total_bytes, 1):.1f} %"
    swatch = f'<i class="{css}"></i>' if css else ""
    cells = f"<td>{swatch}{text(name)}</td><td>{format_bytes(n_bytes)}</td><td>{share}</td>"
    return f'<tr class="{row_css}">{cells}</tr>'


def _neighbourhood(plan: Plan, survey: Survey) -> list[str]:
    method = "Share of what the card leaves for training: one sequence at a time, every memory lever on."
    lines = "A card's line is what it leaves for training. A hollow point is an upper bound."
    chart = length_chart(survey)
    return [
        section("Context by card", _cards(survey), note(method)),
        *([section("Needed memory over context length", chart, note(lines))] if chart else []),
        section("Other methods", _methods(plan, survey)),
    ]


def _cards(survey: Survey) -> str:
    heads = "".join(f"<th>{card.total_bytes / GiB:.3g} GB</th>" for card in survey.cards)
    rows = (_row(need, survey.cards) for need in survey.lengths)
    longest = "".join(f"<td>{tokens_said(card, survey)}</td>" for card in survey.cards)
    return (
        f'<div class="wide"><table class="cards"><thead><tr><th>tokens</th><th>needs</th>{heads}</tr></thead>'
        f'<tbody>{"".join(rows)}<tr class="sum"><th>longest</th><td></td>{longest}</tr></tbody></table></div>'
    )


def _row(need: LengthNeed, cards: Iterable[CardFit]) -> str:
    size = f"{'' if need.traced else '≤ '}{format_bytes(need.reserved_bytes)}"
    cells = "".join(_cell(need, card) for card in cards)
    return f"<tr><th>{need.seq_len:,}</th><td>{size}</td>{cells}</tr>"


def _cell(need: LengthNeed, card: CardFit) -> str:
    """How much of what the card leaves is needed; never told by colour alone."""
    fits = need.reserved_bytes <= card.budget_bytes
    share = f"{int(100 * need.reserved_bytes / max(card.budget_bytes, 1))} %"
    return f'<td class="yes">{share}</td>' if fits else '<td class="no">no</td>'


def _methods(plan: Plan, survey: Survey) -> str:
    rows = [
        ("LoRA, 16-bit", survey.lora_16bit_bytes, "this plan over a 16-bit base"),
        ("this plan", plan.estimate.peak_reserved_bytes, f"{plan.base_precision} base, rank {plan.rank}"),
    ]
    if survey.full_fine_tuning_bytes is not None:
        full = ("full fine-tuning", survey.full_fine_tuning_bytes, "all weights, 16-bit, AdamW, recompute")
        rows.insert(0, full)
    most = max(n_bytes for _, n_bytes, _ in rows)
    told = "".join(
        f'<div class="method"><span>{name}</span><b>{format_bytes(n_bytes)}</b><em>{text(said)}</em>'
        f'<i style="width:{100 * n_bytes / most:.1f}%"></i></div>'
        for name, n_bytes, said in rows
    )
    return told + note(f"Largest rank that fits, doubling the plan's: {survey.largest_rank}.")


def _needs(planned: Planned) -> list[tuple[str, str]]:
    download, run = needs_on_disk(planned)
    size = "unknown: the hub is not reachable" if download is None else format_bytes(download)
    return [
        ("download", "nothing, it is here" if download == 0 else size),
        ("disk for the run", format_bytes(run)),
        ("host memory", format_bytes(planned.plan.host_ram_bytes)),
    ]


_STYLE = (
    """
.legend { width: 100%; max-width: 560px; margin-top: 10px; }
.legend td:first-child { text-align: left; padding-left: 0; }
.legend i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 9px; }
.cards { width: 100%; } .cards td.yes, .cards td.no { text-align: center; border: 2px solid var(--sheet); }
.cards thead th:nth-child(n+3), .cards .sum td:nth-child(n+3) { text-align: center; }
@media (max-width: 520px) {
  .cards { font-size: 12.5px; } .cards td, .cards th { padding: 4px 3px; }
  .legend { font-size: 14px; } .legend td { padding: 3px 0 3px 8px; }
  .legend td:first-child { white-space: normal; } }
.method { display: grid; grid-template-columns: 140px 1fr; gap: 0 12px; margin-bottom: 10px; }
.method em { grid-column: 1 / -1; }
.method i { grid-column: 1 / -1; height: 8px; border-radius: 4px; background: var(--need); }
.part { stroke: var(--sheet); stroke-width: 1; }
.end { stroke: var(--ink); stroke-width: 3; stroke-dasharray: 5 3; }
.card { stroke: var(--held); stroke-dasharray: 4 4; }
.cardname { paint-order: stroke; stroke: var(--sheet); stroke-width: 4px; }
.need { stroke: var(--need); stroke-width: 2.5; }
.traced { fill: var(--need); } .between { fill: var(--sheet); stroke: var(--need); stroke-width: 2; }
"""
    + "".join(
        f".{name} {{ fill: var(--{name}); }} i.{name} {{ background: var(--{name}); }}\n"
        for name in ("held", "context", "lost", "free")
    )
    + "".join(
        f".c{index} {{ fill: {color}; }} i.c{index} {{ background: {color}; }}\n"
        for index, color in enumerate(
            (
                "#3b6fd4",
                "#2ba3b8",
                "#8557c9",
                "#36a15f",
                "#d9a521",
                "#d65a4a",
                "#5b9bf0",
                "#c56bb4",
                "#e08a3c",
            )
        )
    )
)
