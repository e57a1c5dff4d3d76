"""ModelSource: where a model's files are and what they say, without loading a weight."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lowvram.engine import hub
from lowvram.engine.known_models import known_model, nearest_known
from lowvram.errors import ConfigError, first_line, refusals_of_the_system

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

Origin = Literal["folder", "hub", "shipped table"]

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit for its JSON header
_UNREADABLE = "Check its permissions, and those of the folders above it."


@dataclass(frozen=True)
class ModelSource:
    """A model by folder or hub id. Remote code is run only when `trust_remote_code` was asked for.

    The name of a folder that is there becomes absolute, so that what keeps it (plan, adapter) means the same
    model from every directory.

    Raises:
        ConfigError: the system does not let us look there.
    """

    name: str
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        with self._readable():
            if Path(self.name).expanduser().is_dir():
                object.__setattr__(self, "name", absolute(self.name))  # frozen for everybody else

    @property
    def is_local(self) -> bool:
        return Path(self.name).is_dir()

    @cached_property
    def refusal(self) -> hub.Refusal | None:
        """Why the hub does not give this model now; None when it does, and for a folder. Asked once."""
        return None if self.is_local else hub.refusal(self.name)

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's config.json; of a popular model that cannot be had now, its row of the shipped table.

        Raises:
            ConfigError: no such model, no config.json in it, or an unknown architecture.
        """
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig

        if self.config_origin == "shipped table" and (known := known_model(self.name)):
            return known.config()
        bad_values = (ValueError, KeyError, TypeError, AttributeError, StrictDataclassError)
        try:
            return AutoConfig.from_pretrained(self.name, **self._options())
        except (OSError, *bad_values) as error:
            refused = None if self._config_json else self.refusal  # else the one that is here is wrong
            raise ConfigError(*_why_not(self.name, error, refused)) from error

    @property
    def config_origin(self) -> Origin:
        """Where the config comes from; "hub" is also what an earlier run left in the hub's cache."""
        if self.is_local:
            return "folder"
        missing = self._config_json is None and self.refusal is not None
        return "shipped table" if missing and known_model(self.name) else "hub"

    @cached_property
    def fingerprint(self) -> str | None:
        """Tells this model's config from every other without reading it through transformers.

        None where nothing does: the model is not to be had, or may bring code that decides as well.

        Raises:
            ConfigError: a folder without config.json.
        """
        known = known_model(self.name) if self.config_origin == "shipped table" else None
        content = json.dumps(known.facts).encode() if known else self._config_json
        if content is None or self.trust_remote_code:
            return None
        return hashlib.sha256(content).hexdigest()

    @cached_property
    def _config_json(self) -> bytes | None:
        """The file as the folder, the hub or the hub's cache has it; None where none of them does."""
        self._refuse_bad_folder()
        with self._readable():
            file = Path(self.name) / "config.json" if self.is_local else self._downloaded_config()
            return file.read_bytes() if file else None

    def _downloaded_config(self) -> Path | None:
        if self.refusal is None:
            from huggingface_hub import hf_hub_download

            with suppress(OSError, ValueError):  # `config` meets it again, and says what it is
                return Path(hf_hub_download(self.name, "config.json"))
        return self._cached("config.json")

    def _options(self) -> dict[str, Any]:
        """For from_pretrained, which would try for half a minute what the hub has refused already."""
        return {"trust_remote_code": self.trust_remote_code, "local_files_only": self.refusal is not None}

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer.

        Raises:
            ConfigError: there is none, or no such model.
        """
        from transformers import AutoTokenizer

        self._refuse_no_folder()
        try:
            return AutoTokenizer.from_pretrained(self.name, **self._options())
        except Exception as error:  # of a broken tokenizer.json the tokenizers package raises bare ones
            if not self.is_local:
                _ = self.config  # refuses when the whole model is missing, not its tokenizer
            if self.refusal:
                raise self._not_here("tokenizer", "; a plan without --data needs no tokenizer") from error
            raise ConfigError(
                f"'{self.name}' has no tokenizer that transformers can load: {_first_line(error)}",
                "Copy tokenizer.json and tokenizer_config.json into the model's folder.",
            ) from error

    def download_bytes(self) -> int | None:
        """Bytes of weights that training would fetch first: 0 for a folder, None when nobody knows."""
        if self.is_local:
            return 0
        if self.refusal:
            return 0 if self._weights_in_cache() else _published_bytes(self.name)
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

        try:
            files = snapshot_download(
                self.name, allow_patterns="model*.safetensors", dry_run=True, etag_timeout=10
            )
        except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError):
            return _published_bytes(self.name)
        whole = [file for file in files if file.filename == SINGLE_FILE]  # then nothing else is loaded
        return sum(file.file_size or 0 for file in whole or files if file.will_download)

    def require_weights(self) -> None:
        """Refuse weights that are absent, truncated, pickled or out of reach, before loading.

        Raises:
            ConfigError: names the file. One that may not be read counts as well.
        """
        if not self.is_local:
            if self.refusal and not self._weights_in_cache():
                raise self._not_here("weights")
            return
        folder = Path(self.name)
        with self._readable():
            files = local_shards(folder)
            if not files:
                raise no_safetensors(folder, "Point --model at a folder with safetensors weights")
            for file in files:
                read_safetensors_header(file)

    def _weights_in_cache(self) -> bool:
        """Whether an earlier download of the weights is whole."""
        for file in filter(None, map(self._cached, (SINGLE_FILE, INDEX_FILE))):
            try:
                return all(map(read_safetensors_header, local_shards(file.parent)))
            except (ConfigError, OSError):
                return False
        return False

    def _cached(self, file: str) -> Path | None:
        """A file that an earlier download left in the hub's cache."""
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            found = try_to_load_from_cache(self.name, file)
        except HFValidationError:  # no hub id
            return None
        return Path(found) if isinstance(found, str) else None

    def _not_here(self, what: str, hint: str = "") -> ConfigError:
        """What the hub refuses and this machine lacks."""
        known = known_model(self.name)
        remedy = "Let this machine reach the hub, or give a local folder"
        if self.refusal and self.refusal.needs_access:
            remedy = _access(self.name)
        elif known and known.gated:
            remedy += f" (the hub asks for access to this model: huggingface.co/{self.name})"
        return ConfigError(
            f"This machine does not have the {what} of '{self.name}', and {self.refusal}.",
            f"{remedy}{hint}.",
        )

    def _readable(self) -> AbstractContextManager[None]:
        return refusals_of_the_system(f"The model '{self.name}' cannot be read", _UNREADABLE)

    def _refuse_bad_folder(self) -> None:
        self._refuse_no_folder()
        with self._readable():
            whole = not self.is_local or (Path(self.name) / "config.json").is_file()
        if not whole:
            raise ConfigError(
                f"The folder '{self.name}' has no config.json.",
                "Give the folder that from_pretrained would load (config.json, tokenizer, *.safetensors).",
            )

    def _refuse_no_folder(self) -> None:
        path = Path(self.name).expanduser()
        if path.is_file():
            raise ConfigError(
                f"--model '{self.name}' is a file, not a model folder or hub id.",
                "Give the folder that holds config.json.",
            )
        looks_local = path.is_absolute() or self.name.startswith((".", "~")) or self.name.count("/") > 1
        if not path.exists() and looks_local:
            raise ConfigError(
                f"There is no folder '{self.name}'.",
                "Check the path, or give a hub id such as Qwen/Qwen2-7B.",
            )


