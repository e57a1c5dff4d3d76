"""The README's table of scripts/bench_adapters.py: of each method the best rate, loss, time, memory."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

START, END = "<!-- adapters: by scripts/bench_adapters.py -->\n", "<!-- end of adapters -->\n"
_HEAD = (
    "| method | base | tokens | rate | held-out loss | less than LoRA | step | init | predicted peak |",
    "|---|---|---|---|---|---|---|---|---|",
)

Row = dict[str, Any]


def write_table(rows: list[Row], times: list[Row], readme: Path) -> None:
    """Only what is between the markers, once a method has its reference and its time."""
    if not times:
        return
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(START)
    readme.write_text(before + START + block(rows, times) + END + rest.split(END)[1], encoding="utf-8")


def block(rows: list[Row], times: list[Row]) -> str:
    """Of each base and budget of tokens, best first."""
    by_method: defaultdict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in rows:
        by_method[row["method"], int(row["tokens"])].append(row)
    finals = {key: final_rows(found) for key, found in by_method.items()}
    ratio = {row["method"]: float(row["ratio"]) for row in times}
    lines = [
        _line(method, found, finals[reference_of(method), tokens], ratio[method])
        for (method, tokens), found in finals.items()
        if method in ratio and (reference_of(method), tokens) in finals
    ]
    lines.sort(key=lambda line: line[0])  # NF4 first
    first = rows[0]
    return "\n".join(
        [
            *_HEAD,
            *(line for _, line in lines),
            "",
            f"({len(rows)} trainings, mean ± standard deviation of the seeds; "
            f"{first['machine']}, torch {first['torch']}, peft {first['peft']})",
            "",
        ]
    )


def final_rows(found: list[Row]) -> dict[int, Row]:
    """Seed -> row at the rate with the least validation loss at seed 0."""
    best = min((row for row in found if int(row["seed"]) == 0), key=lambda row: float(row["validation_loss"]))
    return {int(r["seed"]): r for r in found if float(r["learning_rate"]) == float(best["learning_rate"])}


def on_16_bits(method: str) -> bool:
    """Whether a method's base is not quantised."""
    return method.endswith("16 bits")


def reference_of(method: str) -> str:
    """Plain LoRA on the same base."""
    return "lora, 16 bits" if on_16_bits(method) else "lora"


def _line(
    method: str, found: dict[int, Row], reference: dict[int, Row], ratio: float
) -> tuple[tuple[bool, int, float], str]:
    losses = [float(row["test_loss"]) for row in found.values()]
    less = [float(reference[s]["test_loss"]) - float(found[s]["test_loss"]) for s in found if s in reference]
    some = next(iter(found.values()))
    peak = some["predicted_peak_bytes"]
    cells = (
        method.removesuffix(", 16 bits").replace("_", "-"),
        "bf16" if on_16_bits(method) else "nf4",
        f"{int(some['tokens']):,}",
        f"{float(some['learning_rate']):g}",
        _spread(losses, "{:.4f}"),
        _spread(less, "{:+.4f}"),
        f"{ratio:.2f}",
        f"{statistics.median(float(row['init_seconds']) for row in found.values()):.0f} s",
        f"{int(peak) / 2**20:,.0f} MiB" if peak else "",
    )
    return (on_16_bits(method), int(some["tokens"]), statistics.mean(losses)), f"| {' | '.join(cells)} |"


def _spread(values: list[float], form: str) -> str:
    """Mean and standard deviation over the seeds."""
    if len(values) < 2:
        return "".join(map(form.format, values))
    return f"{form.format(statistics.mean(values))} ± {statistics.stdev(values):.4f}"
