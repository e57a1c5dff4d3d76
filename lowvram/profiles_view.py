"""`lowvram profiles`: the shipped policies in a table, one as its file, and whether a user's own is valid."""

from __future__ import annotations

import json
import math
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lowvram.planner.profiles import (
    Profile,
    card_sizes,
    load_profile,
    parse_yaml,
    profile_file,
    shipped_profiles,
)
from lowvram.shell import typed
from lowvram.units import printable


def show_all(as_json: bool, console: Console) -> None:
    """Print every shipped profile, with the cards that take it and its file."""
    rows = [(load_profile(name), _cards(name), file) for name, file in shipped_profiles().items()]
    if as_json:
        told = [
            {"cards": cards, "file": str(file)} | profile.model_dump(mode="json")
            for profile, cards, file in rows
        ]
        console.print(json.dumps(told, indent=2), markup=False, soft_wrap=True)
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("profile", "cards", "rank", "alpha", "learning rate", "batch"):
        table.add_column(heading, justify="left" if heading in ("profile", "cards") else "right")
    for profile, cards, _ in rows:
        numbers = (profile.rank, profile.alpha, profile.learning_rate, profile.effective_batch)
        table.add_row(profile.name, cards, *(f"{number:g}" for number in numbers))
    console.print(table)
    for folder in dict.fromkeys(file.parent for _, _, file in rows):  # below the table: a path is wide
        console.print(f"Their files are in {escape(str(folder))}", soft_wrap=True)
    console.print("Copy one: lowvram profiles show 8gb > mine.yaml")


def content(name_or_file: str) -> bytes:
    """A profile's file as it is, once it is known to be one.

    Raises:
        ConfigError: no such profile, or it is not valid.
    """
    load_profile(name_or_file)
    return profile_file(name_or_file).read_bytes()


def validate(file: Path, console: Console) -> None:
    """Say that a profile is valid.

    Raises:
        ConfigError: it is not, with all that is wrong.
    """
    parse_yaml(Profile, file)
    shown, typed_file = (escape(printable(text)) for text in (str(file), typed(file)))
    console.print(
        f"{shown} is valid. Use it with: lowvram plan --model M --profile {typed_file}", soft_wrap=True
    )


def _cards(name: str) -> str:
    """Of which memory, in the words of their makers: a card sold as 8 GB has 8 GiB."""
    if name == "cpu":
        return "no GPU"
    if name not in card_sizes():
        return "none by itself"
    least, below = card_sizes()[name]
    if math.isinf(below):
        return f"from {least:g} GB"
    return f"from {least:g} to below {below:g} GB" if least else f"below {below:g} GB"