def _published_bytes(name: str) -> int | None:
    known = known_model(name)
    return known.weights_bytes if known else None


def absolute(name: str) -> str:
    """`name` from the root. A link keeps its own name: the hub's cache links to files without an ending."""
    path = Path(name).expanduser()
    return str(path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name)


def local_shards(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads of a model folder, whatever else lies beside them.

    5.24 takes model.safetensors where it is there, even beside an index; else the files of the index. A
    consolidated.safetensors or somebody's old copy is no part of the model.

    Raises:
        ConfigError: the index is unreadable, leaves the folder, or names a file that is not there.
    """
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    return [_listed_shard(folder, name) for name in sorted(set(weight_map(folder).values()))]


def weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file, as the folder's index says it; empty where transformers reads no index.

    Raises:
        ConfigError: it is no index.
    """
    index = folder / INDEX_FILE
    if (folder / SINGLE_FILE).is_file() or not index.is_file():
        return {}
    try:
        listed: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if all(isinstance(file, str) for file in listed.values()):
            return listed
    except (ValueError, KeyError, TypeError, AttributeError):
        pass  # as one whose files are no names
    raise ConfigError(f"'{index}' is not a safetensors index.", "Download the file again.")


def _listed_shard(folder: Path, name: str) -> Path:
    index, file = folder / INDEX_FILE, folder / name
    if Path(name).name != name:
        raise ConfigError(f"'{index}' points outside its folder: {name}", "Do not use this model.")
    if not file.is_file():
        raise ConfigError(f"'{index}' lists {name}, which is missing.", f"Download {name} again.")
    return file


def no_safetensors(folder: Path, remedy: str) -> ConfigError:
    """The refusal of a folder without weights, with pickled ones only, or with files of other names."""
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    if others:
        return ConfigError(
            f"'{folder}' has neither {SINGLE_FILE} nor {INDEX_FILE}, by which transformers finds a model's "
            f"weights; {others[0]} is neither.",
            f"{remedy}, or download the file that is missing.",
        )
    pickled = sorted(p.name for p in folder.glob("*.bin"))
    detail = f" (only pickled weights: {pickled[0]})" if pickled else ""
    return ConfigError(
        f"'{folder}' has no *.safetensors file{detail}.", f"{remedy}; lowvram never unpickles a model."
    )


def read_safetensors_header(file: Path) -> dict[str, Any]:
    """Tensor name -> {dtype, shape, data_offsets} of one file, read without its data.

    Raises:
        ConfigError: not a safetensors file, or shorter than its header says.
    """
    size = file.stat().st_size
    with file.open("rb") as handle:
        prefix = handle.read(8)
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER_BYTES + 1
        if header_bytes > min(_MAX_HEADER_BYTES, size):
            raise ConfigError(f"'{file}' is not a safetensors file.", "Download it again.")
        try:
            header: dict[str, Any] = json.loads(handle.read(header_bytes))
            header.pop("__metadata__", None)
            end = 8 + header_bytes + max((t["data_offsets"][1] for t in header.values()), default=0)
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            raise ConfigError(f"'{file}' has a broken safetensors header.", "Download it again.") from error
    if size < end:
        raise ConfigError(
            f"'{file}' is cut off: {size:,} of {end:,} bytes are there.", "Download it again (or resume)."
        )
    return header


def _first_line(error: BaseException) -> str:
    """Without the opening of a list whose items stand on the lines below."""
    return re.sub(r"( from one of)?:\s*$", "", first_line(error))


def _why_not(name: str, error: BaseException, refusal: hub.Refusal | None) -> tuple[str, str]:
    """Message and remedy for a config that cannot be had."""
    if Path(name).is_dir():
        message = f"transformers cannot read '{name}/config.json': {_first_line(error)}"
    else:
        cause = refusal or _first_line(error)
        message = f"Model '{name}' was not found here or on the hub: {cause}"
    return message, _remedy(name, f"{error} {refusal or ''}", bool(refusal and refusal.needs_access))


def _remedy(name: str, text: str, needs_access: bool) -> str:
    if "trust_remote_code" in text or "custom code" in text:
        return "This model brings its own code: add --trust-remote-code if you trust its author."
    if needs_access or "gated" in text or "401" in text or "403" in text:
        return f"{_access(name)}."
    if Path(name).is_dir():
        return "Update transformers (pip install -U transformers) or repair config.json."
    nearest = nearest_known(name)
    meant = f" Or did you mean {nearest}?" if nearest and nearest.casefold() != name.casefold() else ""
    return f"Check the spelling (owner/name), your connection, or give a local folder.{meant}"


def _access(name: str) -> str:
    return f"Ask for access at huggingface.co/{name}, then run: hf auth login"
