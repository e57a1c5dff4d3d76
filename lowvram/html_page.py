"""What all pages for a browser have in common: no script, no request, nothing unescaped."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from lowvram.units import printable

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # the browser would refuse what we never ask for


def document(title: str, body: Iterable[str], style: str) -> str:
    """The whole page; `style` is added to what all of them share."""
    return _PAGE.format(title=text(title), policy=_POLICY, style=_STYLE + style, body="\n".join(body))


def text(value: object) -> str:
    """Foreign text as a browser shows it, never as it would obey it."""
    return escape(printable(str(value)))


def section(title: str, *parts: str) -> str:
    return "\n".join((f"<section><h2>{text(title)}</h2>", *parts, "</section>"))


def note(said: str) -> str:
    return f'<p class="note">{text(said)}</p>'


def pairs(rows: Iterable[tuple[str, object]]) -> str:
    told = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in rows)
    return f"<dl>{told}</dl>"


def items(lines: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{text(line)}</li>' for line in lines)}</ul>"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --dim: #5c6675; --paper: #f5f6f8; --sheet: #fff;
  --rule: #dfe3e8; --yes: #d5f0dc; --yes-ink: #14532d; --no: #f9dada; --no-ink: #7f1d1d; --need: #1d4ed8;
  --held: #9aa3b0; --context: #6b7584; --lost: #3d4654; --free: #e4e8ed; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --dim: #9aa4b2; --paper: #11151b; --sheet: #1a2029; --rule: #303844;
    --yes: #173d26; --yes-ink: #a7e8bd; --no: #4a1d20; --no-ink: #f5b5b5; --need: #7aa5ff;
    --held: #5d6674; --context: #7d8796; --lost: #b3bcc8; --free: #29313c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 860px; margin: 0 auto; padding: 20px 16px 40px; }
header, section { background: var(--sheet); border: 1px solid var(--rule); border-radius: 10px;
  padding: 16px 18px; margin-bottom: 16px; }
h1 { font-size: 22px; line-height: 1.3; margin: 0 0 8px; overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 0 0 12px; }
.verdict { margin: 0 0 14px; }
.verdict b { padding: 3px 10px; border-radius: 99px; margin-right: 6px; white-space: nowrap; }
.yes { background: var(--yes); color: var(--yes-ink); }
.no { background: var(--no); color: var(--no-ink); }
.note, footer, dt, em { color: var(--dim); font-size: 14px; font-style: normal; }
.note { margin: 10px 0 0; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 10px 20px; margin: 0; }
dd { margin: 0; overflow-wrap: anywhere; }
ul { margin: 0; padding-left: 20px; } li { overflow-wrap: anywhere; margin: 2px 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: 4px 10px; text-align: right; white-space: nowrap; font-weight: normal; }
thead th, .sum td, .sum th { font-weight: 600; }
.wide { overflow-x: auto; }
svg { display: block; overflow: hidden; } svg text { fill: var(--dim); font-size: 12px; }
.axis { stroke: var(--dim); } .tick { text-anchor: middle; }
@media (max-width: 520px) { main { padding: 10px 8px; } header, section { padding: 12px; } }
"""
