"""Compares predicted peaks with what others published and with steps really executed here, on CPU.

    PYTHONPATH=. python scripts/bench_prediction.py [--only published|executed] [--out FILE]

Every error is of the bare prediction, before any margin. Writes benchmarks/prediction.csv.
"""

from __future__ import annotations

import argparse
import csv
import gc
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table
from transformers import AutoConfig, LlamaConfig, PretrainedConfig
from transformers.utils.logging import disable_progress_bar

from lowvram.demo.model import demo_model
from lowvram.engine.adapters import add_adapters
from lowvram.engine.batch import Batch
from lowvram.engine.config import Levers, StepConfig
from lowvram.engine.model import load
from lowvram.engine.source import ModelSource
from lowvram.memory.estimate import estimate, peak_of
from lowvram.memory.plain import PlainStep, plain_peak_bytes
from lowvram.memory.profiled import executed_step_bytes
from lowvram.memory.run import trace_step
from lowvram.memory.weights import meta_batch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
_A6000, _A100, _RTX4090 = (8, 6), (8, 0), (8, 9)
_LLAMA_70B: dict[str, Any] = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
_WEIGHTS = {"base_weights", "embeddings", "head", "adapters", "optimizer_state"}
_NOTES = {  # what explains a difference
    "vramcalc": "512 B: transformers 5 keeps a second rotary buffer",
    "vramcalc-llama-3.2-1b-full-bf16-eager": "0.13 MB, not explained",
    "vramcalc-qwen2.5-1.5b-full-bf16": "21 MB: whole allocator blocks, which hang on the order of all frees",
    "fms": "0.2 MB at most: small tensors of the Trainer and of older transformers, not traced one by one",
    "fms-mistral-7b-lora-b4-tf445": "2 MB, not explained",
    "fms-mistral-7b-lora-b8-tf445": "2 MB, not explained",
    "fms-mistral-7b-qlora-b4-tf445": "2 MB, not explained",
    "fms-mistral-7b-qlora-b8-tf445": "2 MB, not explained",
    "fms-mistral-7b-qlora-trl-b4-tf445": "2 MB, not explained",
    "fms-mistral-7b-qlora-trl-b8-tf445": "2 MB, not explained",
    "fms-llama-2-70b": "whole allocator blocks of a card that was full; -11 MB without them",
}
_RNG = "checkpointing keeps 5,056 B of CPU random state a layer: host memory when a GPU trains"
_TORCHTUNE = "torchtune's own model code, NF4 and loss chunks, torch.compile; printed to 0.1 GiB"


@dataclass(frozen=True)
class Row:
    """One comparison."""

    id: str
    kind: str  # exact: the measured code is the traced one; looser: other code; executed: on CPU, here
    predicted_bytes: int
    reference_bytes: int
    source: str
    note: str = ""

    @property
    def signed_error(self) -> float:
        return self.predicted_bytes / self.reference_bytes - 1


