#!/usr/bin/env python3
"""Preparing data, lowvram against TRL: the same rows, tokenizer and processes: benchmarks/data.csv

    python scripts/bench_data.py MODEL [--rows N] [--rounds N] [--processes N] [--shape NAME] [--work FOLDER]

MODEL is a folder with a fast tokenizer. GSM8K's rows (shared/data) are repeated with a number in front, as
chat messages and as prompt and completion. Both read the same JSON lines and stop when token ids and mask of
every row are on disk: lowvram by `prepare`, TRL by load_dataset and SFTTrainer's own _prepare_dataset. TRL
is timed without its start-up, its trainer and its collator; lowvram with its checks, hashes and held-out
split. Rounds are interleaved, each with empty caches. Needs PyPI, no GPU, no weights.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_rows import here, ratios, read, write
from compare_estimators import BENCH, ROOT, environment, version_of
from estimator_tools import TORCH

TRL = "trl==1.16.0"
FILE = BENCH / "data.csv"
SHAPES = ("messages", "prompt-completion")
SOURCE = ROOT.parent / "shared" / "data" / "gsm8k-test.jsonl"


def rows_of(shape: str, count: int) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in SOURCE.read_text(encoding="utf-8").splitlines()]
    numbered = ((at, rows[at % len(rows)]) for at in range(count))
    return [_row(shape, f"({at}) {row['question']}", row["answer"]) for at, row in numbered]


def _row(shape: str, question: str, answer: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if shape == "messages":
        return {"messages": turns}
    return {"prompt": turns[:1], "completion": turns[1:]}


def timed(python: Path, script: str, file: Path, model: str, processes: int) -> dict[str, Any]:
    """What one preparation in a process of its own says, with nothing remembered.

    Raises:
        RuntimeError: it failed.
    """
    with tempfile.TemporaryDirectory() as empty:
        settings = {
            "LOWVRAM_CACHE": empty,
            "HF_HOME": empty,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "true" if script == "lowvram" else "false",
            "DATASETS_VERBOSITY": "critical",
        }
        call = [str(python), str(ROOT / "scripts" / "prepare_once.py"), script]
        call += [str(file), model, str(processes)]
        done = subprocess.run(call, capture_output=True, text=True, env={**os.environ, **settings})
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(shape: str, options: argparse.Namespace, venv: Path) -> dict[str, Any]:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows_of(shape, options.rows)))
        rounds = []
        for number in range(options.rounds):
            sides = [("lowvram", Path(sys.executable)), ("trl", venv / "bin" / "python")]
            found = {
                name: timed(python, name, file, options.model, options.processes)
                for name, python in (sides if number % 2 == 0 else reversed(sides))
            }
            print(shape, found, flush=True)
            rounds.append(found)
    seconds = [[r["lowvram"]["seconds"], r["trl"]["seconds"]] for r in rounds]
    ours, theirs = (statistics.median(column) for column in zip(*seconds, strict=True))
    tokens = rounds[0]["lowvram"]["tokens"]
    return {
        "shape": shape,
        "rows": options.rows,
        "processes": options.processes,
        "lowvram_tokens": tokens,
        "trl_tokens": rounds[0]["trl"]["tokens"],
        "lowvram_trained": rounds[0]["lowvram"]["trained"],
        "trl_trained": rounds[0]["trl"]["trained"],
        "lowvram_s": round(ours, 2),
        "trl_s": round(theirs, 2),
        "lowvram_rows_per_s": round(options.rows / ours),
        "trl_rows_per_s": round(options.rows / theirs),
        "lowvram_tokens_per_s": round(tokens / ours),
        "trl_tokens_per_s": round(rounds[0]["trl"]["tokens"] / theirs),
        **ratios(seconds),
        "lowvram_cpu_s": statistics.median(r["lowvram"]["cpu_seconds"] for r in rounds),
        "trl_cpu_s": statistics.median(r["trl"]["cpu_seconds"] for r in rounds),
        "trl": version_of("trl", venv),
        **here("datasets", "transformers", "tokenizers"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "lowvram-bench-data")
    options = parser.parse_args()
    options.model = str(Path(options.model).resolve())
    venv = environment("trl", [TORCH, TRL, str(ROOT)], options.work)
    records = {row["shape"]: row for row in read(FILE)}
    for shape in [options.shape] if options.shape else SHAPES:
        records[shape] = compare(shape, options, venv)
        write([records[name] for name in SHAPES if name in records], FILE)


if __name__ == "__main__":
    main()
