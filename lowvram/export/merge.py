"""Merges a LoRA adapter into its 16-bit base, one tensor at a time, straight from file to file."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open

from lowvram.engine.source import INDEX_FILE, SINGLE_FILE, ModelSource, local_shards, read_safetensors_header
from lowvram.errors import ConfigError, DoesNotFitError
from lowvram.frozen import Frozen
from lowvram.units import GiB, format_bytes

Progress = Callable[[int, int], None]

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*")
_PEFT_PREFIX = "base_model.model."
_UNSUPPORTED = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias")


class MergeResult(Frozen):
    """What was written."""

    folder: Path
    n_tensors: int
    n_merged: int
    n_bytes: int


@dataclass(frozen=True)
class _Delta:
    """scaling * B @ A, kept as its small factors."""

    a: torch.Tensor  # [r, in]
    b: torch.Tensor  # [out, r]
    scaling: float

    @property
    def transposed(self) -> _Delta:
        """For GPT-2's Conv1D, whose weight is [in, out]."""
        return _Delta(self.b.T, self.a.T, self.scaling)

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    def added_to(self, weight: torch.Tensor) -> torch.Tensor:  # [out, in] -> [out, in]
        """In float32, rounded once to the weight's own dtype."""
        total = weight.float()
        total.addmm_(self.b.float(), self.a.float(), alpha=self.scaling)
        return total.to(weight.dtype)


def merge_adapter(
    base: ModelSource,
    adapter: Path,
    output: Path,
    *,
    max_shard_bytes: int = 4 * GiB,
    progress: Progress | None = None,
) -> MergeResult:
    """Write base + adapter as plain safetensors with config and tokenizer; memory is about one tensor.

    The output appears whole, by a rename at the end, or not at all.

    Raises:
        ConfigError: the output is in use, the adapter belongs to another base or is of an unsupported kind.
        DoesNotFitError: too little disk.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"'{output}' exists already.", "Give another --output; nothing was overwritten.")
    deltas = read_adapter(adapter)
    folder = _base_folder(base)
    sources = [(shard, name, entry) for shard in local_shards(folder) for name, entry in _entries(shard)]
    if not sources:
        raise ConfigError(
            f"'{folder}' has no *.safetensors file.", "Point the adapter at a safetensors base."
        )
    deltas = _named_as_in_base(deltas, {name for _, name, _ in sources})
    _require_match(deltas, {name: tuple(entry["shape"]) for _, name, entry in sources})
    n_bytes = sum(_n_bytes(entry) for _, _, entry in sources)
    _require_disk(output, n_bytes)
    with _whole_or_not_at_all(output) as partial:
        _write_shards(sources, deltas, partial, max_shard_bytes, progress or (lambda _done, _total: None))
        _copy_rest(folder, adapter, partial)
    return MergeResult(folder=output, n_tensors=len(sources), n_merged=len(deltas), n_bytes=n_bytes)


@contextmanager
def _whole_or_not_at_all(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its name at the end, or is removed: it is as large as a model."""
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        partial.mkdir(parents=True)
        yield partial
        if output.exists():
            output.rmdir()
        partial.replace(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def read_adapter_config(adapter: Path) -> dict[str, Any]:
    """The adapter's own description, adapter_config.json.

    Raises:
        ConfigError: it is no JSON object.
    """
    file = adapter / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"'{file}' is not JSON: {error}.", _COPY) from error
    if not isinstance(config, dict):
        raise ConfigError(f"'{file}' is not a JSON object.", _COPY)
    return config


_COPY = "Restore it, for a run by removing its adapter folder and: lowvram resume RUN"


