#!/usr/bin/env python3
"""Finds the largest context of each model on each card, by trace: plain transformers + peft, and lowvram.

    PYTHONPATH=. python scripts/bench_context.py [--model NAME] [--card GIB] [--refresh]

Rank 32 on all linear layers, one sequence, NF4, bf16. What the allocator reserves stays within the card's
nominal GiB less 0.55 GiB of context; host memory within 64 GiB. Contexts beyond a model's own positions are
what memory allows. Writes benchmarks/context.csv and benchmarks/context.svg.
"""

from __future__ import annotations

import argparse
import csv
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from lowvram.alloc_conf import set_alloc_conf
from lowvram.engine.config import Levers, StepConfig
from lowvram.engine.known_models import known_config
from lowvram.engine.shape import ModelShape
from lowvram.engine.source import ModelSource
from lowvram.memory.cache import RememberedModel
from lowvram.memory.plain import PlainStep, plain_peak_bytes
from lowvram.planner.host_memory import host_bytes, longest_on_host
from lowvram.units import GiB

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
FILE = BENCHMARKS / "context.csv"
OTHERS = BENCHMARKS / "context_others.csv"  # by scripts/trace_others.py
CARDS_GIB = (8, 12, 16, 24)
MODELS = (
    "meta-llama/Llama-3.1-8B",
    "Qwen/Qwen2-7B",
    "Qwen/Qwen2.5-14B",
    "Qwen/Qwen2.5-32B",
    "google/gemma-3-12b-pt",
)
CONTEXT_BYTES = int(0.55 * GiB)
HOST_BYTES = 64 * GiB
RANK = 32
HEADINGS = (
    *("model", "card", "plain, traced", "lowvram, traced", "reserved GiB", "host GiB", "limited by"),
    *("bytes/token", "floor", "times floor", "Unsloth, published", "HF + FA2, published"),
)
_AMPERE = (8, 6)
_PER_STEP = ("saved_activations", "recompute_working_set", "logits")
# github.com/unslothai/unsloth, README, "Context length benchmarks": Llama 3.1 8B, QLoRA, r=32 on all linear
# layers, batch 1; the right-hand column is Hugging Face + FlashAttention 2, None where it is out of memory
PUBLISHED = {8: (2972, None), 12: (21848, 932), 16: (40724, 2551), 24: (78475, 5789)}


@dataclass(frozen=True)
class Row:
    """One model on one card. Traced figures and published ones are in columns of their own."""

    model: str
    card_gib: int
    traced_plain_tokens: int  # transformers + peft with gradient checkpointing, 8-bit AdamW
    traced_lowvram_tokens: int
    reserved_gib: float
    host_gib: float
    limited_by: str
    bytes_per_token: int
    floor_bytes_per_token: int  # keys and values of one layer
    times_floor: float | None  # of the step's memory at so many tokens, the floor being those and one tile
    published_unsloth_tokens: int | None
    published_hf_fa2_tokens: int | None


def measure(model: str, card_gib: int) -> Row:
    """Both steps on one card."""
    config = known_config(model)
    assert config is not None
    with tempfile.TemporaryDirectory() as folder:
        config.get_text_config().save_pretrained(folder)  # of Gemma 3 the language model
        remembered = RememberedModel(ModelSource(folder))
        shape, step = remembered.shape, _step(remembered.shape, card_gib)
        budget_bytes = card_gib * GiB - CONTEXT_BYTES

        def reserved_bytes(seq_len: int) -> int:
            at = step.model_copy(update={"seq_len": seq_len})
            return remembered.estimate(at, "cuda", _AMPERE).peak_reserved_bytes

        on_host = longest_on_host(step, shape, HOST_BYTES) // 64 * 64
        tokens = longest(reserved_bytes, budget_bytes, on_host)
        plain = longest(partial(_plain_bytes, remembered, step.target_modules), budget_bytes, on_host)
        far, near = max(tokens, 65536), max(tokens, 65536) // 4
        slope = (allocated(remembered, step, far) - allocated(remembered, step, near)) / (far - near)
        floor = _floor(config.get_text_config())
        unsloth, fa2 = PUBLISHED[card_gib] if model == MODELS[0] else (None, None)
        return Row(
            model=model,
            card_gib=card_gib,
            traced_plain_tokens=plain,
            traced_lowvram_tokens=tokens,
            reserved_gib=round(reserved_bytes(tokens) / GiB, 2) if tokens else 0.0,
            host_gib=round(host_bytes(step.model_copy(update={"seq_len": tokens}), shape) / GiB, 1),
            limited_by="host memory" if tokens == on_host else "card",
            bytes_per_token=round(slope),
            floor_bytes_per_token=floor,
            times_floor=times_floor(remembered, step, tokens, slope, floor) if tokens else None,
            published_unsloth_tokens=unsloth,
            published_hf_fa2_tokens=fa2,
        )


