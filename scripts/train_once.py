"""One training of SmolLM2's NF4 base with LoRA, by lowvram or by TRL; scripts/bench_training.py runs it.

    python scripts/train_once.py lowvram|trl JOB.json

Prints one JSON object: when each optimizer step ended, the process's highest resident bytes and the folder
of the adapter. Both start from the same adapter weights and read the same examples in the same steps.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any


def by_lowvram(job: dict[str, Any]) -> tuple[list[float], str]:
    """Our own loop on the plan, as `lowvram train` runs it."""
    from rich.console import Console

    from lowvram import pipeline
    from lowvram.planner.plan import Plan
    from lowvram.training.live import LineView
    from lowvram.training.loop import train
    from lowvram.training.run_folder import RunFolder

    ends: list[float] = []

    class Clock(LineView):
        def step(self, record: Any) -> None:
            super().step(record)
            ends.append(time.perf_counter())

    plan = Plan.from_yaml(Path(job["plan"]))
    planned = pipeline.from_saved(plan, "")
    assert planned.prepared is not None
    folder = RunFolder.create(Path(job["output"]))
    train(
        plan,
        folder,
        planned.source,
        planned.prepared,
        Clock(Console(stderr=True), "lowvram"),
        before=lambda run: same_start(run.model, job["seed"]),
    )
    return ends, str(folder.adapter)


def by_trl(job: dict[str, Any]) -> tuple[list[float], str]:
    """SFTTrainer on rows that are tokenised, masked and in order already."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    setting = dict(job["setting"])
    dtype = setting.pop("dtype")
    trainer = SFTTrainer(
        model=job["model"],
        args=SFTConfig(
            output_dir=job["output"],
            max_steps=job["steps"],
            learning_rate=job["learning_rate"],
            lr_scheduler_type=job["schedule"],
            warmup_steps=job["warmup_steps"],
            weight_decay=job["weight_decay"],
            max_grad_norm=job["max_grad_norm"],
            seed=job["seed"],
            max_length=None,  # none is longer than the plan's
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            model_init_kwargs={"dtype": dtype},
            **setting,
        ),
        train_dataset=Dataset.from_list(json.loads(Path(job["rows"]).read_text(encoding="utf-8"))),
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=job["double_quantization"],
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        ),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM",
            r=job["rank"],
            lora_alpha=job["alpha"],
            lora_dropout=job["dropout"],
            target_modules=job["target_modules"],
        ),
        callbacks=[Clock()],
    )
    same_start(trainer.model, job["seed"])
    trainer.train()
    trainer.model.save_pretrained(job["output"])
    return ends, job["output"]


def same_start(model: Any, seed: int) -> None:
    """A as peft initialises it, but drawn layer by layer from the seed, whatever else was drawn; B is 0."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if ".lora_A." in name:
            bound = 1 / math.sqrt(parameter.shape[1])  # kaiming_uniform_(a=sqrt(5))
            values = torch.rand(parameter.shape, generator=generator) * 2 * bound - bound
            parameter.data.copy_(values)


def peak_resident_bytes() -> int:
    """Not ru_maxrss: on Linux that begins with the parent's, whose pages a process has until it execs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(kib) * 1024


def main() -> None:
    who, file = sys.argv[1:]
    job = json.loads(Path(file).read_text(encoding="utf-8"))
    ends, adapter = {"lowvram": by_lowvram, "trl": by_trl}[who](job)
    print(json.dumps({"ends": ends, "peak_bytes": peak_resident_bytes(), "adapter": adapter}))


if __name__ == "__main__":
    main()
