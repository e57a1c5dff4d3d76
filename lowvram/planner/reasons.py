"""Reasons: one plain sentence for every choice in a plan."""

from __future__ import annotations

from collections.abc import Iterator

from lowvram.data.stats import DataStats
from lowvram.engine.config import QUANTIZED, StepConfig
from lowvram.engine.shape import ModelShape
from lowvram.engine.source import ModelSource
from lowvram.planner import initialisation
from lowvram.planner.arithmetic import resident_bytes
from lowvram.planner.first_step import Request
from lowvram.planner.levers import sixteen_bit
from lowvram.planner.profiles import Profile
from lowvram.planner.schedule import batch_factor
from lowvram.planner.search import Search
from lowvram.planner.variants import with_value
from lowvram.planner.wishes import Wishes
from lowvram.units import format_bytes, format_count, said

_ASKED = "as you asked"
_HEADS = {
    "nf4": "nf4, a quarter of its 16-bit size, computed a tile of the vocabulary at a time",
    "int8": "int8, half of its 16-bit size, computed a tile of the vocabulary at a time",
    "streamed": "streamed, its 16 bits are in host memory and travel in tiles, twice a forward pass",
}
_PREFERRED = {
    "speed": "the fastest that fits",
    "quality": "the most exact that fits",
    "context": "the one that leaves most room",
}


def explain(request: Request, search: Search, step: StepConfig) -> tuple[str, ...]:
    """Why the plan is as it is, in the order of its fields."""
    profile, wishes, stats, shape = request.profile, request.wishes, request.stats, search.model.shape
    prefer = wishes.prefer or profile.prefer
    return (
        *_origin(request.source),
        *([_data(stats)] if stats else []),
        _precision(step, search, wishes, prefer),
        _adapter(step, profile, wishes),
        *initialisation.reason(step),
        *adapter_reasons(step, shape),
        _length(step, profile, wishes, stats, shape),
        _batch(step, wishes, prefer),
        *_packing(step, search, wishes, stats),
        *_learning_rate(step, profile, wishes),
        *evaluation_reasons(step, wishes, stats),
        *lever_reasons(step, wishes, prefer),
        *_unquantized(shape, step),
        *_untiled(shape, step),
    )


def _origin(source: ModelSource) -> list[str]:
    if source.config_origin != "shipped table":
        return []
    return [f"config from the shipped table ({source.refusal and source.refusal.reason})"]


def _data(stats: DataStats) -> str:
    """What the rows were taken for, and what of them is left out."""
    how = "found by its fields" if stats.shape_found else _ASKED
    said = f"data of the shape {stats.shape} ({how})"
    if stats.unread_fields:
        said += f", fields not read: {', '.join(stats.unread_fields)}"
    if stats.n_skipped_turns:
        said += f", {stats.n_skipped_turns:,} assistant turns untrained, which the chat template rewrites"
    return said + (f", {stats.n_skipped} rows skipped that cannot be used" if stats.n_skipped else "")


def _precision(step: StepConfig, search: Search, wishes: Wishes, prefer: str) -> str:
    chosen = _ASKED if wishes.precision else _why_precision(step, search, prefer)
    computes = f"{step.compute_dtype} arithmetic ({_why_compute(step, search)})"
    return f"{step.base_precision} base ({chosen}), {computes}"


def _why_compute(step: StepConfig, search: Search) -> str:
    hardware = search.hardware
    if step.compute_dtype == "bf16":
        return "bf16 has float32's range"
    if step.compute_dtype == sixteen_bit(hardware):
        scaled = ", so the loss is scaled and adapters are float32" if step.compute_dtype == "fp16" else ""
        return f"{hardware.name} has no fast bf16{scaled}"
    return "the base's own"


def _why_precision(step: StepConfig, search: Search, prefer: str) -> str:
    """By what the next more exact base would take."""
    if step.base_precision not in QUANTIZED:
        return "16 bits fit, so nothing is dequantised"
    more_exact = "int8" if step.base_precision == "nf4" else sixteen_bit(search.hardware)
    needed = resident_bytes(with_value(step, "base_precision", more_exact), search.model.shape)
    if needed > search.budget_bytes:
        return f"{more_exact} would take {format_bytes(round(needed))} before any activation"
    if prefer == "context":
        return "4 bits a weight leave the most room"
    leaves = f"{more_exact} leaves too little for activations"
    return leaves if prefer == "quality" else f"{leaves} to be as fast"


