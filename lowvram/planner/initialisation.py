"""The adapter's initialisation in a plan: what it can be asked for, its scaling, its time, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lowvram.engine.config import DATA_INITS, GRADIENT_INITS, QUANTIZED, RANKS_TAKEN, AdapterInit, StepConfig
from lowvram.engine.shape import ModelShape
from lowvram.planner.wishes import Wishes

PAPERS_ALPHA = 16.0  # with alpha/sqrt(r), in LoRA-GA's and LoRA-One's own runs
# Of the learning rate: at 1e-3, where LoRA ends at 1.03, LoRA-GA ends at 1.33, and at 1e-4 at 0.93 (held-out
# loss after 20 steps, benchmarks/adapters.csv). EVA and LoRA-One are at their best at LoRA's rate or above.
RATE_FACTORS: dict[AdapterInit, float] = {"lora_ga": 0.1}
_GRADIENT_TIME = 2.0  # of a micro-batch of a step: the weights' gradients, in float32
_INPUTS_TIME = 0.5  # a forward pass, and its inputs decomposed
_WHY = {
    "pissa": "the base's largest singular directions; the base stays as it is and B0 A0 is subtracted, where "
    "QPiSSA would quantise it anew",
    "olora": "orthonormal, of the base's QR; the base stays as it is and B0 A0 is subtracted",
    "loftq": "the largest part of what quantising lost, repaired from the start",
    "eva": "A reads the directions in which the layers' inputs vary most",
    "lora_ga": "A and B take the gradient's first 2r directions, B0 A0 is subtracted, so step 0 is the base",
    "lora_one": "B A is the gradient's first r directions: a step of gradient descent before the first",
}


def scales_as_in_paper(wishes: Wishes) -> bool:
    """LoRA-GA's and LoRA-One's scale of A and B is for alpha/sqrt(r), and they run with alpha = 16."""
    return wishes.init in GRADIENT_INITS and wishes.rslora is not False


def largest_rank(init: AdapterInit, shape: ModelShape, targets: Sequence[str]) -> int:
    """Above it an adapter adds no freedom, or its initialisation has no directions left."""
    taken = RANKS_TAKEN.get(init)
    return shape.full_rank(targets) if taken is None else shape.narrowest(targets) // taken


def refusals(
    wishes: Wishes, rank: int, shape: ModelShape, targets: Sequence[str], pinned: dict[str, Any]
) -> Iterator[tuple[str, str]]:
    """What an initialisation cannot go with: (message, remedy)."""
    init = wishes.init or "default"
    if wishes.init_batches and init not in DATA_INITS:
        yield (
            f"--init-batches {wishes.init_batches}: --init {init} looks at no data.",
            f"Leave it out, or use --init {', '.join(sorted(DATA_INITS))}.",
        )
    if init == "default":
        return
    most = largest_rank(init, shape, targets)
    if most < rank <= shape.full_rank(targets):  # above that it is refused whatever the initialisation
        directions = f"{RANKS_TAKEN[init] * rank} directions of every target layer"
        yield (
            f"--init {init} at rank {rank} takes {directions}, and the narrowest has "
            f"{shape.narrowest(targets)}.",
            f"Use --rank {most} or less, or leave out the narrow layers with --targets.",
        )
    if wishes.inference_mode:
        yield f"--init {init} and --inference-mode contradict each other.", "Leave one of them out."
    if init == "loftq" and wishes.precision not in (None, *QUANTIZED):
        yield (
            f"--init loftq repairs what quantising lost; a base in {wishes.precision} has lost nothing.",
            "Use --precision nf4 or int8, or another --init.",
        )
    if init == "eva":
        yield from _eva(shape, pinned)


def _eva(shape: ModelShape, pinned: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if shape.task_type != "CAUSAL_LM":
        yield "--init eva is for decoder-only models.", "Use --init lora_ga or pissa, which know T5."
    if pinned.get("tile_tokens") or pinned.get("offload_checkpoints"):
        yield (
            "--init eva looks at whole sequences: not with tile_tokens or offload_checkpoints.",
            "Leave them off, or use another --init.",
        )


def allows(step: StepConfig, base_precision: str, tiles: bool) -> bool:
    """Whether a candidate of the search suits the initialisation."""
    if step.init == "loftq":
        return base_precision in QUANTIZED
    return not (step.init == "eva" and tiles)


def seconds(step: StepConfig, step_seconds: float, passes: float) -> float:
    """Of its passes over data, `passes` of which make a step; decomposing the layers is not counted."""
    if step.init not in DATA_INITS:
        return 0.0
    share = _GRADIENT_TIME if step.init in GRADIENT_INITS else _INPUTS_TIME
    return step.init_batches * share * step_seconds / max(passes, 1.0)


def reason(step: StepConfig) -> Iterator[str]:
    """One sentence, where there is an initialisation."""
    if step.init == "default":
        return
    looks = f", from {step.init_batches} micro-batches" if step.init in DATA_INITS else ""
    yield f"init {step.init}, as you asked{looks}: {_WHY[step.init]}"
