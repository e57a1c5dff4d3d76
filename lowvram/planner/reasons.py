"""Reasons: one plain sentence for every choice in a plan."""

from __future__ import annotations

from lowvram.data.stats import DataStats
from lowvram.engine.config import StepConfig
from lowvram.hardware import Hardware
from lowvram.planner.profiles import Profile
from lowvram.planner.wishes import Wishes

_HEADS = {
    "nf4": "nf4, a quarter of its 16-bit size, computed a tile of the vocabulary at a time",
    "int8": "int8, half of its 16-bit size, computed a tile of the vocabulary at a time",
    "streamed": "streamed, its 16 bits are in host memory and travel in tiles, twice a forward pass",
}


def explain(
    step: StepConfig, hardware: Hardware, profile: Profile, wishes: Wishes, stats: DataStats | None
) -> tuple[str, ...]:
    """Why the plan is as it is, in the order of its fields."""
    return (
        _precision(step, hardware, wishes),
        _adapter(step, profile, wishes),
        _length(step, profile, wishes, stats),
        _batch(step),
        *_levers(step, wishes),
    )


def _precision(step: StepConfig, hardware: Hardware, wishes: Wishes) -> str:
    chosen = "as you asked" if wishes.precision else "4 bits a weight leave the most room"
    why = "bf16 has float32's range" if step.compute_dtype == "bf16" else f"{hardware.name} has no fast bf16"
    return f"{step.base_precision} base ({chosen}), {step.compute_dtype} arithmetic ({why})"


def _adapter(step: StepConfig, profile: Profile, wishes: Wishes) -> str:
    whose = [("as you asked" if wish else f"profile {profile.name}") for wish in (wishes.rank, wishes.alpha)]
    rank, alpha = f"r={step.rank} ({whose[0]})", f"alpha={step.alpha:g} ({whose[1]})"
    return f"LoRA {rank}, {alpha} on {', '.join(step.target_modules)}"


def _length(step: StepConfig, profile: Profile, wishes: Wishes, stats: DataStats | None) -> str:
    if stats is None:
        why = (
            "no data given, the profile's" if step.seq_len == profile.default_seq_len else "the model's limit"
        )
        return f"{step.seq_len} tokens: {'as you asked' if wishes.seq_len else why}"
    longer, lost = stats.n_longer_than(step.seq_len), stats.n_lost_at(step.seq_len)
    if lost:
        return (
            f"{step.seq_len} tokens: of {stats.n_examples} examples about {longer - lost} are cut and about "
            f"{lost} left out, whose answer begins later"
        )
    if longer:
        return f"{step.seq_len} tokens: about {longer} of {stats.n_examples} examples are longer and are cut"
    return f"{step.seq_len} tokens: the longest example has {stats.longest_tokens}, none is cut"


def _batch(step: StepConfig) -> str:
    whole = step.micro_batch * step.accumulation
    if step.accumulation == 1:
        return f"{whole} examples an update in one forward pass: they fit together"
    passes = f"{step.accumulation} passes of {step.micro_batch}"
    return f"{whole} examples an update as {passes}: the fastest that fits"


def _levers(step: StepConfig, wishes: Wishes) -> list[str]:
    asked = set(wishes.pinned_levers())
    levers = step.levers

    def why(name: str, reason: str) -> str:
        return (
            f"{name}: {_said(getattr(levers, name))}, as you asked" if name in asked else f"{name}: {reason}"
        )

    checkpointing = (
        "on, layers that run by tiles are computed again"
        if levers.tiles and asked
        else "on, keeping all activations does not fit"
        if levers.gradient_checkpointing
        else "off, all activations fit, so nothing is computed twice"
    )
    lines = [
        why("gradient_checkpointing", checkpointing),
        why("loss_chunk_tokens", f"logits of {levers.loss_chunk_tokens} trained tokens at one time"),
    ]
    if levers.kept_layers:
        more = "the last layers keep their activations, there is room for that"
        lines.append(why("kept_layers", f"{levers.kept_layers}, {more}"))
    if levers.tile_tokens:
        lines.append(why("tile_tokens", f"a layer runs on {levers.tile_tokens} tokens at a time"))
    if levers.offload_checkpoints:
        lines.append(why("offload_checkpoints", "on, each layer's input waits in host memory"))
    if levers.embedding_on_host:
        lines.append(why("embedding_on_host", "on, its table is in host memory and the batch's rows travel"))
    if levers.head != "16bit":
        lines.append(why("head", _HEADS[levers.head]))
    if levers.empty_cache:
        lines.append(why("empty_cache", "on"))
    if levers.liger:
        lines.append(why("liger", "on, it is installed: its norms and gated MLPs keep fewer bytes"))
    if step.base_precision == "nf4":
        lines.append(why("double_quantization", "on, 0.37 bits a weight for about 1 % of the time"))
    if step.optimizer != "adamw":
        lines.append(
            f"{step.optimizer}: " + ("as you asked" if wishes.optimizer else "its state is 4x smaller")
        )
    return lines


def _said(value: bool | int | str) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