def _adapter(step: StepConfig, profile: Profile, wishes: Wishes) -> str:
    raised = wishes.rank is None and step.rank != profile.rank
    rank_of = _ASKED if wishes.rank else "the highest that fits" if raised else f"profile {profile.name}"
    alpha_of = _ASKED if wishes.alpha else _alpha_of(step, profile, wishes)
    targets = ", ".join(step.target_modules)
    rs = ", scaled by alpha/sqrt(r)" if step.use_rslora else ""
    return f"LoRA r={step.rank} ({rank_of}), alpha={step.alpha:g} ({alpha_of}){rs} on {targets}"


def _alpha_of(step: StepConfig, profile: Profile, wishes: Wishes) -> str:
    if step.use_rslora and initialisation.scales_as_in_paper(wishes):
        return f"as in the paper of {step.init}"
    if step.use_rslora and wishes.rslora is None and profile.use_rslora == "above_rank":
        return f"as strong as the profile's at its r={profile.rank}"
    return f"profile {profile.name}"


def adapter_reasons(step: StepConfig, shape: ModelShape) -> Iterator[str]:
    """Of each way in which the adapter is not plain LoRA; and why it is, where it is."""
    others = step.use_rslora, step.use_dora, step.freeze_a, step.lora_plus_ratio != 1, step.init != "default"
    if not (step.inference_mode or any(others)):
        yield "plain LoRA: of the other ways that were compared none kept a lead (README)"
    if step.inference_mode:
        yield (
            f"inference mode, {_ASKED}: loading and a forward pass are counted, nothing trains "
            "(what answering takes says lowvram chat --dry-run)"
        )
    if step.bias != "none":
        yield f"bias: {step.bias}, {_ASKED}; {_biases(step, shape)}"
    if step.use_dora:
        yield f"DoRA, {_ASKED}: each row's magnitude trains beside its direction, for more products a layer"
    if step.lora_plus_ratio != 1:
        yield f"LoRA+, {_ASKED}: B learns at {step.lora_plus_ratio:g} times the learning rate of A"
    if step.freeze_a:
        kept = "which saves its optimizer state (DoRA keeps the layer's input)"
        freed = kept if step.use_dora else "so an adapted layer's input is not kept for it"
        yield f"LoRA-FA, {_ASKED}: A stays as it was drawn, {freed}"


def _biases(step: StepConfig, shape: ModelShape) -> str:
    if shape.trains_no_bias(step):
        which = "this model has none" if step.bias == "all" else "the adapted layers have none"
        return f"{which}, so nothing is added"
    return "they train in float32, and no weight decay draws them to 0"


def _length(
    step: StepConfig, profile: Profile, wishes: Wishes, stats: DataStats | None, shape: ModelShape
) -> str:
    limited = " (the model's limit)" if step.seq_len == shape.context_limit else ""
    if stats is None:
        own = step.seq_len == profile.default_seq_len
        why = "no data given, the profile's" if own else "the longest that fits"
        return f"{step.seq_len} tokens: {_ASKED if wishes.seq_len else why}{limited}"
    longer, lost = stats.n_longer_than(step.seq_len), stats.n_lost_at(step.seq_len)
    if lost:
        return (
            f"{step.seq_len} tokens{limited}: of {stats.n_examples} examples about {longer - lost} are cut "
            f"and about {lost} left out, whose answer begins later"
        )
    if longer:
        cut = f"about {longer} of {stats.n_examples} examples are longer and are cut"
        return f"{step.seq_len} tokens{limited}: {cut}"
    return f"{step.seq_len} tokens: the longest example has {stats.longest_tokens}, none is cut"


def _batch(step: StepConfig, wishes: Wishes, prefer: str) -> str:
    whole = step.effective_batch
    if step.accumulation == 1:
        return f"{whole} examples an update in one forward pass: they fit together"
    if step.packing:
        tokens = step.micro_batch * step.seq_len
        return f"{whole} examples an update in rows of up to {tokens} tokens: {_PREFERRED[prefer]}"
    why = _ASKED if wishes.micro_batch else _PREFERRED[prefer]
    return f"{whole} examples an update as {step.accumulation} passes of {step.micro_batch}: {why}"


def _packing(step: StepConfig, search: Search, wishes: Wishes, stats: DataStats | None) -> Iterator[str]:
    if stats is None and wishes.packing is None:
        return
    whole = step.effective_batch
    work = search.work(step.seq_len, whole)
    if step.packing:
        passes, padding = work.tokens(step.micro_batch, packing=True).passes, work.padding(min(4, whole))
        why = _ASKED if wishes.packing else f"an update takes {passes:.1f} rows"
        yield f"packing: on, {why}; micro-batches of {min(4, whole)} would be {padding:.0%} padding"
    elif wishes.packing is False:
        yield f"packing: off, {_ASKED}"
    else:
        reason = _why_unpacked(step, search)
        yield f"packing: off, {reason}; padding is {work.padding(step.micro_batch):.0%} of the tokens"


