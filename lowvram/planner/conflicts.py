"""Conflicts: every wish that the model, the data or the device cannot grant, told together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from lowvram.data.stats import DataStats
from lowvram.engine.config import DORA_INITS, PAGED
from lowvram.engine.shape import ModelShape
from lowvram.errors import ConfigError
from lowvram.hardware import Hardware
from lowvram.planner.first_step import Request, effective_batch
from lowvram.planner.initialisation import refusals
from lowvram.planner.levers import LEVERS, sixteen_bit
from lowvram.planner.optional import require_liger_on
from lowvram.planner.wishes import Wishes
from lowvram.units import said

_MOST_LOST = 0.5  # of the examples may be left out for their length


class Conflict(NamedTuple):
    """One wish that cannot be granted, and the nearest value that can, or what to give up."""

    message: str
    remedy: str


def refuse_conflicts(request: Request, shape: ModelShape) -> None:
    """Refuse what no search could grant.

    Raises:
        ConfigError: all conflicts in one message, each with its remedy.
    """
    raise_all(
        [
            *_adapter(request, shape),
            *adapter_methods(request.wishes, shape),
            *_length(request, shape),
            *_batch(request),
            *_precision(request.wishes, request.hardware),
            *_levers(request, shape),
            *_early_stop(request.wishes),
        ]
    )


def raise_all(conflicts: Iterable[Conflict]) -> None:
    """Raises: ConfigError, if there is a conflict."""
    found = list(conflicts)
    if len(found) == 1:
        raise ConfigError(*found[0])
    if found:
        lines = "".join(f"\n  {n}. {one.message}" for n, one in enumerate(found, 1))
        remedies = "".join(f"\n  {n}. {one.remedy}" for n, one in enumerate(found, 1))
        raise ConfigError(f"{len(found)} wishes cannot be granted:{lines}", remedies)


def _adapter(request: Request, shape: ModelShape) -> Iterator[Conflict]:
    """An adapter of a rank above its layer's own adds parameters and no freedom."""
    try:
        targets = shape.resolve_targets(request.wishes.targets or request.profile.targets)
    except ConfigError as error:
        yield Conflict(error.message, error.remedy)
        return
    rank, full = request.wishes.rank or request.profile.rank, shape.full_rank(targets)
    if rank > full:
        yield Conflict(
            f"--rank {rank} is above the full rank {full} of the largest target layer.",
            f"Use --rank {full} or less; 4 to 64 are usual.",
        )
    pinned = request.wishes.pinned_levers()
    for message, remedy in refusals(request.wishes, rank, shape, targets, pinned):
        yield Conflict(message, remedy)


def adapter_methods(wishes: Wishes, shape: ModelShape) -> Iterator[Conflict]:
    """Ways to train an adapter that exclude each other, or that this model does not have."""
    if wishes.bias == "all" and shape.untrained_biases:
        yield Conflict(
            f"--bias all: not for this model, {shape.untrained_biases}.", "Use --bias lora_only or none."
        )
    if wishes.lora_fa and (wishes.lora_plus or 1) != 1:
        yield Conflict(
            f"--lora-plus {wishes.lora_plus:g} is B's learning rate over A's, and --lora-fa leaves A none.",
            "Leave one of them out.",
        )
    if wishes.dora and wishes.init not in (None, *DORA_INITS):
        yield Conflict(
            f"--dora and --init {wishes.init}: DoRA's magnitudes are those of the base's own rows.",
            f"Use --init {' or '.join(DORA_INITS)}, or leave --dora out.",
        )
    if wishes.inference_mode:
        yield from _trains(wishes)


def _trains(wishes: Wishes) -> Iterator[Conflict]:
    """Flags that say how to train, where nothing trains."""
    flags: tuple[str, ...] = ("optimizer", "lora_plus", "lora_fa", "learning_rate", "epochs", "steps")
    flags += ("keep_checkpoints", "early_stop")
    for flag in flags:
        if getattr(wishes, flag):
            name = f"--{flag.replace('_', '-')}"
            yield Conflict(f"{name} and --inference-mode: nothing trains.", "Leave one of them out.")


def _length(request: Request, shape: ModelShape) -> Iterator[Conflict]:
    wanted, limit, stats = request.wishes.seq_len, shape.context_limit, request.stats
    if wanted is not None and wanted > limit:
        yield Conflict(
            f"--seq-len {wanted} is beyond the model's {limit} positions.",
            f"Use --seq-len {limit} or less, or a model that knows more positions.",
        )
    elif stats is not None:
        yield from too_short(min(wanted or stats.longest_tokens, limit), stats)


def too_short(seq_len: int, stats: DataStats) -> Iterator[Conflict]:
    """A length that leaves most examples without a token to learn from."""
    lost = stats.n_lost_at(seq_len)
    if lost > _MOST_LOST * stats.n_examples:
        enough = stats.answer_start_quantiles[95] + 1
        yield Conflict(
            f"In about {lost} of {stats.n_examples} examples the answer begins after {seq_len} tokens: "
            "they would teach nothing.",
            f"Use --seq-len {enough} or more (the longest example has {stats.longest_tokens} tokens).",
        )


