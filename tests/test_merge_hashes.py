"""Files that are not what was downloaded or trained: told by their hashes, before anything is written."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest

from lowvram.engine.source import ModelSource
from lowvram.errors import ConfigError
from lowvram.export.base_files import base_folder
from lowvram.export.merge import merge_adapter
from lowvram.export.run_adapter import adapter_of
from lowvram.file_hash import file_sha256
from lowvram.training.run_folder import RunFolder
from tests.merge_cases import Case, save_adapter, save_base
from tests.test_model_card import RESULT

REPO = "somebody/tiny"


def _flip(file: Path) -> None:
    """One bit, far behind the header."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model as the hub's client caches it: a snapshot of links to blobs named by their SHA-256."""
    base = save_base(Case(shard="40KB"), tmp_path / "base")
    save_adapter(base, Case(), tmp_path / "adapter")
    repo = tmp_path / "hub" / "models--somebody--tiny"
    snapshot, blobs = repo / "snapshots" / ("0" * 40), repo / "blobs"
    for folder in (snapshot, blobs, repo / "refs"):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    for file in base.iterdir():
        blob = blobs / file_sha256(file)
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(blob)
    shutil.rmtree(base)
    for module in ("file_download", "_snapshot_download"):
        monkeypatch.setattr(f"huggingface_hub.{module}.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return blobs


def test_a_download_is_compared_with_its_hash(cached: Path, tmp_path: Path) -> None:
    result = merge_adapter(ModelSource(REPO), tmp_path / "adapter", tmp_path / "whole")
    assert result.n_merged == 4
    _flip(max(cached.iterdir(), key=lambda file: file.stat().st_size))
    with pytest.raises(ConfigError, match=r"in the hub's cache is damaged: its SHA-256 is") as told:
        merge_adapter(ModelSource(REPO), tmp_path / "adapter", tmp_path / "out")
    assert "rm " in told.value.remedy
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.usefixtures("cached")
def test_only_what_transformers_loads_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a repository with Mistral's consolidated file, which is as large as the model again."""
    asked: list[str] = []
    whole = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda *given, **options: asked.extend(options["allow_patterns"]) or whole(*given, **options),
    )
    folder = base_folder(ModelSource(REPO))
    there = {file.name for file in folder.glob("*.safetensors")}
    named = [*there, "model.safetensors", "consolidated.safetensors", "model.fp16.safetensors"]
    wanted = {name for name in named if any(fnmatch(name, pattern) for pattern in asked)}
    assert len(there) > 1
    assert wanted == there | {"model.safetensors"}


def test_a_run_s_adapter_is_compared_with_its_hash(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    save_adapter(save_base(Case(), tmp_path / "base"), Case(), run.adapter)
    weights = run.adapter / "adapter_model.safetensors"
    result = RESULT.model_copy(update={"adapter_sha256": file_sha256(weights)})
    run.result_file.write_text(result.model_dump_json())
    assert adapter_of(run.path) == run.adapter
    _flip(weights)
    with pytest.raises(ConfigError, match=r"is not what the run wrote: its SHA-256 is") as told:
        adapter_of(run.path)
    assert f"lowvram resume {run.path}" in told.value.remedy
    assert adapter_of(run.adapter) == run.adapter  # as a lone adapter it is taken for what it is
