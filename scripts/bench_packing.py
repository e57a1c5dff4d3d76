#!/usr/bin/env python3
"""Rows that lowvram, TRL and torchtune make of the same examples, the others each in its own environment.

    python scripts/bench_packing.py [--data FILE] [--row-tokens 2048] [--work FOLDER]

Examples are GSM8K's test rows in SmolLM2's tokens and chat template. Writes benchmarks/packing.csv: rows,
the share of them that is filled, rows that begin within an example, tokens lost, and seconds of the packing
alone. The others' own code is called (scripts/pack_others.py). Needs PyPI, no GPU, 2 minutes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench_rows import here, write
from compare_estimators import BENCH, ROOT, environment, version_of
from trace_others import PROJECTS

from lowvram import __version__
from lowvram.data.conversations import load_conversations
from lowvram.data.order import batches_of_epoch
from lowvram.data.packed_order import pack
from lowvram.data.tokens import tokenize
from lowvram.demo.model import demo_model
from lowvram.engine.source import ModelSource

GSM8K = ROOT.parent / "shared" / "data" / "gsm8k-test.jsonl"
_EXAMPLES_A_STEP = 16


def ours(lengths: list[int], row_tokens: int) -> Iterator[dict[str, Any]]:
    """All rows at once, and as training deals them to steps, whose tokens are spread over equal rows."""
    started = time.perf_counter()
    packed = pack(range(len(lengths)), lengths, row_tokens, 1)
    yield {"method": "pack", "rows": len(packed), "seconds": round(time.perf_counter() - started, 3)}
    started = time.perf_counter()
    steps = batches_of_epoch(
        lengths, micro_batch=1, accumulation=_EXAMPLES_A_STEP, seed=0, epoch=1, packed_tokens=row_tokens
    )
    yield {
        "method": f"order of {len(steps)} steps of {_EXAMPLES_A_STEP} examples",
        "rows": sum(map(len, steps)),
        "seconds": round(time.perf_counter() - started, 3),
    }


def others(examples: list[list[int]], row_tokens: int, work: Path) -> Iterator[dict[str, Any]]:
    """Of TRL and torchtune, in the versions whose memory scripts/trace_others.py traces.

    Raises:
        CalledProcessError: what the project said is on stderr.
    """
    file = work / "examples.json"
    file.write_text(json.dumps(examples), encoding="utf-8")
    for project in PROJECTS:
        needed = [one for one in project.requirements if one != str(ROOT)]
        venv = environment(project.package, needed, work)
        script = [f"{venv}/bin/python", f"{ROOT}/scripts/pack_others.py", project.package]
        done = subprocess.run(
            [*script, str(file), str(row_tokens)], capture_output=True, text=True, check=True
        )
        for line in done.stdout.splitlines():
            if line.startswith("{"):
                yield {
                    "project": project.package,
                    "version": version_of(project.package, venv),
                    **json.loads(line),
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, default=GSM8K)
    parser.add_argument("--row-tokens", type=int, default=2048)
    parser.add_argument("--work", type=Path, help="keep the environments here, not in a temporary folder")
    asked = parser.parse_args()
    tokenizer = ModelSource(demo_model(print)).tokenizer
    made = tokenize(load_conversations(str(asked.data)).conversations, tokenizer)
    examples = [list(example.input_ids) for example in made]
    lengths, tokens = [len(example) for example in examples], sum(map(len, examples))
    mine = {"project": "lowvram", "version": __version__, "filled": tokens, "cut": 0, "lost": 0}
    with tempfile.TemporaryDirectory() as temporary:
        work = (asked.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        found = [mine | row for row in ours(lengths, asked.row_tokens)]
        found += others(examples, asked.row_tokens, work)
    write([_record(row, asked, len(examples)) for row in found], BENCH / "packing.csv")


def _record(row: dict[str, Any], asked: argparse.Namespace, n_examples: int) -> dict[str, Any]:
    return {
        "project": row["project"],
        "version": row["version"],
        "method": row["method"],
        "data": asked.data.name,
        "examples": n_examples,
        "row_tokens": asked.row_tokens,
        "rows": row["rows"],
        "filled_percent": round(100 * row["filled"] / (row["rows"] * asked.row_tokens), 2),
        "rows_that_begin_within_an_example": row["cut"],
        "tokens_lost": row["lost"],
        "seconds": row["seconds"],
        **here(),
    }


if __name__ == "__main__":
    main()
