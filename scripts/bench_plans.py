#!/usr/bin/env python3
"""Plans each reference model on its card with the planner itself, and times the search.

    PYTHONPATH=. python scripts/bench_plans.py [--searches N] [--refresh]

The shipped profile of the card, a desktop's 0.7 GiB of context and 0.4 GiB held by others, the models' shapes
from the shipped table. Liger's kernels are off, so that the rows do not hang on what is installed here.
Everything is predicted: scripts/gpu_check.py is what runs plans on a GPU. The search is timed alone, in a
process for each pair, after imports, with no trace remembered; --searches adds runs to those of the file.
Writes benchmarks/plans.csv and the README's table.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import bench_rows
from rich.console import Console

from lowvram.alloc_conf import set_alloc_conf
from lowvram.engine.config import StepConfig
from lowvram.engine.known_models import known_config
from lowvram.engine.source import ModelSource
from lowvram.hardware import card_of_size, probe
from lowvram.memory.cache import RememberedModel
from lowvram.planner.build import decide, search_for
from lowvram.planner.choice import choose
from lowvram.planner.first_step import Request, first_step
from lowvram.planner.plan import Plan
from lowvram.planner.profiles import profile_for
from lowvram.planner.search import Search
from lowvram.planner.survey import survey, tokens_said
from lowvram.planner.wishes import Wishes
from lowvram.units import GiB, format_bytes, format_count

ROOT = Path(__file__).parents[1]
FILE = ROOT / "benchmarks" / "plans.csv"
README = ROOT / "README.md"
START, END = "<!-- plans: by scripts/bench_plans.py -->\n", "<!-- end of plans -->\n"
HOST_BYTES = 32 * GiB  # free host memory beside the card: the machine that plans is not the one that trains
_RUNS = 3  # of each search


class Pair(NamedTuple):
    """A model, and the smallest card that it is meant to be trained on."""

    model: str
    card_gib: int

    def __str__(self) -> str:
        return f"{self.model.rsplit('/')[-1]} on {self.card_gib} GB"


PAIRS = (
    Pair("Qwen/Qwen2-7B", 8),
    Pair("meta-llama/Llama-3.1-8B", 8),
    Pair("mistralai/Mistral-7B-v0.1", 8),
    Pair("meta-llama/Llama-2-13b-hf", 12),
    Pair("Qwen/Qwen2.5-14B", 12),
    Pair("Qwen/Qwen2.5-14B", 16),
    Pair("huggyllama/llama-30b", 24),
    Pair("Qwen/Qwen2.5-32B", 24),
)


@dataclass(frozen=True)
class Searched:
    """What the search decided, and what it took."""

    step: StepConfig
    search: Search
    seconds: float
    cpu_seconds: float  # of this process alone: neighbours lengthen the other
    traces: int


@contextmanager
def request_for(pair: Pair) -> Iterator[Request]:
    """By the shipped profile. The model's folder holds its config.json, from the shipped table."""
    config = known_config(pair.model)
    assert config is not None
    host = {"backend": "cpu", "host_total_bytes": HOST_BYTES, "host_free_bytes": HOST_BYTES}
    card = card_of_size(pair.card_gib * GiB, probe(trial=False).model_copy(update=host))
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        yield Request(ModelSource(folder), card, profile_for(card), Wishes(levers="liger=off"))


def searched(request: Request) -> Searched:
    """The planner's search alone, as `decide` runs it: candidates, traces, choice."""
    said: list[str] = []
    model = RememberedModel(request.source)
    search, base = search_for(request, model, said.append), first_step(request, model.shape)
    started, started_cpu = time.perf_counter(), time.process_time()
    step = choose(search, base, request)
    seconds, cpu = time.perf_counter() - started, time.process_time() - started_cpu
    return Searched(step, search, round(seconds, 2), round(cpu, 2), len(said))


