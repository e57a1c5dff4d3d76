"""Times lowvram's step beside that of plain transformers + peft, in turns, on SmolLM2-135M in NF4.

    PYTHONPATH=. python scripts/bench_step.py [--rounds N] [--threads N] [--out FILE]

Both train the same LoRA (r=8, dropout 0.05, all linear layers) in bf16 with clipping and torch's AdamW; plain
computes all logits, ours only those of trained tokens, in one chunk. Writes benchmarks/step.csv. Nothing is
asserted of the times, for they depend on the machine and on who shares it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
from bench_rows import LIBRARIES, here, medians, ratios, write
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils.logging import disable_progress_bar

from lowvram.demo.model import demo_model
from lowvram.engine.adapters import add_adapters, trainable
from lowvram.engine.batch import Batch
from lowvram.engine.config import Levers, StepConfig
from lowvram.engine.model import load
from lowvram.engine.optimizer import make_optimizer
from lowvram.engine.source import ModelSource
from lowvram.engine.step import SummedLoss, train_step

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LENGTHS = (512, 2048)
_LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Row:
    """One set-up: seconds of a step and ours over plain's, a ratio for each round."""

    tokens: int
    masked_tokens: int  # the prompt, not trained
    checkpointing: bool
    rounds: int
    plain_seconds: float
    lowvram_seconds: float
    ratio: float
    lowest_ratio: float
    highest_ratio: float
    machine: str
    threads: int
    torch: str
    transformers: str
    peft: str
    bitsandbytes: str
    date: str


@dataclass(frozen=True)
class Text:
    """Tokens of which the first `masked` are a prompt."""

    ids: torch.Tensor  # [1, T]
    masked: int

    @property
    def labels(self) -> torch.Tensor:  # [1, T]
        labels = self.ids.clone()
        labels[:, : self.masked] = -100
        return labels

    @property
    def batch(self) -> Batch:
        first = max(self.masked, 1)
        targets = self.ids[0, first:]
        return Batch(self.ids, torch.arange(first - 1, self.ids.shape[1] - 1), targets)


Step = Callable[[Text], float]  # one optimizer step; returns its loss


def plain_step(folder: str, config: StepConfig) -> Step:
    """transformers' own model and loss, peft's own layers with its float32 adapters."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=quantization
    )
    if config.levers.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.target_modules),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, lora).train()
    parameters = list(trainable(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, weight_decay=0.0)

    def step(text: Text) -> float:
        ids, labels = text.ids, text.labels
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def our_step(folder: str, config: StepConfig) -> Step:
    """The engine's train_step."""
    model = add_adapters(load(ModelSource(folder), config, "cpu"), config).train()
    loss_of = SummedLoss(model, config)
    optimizer = make_optimizer(trainable(model), config, _LEARNING_RATE)

    def step(text: Text) -> float:
        result = train_step(loss_of, optimizer, [text.batch], max_grad_norm=config.max_grad_norm)
        return float(result.loss)

    return step


def measure(folder: str, rounds: int) -> Iterator[Row]:
    """Every set-up, short ones first; each round runs both steps, and who goes first alternates."""
    pairs = {checkpointing: _pair(folder, checkpointing) for checkpointing in (False, True)}
    for tokens, checkpointing, is_masked in product(LENGTHS, pairs, (False, True)):
        text = random_text(tokens, tokens // 2 if is_masked else 0)
        yield _row(text, checkpointing, rounds_of(pairs[checkpointing], text, rounds))


def random_text(tokens: int, masked: int = 0) -> Text:
    """The same for the same length."""
    ids = torch.randint(5, 40_000, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    return Text(ids, masked)


def _pair(folder: str, checkpointing: bool) -> list[Step]:
    levers = Levers(gradient_checkpointing=checkpointing, loss_chunk_tokens=max(LENGTHS))
    config = StepConfig(target_modules=LINEARS, accumulation=1, levers=levers)
    return [plain_step(folder, config), our_step(folder, config)]


def rounds_of(steps: list[Step], text: Text, rounds: int) -> list[list[float]]:
    """Seconds of each of two steps, round by round, after one each to warm up."""
    losses = [step(text) for step in steps]
    assert abs(losses[0] / losses[1] - 1) < 0.05, f"the two steps differ: losses {losses}"  # NF4's head: 3 %
    return [_round(steps, text, reverse=bool(index % 2)) for index in range(rounds)]


def _round(steps: list[Step], text: Text, *, reverse: bool) -> list[float]:
    seconds = [0.0] * len(steps)
    for index in sorted(range(len(steps)), reverse=reverse):
        started = time.perf_counter()
        steps[index](text)
        seconds[index] = time.perf_counter() - started
    return seconds


def _row(text: Text, checkpointing: bool, seconds: list[list[float]]) -> Row:
    plain, ours = medians(seconds)
    return Row(
        tokens=text.ids.shape[1],
        masked_tokens=text.masked,
        checkpointing=checkpointing,
        plain_seconds=plain,
        lowvram_seconds=ours,
        **ratios(seconds),
        **here(*LIBRARIES),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="fewer than the cores where neighbours take some")
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "step.csv")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    disable_progress_bar()
    rows: list[Row] = []
    for row in measure(demo_model(print), args.rounds):
        rows.append(row)
        write([asdict(r) for r in rows], args.out)
        print(
            f"{row.tokens} tokens, {row.masked_tokens} masked, checkpointing {row.checkpointing}: plain "
            f"{row.plain_seconds:.2f} s, lowvram {row.lowvram_seconds:.2f} s, ratio {row.ratio:.2f} "
            f"({row.lowest_ratio:.2f} to {row.highest_ratio:.2f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