def _step(shape: ModelShape, card_gib: int) -> StepConfig:
    """Every lever on; an 8 GB card has less room for a tile."""
    levers = Levers(
        loss_chunk_tokens=2048,
        tile_tokens=2048 if card_gib <= 8 else 4096,
        offload_checkpoints=True,
        embedding_on_host=True,
        head="nf4",
        expandable_segments=True,
    )
    return StepConfig(
        rank=RANK,
        target_modules=shape.resolve_targets("all-linear"),
        accumulation=1,
        optimizer="paged_adamw8bit",
        levers=levers,
    )


def allocated(model: RememberedModel, step: StepConfig, seq_len: int) -> int:
    """In the backward pass, where every token counts; loading may need more and does not depend on them."""
    at = step.model_copy(update={"seq_len": seq_len})
    return model.estimate(at, "cuda", _AMPERE).phases_bytes["backward"]


def times_floor(model: RememberedModel, step: StepConfig, seq_len: int, slope: float, floor: int) -> float:
    """What a step needs beside weights, adapters, gradients and optimizer, over the least that it could."""
    estimate = model.estimate(step.model_copy(update={"seq_len": seq_len}), "cuda", _AMPERE)
    needed = sum(estimate.components_bytes.get(name, 0) for name in _PER_STEP)
    tile_bytes = needed - slope * seq_len
    return round(needed / (floor * seq_len + tile_bytes), 2)


def _floor(text: Any) -> int:
    """Keys and values of one layer, two bytes each."""
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * 2 * text.num_key_value_heads * width)


def _plain_bytes(model: RememberedModel, targets: tuple[str, ...], seq_len: int) -> int:
    """Allocated by transformers + peft: QLoRA with recompute, SDPA, torch's AdamW."""
    plain = PlainStep(
        method="qlora", rank=RANK, targets=targets, seq_len=seq_len, checkpointing="non-reentrant", clips=True
    )
    return plain_peak_bytes(model.source.config, plain, "cuda", _AMPERE)