def predicted(pair: Pair, request: Request) -> dict[str, Any]:
    """The columns that are the same on every machine: the plan, and what else would fit."""
    plan, search = decide(request)
    around = survey(plan, request.hardware, search)
    card = next(card for card in around.cards if card.total_bytes == request.hardware.total_bytes)
    return {
        **of_step(pair, plan.step, search),
        "host_bytes": plan.host_ram_bytes,
        "largest_rank": around.largest_rank,
        "longest_as_planned": plan.largest_seq_len,
        "longest_every_lever": tokens_said(card, around).replace(",", ""),
        **_pace(plan, search),
    }


def of_step(pair: Pair, step: StepConfig, search: Search) -> dict[str, Any]:
    """Columns of the step and its memory."""
    shape, estimate = search.model.shape, search.estimate(step)
    return {
        "model": pair.model,
        "parameters": shape.n_parameters,
        "card_gib": pair.card_gib,
        "rank": step.rank,
        "alpha": step.alpha,
        "dropout": step.dropout,
        "seq_len": step.seq_len,
        "base_precision": step.base_precision,
        "batch": f"{step.micro_batch} x {step.accumulation}",
        "levers": levers_said(step, shape.n_layers),
        "peak_allocated_bytes": estimate.peak_allocated_bytes,
        "peak_reserved_bytes": estimate.peak_reserved_bytes,
        "budget_bytes": search.budget_bytes,
        "left_bytes": search.budget_bytes - estimate.peak_reserved_bytes,
        "load_bytes": estimate.phases_bytes["load"],
        "peak_phase": estimate.peak_moment.split(",")[0],
    }


def levers_said(step: StepConfig, n_layers: int) -> str:
    """Those that are on, in a few words each."""
    levers = step.levers
    kept = f"recompute {n_layers - levers.kept_layers} of {n_layers} layers"
    on = {
        "double quantisation": levers.double_quantization and step.base_precision == "nf4",
        kept: levers.gradient_checkpointing,
        f"logits of {levers.loss_chunk_tokens:,}": True,
        "embedding on host": levers.embedding_on_host,
        f"{levers.head} head": levers.head != "16bit",
        "paged 8-bit AdamW": step.optimizer == "paged_adamw8bit",
        "paged AdamW": step.optimizer == "paged_adamw",
        "checkpoints on host": levers.offload_checkpoints,
        f"tiles of {levers.tile_tokens:,}": levers.tile_tokens > 0,
    }
    return ", ".join(name for name, is_on in on.items() if is_on)


def _pace(plan: Plan, search: Search) -> dict[str, Any]:
    """Modelled, with where the device's rates are from."""
    tokens = plan.effective_batch * plan.seq_len
    return {
        "modelled_seconds_per_step": plan.seconds_per_step,
        "modelled_tokens_per_second": round(tokens / plan.seconds_per_step, 1),
        "device_rates": search.time.rates.source,
    }


def planned_row(pair: Pair) -> dict[str, Any]:
    """The columns of a pair's plan."""
    with request_for(pair) as request:
        return predicted(pair, request)


def search_row(pair: Pair) -> dict[str, Any]:
    """The columns of one search that remembers nothing."""
    with tempfile.TemporaryDirectory() as cache, request_for(pair) as request:
        os.environ["LOWVRAM_CACHE"] = cache  # of this process, which ends with the row
        _import_everything(request)
        found, load = searched(request), round(os.getloadavg()[0], 1)
        return {
            "search_seconds": found.seconds,
            "search_cpu_seconds": found.cpu_seconds,
            "search_traces": found.traces,
            "load": load,
            **bench_rows.here(*bench_rows.LIBRARIES),
        }


def _import_everything(request: Request) -> None:
    """A trace of another model: what it imports and what torch sets up is no part of the search."""
    from transformers import LlamaConfig

    from lowvram.memory.estimate import estimate

    small = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=512
    )
    estimate(small, StepConfig(seq_len=64), "cuda", request.hardware.capability)


def earlier_rows() -> list[dict[str, Any]]:
    """The committed rows, all cells as text."""
    with FILE.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def block(rows: list[dict[str, Any]]) -> str:
    """The README's table and what the search took, markers included."""
    lines = [
        "| model | card | LoRA | tokens | reserved of budget | levers that are on | longest context |",
        "|---|---|---|---|---|---|---|",
        *map(_line, rows),
    ]
    return START + "\n".join([*lines, "", _search_said(rows), END])


