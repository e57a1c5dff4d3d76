"""Trains SmolLM2-135M on GSM8K by each way of adapting it, and compares held-out losses, time and memory.

    PYTHONPATH=. python scripts/bench_adapters.py [--tokens N] [--seeds N] [--only METHOD ...] [--refresh]

Every method reads the same examples in the same order for the same number of tokens, at rank 8 on all linear
layers with alpha 16 and dropout 0.05, 4 examples a step, AdamW, a tenth of the steps to warm up, then cosine.
Its learning rate is the one of a small grid, the same for all, with the least loss on a validation split at
seed 0 (the grid is longer where the least is at its end); with that rate it is trained from each seed, and
the loss on a test split counts. Rows that are in
benchmarks/adapters.csv already are not made again, so it may be stopped at any time. --refresh only writes
the README's table of the rows that are there.

"lora_ga by peft" is peft's own LoRA-GA, which takes a 16-bit base; "lora" and "lora_ga" on that base stand
beside it, at the rates that were the best on NF4, all three on half of the tokens.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from adapter_table import on_16_bits, reference_of, write_table
from bench_rows import LIBRARIES, here, ratios, read, write
from transformers import get_scheduler
from transformers.utils.logging import disable_progress_bar

from lowvram.data.tokens import Example
from lowvram.demo.model import demo_model
from lowvram.engine.adapter_init import Means, initialise
from lowvram.engine.adapters import add_adapters, trainable
from lowvram.engine.batch import Batch, collate
from lowvram.engine.config import Levers, StepConfig
from lowvram.engine.host import Host
from lowvram.engine.model import load
from lowvram.engine.optimizer import make_optimizer
from lowvram.engine.source import ModelSource
from lowvram.engine.step import SummedLoss, evaluate, train_step
from lowvram.engine.weight_init import OriginalWeights
from lowvram.memory.cache import RememberedModel
from lowvram.training.data import prepare

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data" / "gsm8k-test.jsonl"
OUT, TIMES = ROOT / "benchmarks" / "adapters.csv", ROOT / "benchmarks" / "adapter_steps.csv"
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # half a decade apart; tried from the middle outwards
FIRST_RATES = (1e-3, 3e-3)
N_VALIDATION, N_TEST = 32, 64
MICRO_BATCH, EFFECTIVE_BATCH = 4, 4
INIT_BATCHES = 8  # micro-batches, 32 examples: LoRA-GA's own default
A100 = (8, 0)  # for whose kernels the memory is traced

METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "lora_plus": {"lora_plus_ratio": 16.0},
    "dora": {"use_dora": True},
    "eva": {"init": "eva"},
    "lora_ga": {"init": "lora_ga", "use_rslora": True},
    "lora_one": {"init": "lora_one", "use_rslora": True},
    "lora, 16 bits": {"base_precision": "bf16"},
    "lora_ga, 16 bits": {"init": "lora_ga", "use_rslora": True, "base_precision": "bf16"},
    "lora_ga by peft, 16 bits": {"use_rslora": True, "base_precision": "bf16"},
}

TUNED_AS = {"lora, 16 bits": "lora", "lora_ga, 16 bits": "lora_ga"}


@dataclass(frozen=True)
class Split:
    """Examples by what they are for."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]


def split(source: ModelSource) -> Split:
    """The same for every method and seed."""
    prepared = prepare(str(DATA), source)
    rows = [*prepared.train, *prepared.held_out]
    random.Random("lowvram adapters").shuffle(rows)
    held = N_VALIDATION + N_TEST
    return Split(rows[held:], rows[:N_VALIDATION], rows[N_VALIDATION:held])


def tokens_of(method: str, n_tokens: int) -> int:
    """That a training reads: a 16-bit base takes longer on a CPU."""
    return n_tokens // 2 if on_16_bits(method) else n_tokens


def batches(examples: list[Example]) -> list[Batch]:
    """Micro-batches of examples of like length."""
    ordered = sorted(examples, key=len)
    return [collate(ordered[at : at + MICRO_BATCH], 0) for at in range(0, len(ordered), MICRO_BATCH)]


