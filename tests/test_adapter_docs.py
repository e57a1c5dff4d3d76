"""docs/adapters.md and --help say what the code does: settings, flags, defaults and meanings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer

from lowvram.cli import app
from lowvram.engine.config import StepConfig
from lowvram.engine.shape import NAMED_TARGETS
from lowvram.planner.profiles import Profile
from lowvram.planner.wishes import Wishes

PAGE = (Path(__file__).parents[1] / "docs" / "adapters.md").read_text(encoding="utf-8")
# What a StepConfig says beside the adapter; `init` and its batches have a page of their own.
_NOT_THE_ADAPTER_S = {
    *("base_precision", "compute_dtype", "seq_len", "target_len", "micro_batch", "accumulation", "packing"),
    *("optimizer", "max_grad_norm", "levers", "init", "init_batches"),
}
_IN_PROFILE = {"target_modules": "targets"}  # under another name


def _rows(header: str) -> list[list[str]]:
    lines = PAGE[PAGE.index(header) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


ROWS = _rows("| setting |")


def _options(command: str) -> dict[str, Any]:
    """Flag -> the option that has it."""
    group: Any = typer.main.get_command(app)
    return {flag: option for option in group.commands[command].params for flag in option.opts}


def test_every_setting_of_the_adapter_is_there_once() -> None:
    assert sorted(row[0] for row in ROWS) == sorted(set(StepConfig.model_fields) - _NOT_THE_ADAPTER_S)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_default_and_meaning_are_the_code_s(row: list[str]) -> None:
    name, flag, default, meaning, source = row
    field = StepConfig.model_fields[name]
    assert meaning == field.description
    assert source
    if default == "profile":
        assert _IN_PROFILE.get(name, name) in Profile.model_fields
    else:
        assert default == str(field.default)
    assert not flag.startswith("--") or flag in _options("plan")


@pytest.mark.parametrize("command", ["plan", "auto"])
@pytest.mark.parametrize("flag", [*(row[1] for row in ROWS if row[1].startswith("--")), "--init"])
def test_help_says_the_default(command: str, flag: str) -> None:
    option = _options(command)[flag]
    assert re.search(r"\(default: .+\)\.$", option.help)
    assert option.name in Wishes.model_fields
    default = next((row[2] for row in ROWS if row[1] == flag), "default")
    said = {"False": "off", "1.0": "1"}.get(default, default)
    assert f"(default: {'the profile' if said == 'profile' else said}" in option.help


@pytest.mark.parametrize("command", ["plan", "auto"])
def test_help_names_the_settings_without_a_flag(command: str) -> None:
    """What the model or the plan's file decides: the task type, and the weight decay."""
    said = " ".join(option.help or "" for option in _options(command).values())
    unflagged = [row[0] for row in ROWS if not row[1].startswith("--")]
    assert unflagged == ["task_type", "weight_decay"]
    assert all(word in said for word in ("CAUSAL_LM", "SEQ2SEQ_LM", "weight_decay"))


def test_named_sets_are_the_code_s() -> None:
    sets = {row[0]: tuple(row[1].split(", ")) for row in _rows("| set |")}
    assert sets.pop("all-linear") == ("every linear layer but the head",)
    assert sets == NAMED_TARGETS


def test_every_flag_on_the_page_exists() -> None:
    known = _options("plan")
    assert {flag for flag in re.findall(r"--[a-z][a-z-]+", PAGE) if flag != "--help"} <= set(known)
