#!/usr/bin/env python3
"""Trains SmolLM2-135M on GSM8K with TRL's SFTTrainer and with lowvram, and compares loss, time and memory.

    python scripts/bench_training.py [--steps N] [--rounds N] [--settings] [--work FOLDER]

NF4 base and LoRA of the cpu profile; the same tokens, loss mask, order of examples, optimizer steps,
schedule, learning rate, dropout and adapter start. Each round is a whole training of each, one after the
other, in processes of their own, from the round's seed; which comes first alternates. TRL runs in its own
environment with the fastest of SETTINGS, which --settings times anew (training_settings.csv). lowvram runs
its own plan.

Tokens a second (without padding) are of all steps between the ends of the first and of the last but one, with
everything that the loops do between steps. Peak memory is the whole process's, loading included. Held-out
loss is measured by scripts/judge_adapters.py, by plain peft, for both. Rounds that are in
benchmarks/training.csv for these steps are not made again. Needs PyPI, no GPU; a round takes 5 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_rows import LIBRARIES, here, ratios, read, write
from compare_estimators import BENCH, ROOT, environment, version_of
from trace_others import PROJECTS

from lowvram import hardware, planning
from lowvram.data.tokens import Example
from lowvram.demo.model import demo_model
from lowvram.engine.source import ModelSource
from lowvram.planner.plan import Plan
from lowvram.planner.profiles import profile_for
from lowvram.planner.wishes import Wishes
from lowvram.training.data import TrainingData, prepare, training_data
from lowvram.units import MiB

DATA = ROOT.parent / "shared" / "data" / "gsm8k-test.jsonl"
FILE, TRIED = BENCH / "training.csv", BENCH / "training_settings.csv"
BATCH = 8  # examples in an optimizer step: the cpu profile's
TRIAL_STEPS = MIN_STEPS = 4
TRIAL_SECONDS = 600  # 15 times what TRIAL_STEPS take with the fastest setting
HELD_OUT_SHARE = 0.025  # 33 rows, 4,700 trained tokens: lowvram reads them twice, the judge three times

# SFTConfig's, of what its documentation says of speed and memory and what runs on a CPU without the hub. Not
# among them: use_liger_kernel (Triton), use_kernels (the hub), packing (other steps than lowvram's: with
# padding_free the same rows are made of each micro-batch).
PLAIN = {"dtype": "bfloat16", "bf16": True, "gradient_checkpointing": False, "micro_batch": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "bf16, autocast": PLAIN,
    "bf16, autocast, micro-batch 4": {**PLAIN, "micro_batch": 4},
    "bf16, autocast, micro-batch 8": {**PLAIN, "micro_batch": 8},
    "bf16, autocast, micro-batch 1": {**PLAIN, "micro_batch": 1},
    "bf16, no autocast": {**PLAIN, "bf16": False},
    "bf16, no autocast, micro-batch 4": {**PLAIN, "bf16": False, "micro_batch": 4},
    "bf16, no autocast, padding-free": {**PLAIN, "bf16": False, "padding_free": True},
    "bf16, no autocast, a loader's process": {**PLAIN, "bf16": False, "dataloader_num_workers": 1},
    "bf16, no autocast, checkpointing": {**PLAIN, "bf16": False, "gradient_checkpointing": True},
    "fp32": {**PLAIN, "dtype": "float32", "bf16": False},
    "bf16, no autocast, torch.compile": {**PLAIN, "bf16": False, "torch_compile": True},
}
BEST = "bf16, autocast, micro-batch 4"


@dataclass(frozen=True)
class Task:
    """What both are asked to do: lowvram's plan, and its order of examples as files."""

    plan: Plan
    data: TrainingData
    folder: Path

    @property
    def rows_file(self) -> Path:
        return self.folder / "rows.json"

    @property
    def held_out_file(self) -> Path:
        return self.folder / "held_out.json"

    @property
    def tokens_of_steps(self) -> list[int]:
        steps = (micro_batches for _, micro_batches in self.data.steps_from(0))
        return [sum(map(len, (e for micro_batch in step for e in micro_batch))) for step in steps]