def steps_of(examples: list[Example], n_tokens: int, seed: int) -> list[list[Batch]]:
    """Optimizer steps of a seed's order, until `n_tokens` have been read."""
    order = list(examples)
    random.Random(f"lowvram adapters {seed}").shuffle(order)
    steps, read = [], 0
    for at in range(0, len(order), EFFECTIVE_BATCH):
        if read >= n_tokens:
            break
        step = order[at : at + EFFECTIVE_BATCH]
        read += sum(map(len, step))
        steps.append(batches(step))
    return steps


def step_config(method: str) -> StepConfig:
    """What `method` trains."""
    common = {
        "base_precision": "nf4",
        "rank": 8,
        "alpha": 16,
        "dropout": 0.05,
        "target_modules": LINEARS,
        "seq_len": 512,
        "micro_batch": MICRO_BATCH,
        "accumulation": EFFECTIVE_BATCH // MICRO_BATCH,
        "init_batches": INIT_BATCHES,
        "levers": Levers(gradient_checkpointing=False),
    }
    return StepConfig(**{**common, **METHODS[method]})


@dataclass
class Trial:
    """One model with one method's adapters, ready to train."""

    model: Any
    loss_of: SummedLoss
    step: StepConfig
    init_seconds: float


def prepare_trial(method: str, source: ModelSource, steps: list[list[Batch]], seed: int) -> Trial:
    """Load, adapt, initialise."""
    step = step_config(method)
    base = load(source, step, "cpu")
    torch.manual_seed(seed)
    first = [batch for some in steps for batch in some][: step.init_batches]
    started = time.perf_counter()
    if "by peft" in method:
        from peft_lora_ga import peft_lora_ga

        model = peft_lora_ga(base, step, first)
        loss_of = SummedLoss(model, step)
    else:
        model = add_adapters(base, step)
        loss_of = SummedLoss(model.train(), step)
        means = Means(Host(torch.device("cpu")), seed, OriginalWeights(source))
        initialise(model, loss_of, step, first, means)
    return Trial(model.train(), loss_of, step, time.perf_counter() - started)


