"""Why: each lever beside its next setting: what it saves, what it costs, and what would flip it."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from lowvram.engine.config import Levers, StepConfig
from lowvram.frozen import Frozen
from lowvram.planner.first_step import Request
from lowvram.planner.levers import LEVERS, Lever, Setting, compute_dtype
from lowvram.planner.search import Search
from lowvram.planner.variants import value_of, with_value
from lowvram.units import format_bytes, said

_TILING = ("tile_tokens", "offload_checkpoints")


class LeverWhy(Frozen):
    """One lever of a plan."""

    name: str
    does: str
    setting: str
    beside: str | None  # the next setting, faster where there is one, else smaller; None: there is no other
    saves_bytes: int | None  # reserved, of `setting` over `beside`; below 0 it takes more
    costs_share: float | None  # of the step's modelled time, of `setting` over `beside`; below 0 it is faster
    flips: str  # what would flip it, or why it cannot


def why(search: Search, step: StepConfig, request: Request) -> tuple[LeverWhy, ...]:
    """All levers, in the order in which they are searched.

    What a lever saves is the difference of two traces, what it costs that of two modelled times.
    """
    setting = search.setting(step)
    return tuple(_of(lever, setting, search, request) for lever in LEVERS)


def _of(lever: Lever, setting: Setting, search: Search, request: Request) -> LeverWhy:
    step, now = setting.base, value_of(setting.base, lever.name)
    told = {"name": lever.name, "does": lever.does, "setting": said(now)}
    other = _beside(lever, setting)
    moved = None if other is None else _moved(setting, lever.name, other, request)
    if moved is None:
        nothing = {"beside": None, "saves_bytes": None, "costs_share": None}
        return LeverWhy(**told, **nothing, flips=_why_fixed(lever, setting, request))
    saves = search.reserved_bytes(moved) - search.reserved_bytes(step)
    costs = search.seconds(step) / search.seconds(moved) - 1
    flips = _flips(lever, said(other), moved, search, request, step)
    return LeverWhy(**told, beside=said(other), saves_bytes=saves, costs_share=round(costs, 4), flips=flips)


def _beside(lever: Lever, setting: Setting) -> Any:
    """The next faster setting, else the next smaller; None where there is no other."""
    now, values = value_of(setting.base, lever.name), lever.settings(setting)
    if lever.name == "kept_layers" and (setting.base.levers.tiles or not _recomputes(setting.base)):
        return None
    if lever.name == "double_quantization" and setting.base.base_precision != "nf4":
        return None
    if now not in values or len(values) < 2:  # a tiled head has chunks of its own
        return None
    at = values.index(now)
    return values[at - 1] if at else values[at + 1]


def _recomputes(step: StepConfig) -> bool:
    return step.levers.gradient_checkpointing


def _moved(setting: Setting, name: str, value: Any, request: Request) -> StepConfig | None:
    """The step with one lever moved, and what cannot stay beside it at rest; None where they exclude it."""
    moved = with_value(setting.base, name, value)
    if setting.shape.tied and name == "head":  # one weight: both are placed, or none
        moved = with_value(moved, "embedding_on_host", value != "16bit")
    if setting.shape.tied and name == "embedding_on_host":
        moved = with_value(moved, "head", "streamed" if value else "16bit")
    if name == "base_precision":
        moved = with_value(moved, "compute_dtype", compute_dtype(value, request.hardware))
    if name in _TILING and value:
        moved = with_value(with_value(moved, "kept_layers", 0), "packing", False)
        moved = with_value(moved, "gradient_checkpointing", True)
    if name == "gradient_checkpointing" and not value:
        moved = with_value(moved, "kept_layers", 0)
    try:
        Levers.model_validate(moved.levers.model_dump())
    except ValidationError:
        return None
    return moved


def _why_fixed(lever: Lever, setting: Setting, request: Request) -> str:
    if lever.name in request.wishes.pinned:
        return "as you asked"
    if reason := lever.why_not(setting):
        return f"not here: {reason}"
    if lever.name == "kept_layers":
        return (
            "nothing is recomputed" if not _recomputes(setting.base) else "layers that run by tiles keep none"
        )
    if lever.name == "packing":
        return (
            f"not for this model: {setting.shape.unpacked}"
            if setting.shape.unpacked
            else "decided by the data"
        )
    return "no other setting here"


def _flips(
    lever: Lever, other: str, moved: StepConfig, search: Search, request: Request, step: StepConfig
) -> str:
    if lever.name in request.wishes.pinned:
        return "as you asked"
    if lever.name not in request.profile.ladder:
        return f"profile {request.profile.name} leaves it unused"
    needed = search.reserved_bytes(moved)
    if needed > search.budget_bytes:
        return f"{other} with {format_bytes(needed - search.budget_bytes)} more memory"
    if not search.host_has_room(moved):
        return f"{other} with more host memory"
    if search.seconds(moved) < search.seconds(step):
        return f"{other} if it were preferred"
    left = search.budget_bytes - search.reserved_bytes(step)
    if needed >= search.reserved_bytes(step):
        return f"nothing: {other} saves nothing at this peak"
    return f"{other} with {format_bytes(left)} less memory, or longer sequences"