def task_for(source: ModelSource, steps: int, seed: int, folder: Path) -> Task:
    """Plan as a user would, evaluate and save at the end only, and write down what is read when."""
    device = hardware.probe(trial=False)
    wishes = Wishes(precision="nf4", batch=BATCH, steps=steps, seed=seed)
    planned = planning.plan_for(source, str(DATA), device, profile_for(device), wishes, lambda _: None)
    once = {"evaluate_every": steps, "save_every": steps, "held_out_share": HELD_OUT_SHARE}
    plan = planned.plan.model_copy(update=once)
    prepared = prepare(str(DATA), source, plan.held_out_share, plan.reading)
    task = Task(plan, training_data(plan, prepared, 0), folder)
    (folder / "plan.yaml").write_text(plan.to_yaml(), encoding="utf-8")
    in_order = [e for _, step in task.data.steps_from(0) for micro_batch in step for e in micro_batch]
    task.rows_file.write_text(json.dumps(list(map(_row, in_order))), encoding="utf-8")
    task.held_out_file.write_text(json.dumps(list(map(_row, task.data.held_out))), encoding="utf-8")
    return task


def _row(example: Example) -> dict[str, list[int]]:
    ids = list(example.input_ids)
    labels = [token if trained else -100 for token, trained in example.tokens()]
    return {"input_ids": ids, "labels": labels}


def job_of(task: Task, output: Path, setting: dict[str, Any]) -> dict[str, Any]:
    """What train_once.py reads."""
    same = ("model", "seed", "schedule", "learning_rate", "warmup_steps", "weight_decay", "max_grad_norm")
    adapter = ("rank", "alpha", "dropout", "target_modules")
    micro_batch = setting["micro_batch"]
    batch = {
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": task.plan.effective_batch // micro_batch,
    }
    return {
        **task.plan.model_dump(mode="json", include={*same, *adapter}),
        "double_quantization": task.plan.levers.double_quantization,
        "steps": task.plan.total_steps,
        "plan": str(task.folder / "plan.yaml"),
        "rows": str(task.rows_file),
        "output": str(output),
        "setting": {**{k: v for k, v in setting.items() if k != "micro_batch"}, **batch},
    }


def trained(
    who: str, python: Path, task: Task, setting: dict[str, Any], limit_seconds: float | None = None
) -> dict[str, Any]:
    """One training in a process of its own: tokens a second, peak bytes and the adapter's folder.

    Raises:
        RuntimeError: it failed, or took longer than `limit_seconds`.
    """
    output = Path(tempfile.mkdtemp(dir=task.folder)) / "run"
    file = output.parent / "job.json"
    file.write_text(json.dumps(job_of(task, output, setting)), encoding="utf-8")
    quiet = {"HF_HUB_OFFLINE": "1", "DATASETS_VERBOSITY": "critical", "TRANSFORMERS_VERBOSITY": "error"}
    call = [str(python), str(ROOT / "scripts" / "train_once.py"), who, str(file)]
    variables = {**os.environ, **quiet}
    try:
        done = subprocess.run(call, capture_output=True, text=True, env=variables, timeout=limit_seconds)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"not finished after {limit_seconds} s") from error
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    ends, tokens = answer["ends"], task.tokens_of_steps
    if len(ends) != len(tokens):
        raise RuntimeError(f"{who} made {len(ends)} steps of {len(tokens)}")
    seconds = ends[-2] - ends[0]
    answer["tokens_per_s"] = round(sum(tokens[1:-1]) / seconds, 1)
    answer["s_per_step"] = round(seconds / (len(ends) - 2), 3)
    return answer


