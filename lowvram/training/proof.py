"""Proof before the first step: the plan's largest batch through evaluation and a whole step, then undone."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import cycle, islice

import torch
from torch import nn

from lowvram.data.tokens import Example
from lowvram.engine.adapters import trainable
from lowvram.engine.optimizer import forget_state
from lowvram.engine.step import evaluate
from lowvram.errors import ConfigError
from lowvram.shell import typed
from lowvram.training import checkpoint
from lowvram.training.receipt import save_receipt
from lowvram.training.recovery import MOST_RUNGS, NoRungLeftError, drop_rung, recovering
from lowvram.training.run import Run
from lowvram.training.stepping import micro_batches_now, run_step
from lowvram.units import format_bytes

_EXPERTS = ".experts."  # a token may pass by an expert, which then has no gradient


def prove(run: Run) -> None:
    """Run the largest step that this plan can meet, now and not hours later.

    Longest evaluation batch, forward, backward, clip, optimizer; all of it is undone. What it took goes into
    the receipt. Running out of memory, or needing more than the budget, drops a rung at once.

    Raises:
        NoRungLeftError: nothing makes it fit.
    """
    started = time.perf_counter()
    for rungs in range(MOST_RUNGS + 1):
        recovering(run, "proof", lambda: _largest_step(run))
        over = _over_budget(run)
        if over is None:
            _say(run, time.perf_counter() - started)
            return
        if rungs == MOST_RUNGS or not drop_rung(run, "proof", over):
            raise NoRungLeftError("proof", over)
        run.monitor.forget()


def _say(run: Run, seconds: float) -> None:
    peak, predicted = format_bytes(run.monitor.peak_bytes), format_bytes(run.predicted_bytes)
    shape = f"{run.now.micro_batch} x {run.now.seq_len} tokens"
    save_receipt(run)
    ran = f"The largest batch ({shape}) ran in {seconds:.1f} s"
    run.tell("proof", f"{ran}: {peak} measured, {predicted} predicted.")


def _over_budget(run: Run) -> str | None:
    """Both numbers, where the device counts what was reserved."""
    measured = run.monitor.peak_bytes
    if run.device.type != "cuda" or measured <= run.plan.budget_bytes:
        return None
    return f"the proof took {format_bytes(measured)} of {format_bytes(run.plan.budget_bytes)}"


def _largest_step(run: Run) -> None:
    largest = [largest_micro_batch(run)] * min(run.now.accumulation, 2)  # the first one's gradients stay
    with undone(run):
        with run.monitor.during("evaluation"):
            evaluate(run.loss_of, micro_batches_now(run, largest[:1]), run.device)
        run_step(run, list(micro_batches_now(run, largest)))


def largest_micro_batch(run: Run) -> list[Example]:
    """As many and as long as the step allows, all tokens trained: what the memory was predicted for."""
    step, data = run.now, run.data.train
    example = data[int(data.lengths.argmax())]
    if example.source_ids is None:
        ids = _repeated(example.input_ids, step.seq_len)
        longest = Example(ids, b"\0" + b"\1" * (len(ids) - 1), "proof")
    else:
        target = _repeated(example.input_ids, step.target_len or len(example.input_ids))
        source = _repeated(example.source_ids, step.seq_len)
        longest = Example(target, b"\1" * len(target), "proof", source_ids=source)
    return [longest] * step.micro_batch


def _repeated(ids: Iterable[int], length: int) -> array[int]:
    return array("q", islice(cycle(ids), length))


@contextmanager
def undone(run: Run) -> Iterator[None]:
    """Parameters, optimizer, loss scale and random generators are afterwards as before the first update.

    The optimizer's state stays in memory, all zero: no later step has to make room for it.
    """
    rng, scaler = checkpoint.collect_rng(), run.accelerator.scaler
    scale = scaler.state_dict() if scaler is not None else None
    before = {p: p.detach().to("cpu", copy=True) for p in trainable(run.model).values()}
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in before.items():
                parameter.copy_(value)
        forget_state(run.optimizer)
        run.optimizer.zero_grad(set_to_none=True)
        if scaler is not None:
            scaler.load_state_dict(scale)
        checkpoint.restore_rng(rng)


def require_masked(run: Run, planned: Iterable[list[Example]]) -> None:
    """The first step trains some of its tokens, and not all where a mask was asked for.

    Raises:
        ConfigError: it trains none, or all tokens of rows that have prompts.
    """
    examples = [example for group in planned for example in group if example.source_ids is None]
    trained, tokens = sum(e.n_trained for e in examples), sum(e.n_tokens for e in examples)
    all_is_right = trained == tokens - len(examples) and run.plan.reading.shape == "text"
    if not examples or 0 < trained < tokens - len(examples) or all_is_right:
        return
    raise ConfigError(
        f"The first step would train {trained} of its {tokens} tokens: the mask of the prompts is wrong.",
        f"Look at the coloured example: lowvram data check {typed(run.plan.data)} "
        f"--model {typed(run.plan.model)}",
    )


def require_gradients(parameters: dict[str, nn.Parameter], plan_targets: tuple[str, ...]) -> None:
    """Every LoRA B learns from the first step on.

    Raises:
        ConfigError: some have no gradient or one of zeros (they would stay zero: open-unlearning issue 178).
    """
    names = [name for name in parameters if ".lora_B." in name and _EXPERTS not in name]
    dead = [name for name in names if (grad := parameters[name].grad) is None or not bool(grad.any())]
    if dead:
        raise ConfigError(
            f"{len(dead)} of {len(names)} adapters got no gradient in the first step, such as {dead[0]}.",
            f"Leave the layers that the model does not use out of --targets {','.join(plan_targets)}.",
        )