def _why_unpacked(step: StepConfig, search: Search) -> str:
    if step.levers.tiles:
        return "layers run by tiles"
    on_cpu = "on a CPU it is not faster" if search.backend == "cpu" else ""
    return search.model.shape.unpacked or on_cpu or "examples are of like length"


def _learning_rate(step: StepConfig, profile: Profile, wishes: Wishes) -> Iterator[str]:
    whole, why = step.effective_batch, []
    if whole != profile.effective_batch:
        why.append(f"times {batch_factor(profile, whole):.2g}, the root of the batch's ratio")
    if factor := initialisation.RATE_FACTORS.get(step.init):
        why.append(f"times {factor:g}, at which {step.init} learns best (README)")
    if why and not wishes.learning_rate:
        own = f"the profile's {profile.learning_rate:g} for {profile.effective_batch} examples"
        yield f"learning rate: {own} {' '.join(why)}"


def evaluation_reasons(step: StepConfig, wishes: Wishes, stats: DataStats | None) -> Iterator[str]:
    """Of held-out examples with a file of their own, and of an early stop."""
    if stats and stats.eval_source:
        longest = stats.longest_held_out_tokens
        told = f"the longest has {longest} tokens and is cut to {step.seq_len}"
        if longest <= step.seq_len:
            told = f"the longest has {longest} tokens, none is cut"
        yield f"held out: {stats.eval_source}, {_ASKED}, nothing of {stats.source}; {told}"
    if wishes.early_stop:
        yield f"early stop: after {wishes.early_stop} held-out losses in a row without a better, {_ASKED}"


def lever_reasons(step: StepConfig, wishes: Wishes, prefer: str) -> Iterator[str]:
    """Of each lever that is on."""
    pinned = set(wishes.pinned_levers())
    levers = step.levers

    def why(name: str, reason: str) -> str:
        asked = f"{name}: {said(getattr(levers, name))}, {_ASKED}"
        return asked if name in pinned else f"{name}: {reason}"

    yield why("gradient_checkpointing", _why_checkpointing(step, bool(pinned), prefer))
    yield why("loss_chunk_tokens", f"logits of {levers.loss_chunk_tokens} trained tokens at one time")
    if levers.kept_layers:
        more = "the last layers keep their activations, there is room for that"
        yield why("kept_layers", f"{levers.kept_layers}, {more}")
    if levers.tile_tokens:
        yield why("tile_tokens", f"a layer runs on {levers.tile_tokens} tokens at a time")
    if levers.offload_checkpoints:
        yield why("offload_checkpoints", "on, each layer's input waits in host memory")
    if levers.embedding_on_host:
        yield why("embedding_on_host", "on, its table is in host memory and the batch's rows travel")
    if levers.head != "16bit":
        yield why("head", _HEADS[levers.head])
    if levers.empty_cache:
        yield why("empty_cache", "on")
    if levers.liger:
        yield why("liger", "on, it is installed: its norms and gated MLPs keep fewer bytes")
    if step.base_precision == "nf4":
        with_nested = "on, 0.37 bits a weight for about 1 % of the dequantising"
        without = "off, 0.37 bits more a weight, for which there is room"
        yield why("double_quantization", with_nested if levers.double_quantization else without)
    if step.optimizer != "adamw":
        yield f"{step.optimizer}: {_ASKED if wishes.optimizer else 'its state is 4x smaller'}"


def _why_checkpointing(step: StepConfig, pinned: bool, prefer: str) -> str:
    if step.inference_mode and not step.levers.gradient_checkpointing:
        return "off, there is no backward pass to keep anything for"
    if not step.levers.gradient_checkpointing:
        return "off, all activations fit, so nothing is computed twice"
    if step.levers.tiles and pinned:
        return "on, layers that run by tiles are computed again"
    if prefer == "context":
        return "on, a layer keeps its input only"
    return "on, keeping all activations does not fit"


def _unquantized(shape: ModelShape, step: StepConfig) -> list[str]:
    """A mixture's experts are no linear layers in transformers 5: bitsandbytes leaves them in 16 bits."""
    if step.base_precision not in QUANTIZED or not shape.stacked_parameters:
        return []
    experts = format_count(shape.stacked_parameters)
    return [
        f"{experts} parameters are a mixture's experts, not linear layers: they stay in 16 bits and are not "
        "adapted"
    ]


def _untiled(shape: ModelShape, step: StepConfig) -> list[str]:
    if not shape.untiled or not step.levers.gradient_checkpointing:
        return []
    return [f"tile_tokens and offload_checkpoints: not for this model, {shape.untiled}"]