def _line(row: dict[str, Any]) -> str:
    name = f"{row['model'].rsplit('/')[-1]}, {format_count(int(row['parameters']))}"
    reserved, budget = (format_bytes(int(row[f"{key}_bytes"])) for key in ("peak_reserved", "budget"))
    most = str(row["longest_every_lever"])
    most = f"{int(most.rstrip('+')):,}{'+' if most.endswith('+') else ''}"
    cells = (
        name,
        f"{row['card_gib']} GB",
        f"r={row['rank']}, alpha {float(row['alpha']):g}",
        f"{int(row['seq_len']):,}",
        f"{reserved} of {budget}",
        row["levers"],
        f"{int(row['longest_as_planned']):,}; {most}",
    )
    return f"| {' | '.join(cells)} |"


def _search_said(rows: list[dict[str, Any]]) -> str:
    """From the fastest to the slowest."""
    seconds, cpu, loads = (
        sorted(float(row[name]) for row in rows) for name in ("search_seconds", "search_cpu_seconds", "load")
    )
    traces, runs = (sorted(int(row[name]) for row in rows) for name in ("search_traces", "search_runs"))
    best_of = f"{runs[0]}" if runs[0] == runs[-1] else f"{runs[0]} to {runs[-1]}"
    return (
        f"A search takes {seconds[0]:.1f} to {seconds[-1]:.1f} s and {traces[0]} to {traces[-1]} traces, "
        "after imports, none remembered\n"
        f"({rows[0]['machine']}, best of {best_of} runs beside busy neighbours, "
        f"load {loads[0]:.1f} to {loads[-1]:.1f}; CPU time {cpu[0]:.1f} to {cpu[-1]:.1f} s)."
    )


def write_readme(rows: list[dict[str, Any]]) -> None:
    """Only what is between the markers."""
    before, rest = README.read_text(encoding="utf-8").split(START)
    README.write_text(before + block(rows) + rest.split(END)[1], encoding="utf-8")


def plans(console: Console) -> list[dict[str, Any]]:
    """One after another, each in a process of its own."""
    rows = []
    for pair, row in zip(PAIRS, _alone(planned_row), strict=True):
        rows.append(row)
        console.print(f"{pair}: {format_bytes(row['left_bytes'])} left, {row['levers']}")
    return rows


def with_searches(rows: list[dict[str, Any]], console: Console) -> list[dict[str, Any]]:
    """Each pair's search once more; the fastest run so far counts, for neighbours only lengthen it."""
    found = []
    for pair, row, new in zip(PAIRS, rows, _alone(search_row), strict=True):
        runs = int(row.get("search_runs", 0)) + 1
        faster = runs == 1 or new["search_seconds"] < float(row["search_seconds"])
        found.append(row | (new if faster else {}) | {"search_runs": runs})
        said = f"{new['search_seconds']} s, {new['search_cpu_seconds']} s of CPU time"
        console.print(f"{pair}: {said}, {new['search_traces']} traces, load {new['load']}")
    return found


def _alone(work: Callable[[Pair], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A fresh process for each pair: what one has built would speed up the next."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        yield from pool.imap(work, PAIRS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--searches", type=int, help="only so many more searches of each pair, no new plan")
    parser.add_argument("--refresh", action="store_true", help="the README's table from the CSV; no trace")
    chosen, console = parser.parse_args(), Console(width=160)
    set_alloc_conf()  # as the command line does: host memory is counted by it
    again = chosen.refresh or chosen.searches is not None
    rows = earlier_rows() if again else plans(console)
    for _ in range(0 if chosen.refresh else chosen.searches or _RUNS):
        rows = with_searches(rows, console)
        bench_rows.write(rows, FILE)  # after each round: a run that is cut off has those before
    write_readme(earlier_rows())


if __name__ == "__main__":
    main()
