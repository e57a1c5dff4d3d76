"""From a command's flags to a plan, or to several beside each other."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape

from lowvram import cli_data
from lowvram.gc_pause import no_collections

if TYPE_CHECKING:
    from lowvram.hardware import Hardware
    from lowvram.planning import Planned


def compare(flags: dict[str, Any], as_json: bool) -> None:
    """Plan each model; one that does not fit is a column like the others. Exit code 3 when none fits."""
    from lowvram import compare_view
    from lowvram.errors import DoesNotFitError

    columns: list[compare_view.Column] = []
    for name in flags["model"]:
        try:
            columns.append(compare_view.Column(name, planned(flags | {"model": name}, with_survey=True)))
        except DoesNotFitError as error:
            columns.append(compare_view.Column(name, error))
    if as_json:
        typer.echo(json.dumps([column.as_json() for column in columns], indent=2))
    else:
        compare_view.show_comparison(columns, Console(highlight=False))
    if not any(column.planned for column in columns):
        raise DoesNotFitError(f"None of the {len(columns)} models fits.", "Take one of the nearest plans.")


def planned(flags: dict[str, Any], **also: bool) -> Planned:
    """Everything up to the plan, from a command's flags."""
    from lowvram import planning
    from lowvram.engine.source import ModelSource
    from lowvram.planner.profiles import load_profile, profile_for
    from lowvram.planner.wishes import Wishes, wishes_from

    wishes = wishes_from(**{name: flags[name] for name in Wishes.model_fields})
    wishes.pinned_levers()
    reading = cli_data.reading_of(flags)
    hardware = hardware_of(flags["vram"])
    profile = profile_for(hardware) if flags["profile"] is None else load_profile(flags["profile"])
    source = ModelSource(flags["model"], flags["trust_remote_code"])
    with Console(stderr=True).status("planning") as status, no_collections():

        def say(text: str) -> None:
            status.update(escape(text))

        return planning.plan_for(
            source,
            flags["data"],
            hardware,
            profile,
            wishes,
            say,
            reading=reading,
            eval_data=flags["eval_data"],
            **also,
        )


def hide_loading_bars() -> None:
    """transformers' bars for loading weights would break our view; the hub's bars for downloads stay."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def hardware_of(vram: str | None) -> Hardware:
    from lowvram import hardware
    from lowvram.units import parse_bytes

    return hardware.probe(trial=False) if vram is None else hardware.imagined_card(parse_bytes(vram))
