"""Writes `data check` as one HTML page: the histogram of lengths, bad rows, coloured examples."""

from __future__ import annotations

import numpy as np

from lowvram import __version__
from lowvram.data.tokens import Example
from lowvram.data_report import Report
from lowvram.data_view import runs, told
from lowvram.html_page import document, items, note, pairs, section, text

_BINS = 40
_HEIGHT, _FLOOR = 200, 172  # pixels: of the picture, and of the line of no examples
_SHOWN_TOKENS = 2000


def page(report: Report) -> str:
    """The whole page; the report has a tokenizer."""
    facts = report.facts
    title = f"lowvram data check: {facts['data']}"
    body = [
        f"<header><h1>{text(facts['data'])}</h1>{pairs(list(told(facts))[1:])}</header>",
        section("Tokens of an example", histogram(report), note(_said(report))),
        *([section("Rows that cannot be used", *_bad(report))] if facts["bad_rows"] else []),
        *_examples(report),
        f"<footer>lowvram {__version__}</footer>",
    ]
    return document(title, body, _STYLE)


def _said(report: Report) -> str:
    seq_len = report.facts.get("seq_len")
    cut = f" The line is --seq-len {seq_len:,}." if seq_len else ""
    return f"Of the {len(report.train):,} examples trained on.{cut} Point at a bar for its numbers."


def histogram(report: Report) -> str:
    """Numbers of examples by length, as inline SVG; a line where they are cut."""
    lengths = report.train.lengths
    top = int(lengths.max())
    width = -(-top // _BINS)  # tokens of a bar
    counts = np.bincount((lengths - 1) // width, minlength=-(-top // width)).tolist()
    most, step = max(counts), 100 / len(counts)
    bars = [
        _bar(at * step, step, _FLOOR * count / most, f"{at * width + 1:,} to {(at + 1) * width:,}", count)
        for at, count in enumerate(counts)
        if count
    ]
    seq_len = report.facts.get("seq_len")
    whole = width * len(counts)
    line = [_cut_line(100 * seq_len / whole)] if seq_len and seq_len < whole else []
    ticks = [_tick(share, round(whole * share)) for share in (0, 0.25, 0.5, 0.75, 1)]
    axis = f'<line class="axis" x1="0" x2="100%" y1="{_FLOOR}" y2="{_FLOOR}"/>'
    drawn = "".join((*bars, *line, axis, *ticks))
    label = f"Histogram of lengths, at most {top} tokens"
    return f'<svg role="img" aria-label="{label}" width="100%" height="{_HEIGHT}">{drawn}</svg>'


def _bar(left: float, width: float, height: float, tokens: str, count: int) -> str:
    place = f'x="{left:.3f}%" y="{_FLOOR - height:.1f}" width="{width * 0.9:.3f}%" height="{height:.1f}"'
    return f'<rect class="bar" {place}><title>{tokens} tokens: {count:,} examples</title></rect>'


def _cut_line(left: float) -> str:
    return f'<line class="cut" x1="{left:.3f}%" x2="{left:.3f}%" y1="0" y2="{_FLOOR}"/>'


def _tick(share: float, tokens: int) -> str:
    anchor = "start" if share == 0 else "end" if share == 1 else "middle"
    place = f'x="{100 * share:g}%" y="{_FLOOR + 18}" text-anchor="{anchor}"'
    return f"<text {place}>{tokens:,}</text>"


def _bad(report: Report) -> list[str]:
    listed, all_of_them = report.facts["bad"], report.facts["bad_rows"]
    more = [note(f"And {all_of_them - len(listed):,} more.")] if all_of_them > len(listed) else []
    return [items(listed), *more]


def _examples(report: Report) -> list[str]:
    """The first, the shortest, the one in the middle and the longest: each row once."""
    order = np.argsort(report.train.lengths, kind="stable")
    chosen = {
        "First": 0,
        "Shortest": int(order[0]),
        "Median": int(order[len(order) // 2]),
        "Longest": int(order[-1]),
    }
    names: dict[int, list[str]] = {}
    for name, index in chosen.items():
        names.setdefault(index, []).append(name)
    return [
        section(f"{' and '.join(called).capitalize()} example", *_example(report, report.train[index]))
        for index, called in names.items()
    ]


def _example(report: Report, example: Example) -> list[str]:
    parts = [
        f'<mark class="trained">{text(shown)}</mark>' if trained else text(shown)
        for trained, shown in runs(example, report.tokenizer, _SHOWN_TOKENS)
    ]
    tokens, trained = example.n_tokens, example.n_trained
    more = tokens - _SHOWN_TOKENS
    said = f"{example.where}, {tokens:,} tokens; the {trained:,} that are trained are marked."
    return [
        f'<pre class="example">{"".join(parts)}</pre>',
        note(said + (f" Only the first {_SHOWN_TOKENS:,} are shown." if more > 0 else "")),
    ]


_STYLE = """
.bar { fill: var(--need); }
.cut { stroke: var(--no-ink); stroke-width: 2; stroke-dasharray: 5 3; }
.example { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; color: var(--dim);
  font: 14px/1.5 ui-monospace, "DejaVu Sans Mono", Consolas, monospace; }
.trained { background: var(--yes); color: var(--yes-ink); border-radius: 3px; text-decoration: underline;
  text-decoration-thickness: 1px; text-underline-offset: 3px; }
"""
