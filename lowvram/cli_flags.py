"""The command line's flags: their names, types and help, shared by its commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_TASKS = "Task type: SEQ2SEQ_LM for T5-type models, CAUSAL_LM for all others."
Model = Annotated[
    str, typer.Option("--model", "-m", help=f"Folder or hub id, such as Qwen/Qwen2-7B. {_TASKS}")
]
Models = Annotated[
    list[str], typer.Option("--model", "-m", help=f"Folder or hub id; up to four are compared. {_TASKS}")
]
Data = Annotated[
    str, typer.Option("--data", "-d", help="JSONL, JSON, CSV, parquet, or a data set's id or folder.")
]
MaybeData = Annotated[str | None, typer.Option("--data", "-d", help="Plan for this data's lengths.")]
DataFormat = Annotated[
    str | None,
    typer.Option("--data-format", help="Shape of the rows: messages, alpaca, text ... (default: found)."),
]
Fields = Annotated[
    str | None, typer.Option("--fields", help="Their names, such as question=ask,answer=reply.")
]
Split = Annotated[str | None, typer.Option("--split", help="Of a data set, such as train[:10%].")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out rows that cannot be used.")]
EvalData = Annotated[
    str | None,
    typer.Option("--eval-data", help="Held-out examples, read as --data is (default: a share of --data)."),
]
Vram = Annotated[str | None, typer.Option(help="Plan for a card of this size, such as 8GB.")]
Rank = Annotated[int | None, typer.Option(help="LoRA rank r (default: the profile's).")]
Alpha = Annotated[
    float | None,
    typer.Option(help="LoRA alpha, over r or its root the update's factor (default: the profile's)."),
]
Dropout = Annotated[
    float | None, typer.Option(help="Dropout on the adapter's input (default: the profile's).")
]
Targets = Annotated[
    str | None,
    typer.Option(
        help="Adapted layers: qv (q_proj and v_proj, the smallest set), attention, all-linear, or a list a,b "
        "(default: the profile's)."
    ),
]
SeqLen = Annotated[int | None, typer.Option(help="Longest sequence in tokens.")]
BatchSize = Annotated[int | None, typer.Option("--batch", help="Examples in one optimizer step.")]
Precision = Annotated[str | None, typer.Option(help="Of the base: nf4, int8, bf16, fp16 or fp32.")]
Optimizer = Annotated[str | None, typer.Option(help="adamw, adamw8bit, paged_adamw or paged_adamw8bit.")]
MicroBatch = Annotated[int | None, typer.Option(help="Examples in one forward pass.")]
Packing = Annotated[
    bool | None, typer.Option("--packing/--no-packing", help="Examples in one row instead of padding.")
]
RsLora = Annotated[
    bool | None,
    typer.Option(
        "--rslora/--no-rslora",
        help="Scale by alpha/sqrt(r) instead of alpha/r (default: the profile's rule, above its rank).",
    ),
]
Bias = Annotated[
    str | None,
    typer.Option(help="Biases that train: none, all, or lora_only, the adapted layers' (default: none)."),
]
Init = Annotated[
    str | None,
    typer.Option(
        help="Adapter's start: default (A random, B zero), pissa, olora, loftq, eva, lora_ga or lora_one "
        "(default: default)."
    ),
]
InitBatches = Annotated[
    int | None, typer.Option(help="Micro-batches that eva, lora_ga and lora_one look at (default: 8).")
]
Dora = Annotated[
    bool | None,
    typer.Option("--dora/--no-dora", help="DoRA: magnitude and direction train apart (default: off)."),
]
LoraPlus = Annotated[
    float | None, typer.Option(help="LoRA+: learning rate of B over that of A, such as 16 (default: 1).")
]
LoraFa = Annotated[
    bool | None,
    typer.Option("--lora-fa/--no-lora-fa", help="LoRA-FA: A stays random, only B trains (default: off)."),
]
InferenceMode = Annotated[
    bool,
    typer.Option("--inference-mode", help="Plan for using an adapter: nothing trains (default: off)."),
]
NoOffload = Annotated[bool, typer.Option("--no-offload", help="Keep nothing of the step in host memory.")]
Preference = Annotated[
    str | None, typer.Option("--prefer", help="speed (fastest that fits), context or quality.")
]
LeverText = Annotated[str, typer.Option("--levers", help="default, none, all, or name=value,name=value.")]
ProfileName = Annotated[
    str | None, typer.Option("--profile", help="8gb, 12gb, 16gb, 24gb, cpu or a YAML file.")
]
Seed = Annotated[int, typer.Option(help="Of the data order, dropout and adapter.")]
Epochs = Annotated[float | None, typer.Option(help="Passes over the data.")]
Steps = Annotated[int | None, typer.Option(help="Optimizer steps, instead of epochs.")]
LearningRate = Annotated[
    float | None, typer.Option(help="Peak learning rate (weight_decay, 0, is in the plan's file).")
]
KeepCheckpoints = Annotated[
    int | None, typer.Option(help="Newest checkpoints that stay, beside the best one's (default: 2).")
]
EarlyStop = Annotated[
    int | None,
    typer.Option(help="Stop after so many held-out losses in a row without a better one (default: never)."),
]
Push = Annotated[
    str | None, typer.Option(help="Upload to this new repository of the Hugging Face hub, OWNER/NAME.")
]
Public = Annotated[bool, typer.Option("--public", help="Let everybody see it there (default: private).")]
Remote = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code the model brings.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Run folder (default: runs/MODEL-DATA).")]
LogWith = Annotated[
    list[str] | None,
    typer.Option(help="Tracker: tensorboard, wandb, trackio (repeatable); none: not even those of the plan."),
]