def published() -> Iterator[Row]:
    """Predictions for every published row whose measured code is known to the byte."""
    with (BENCHMARKS / "published_peaks.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        kind = row["id"].split("-")[0]
        if kind == "vramcalc" and row["method"] != "inference":
            yield _plain_row(row, _vramcalc(row), _A6000)
        elif kind == "fms" and _is_plain_fms(row):
            yield _plain_row(row, _fms(row), _A100)
        elif row["id"].startswith("torchtune-llama-3.1-8b"):
            yield _torchtune(row)


def _plain_row(row: dict[str, str], plain: PlainStep, capability: tuple[int, int]) -> Row:
    predicted = plain_peak_bytes(_config(row["model"]), plain, "cuda", capability)
    return Row(row["id"], "exact", predicted, _bytes(row), row["source"], _note(row["id"]))


def _note(name: str) -> str:
    """The note of the longest matching beginning."""
    matching = [start for start in _NOTES if name.startswith(start)]
    return _NOTES[max(matching, key=len)] if matching else ""


def _bytes(row: dict[str, str]) -> int:
    return int(float(row["published_bytes"]))


def _config(model: str) -> PretrainedConfig:
    if "70b" in model.lower():
        return LlamaConfig(**_LLAMA_70B)
    config: PretrainedConfig = AutoConfig.from_pretrained(BENCHMARKS / "configs" / model.rsplit("/", 1)[-1])
    return config


def _is_plain_fms(row: dict[str, str]) -> bool:
    """Not the fused kernels, nor Mixtral, whose experts transformers has since rewritten."""
    return "foak" not in row["id"] and ("mistral-7b" in row["id"] or "llama-2-70b" in row["id"])


def _vramcalc(row: dict[str, str]) -> PlainStep:
    amp = row["base_precision"] == "fp32-amp"
    return PlainStep(
        method=row["method"],  # type: ignore[arg-type]
        precision="fp32" if amp else "bf16",
        autocast=amp,
        checkpointing="non-reentrant" if row["checkpointing"] == "yes" else "no",
        attention=row["attention"],  # type: ignore[arg-type]
        builds_mask=True,
        keeps_outputs=True,
        keeps_gradients=True,
        empties_cache=True,
    )


def _fms(row: dict[str, str]) -> PlainStep:
    return PlainStep(
        method=row["method"],  # type: ignore[arg-type]
        dropout=0.0 if row["method"] == "full" else 0.1,
        autocast=row["method"] == "qlora",
        checkpointing="reentrant",
        attention="fa2",
        batch=int(row["batch"]),
        seq_len=int(row["seq_len"]),
        loss="fp32-head" if "tf445" in row["id"] else "shifted-logits",
        expands_kv="mistral-7b" in row["id"] and "tf445" in row["id"],  # Llama's FlashAttention never did
        norms_in_fp32=row["upcast_norms"] == "yes",
        more_inputs=2,  # labels and mask
        clips=True,
    )


def _torchtune(row: dict[str, str]) -> Row:
    """lowvram's own step at torchtune's shapes."""
    step = StepConfig(
        base_precision="nf4" if row["method"] == "qlora" else "bf16",
        rank=8,
        dropout=0.0,
        target_modules=tuple(row["targets"].split()),
        micro_batch=int(row["batch"]),
        seq_len=int(row["seq_len"]),
        accumulation=1,
        levers=Levers(loss_chunk_tokens=512),  # its loss has 8 chunks, of 4096 tokens
    )
    predicted = estimate(_config("Meta-Llama-3.1-8B"), step, "cuda", _RTX4090).peak_allocated_bytes
    return Row(row["id"], "looser", predicted, _bytes(row), row["source"], _TORCHTUNE)


def _levers(checkpointing: bool, chunk: int, double: bool = True) -> dict[str, Any]:
    return {
        "gradient_checkpointing": checkpointing,
        "loss_chunk_tokens": chunk,
        "double_quantization": double,
    }


EXECUTED: dict[str, dict[str, Any]] = {
    "nf4-r8-ckpt": {"seq_len": 256, "levers": _levers(True, 64)},
    "nf4-r8": {"levers": _levers(False, 64)},
    "nf4-r64-ckpt-all": {"rank": 64, "target_modules": ATTENTION + MLP, "levers": _levers(True, 100)},
    "nf4-r16-qv-whole-loss": {
        "rank": 16,
        "target_modules": ("q_proj", "v_proj"),
        "levers": _levers(True, 1024),
    },
    "nf4-single-b2": {"micro_batch": 2, "seq_len": 64, "levers": _levers(True, 32, double=False)},
    "nf4-accumulation": {"accumulation": 4, "levers": _levers(True, 64)},
    "nf4-adamw8bit": {"optimizer": "adamw8bit", "rank": 64, "levers": _levers(True, 64)},
    "fp32-r8-ckpt": {"base_precision": "fp32", "levers": _levers(True, 128)},
    "fp32-r8": {"base_precision": "fp32", "seq_len": 200, "levers": _levers(False, 50)},
    "fp32-b3-accumulation": {
        "base_precision": "fp32",
        "micro_batch": 3,
        "seq_len": 64,
        "accumulation": 2,
        "levers": _levers(False, 64),
    },
    "fp32-no-dropout-all": {
        "base_precision": "fp32",
        "dropout": 0.0,
        "rank": 32,
        "target_modules": ATTENTION + MLP,
        "levers": _levers(True, 256),
    },
    "nf4-no-dropout": {"dropout": 0.0, "rank": 4, "seq_len": 160, "levers": _levers(False, 256)},
}
_COMMON: dict[str, Any] = {
    "compute_dtype": "fp32",  # a CPU without bf16 takes ten times as long in it
    "seq_len": 128,
    "target_modules": ATTENTION,
    "accumulation": 1,
}


def executed(console: Console) -> Iterator[Row]:
    """The real SmolLM2-135M's step on this CPU, its allocations seen by torch's profiler."""
    disable_progress_bar()
    source = ModelSource(demo_model(console.print))
    bases: dict[tuple[str, bool], Any] = {}  # loading takes longer than a step
    for name, changes in EXECUTED.items():
        step = StepConfig.model_validate({**_COMMON, **changes})
        try:
            trace = trace_step(source.config, step, "cpu")
            held = sum(a.n_bytes for a in trace.allocations if a.component in _WEIGHTS)
            measured = held + _measured_bytes(source, step, bases)
        except (RuntimeError, NotImplementedError) as error:  # an optimizer that this CPU has no kernel for
            console.print(f"{name} cannot run here: {str(error).splitlines()[0]}")
            continue
        gc.collect()
        console.print(f"{name}: {peak_of(trace)[0]:,} predicted, {measured:,} measured")
        note = _RNG if step.levers.gradient_checkpointing else ""
        yield Row(f"smollm2-135m-{name}", "executed", peak_of(trace)[0], measured, "this script, CPU", note)


def _measured_bytes(source: ModelSource, step: StepConfig, bases: dict[tuple[str, bool], Any]) -> int:
    """Peak bytes that torch's profiler sees the step allocate, beyond weights and optimizer state."""
    kind = (step.base_precision, step.levers.double_quantization)
    model = add_adapters(bases.pop(kind, None) or load(source, step, "cpu"), step).train()
    peak = executed_step_bytes(model, step, lambda: [_batch(step) for _ in range(min(step.accumulation, 2))])
    bases[kind] = _without_adapters(model)
    return peak


def _without_adapters(model: Any) -> Any:
    base = model.unload()
    if hasattr(base, "_require_grads_hook"):  # peft's, for checkpointing
        base.disable_input_require_grads()
    base.activation_checkpointing_disable()
    return base


def _batch(step: StepConfig) -> Batch:
    return Batch(*(torch.randint(5, 40, t.shape) for t in meta_batch(step).tensors if t is not None))


def _write(rows: list[Row], path: Path) -> None:
    columns = ("id", "predicted_bytes", "reference_bytes", "signed_error", "source", "kind", "note")
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({**asdict(row), "signed_error": f"{row.signed_error:+.6f}"})


def _kept(path: Path, only: str | None) -> list[Row]:
    """What the file says of the part that does not run now."""
    if only is None or not path.exists():
        return []
    with path.open(newline="") as file:
        rows = [{k: v for k, v in row.items() if k != "signed_error"} for row in csv.DictReader(file)]
    sizes = ("predicted_bytes", "reference_bytes")
    kept = [Row(**{k: int(v) if k in sizes else v for k, v in row.items()}) for row in rows]  # type: ignore[arg-type]
    return [row for row in kept if (row.kind == "executed") == (only == "published")]


def _table(rows: list[Row]) -> Table:
    table = Table(Column("Step", no_wrap=True), "Kind", "Predicted, bytes", "Reference, bytes", "Error")
    for row in rows:
        error = row.signed_error
        colour = "green" if abs(error) < 0.005 else "yellow" if abs(error) < 0.05 else "red"
        sizes = (f"{row.predicted_bytes:,}", f"{row.reference_bytes:,}")
        table.add_row(row.id, row.kind, *sizes, f"[{colour}]{error:+.3%}[/]")
    return table


def _summary(rows: list[Row]) -> Iterator[str]:
    for kind in ("exact", "executed", "looser"):
        errors = [r.signed_error for r in rows if r.kind == kind]
        if errors:
            under = sum(e < -0.002 for e in errors)
            yield (
                f"{kind}: {len(errors)} steps, error {min(errors):+.3%} to {max(errors):+.3%}, "
                f"{under} under-estimated by more than 0.2 %"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("published", "executed"))
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "prediction.csv")
    args = parser.parse_args()
    console = Console()
    rows = _kept(args.out, args.only)
    if args.only != "executed":
        rows = [*published(), *rows]
    if args.only != "published":
        for row in executed(console):
            rows.append(row)
            _write(rows, args.out)
    _write(rows, args.out)
    console.print(_table(rows))
    for line in _summary(rows):
        console.print(line)


if __name__ == "__main__":
    main()
