#!/usr/bin/env python3
"""Longest contexts of TRL's and torchtune's QLoRA steps, traced, each in an environment of its own.

    python scripts/trace_others.py [--work FOLDER] [--project NAME] [--model NAME] [--option NAME]

Rank 32 on all linear layers, one sequence, NF4, bf16, checkpointing, and what each project has against
memory. Budgets are those of scripts/bench_context.py. Writes benchmarks/context_others.csv; a run of one
project or model replaces its rows. Needs PyPI, no GPU, no weights; a project and model take 1 to 10
minutes.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from compare_estimators import BENCH, ROOT, environment, version_of
from estimator_tools import TORCH

FILE = BENCH / "context_others.csv"
OPTIONS = ("defaults", "activation_offloading")  # what the project does unasked, and with this besides


@dataclass(frozen=True)
class Project:
    """What is installed, which script traces it, and which models it is asked about."""

    package: str
    requirements: list[str]
    script: str
    models: tuple[str, ...]


QWEN = ("Qwen/Qwen2-7B", "Qwen/Qwen2.5-14B", "Qwen/Qwen2.5-32B")
LLAMA = "meta-llama/Llama-3.1-8B"
# torchao 0.15 is the newest that torchtune 0.6.1 imports with: 0.16 has no int4_weight_only.
PROJECTS = (
    Project(
        package="trl",
        requirements=[TORCH, str(ROOT), "trl==1.16.0"],
        script="trace_trl.py",
        models=(LLAMA, *QWEN, "google/gemma-3-12b-pt"),
    ),
    Project(
        package="torchtune",
        requirements=[TORCH, str(ROOT), "torchtune==0.6.1", "torchao==0.15.0"],
        script="trace_torchtune.py",
        models=(LLAMA, *QWEN),
    ),
)


@dataclass(frozen=True)
class Row:
    """The longest context of one step on one card."""

    model: str
    card_gib: int
    project: str
    version: str
    options: str
    traced_tokens: int
    torch: str

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.model, self.project, self.options, self.card_gib


def measure(project: Project, model: str, option: str, venv: Path) -> Iterator[Row]:
    """One row for each card.

    Raises:
        CalledProcessError: the trace failed; what it said is on stderr.
    """
    command = [f"{venv}/bin/python", f"{ROOT}/scripts/{project.script}", model, "--option", option]
    settings = {"PYTHONPATH": f"{ROOT}:{ROOT}/scripts", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, env={**os.environ, **settings}, stdout=subprocess.PIPE, text=True, check=True
    )
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            yield Row(
                model=model,
                project=project.package,
                version=version_of(project.package, venv),
                options=option,
                torch=version_of("torch", venv),
                **json.loads(line),
            )


def earlier_rows() -> dict[tuple[str, str, str, int], Row]:
    """What earlier runs wrote."""
    if not FILE.exists():
        return {}
    with FILE.open(newline="", encoding="utf-8") as handle:
        rows = [Row(**{k: _parsed(k, v) for k, v in line.items()}) for line in csv.DictReader(handle)]
    return {row.key: row for row in rows}


def _parsed(name: str, text: str) -> int | str:
    return int(text) if name in ("card_gib", "traced_tokens") else text


def write(rows: dict[tuple[str, str, str, int], Row]) -> None:
    models = [model for project in PROJECTS for model in project.models]
    projects = [project.package for project in PROJECTS]

    def place(row: Row) -> tuple[int, ...]:
        option = OPTIONS.index(row.options)
        return models.index(row.model), projects.index(row.project), option, row.card_gib

    ordered = sorted(rows.values(), key=place)
    with FILE.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(Row.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, ordered))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, help="keep the environments here, not in a temporary folder")
    parser.add_argument("--project", choices=[p.package for p in PROJECTS], action="append")
    parser.add_argument("--model", choices=PROJECTS[0].models, action="append")
    parser.add_argument("--option", choices=OPTIONS, action="append")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (asked.work or Path(temporary)).resolve()
        for project in PROJECTS:
            if project.package in (asked.project or [project.package]):
                models = [m for m in project.models if m in (asked.model or project.models)]
                run(project, models, asked.option or OPTIONS, work)


def run(project: Project, models: list[str], options: Iterable[str], work: Path) -> None:
    """A project's models, written as they come."""
    venv = environment(project.package, project.requirements, work)
    for model in models:
        for option in options:
            rows = {row.key: row for row in measure(project, model, option, venv)}
            write(earlier_rows() | rows)
            tokens = ", ".join(f"{row.card_gib} GB {row.traced_tokens:,}" for row in rows.values())
            print(f"{project.package}, {model}, {option}: {tokens}", flush=True)


if __name__ == "__main__":
    main()
