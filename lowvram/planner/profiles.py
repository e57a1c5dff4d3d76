"""Profiles: policy per card class, in YAML that people read, copy and edit."""

from __future__ import annotations

import difflib
import math
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from lowvram.errors import ConfigError
from lowvram.frozen import Frozen
from lowvram.hardware import Hardware
from lowvram.units import GiB

_SIZES = ((10, "8gb"), (14, "12gb"), (20, "16gb"), (math.inf, "24gb"))  # below this many GiB -> profile
_FOLDERS = (Path(__file__).parents[1] / "profiles", Path(__file__).parents[2] / "profiles")
_NEW_PROFILE = "Start from a copy: lowvram profiles show 8gb > mine.yaml"
_NEW_PLAN = "Make one: lowvram plan --model M --data D -o plan.yaml"


Prefer = Literal["speed", "context", "quality"]
LeverName = Literal[
    "micro_batch",
    "packing",
    "loss_chunk_tokens",
    "gradient_checkpointing",
    "kept_layers",
    "base_precision",
    "double_quantization",
    "embedding_on_host",
    "optimizer",
    "liger",
    "offload_checkpoints",
    "tile_tokens",
    "head",
]


class Profile(Frozen):
    """What to wish for when the user wishes nothing."""

    name: str
    rank: int = Field(ge=1)
    alpha: float = Field(gt=0)
    dropout: float = Field(ge=0, lt=1)
    use_rslora: Literal["never", "above_rank", "always"]
    largest_rank: int = Field(ge=1)
    targets: str | tuple[str, ...]
    prefer: Prefer
    learning_rate: float = Field(gt=0)
    schedule: Literal["cosine", "linear", "constant"]
    warmup_share: float = Field(ge=0, lt=1)
    effective_batch: int = Field(ge=1)
    epochs: float = Field(gt=0)
    default_seq_len: int = Field(ge=8)
    smallest_seq_len: int = Field(ge=8)
    margin_share: float = Field(ge=0, lt=1)
    quantized_head: Literal["last_resort", "when_faster", "never"]
    ladder: tuple[LeverName, ...]


def profile_for(hardware: Hardware) -> Profile:
    """The shipped profile for this card's size, or `cpu`."""
    if hardware.backend == "cpu":
        return load_profile("cpu")
    size_gib = hardware.total_bytes / GiB
    return load_profile(next(name for limit, name in _SIZES if size_gib < limit))


def budget(hardware: Hardware, profile: Profile) -> int:
    """Bytes that a step may reserve: the card less context, other programs and the profile's margin."""
    if hardware.backend == "cpu":
        return int(hardware.host_free_bytes * (1 - profile.margin_share))
    usable = hardware.total_bytes - hardware.held_bytes - hardware.context_bytes
    return int(usable - profile.margin_share * hardware.total_bytes)


def load_profile(name_or_file: str) -> Profile:
    """A shipped profile by name, or a user's YAML file.

    Raises:
        ConfigError: no such profile, or keys and values that are not understood, all named at once.
    """
    return Profile.model_validate(parse_yaml(Profile, profile_file(name_or_file)))


def profile_file(name_or_file: str) -> Path:
    """The file of a shipped profile, or a user's own.

    Raises:
        ConfigError: no such profile.
    """
    shipped = shipped_profiles()
    if name_or_file in shipped:
        return shipped[name_or_file]
    if _is_there(Path(name_or_file)):
        return Path(name_or_file)
    raise ConfigError(f"There is no profile '{name_or_file}'.", f"Use {', '.join(shipped)} or a YAML file.")


def shipped_profiles() -> dict[str, Path]:
    """Each shipped profile's file by its name, those for small cards first."""
    files = {file.stem: file for folder in reversed(_FOLDERS) for file in folder.glob("*.yaml")}
    by_card = [name for name in card_sizes() if name in files]
    return {name: files[name] for name in [*by_card, *sorted(files.keys() - by_card)]}


def card_sizes() -> dict[str, tuple[float, float]]:
    """For each profile that cards take by their size: from how many GiB, and below how many."""
    limits = pairwise((0.0, *(limit for limit, _ in _SIZES)))
    return {name: sizes for (_, name), sizes in zip(_SIZES, limits, strict=True)}


def _is_there(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError:  # a folder that may not be entered: reading the file says so
        return True


def parse_yaml(model: type[Any], file: Path) -> Any:
    """Validate a YAML file against a frozen model.

    Raises:
        ConfigError: every unknown key (with the nearest known one) and every bad value, in one message.
    """
    remedy = _NEW_PROFILE if model is Profile else _NEW_PLAN
    content = _read_yaml(file, remedy)
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"a {type(content).__name__}"
        raise ConfigError(f"{file} holds {found}, not lines of KEY: VALUE.", remedy)
    try:
        return model.model_validate(content)
    except ValidationError as error:
        lines = [_explain(e, model) for e in error.errors()]
        raise ConfigError(f"{file} is not valid:\n  " + "\n  ".join(lines), "Edit those lines.") from error


def _read_yaml(file: Path, remedy: str) -> Any:
    try:
        return yaml.safe_load(file.read_bytes())  # UTF-8, or UTF-16 as PowerShell's > writes it
    except FileNotFoundError as error:
        raise ConfigError(f"There is no {file}.", remedy) from error
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be read ({error.strerror}).", "Check the path and its permissions."
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} cannot be read as YAML: {error}", "Repair the file.") from error


def _explain(error: Any, model: type[Any]) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if isinstance(error["input"], dict) and error["type"] != "extra_forbidden":
        # A rule across lines names its lines itself, and of a missing one the input is the whole file: 3 KB.
        said = error["msg"].removeprefix("Value error, ")
        return f"{where}: {said}" if where else str(said)
    if error["type"] != "extra_forbidden":
        return f"{where}: {error['msg']} (got {error['input']!r})"
    near = difflib.get_close_matches(str(error["loc"][-1]), list(model.model_fields), n=1)
    return f"{where}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
