"""The streamed merge against peft's own merge, for every kind of adapter and base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from lowvram.engine.adapters import add_adapters, trainable
from lowvram.engine.config import StepConfig
from lowvram.engine.model import load
from lowvram.engine.source import ModelSource
from lowvram.export.merge import merge_adapter, write_merged
from lowvram.export.merged_tensors import MergedTensors
from lowvram.export.tensor_files import StoredTensor, tensors_of_folder
from tests.merge_cases import CASES, TIED, Case, adapted, load_plain, logits, save_adapter, save_base

pytestmark = pytest.mark.usefixtures("one_thread")


def _made(folder: Path, case: Case) -> tuple[ModelSource, Path]:
    base = save_base(case, folder / "base")
    return ModelSource(str(base)), save_adapter(base, case, folder / "adapter")


def _assert_one_unit(
    found: torch.Tensor, wanted: torch.Tensor, name: str, summand: torch.Tensor | None = None
) -> None:
    """Within one unit in the last place; of float32, whose sums have several roundings, within four.

    Args:
        summand: for an embedding, whose update peft rounds by itself: the unit is of the larger number.
    """
    assert found.dtype == wanted.dtype, name
    units = 4 if wanted.dtype == torch.float32 else 1
    size = wanted.double().abs().clamp(min=1e-6)
    size = size if summand is None else size.maximum(summand.double().abs())
    unit = torch.finfo(wanted.dtype).eps * 2.0 ** size.log2().floor()
    worst = ((found.double() - wanted.double()).abs() / unit).max()
    assert float(worst) <= units, f"{name}: {float(worst)} units"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_peft_s_merge(tmp_path: Path, case: Case) -> None:
    source, adapter = _made(tmp_path, case)
    result = merge_adapter(source, adapter, tmp_path / "out", max_shard_bytes=50_000)
    assert case.n_changed in (None, result.n_merged)
    before = load_plain(Path(source.name)).state_dict()
    wanted = adapted(Path(source.name), adapter).merge_and_unload().state_dict()
    merged = load_plain(tmp_path / "out").state_dict()
    assert merged.keys() == wanted.keys()
    for name, value in merged.items():
        _assert_one_unit(value, wanted[name], name, before[name] if "embed_tokens" in name else None)
    changed = [name for name in merged if not torch.equal(merged[name], before[name])]
    assert len(changed) >= result.n_merged  # a tied one has two names


@pytest.mark.parametrize("kind", TIED)
def test_tied_weights_become_what_the_unmerged_adapter_makes_of_them(tmp_path: Path, kind: str) -> None:
    """In float32, where nothing is rounded: untied where peft's forward pass has two weights."""
    case = Case(TIED[kind], config={"tie_word_embeddings": True}, dtype=torch.float32)
    source, adapter = _made(tmp_path, case)
    merge_adapter(source, adapter, tmp_path / "out")
    merged, wanted = load_plain(tmp_path / "out"), logits(adapted(Path(source.name), adapter))
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-5)
    assert (wanted - logits(load_plain(Path(source.name)))).abs().max() > 0.05
    stays_tied = kind in ("tokens", "both saved, tied")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is stays_tied


@pytest.mark.parametrize("precision", ["fp32", "int8", "nf4"])
def test_our_engine_s_adapter_of_a_turned_base(tmp_path: Path, precision: str) -> None:
    """Conv1D keeps [in, out]: trained by our engine, merged onto the 32-bit file, equal to peft's merge."""
    base = save_base(Case(base="gpt2 short", dtype=torch.float32), tmp_path / "base")
    step = StepConfig.model_validate(
        {"base_precision": precision, "compute_dtype": "fp32", "target_modules": ("c_attn", "c_proj")}
    )
    model = add_adapters(load(ModelSource(str(base)), step, "cpu"), step)
    for parameter in trainable(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    result = merge_adapter(ModelSource(str(base)), tmp_path / "adapter", tmp_path / "out")
    assert result.n_merged == 6
    wanted = adapted(base, tmp_path / "adapter").merge_and_unload().state_dict()
    for name, value in load_plain(tmp_path / "out").state_dict().items():
        _assert_one_unit(value, wanted[name], name)


@pytest.mark.parametrize("pieces", [1, 100, 1 << 22])
@pytest.mark.parametrize("kind", ["dora", "gpt2, dora", "embedding adapted", "tokens"])
def test_pieces_of_rows_change_nothing(
    tmp_path: Path, kind: str, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, adapter = _made(tmp_path, CASES[kind])
    tensors = MergedTensors.open(source, adapter)
    whole = {name: tensors.tensor(name) for name in tensors.names}
    monkeypatch.setattr("lowvram.export.tensor_files.PIECE_NUMBERS", pieces)
    for name, wanted in whole.items():
        _assert_one_unit(tensors.tensor(name), wanted, name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_another_dtype_is_rounded_to_once(tmp_path: Path, dtype: torch.dtype) -> None:
    source, adapter = _made(tmp_path, Case())
    tensors = MergedTensors.open(source, adapter)
    tensors.stored_as(dtype)
    write_merged(tensors, adapter, tmp_path / "out")
    exact = adapted(Path(source.name), adapter, torch.float32).merge_and_unload().state_dict()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.dtype == dtype
    for name, value in merged.state_dict().items():
        _assert_one_unit(value, exact[name].to(dtype), name)


def test_shards_are_of_the_chosen_size_and_whole(tmp_path: Path) -> None:
    source, adapter = _made(tmp_path, Case())
    merge_adapter(source, adapter, tmp_path / "out", max_shard_bytes=50_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert max(file.stat().st_size for file in files) < 55_000
    listed = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            assert {listed.pop(name) for name in tensors.keys()} == {file.name}  # noqa: SIM118
    assert not listed


def test_the_base_alone_is_its_own_tensors(tmp_path: Path) -> None:
    """For exports without an adapter."""
    base = save_base(Case(shard="40KB"), tmp_path / "base")
    tensors = MergedTensors.open(ModelSource(str(base)), None)
    stored: dict[str, StoredTensor] = tensors_of_folder(base)
    assert tensors.names == list(stored)
    assert not tensors.changed
    for name, value in AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).state_dict().items():
        assert torch.equal(tensors.tensor(name), value)
