"""Whole runs on a card that gives less than was planned: rungs are taken, and the run learns the same.

Also that a resumed run's paged optimizer state is paged again. On a CPU, which has no allocator to limit, the
first micro-batch of a step is refused once instead.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from gpu_check_rows import Row
from rich.console import Console
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lowvram import hardware, pipeline
from lowvram.engine.source import ModelSource
from lowvram.memory.receipt import Receipt
from lowvram.planner.profiles import profile_for
from lowvram.planner.wishes import Wishes
from lowvram.planning import Planned, plan_for
from lowvram.training import recovery
from lowvram.training.run import Run

Emit = Callable[[Row], None]
LOSS_LIMIT = 0.01  # between two splits of the same steps in bf16; an untrained model is off by 10 % and more
_STEPS, _ROWS = 6, 48
_GIVEN = 0.85  # of the predicted bytes
_WIDTH = {"cuda": 1024, "cpu": 64}


def recovery_checks(emit: Emit, device: str) -> None:
    """A run as planned, one on less memory than it needs, and one that is resumed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        planned = _planned(folder, device)
        whole = _train(planned, folder / "whole")
        with _less_memory(planned, device):
            lean = _train(planned, folder / "lean")
        emit(_compared(planned, whole, lean))
        if device == "cuda":
            emit(_paged_after_resume(folder, device))


def _planned(folder: Path, device: str, **wishes: Any) -> Planned:
    """A model whose activations are most of what it takes, on rows of several hundred tokens."""
    model, data = folder / "model", folder / "rows.jsonl"
    if not model.exists():
        _save_model(model, _WIDTH[device])
        rows = [{"question": f"{i}? " + "please " * (40 + i), "answer": f"{i} " * 20} for i in range(_ROWS)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    here = hardware.probe(trial=False)
    asked = {"batch": 8, "steps": _STEPS, "rank": 16, "dropout": 0.0, **wishes}
    source, profile = ModelSource(str(model)), profile_for(here)
    return plan_for(source, str(data), here, profile, Wishes(**asked), lambda _: None)


def _save_model(folder: Path, width: int) -> None:
    characters = sorted(ByteLevel.alphabet())
    vocabulary = {text: number for number, text in enumerate([*characters, "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_attention_heads=8,
        num_hidden_layers=4,
        vocab_size=len(vocabulary),
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def _train(planned: Planned, folder: Path) -> Path:
    pipeline.start(planned, folder, Console(file=StringIO()))
    return folder


@contextmanager
def _less_memory(planned: Planned, device: str) -> Iterator[None]:
    """The allocator refuses what goes beyond a part of the prediction; on a CPU one step is refused."""
    if device == "cuda":
        total = torch.cuda.mem_get_info(0)[1]
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(_GIVEN * planned.plan.estimate.peak_reserved_bytes / total)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return
    refused: list[int] = []
    take_step = recovery.recovering

    def once(run: Run, moment: Any, attempt: Callable[[], Any]) -> Any:
        def first_refused() -> Any:
            if moment == "training" and not refused:
                refused.append(run.step)
                raise torch.OutOfMemoryError("refused by gpu_check")
            return attempt()

        return take_step(run, moment, first_refused)

    with patch("lowvram.training.loop.recovering", once):
        yield


def _compared(planned: Planned, whole: Path, lean: Path) -> Row:
    receipt = Receipt.model_validate_json((lean / "receipt.json").read_bytes())
    losses = [json.loads((run / "result.json").read_text())["held_out_loss_after"] for run in (whole, lean)]
    error = losses[1] / losses[0] - 1
    right = bool(receipt.rungs) and abs(error) <= LOSS_LIMIT
    return Row(
        check="recovery",
        model="4 layers",
        outcome="ran" if right else "differs",
        seq_len=planned.plan.seq_len,
        micro_batch=planned.plan.micro_batch,
        predicted_reserved_bytes=receipt.rungs[-1].predicted_peak_reserved_bytes if receipt.rungs else None,
        measured_reserved_bytes=receipt.measured_peak_reserved_bytes,
        loss_error=error,
        gradient_limit=LOSS_LIMIT,
        note="; ".join(rung.sentence for rung in receipt.rungs) or "no rung was taken",
    )


def _paged_after_resume(folder: Path, device: str) -> Row:
    """bitsandbytes loads paged state to the device; ours stays where it was made."""
    planned = _planned(folder, device, optimizer="paged_adamw8bit", rank=128)
    paged: list[int] = []

    def look(run: Run) -> None:
        values = [value for state in run.optimizer.state.values() for value in state.values()]
        paged.append(sum(bool(getattr(value, "is_paged", False)) for value in values))

    run = folder / "paged"
    pipeline.start(planned, run, Console(file=StringIO()), before=look)
    for name in ("result.json", "adapter"):
        (run / name).rename(folder / f"old {name}")
    pipeline.resume(run, Console(file=StringIO()), before=look)
    same = len(set(paged)) == 1 and paged[0] > 0
    note = f"paged tensors when the run began and when it was resumed: {paged}"
    return Row(check="recovery", optimizer="paged_adamw8bit", outcome="ran" if same else "differs", note=note)