def read_adapter(adapter: Path) -> dict[str, _Delta]:
    """Base tensor name -> its update, from a plain peft folder.

    Raises:
        ConfigError: no adapter, pickled weights, or a kind of adapter that this merge does not know.
    """
    config_file, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    if not config_file.is_file() or not weights.is_file():
        pickled = (
            " (adapter_model.bin is pickled and is not read)"
            if (adapter / "adapter_model.bin").is_file()
            else ""
        )
        raise ConfigError(
            f"'{adapter}' holds no adapter_config.json with adapter_model.safetensors{pickled}.",
            "Give a finished run, or a folder that peft's save_pretrained wrote.",
        )
    config = read_adapter_config(adapter)
    _require_supported(config)
    read_safetensors_header(weights)
    scaling = _scaling(config, config_file)
    with safe_open(weights, framework="pt") as tensors:
        names = [n.removesuffix(".lora_A.weight") for n in tensors.keys() if n.endswith(".lora_A.weight")]  # noqa: SIM118
        other = [n for n in tensors.keys() if ".lora_A." not in n and ".lora_B." not in n]  # noqa: SIM118
        if other or not names:
            raise ConfigError(f"'{weights}' holds more than LoRA weights: {other[:3]}.", _BY_PEFT)
        factors = {n: [tensors.get_tensor(f"{n}.lora_{side}.weight") for side in "AB"] for n in names}
    deltas = {n.removeprefix(_PEFT_PREFIX): _Delta(a, b, scaling) for n, (a, b) in factors.items()}
    turned = bool(config.get("fan_in_fan_out"))
    return {f"{name}.weight": d.transposed if turned else d for name, d in deltas.items()}


_BY_PEFT = "Merge it with peft's merge_and_unload; this merge does not support it yet."


def _scaling(config: dict[str, Any], file: Path) -> float:
    try:
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"'{file}' has no usable r and lora_alpha.", _COPY) from error


def _require_supported(config: dict[str, Any]) -> None:
    odd = [name for name in _UNSUPPORTED if config.get(name)]
    if config.get("peft_type") != "LORA":
        odd.append(f"peft_type {config.get('peft_type')}")
    if config.get("bias", "none") != "none":
        odd.append(f"bias {config['bias']}")
    if odd:
        raise ConfigError(f"The adapter uses {', '.join(odd)}.", _BY_PEFT)