def judged(source: ModelSource, task: Task, adapters: list[str]) -> list[float]:
    """Held-out losses of the base alone and of each adapter."""
    call = [sys.executable, str(ROOT / "scripts" / "judge_adapters.py"), source.name]
    done = subprocess.run([*call, str(task.held_out_file), *adapters], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    losses: list[float] = json.loads(done.stdout.splitlines()[-1])
    return [round(loss, 5) for loss in losses]


def a_round(source: ModelSource, steps: int, seed: int, venv: Path) -> dict[str, Any]:
    """A row of the table."""
    pythons = {"lowvram": Path(sys.executable), "trl": venv / "bin" / "python"}
    with tempfile.TemporaryDirectory() as folder:
        task = task_for(source, steps, seed, Path(folder))
        order = list(pythons) if seed % 2 == 0 else list(reversed(pythons))
        found = {who: trained(who, pythons[who], task, SETTINGS[BEST]) for who in order}
        losses = judged(source, task, [found[who]["adapter"] for who in pythons])
    ours, theirs = found["lowvram"], found["trl"]
    return {
        "round": seed,
        "steps": steps,
        "examples_per_step": task.plan.effective_batch,
        "tokens": sum(task.tokens_of_steps),
        "trained_tokens": sum(e.n_trained for _, step in task.data.steps_from(0) for m in step for e in m),
        "lowvram_tokens_per_s": ours["tokens_per_s"],
        "trl_tokens_per_s": theirs["tokens_per_s"],
        "ratio": round(ours["tokens_per_s"] / theirs["tokens_per_s"], 3),
        "lowvram_peak_bytes": ours["peak_bytes"],
        "trl_peak_bytes": theirs["peak_bytes"],
        **dict(zip(("held_out_loss_before", "lowvram_loss", "trl_loss"), losses, strict=True)),
        "lowvram_micro_batch": task.plan.micro_batch,
        "trl_setting": BEST,
        "trl": version_of("trl", venv),
        **here(*LIBRARIES),
    }


def try_settings(source: ModelSource, venv: Path) -> None:
    """A few steps with each of TRL's settings; one that fails or takes too long has no numbers."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        task = task_for(source, TRIAL_STEPS, 0, Path(folder))
        for name, setting in SETTINGS.items():
            try:
                found = trained("trl", venv / "bin" / "python", task, setting, TRIAL_SECONDS)
            except RuntimeError as error:
                print(f"{name}: {error}")
                found = {}
            numbers = {key: found.get(key) for key in ("tokens_per_s", "s_per_step", "peak_bytes")}
            about = {"trl": version_of("trl", venv), **here(*LIBRARIES)}
            rows.append({"setting": name, "micro_batch": setting["micro_batch"], **numbers, **about})
            print(rows[-1], flush=True)
            write(rows, TRIED)


def summary(rows: list[dict[str, Any]]) -> str:
    """Medians over the rounds, and the targets beside them."""
    speeds = [[float(r["trl_tokens_per_s"]), float(r["lowvram_tokens_per_s"])] for r in rows]
    found = ratios(speeds)
    ours, theirs = (statistics.mean(float(r[f"{who}_loss"]) for r in rows) for who in ("lowvram", "trl"))
    peaks = [max(int(r[f"{who}_peak_bytes"]) for r in rows) / MiB for who in ("lowvram", "trl")]
    lowest, highest = found["lowest_ratio"], found["highest_ratio"]
    return (
        f"{found['rounds']} rounds, {rows[0]['machine']}\n"
        f"tokens/s: ratio {found['ratio']}, {lowest} to {highest} (at least 1.2)\n"
        f"held-out loss: {ours:.4f} against {theirs:.4f}, {ours / theirs - 1:+.2%} (at most +1%)\n"
        f"peak host memory: {peaks[0]:.0f} against {peaks[1]:.0f} MiB (at most theirs)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--settings", action="store_true", help="only time TRL's settings")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "lowvram-bench-training")
    options = parser.parse_args()
    if options.steps < MIN_STEPS:
        parser.error(
            f"--steps {options.steps}: the first and the last are not timed, use {MIN_STEPS} or more"
        )
    project = PROJECTS[0]
    venv = environment(project.package, project.requirements, options.work)
    source = ModelSource(demo_model(print))
    if options.settings:
        try_settings(source, venv)
        return
    known = read(FILE)
    rows = [row for row in known if int(row["steps"]) == options.steps]
    others = [row for row in known if row not in rows]
    for seed in range(len(rows), options.rounds):
        rows.append(a_round(source, options.steps, seed, venv))
        print(rows[-1], flush=True)
        write([*others, *rows], FILE)
    print(summary(rows))


if __name__ == "__main__":
    main()
