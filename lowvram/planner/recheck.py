"""Recheck: a saved plan that a person may have edited, validated and predicted anew."""

from __future__ import annotations

from lowvram.data.stats import DataStats
from lowvram.device_rates import DeviceRates, rates_of
from lowvram.engine.shape import ModelShape
from lowvram.engine.source import ModelSource
from lowvram.errors import ConfigError, DoesNotFitError
from lowvram.hardware import Hardware
from lowvram.memory.cache import RememberedModel
from lowvram.planner.build import search_on
from lowvram.planner.figures import figures
from lowvram.planner.initialisation import largest_rank
from lowvram.planner.optional import require_liger_on
from lowvram.planner.plan import Plan
from lowvram.planner.schedule import Schedule
from lowvram.units import format_bytes

_SMALLER = "Lower seq_len or micro_batch in the plan, or make a new one: lowvram plan ... -o FILE"


def checked(
    plan: Plan,
    source: ModelSource,
    hardware: Hardware,
    stats: DataStats | None = None,
    rates: DeviceRates | None = None,
) -> Plan:
    """The plan with its memory, time and counts predicted anew; what it decides stays as it is.

    Args:
        hardware: where it is to run now.
        stats: of its data.
        rates: of the device, where they were measured.

    Raises:
        ConfigError: it contradicts the model or the device.
        DoesNotFitError: it needs more than its budget, or than other programs leave now.
    """
    model = RememberedModel(source)
    _require_possible(plan, model.shape, source)
    search = search_on(hardware, rates or rates_of(hardware), model, plan.budget_bytes, stats)
    _require_room(plan, search.reserved_bytes(plan.step), hardware)
    if not search.host_has_room(plan.step):
        free = format_bytes(hardware.host_free_bytes)
        raise DoesNotFitError(
            f"Beside the card the plan needs more host memory than the {free} that are free.",
            "Close other programs, or turn offload_checkpoints and embedding_on_host off in the plan.",
        )
    schedule = Schedule(**{name: getattr(plan, name) for name in Schedule.model_fields})
    return plan.model_copy(update=figures(search, plan.step, schedule, stats))


def _require_possible(plan: Plan, shape: ModelShape, source: ModelSource) -> None:
    shape.resolve_targets(plan.target_modules)
    full = shape.full_rank(plan.target_modules)
    wrong = ""
    if plan.seq_len > shape.context_limit:
        wrong = f"seq_len {plan.seq_len} is beyond the model's {shape.context_limit} positions"
    elif plan.rank > full:
        wrong = f"rank {plan.rank} is above the full rank {full} of the largest target layer"
    elif plan.rank > (most := largest_rank(plan.init, shape, plan.target_modules)):
        wrong = f"init {plan.init} at rank {plan.rank} finds directions for rank {most} in every target layer"
    elif plan.compute_dtype == "fp16" and plan.device.backend == "cpu":
        wrong = "compute_dtype fp16 is for GPUs, its loss scaling needs one: use bf16 or fp32"
    elif plan.packing and shape.unpacked:
        wrong = f"packing is not for this model, {shape.unpacked}"
    elif plan.bias == "all" and shape.untrained_biases:
        wrong = f"bias all is not for this model, {shape.untrained_biases}"
    if wrong:
        raise ConfigError(f"{wrong}.", "Edit the plan.")
    if plan.levers.liger:
        require_liger_on(plan.device.backend, source.config)


def _require_room(plan: Plan, needed_bytes: int, hardware: Hardware) -> None:
    """In the budget, less what other programs have taken since it was made."""
    same_card = hardware.total_bytes == plan.device.total_bytes
    taken = max(hardware.held_bytes - plan.device.held_bytes, 0) if same_card else 0
    if needed_bytes <= plan.budget_bytes - taken:
        return
    since = f", of which other programs have taken {format_bytes(taken)} since" if taken else ""
    budget = f"its budget is {format_bytes(plan.budget_bytes)}{since}"
    raise DoesNotFitError(
        f"The plan needs {format_bytes(needed_bytes)}, {budget}.",
        f"Close other programs on the GPU. {_SMALLER}" if taken else _SMALLER,
    )