def train(trial: Trial, steps: list[list[Batch]], learning_rate: float) -> float:
    """Seconds that all steps took."""
    parameters = trainable(trial.model)
    optimizer = make_optimizer(parameters, trial.step, learning_rate)
    scheduler = get_scheduler("cosine", optimizer, max(1, len(steps) // 10), len(steps))
    started = time.perf_counter()
    for step in steps:
        train_step(trial.loss_of, optimizer, step, max_grad_norm=1.0)
        scheduler.step()
    return time.perf_counter() - started


def traced_bytes(method: str, source: ModelSource) -> int | None:
    """Predicted peak on an Ampere GPU; None for what our engine does not run."""
    if "by peft" in method:
        return None
    remembered = RememberedModel(source)  # a method has many rows
    return remembered.estimate(step_config(method), "cuda", A100).peak_allocated_bytes


def run(
    method: str, rate: float, seed: int, n_tokens: int, source: ModelSource, data: Split
) -> dict[str, Any]:
    """A row: losses before the budget is spent are nobody's business, so only those after it."""
    steps = steps_of(data.train, n_tokens, seed)
    trial = prepare_trial(method, source, steps, seed)
    seconds = train(trial, steps, rate)
    return {
        "method": method,
        "learning_rate": rate,
        "seed": seed,
        "tokens": n_tokens,
        "steps": len(steps),
        "validation_loss": round(evaluate(trial.loss_of, batches(data.validation), "cpu"), 5),
        "test_loss": round(evaluate(trial.loss_of, batches(data.test), "cpu"), 5),
        "seconds": round(seconds, 1),  # with whatever else the machine did: times are another table's
        "init_seconds": round(trial.init_seconds, 1),
        "trainable": sum(p.numel() for p in trainable(trial.model).values()),
        "predicted_peak_bytes": traced_bytes(method, source) or "",
        **here(*LIBRARIES),
    }


def _key(row: dict[str, Any]) -> tuple[str, float, int, int]:
    return row["method"], float(row["learning_rate"]), int(row["seed"]), int(row["tokens"])


@dataclass
class Table:
    """The rows made so far, in a file that is whole after each."""

    rows: list[dict[str, Any]]

    def find(self, method: str, rate: float, seed: int, n_tokens: int) -> dict[str, Any] | None:
        wanted = (method, float(rate), int(seed), int(n_tokens))
        return next((row for row in self.rows if _key(row) == wanted), None)

    def row(
        self, method: str, rate: float, *, seed: int, n_tokens: int, source: ModelSource, data: Split
    ) -> dict[str, Any]:
        found = self.find(method, rate, seed, n_tokens)
        if found is None:
            found = run(method, rate, seed, n_tokens, source, data)
            self.rows.append(found)
            write(self.rows, OUT)
            print({k: found[k] for k in ("method", "learning_rate", "seed", "validation_loss", "test_loss")})
        return found


def tuned_rate(row_at: Callable[[float], dict[str, Any]]) -> float:
    """The rate with the least validation loss, which has a worse neighbour on either side."""
    losses = {rate: float(row_at(rate)["validation_loss"]) for rate in FIRST_RATES}
    while True:
        best = min(losses, key=lambda rate: losses[rate])
        at = RATES.index(best)
        untried = [rate for rate in RATES[max(at - 1, 0) : at + 2] if rate not in losses]
        if not untried:
            return best
        losses |= {rate: float(row_at(rate)["validation_loss"]) for rate in untried}


def times(methods: list[str], rounds: int, source: ModelSource, data: Split) -> None:
    """Seconds of one step of each method, in turns: the machine's other work slows all of them alike."""
    step = steps_of(data.train, 1, seed=0)[0]
    running = {m: train_one(prepare_trial(m, source, [step], 0), step) for m in dict.fromkeys(methods)}
    seconds: dict[str, list[float]] = {method: [] for method in running}
    for number in range(rounds + 1):
        for method, one_step in running.items():
            taken = one_step()
            if number:  # the first round makes the optimizers' states
                seconds[method].append(taken)
    rows = [
        {
            "method": method,
            "rounds": rounds,
            "tokens": sum(batch.input_ids.numel() for batch in step),
            "seconds": round(statistics.median(seconds[method]), 3),
            "ratio": ratios(list(zip(seconds[reference_of(method)], taken, strict=True)))["ratio"],
            **here(*LIBRARIES),
        }
        for method, taken in seconds.items()
    ]
    write([*(row for row in read(TIMES) if row["method"] not in seconds), *rows], TIMES)


def train_one(trial: Trial, step: list[Batch]) -> Callable[[], float]:
    """Runs one step and says its seconds."""
    optimizer = make_optimizer(trainable(trial.model), trial.step, 1e-4)

    def one_step() -> float:
        started = time.perf_counter()
        train_step(trial.loss_of, optimizer, step, max_grad_norm=1.0)
        return time.perf_counter() - started

    return one_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=16_000, help="that each training on NF4 reads")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5, help="of one step of each method, for the times")
    parser.add_argument("--only", nargs="*", default=list(METHODS))
    parser.add_argument("--refresh", action="store_true")
    options = parser.parse_args()
    table = Table(read(OUT))
    if not options.refresh:
        disable_progress_bar()
        source = ModelSource(demo_model(print))
        made = {"source": source, "data": split(source)}
        for method in options.only:
            like = TUNED_AS.get(method, method)
            best = tuned_rate(
                partial(table.row, like, n_tokens=tokens_of(like, options.tokens), seed=0, **made)
            )
            for seed in range(options.seeds):
                table.row(method, best, n_tokens=tokens_of(method, options.tokens), seed=seed, **made)
        times([*map(reference_of, options.only), *options.only], options.rounds, **made)
    write_table(table.rows, read(TIMES), ROOT / "README.md")


if __name__ == "__main__":
    main()