def _base_folder(base: ModelSource) -> Path:
    """The base's local folder, downloaded if it is a hub id.

    Raises:
        ConfigError: it cannot be had.
    """
    if base.is_local:
        return Path(base.name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(base.name, allow_patterns=["*.safetensors", *_COPIED, "tokenizer*"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise ConfigError(
            f"The base model '{base.name}' is neither a folder nor reachable on the hub.",
            "Check the connection, or say where the model is: --base PATH",
        ) from error


def _entries(shard: Path) -> list[tuple[str, dict[str, Any]]]:
    header = read_safetensors_header(shard)
    return sorted(header.items(), key=lambda item: item[1]["data_offsets"][0])


def _n_bytes(entry: dict[str, Any]) -> int:
    start, end = entry["data_offsets"]
    return int(end - start)


_OWN_BASE = "Give the base that the adapter was trained on: --base PATH"


def _named_as_in_base(deltas: dict[str, _Delta], names: set[str]) -> dict[str, _Delta]:
    """GPT-2's file on the hub says "h.0.attn" where the model says "transformer.h.0.attn"."""
    if any(name in names for name in deltas):
        return deltas
    shorter = {name.partition(".")[2]: delta for name, delta in deltas.items()}
    return shorter if all(name in names for name in shorter) else deltas


def _require_match(deltas: dict[str, _Delta], shapes: dict[str, tuple[int, ...]]) -> None:
    for name, delta in deltas.items():
        if name not in shapes:
            raise ConfigError(
                f"The adapter changes '{name}', which the base does not have: it belongs to another model.",
                _OWN_BASE,
            )
        if shapes[name] != delta.shape:
            raise ConfigError(
                f"'{name}' is {list(shapes[name])} in the base and {list(delta.shape)} in the adapter.",
                _OWN_BASE,
            )


def _require_disk(output: Path, n_bytes: int) -> None:
    existing = next(p for p in (output, *output.absolute().parents) if p.exists())
    free, needed = shutil.disk_usage(existing).free, int(1.05 * n_bytes)
    if free < needed:
        raise DoesNotFitError(
            f"The merged model needs {format_bytes(needed)} of disk at '{existing}'; "
            f"{format_bytes(free)} is free.",
            "Free some, or give an --output on another disk.",
        )


def _write_shards(
    sources: list[tuple[Path, str, dict[str, Any]]],
    deltas: dict[str, _Delta],
    folder: Path,
    max_shard_bytes: int,
    progress: Progress,
) -> None:
    """The tensors in their order, in files of at most `max_shard_bytes` (or one larger tensor)."""
    groups = _grouped(sources, max_shard_bytes)
    total, done, weight_map = sum(_n_bytes(e) for _, _, e in sources), 0, {}
    for number, group in enumerate(groups, 1):
        name = SINGLE_FILE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        with (folder / name).open("wb") as handle:
            _write_header(handle, group)
            for shard, tensor_name, entry in group:
                _write_tensor(handle, shard, tensor_name, entry, deltas.get(tensor_name))
                weight_map[tensor_name] = name
                done += _n_bytes(entry)
                progress(done, total)
            handle.flush()
            os.fsync(handle.fileno())
    if len(groups) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _grouped(
    sources: list[tuple[Path, str, dict[str, Any]]], max_shard_bytes: int
) -> list[list[tuple[Path, str, dict[str, Any]]]]:
    groups: list[list[tuple[Path, str, dict[str, Any]]]] = [[]]
    size = 0
    for source in sources:
        n_bytes = _n_bytes(source[2])
        if groups[-1] and size + n_bytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(source)
        size += n_bytes
    return groups


def _write_header(handle: BinaryIO, group: list[tuple[Path, str, dict[str, Any]]]) -> None:
    """safetensors' own layout: 8 bytes of length, a JSON table, then the tensors one after another."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for _, name, entry in group:
        end = offset + _n_bytes(entry)
        table[name] = {"dtype": entry["dtype"], "shape": entry["shape"], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    handle.write(struct.pack("<Q", len(text)) + text)


def _write_tensor(
    handle: BinaryIO, shard: Path, name: str, entry: dict[str, Any], delta: _Delta | None
) -> None:
    if delta is None:
        _copy_bytes(handle, shard, entry)
        return
    if entry["dtype"] not in _DTYPES:
        raise ConfigError(
            f"'{name}' is stored as {entry['dtype']}, not in 16 or 32 bits.", "Use the 16-bit base."
        )
    with safe_open(shard, framework="pt") as tensors:
        merged = delta.added_to(tensors.get_tensor(name)).contiguous()
    handle.write(merged.view(torch.uint8).numpy().data)


def _copy_bytes(handle: BinaryIO, shard: Path, entry: dict[str, Any]) -> None:
    """Unchanged tensors travel in pieces of 16 MiB."""
    with shard.open("rb") as source:
        header_bytes = struct.unpack("<Q", source.read(8))[0]
        source.seek(8 + header_bytes + entry["data_offsets"][0])
        left = _n_bytes(entry)
        while left:
            piece = source.read(min(left, 16 << 20))
            handle.write(piece)
            left -= len(piece)


def _copy_rest(base: Path, adapter: Path, output: Path) -> None:
    """Config and tokenizer of the base, then the adapter's own tokenizer and chat template over them."""
    skip = {INDEX_FILE, "adapter_config.json"}
    tokenizer = ("tokenizer*", "special_tokens_map.json", "chat_template*", "vocab*", "merges.txt")
    for folder, patterns in ((base, _COPIED), (adapter, tokenizer)):
        for file in {f for pattern in patterns for f in folder.glob(pattern)}:
            if file.name not in skip and file.is_file():
                shutil.copyfile(file, output / file.name)