def longest(bytes_of: Callable[[int], int], budget_bytes: int, limit: int) -> int:
    """The most tokens within the budget, to 64 tokens and 1 %; 0 when not even 64 are.

    Bytes are nearly a line over tokens: two short sequences, and then where their line meets the budget.
    """
    bytes_at = {n: bytes_of(n) for n in (limit // 16, limit // 8)}
    fits, too_many = 0, limit + 1
    while True:
        tokens = min(where_it_meets(budget_bytes, bytes_at), limit)
        if tokens >= too_many:  # what is reserved comes in pages: no line
            tokens = int(too_many * 0.995)
        tokens = tokens // 64 * 64
        if tokens <= fits * 1.01:
            return fits
        bytes_at[tokens] = bytes_of(tokens)
        fits, too_many = (tokens, too_many) if bytes_at[tokens] <= budget_bytes else (fits, tokens)


def where_it_meets(budget_bytes: int, bytes_at: dict[int, int]) -> int:
    """Where the line through the two known points nearest to the budget meets it."""
    low, high = sorted(sorted(bytes_at, key=lambda n: abs(bytes_at[n] - budget_bytes))[:2])
    slope = max((bytes_at[high] - bytes_at[low]) / (high - low), 1.0)
    return int(low + (budget_bytes - bytes_at[low]) / slope)


def table(rows: list[Row]) -> Table:
    shown = Table(*(Column(name, justify="right") for name in HEADINGS))
    for row in rows:
        cells = (row.model, f"{row.card_gib} GB", *map(_said, list(asdict(row).values())[2:]))
        shown.add_row(*cells)
    return shown


def _said(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else "" if value is None else str(value)


def earlier_rows() -> dict[tuple[str, int], Row]:
    """What an earlier run wrote: a run of one model replaces that model's rows."""
    if not FILE.exists():
        return {}
    with FILE.open(newline="", encoding="utf-8") as handle:
        rows = [Row(**{k: _parsed(k, v) for k, v in line.items()}) for line in csv.DictReader(handle)]
    return {(row.model, row.card_gib): row for row in rows}


def _parsed(name: str, text: str) -> Any:
    if name in ("model", "limited_by"):
        return text
    if name == "times_floor" or (name.endswith("_gib") and name != "card_gib"):
        return float(text) if text else None
    return int(text) if text else None


def in_order(rows: dict[tuple[str, int], Row]) -> list[Row]:
    return sorted(rows.values(), key=lambda row: (MODELS.index(row.model), row.card_gib))


def write(rows: list[Row]) -> None:
    with FILE.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(asdict(rows[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, rows))
    (BENCHMARKS / "context.svg").write_text(picture(rows), encoding="utf-8")


def other_bars(card_gib: int) -> list[tuple[str, int, str]]:
    """TRL's and torchtune's steps on this card, where they were traced."""
    if not OTHERS.exists():
        return []
    with OTHERS.open(newline="", encoding="utf-8") as handle:
        lines = [
            x for x in csv.DictReader(handle) if (x["model"], x["card_gib"]) == (MODELS[0], str(card_gib))
        ]
    colours = {"trl": "#d9a441", "torchtune": "#c2714f"}
    return [(_other_name(x), int(x["traced_tokens"]), colours[x["project"]]) for x in lines]


def _other_name(line: dict[str, str]) -> str:
    option = "" if line["options"] == "defaults" else f" with {line['options'].replace('_', ' ')}"
    return f"{line['project']} {line['version']}{option}, traced"


def picture(rows: list[Row]) -> str:
    """Bars on a logarithmic scale for the first model: a length each for card and step."""
    bars, height = [], 0
    for row in (r for r in rows if r.model == MODELS[0]):
        height += 14
        bars.append(f'<text x="0" y="{height + 11}" font-weight="bold">{row.card_gib} GB</text>')
        for name, tokens, colour in (
            ("transformers + peft, traced", row.traced_plain_tokens, "#b8b8b8"),
            *other_bars(row.card_gib),
            ("Unsloth, published", row.published_unsloth_tokens or 0, "#7a9cc6"),
            ("lowvram, traced", row.traced_lowvram_tokens, "#2f8f5b"),
        ):
            width = max(0.0, 100 * math.log10(max(tokens, 1) / 100))
            bars.append(f'<rect x="60" y="{height}" width="{width:.0f}" height="14" fill="{colour}"/>')
            said = f"{tokens:,} tokens" if tokens else "out of memory"
            bars.append(f'<text x="{66 + width:.0f}" y="{height + 11}">{name}: {said}</text>')
            height += 17
    title = "Longest context, Llama-3.1-8B, rank 32, one sequence (logarithmic)"
    box, fill = f"0 -24 700 {height + 36}", f'<rect y="-24" width="700" height="{height + 36}" fill="#fff"/>'
    font = 'font-family="sans-serif" font-size="11"'
    text = f'<text x="0" y="-8" font-size="14">{title}</text>'
    inside = fill + text + "".join(bars)
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" {font}>{inside}</svg>\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--card", type=int, choices=CARDS_GIB, action="append")
    parser.add_argument("--refresh", action="store_true", help="draw with context_others.csv; no trace")
    chosen = parser.parse_args()
    set_alloc_conf()  # as the command line does: host memory is counted by it
    rows = earlier_rows()
    console = Console()
    if chosen.refresh:
        write(in_order(rows))
        return
    for model in chosen.model or MODELS:
        for card_gib in chosen.card or CARDS_GIB:
            started = time.perf_counter()
            row = measure(model, card_gib)
            rows[model, card_gib] = row
            write(in_order(rows))
            said = f"{row.traced_lowvram_tokens:,} tokens, plain {row.traced_plain_tokens:,}"
            console.print(f"{model}, {card_gib} GB: {said} ({time.perf_counter() - started:.0f} s)")
    Console(width=160).print(table(in_order(rows)))


if __name__ == "__main__":
    main()