def _batch(request: Request) -> Iterator[Conflict]:
    micro_batch = request.wishes.micro_batch
    whole = effective_batch(request.profile, request.wishes, request.stats)
    if micro_batch is not None and whole % micro_batch:
        near = max(n for n in range(1, micro_batch + 1) if whole % n == 0)
        yield Conflict(
            f"--micro-batch {micro_batch} does not divide the {whole} examples of an optimizer step.",
            f"Use --micro-batch {near}, or --batch {math.ceil(whole / micro_batch) * micro_batch}.",
        )


def _early_stop(wishes: Wishes) -> Iterator[Conflict]:
    """The first held-out loss is the best so far: so many more without a better one take as many steps."""
    if wishes.early_stop and wishes.steps and wishes.steps <= wishes.early_stop:
        yield Conflict(
            f"--early-stop {wishes.early_stop} waits for longer than --steps {wishes.steps} last.",
            "Raise --steps, or leave --early-stop out.",
        )


def _precision(wishes: Wishes, hardware: Hardware) -> Iterator[Conflict]:
    wanted, own = wishes.precision, sixteen_bit(hardware)
    if wanted == "fp16" and hardware.backend == "cpu":
        yield Conflict(
            "--precision fp16 needs a GPU: its loss scaling does.", f"Use --precision {own}, int8 or nf4."
        )
    elif wanted == "bf16" and not hardware.bf16 and hardware.backend != "cpu":
        yield Conflict(
            f"--precision bf16: {hardware.name} has no bf16 arithmetic.",
            "Use --precision fp16 (with loss scaling, adapters in float32), int8 or nf4.",
        )
    if wishes.optimizer in PAGED and hardware.backend == "cpu":
        yield Conflict(
            f"--optimizer {wishes.optimizer}: a CPU has no other memory to page to.",
            "Use --optimizer adamw8bit or adamw.",
        )


def _levers(request: Request, shape: ModelShape) -> Iterator[Conflict]:
    wishes, hardware = request.wishes, request.hardware
    pinned = wishes.pinned_levers()
    if pinned.get("double_quantization") and wishes.levers != "all" and wishes.precision not in (None, "nf4"):
        yield Conflict(
            f"double_quantization=on is for an NF4 base, not for --precision {wishes.precision}.",
            "Leave it out, or use --precision nf4.",
        )
    if pinned.get("liger"):
        try:
            require_liger_on(hardware.backend, request.source.config)
        except ConfigError as error:
            yield Conflict(error.message, error.remedy)
    yield from _not_for(shape, pinned)
    yield from _one_weight(request, shape, pinned)
    if wishes.no_offload:
        yield from _offloads(wishes)
    yield from _packed(wishes, shape, pinned)


def _not_for(shape: ModelShape, pinned: dict[str, Any]) -> Iterator[Conflict]:
    """Levers that this model's structure does not have."""
    if shape.untiled and (pinned.get("tile_tokens") or pinned.get("offload_checkpoints")):
        yield Conflict(
            f"tile_tokens and offload_checkpoints: not for this model, {shape.untiled}.",
            "Leave them off; gradient_checkpointing works.",
        )
    placed = pinned.get("embedding_on_host") or pinned.get("head", "16bit") != "16bit"
    if placed and shape.task_type != "CAUSAL_LM":
        yield Conflict(
            "embedding_on_host and head are for decoder-only models: here encoder and decoder share one "
            "embedding.",
            "Leave them out.",
        )
    kept = pinned.get("kept_layers", 0)
    if kept >= shape.n_layers:
        yield Conflict(
            f"kept_layers={kept} leaves none of the {shape.n_layers} layers to be recomputed.",
            f"Use kept_layers up to {shape.n_layers - 1}, or gradient_checkpointing=off.",
        )


def _one_weight(request: Request, shape: ModelShape, pinned: dict[str, Any]) -> Iterator[Conflict]:
    """A tied embedding on the host, beside a head that needs it on the device."""
    whole = pinned.get("head") == "16bit" or ("head" not in pinned and "head" not in request.profile.ladder)
    if shape.tied and pinned.get("embedding_on_host") and whole:
        yield Conflict(
            "The embedding of this model cannot stay on the host while its head is 16bit: both are one "
            "weight, and the head needs it on the device.",
            "Use --levers embedding_on_host=on,head=nf4 (or int8, or streamed).",
        )


def _offloads(wishes: Wishes) -> Iterator[Conflict]:
    asked = {**wishes.pinned_levers(), "optimizer": wishes.optimizer}
    for lever in LEVERS:
        value = asked.get(lever.name)
        if value in lever.on_host:
            asked_for = f"{lever.name}={said(value)}"
            yield Conflict(f"--no-offload and {asked_for} contradict each other.", "Leave one of them out.")


def _packed(wishes: Wishes, shape: ModelShape, pinned: dict[str, Any]) -> Iterator[Conflict]:
    if not wishes.packing:
        return
    if shape.unpacked:
        yield Conflict(f"--packing: not for this model, {shape.unpacked}.", "Use --no-packing.")
    if pinned.get("tile_tokens") or pinned.get("offload_checkpoints"):
        yield Conflict(
            "--packing and levers that tile (tile_tokens, offload_checkpoints) contradict each other.",
            "Leave one of them out.",
        )
