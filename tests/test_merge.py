"""The streamed merge against peft's own merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lowvram.engine.adapters import add_adapters, trainable
from lowvram.engine.config import StepConfig
from lowvram.engine.model import load
from lowvram.engine.source import ModelSource
from lowvram.errors import ConfigError, DoesNotFitError
from lowvram.export.merge import merge_adapter

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}


def _made(folder: Path, *, tied: bool = False, shard: str = "1GB", rslora: bool = False) -> tuple[Path, Path]:
    torch.manual_seed(0)
    base = folder / "base"
    config = LlamaConfig(**SHAPE, tie_word_embeddings=tied)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(base, max_shard_size=shard)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], use_rslora=rslora)
    peft_model = get_peft_model(model, lora)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    peft_model.save_pretrained(folder / "adapter")
    return base, folder / "adapter"


@pytest.mark.parametrize("precision", ["fp32", "int8", "nf4"])
@pytest.mark.parametrize("prefixed", [True, False])
def test_gpt2_s_turned_weights_merge(tmp_path: Path, precision: str, prefixed: bool) -> None:
    """Conv1D keeps [in, out]: trained by our engine, merged onto the 32-bit file, equal to peft's merge.

    The hub's GPT-2 file names its tensors without "transformer.".
    """
    torch.manual_seed(0)
    shape = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 32}
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    if not prefixed:
        tensors = {n.removeprefix("transformer."): t for n, t in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    step = StepConfig.model_validate(
        {"base_precision": precision, "compute_dtype": "fp32", "target_modules": ("c_attn", "c_proj")}
    )
    model = add_adapters(load(ModelSource(str(tmp_path / "base")), step, "cpu"), step)
    for parameter in trainable(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    result = merge_adapter(ModelSource(str(tmp_path / "base")), tmp_path / "adapter", tmp_path / "out")
    assert result.n_merged == 6
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = plain.transformer.h[0].attn.c_proj.weight.clone()
    wanted = PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload().state_dict()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, value in merged.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6)
    assert (merged["transformer.h.0.attn.c_proj.weight"] - before).abs().max() > 0.1


@pytest.mark.parametrize(
    "kind",
    [{}, {"tied": True}, {"shard": "40KB"}, {"rslora": True}],
    ids=["plain", "tied", "sharded", "rslora"],
)
def test_equals_peft_s_merge(tmp_path: Path, kind: dict[str, Any]) -> None:
    base, adapter = _made(tmp_path, **kind)
    result = merge_adapter(ModelSource(str(base)), adapter, tmp_path / "out", max_shard_bytes=50_000)
    assert result.n_merged == 4
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    before = {n: p.clone() for n, p in plain.named_parameters()}
    wanted = PeftModel.from_pretrained(plain, adapter).merge_and_unload().state_dict()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=2**-7, atol=1e-6)
        if "q_proj" in name or "down_proj" in name:
            assert not torch.equal(value, before[name])


def test_refusals_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = _made(tmp_path)
    source, out = ModelSource(str(base)), tmp_path / "out"
    used = tmp_path / "used"
    used.mkdir()
    (used / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        merge_adapter(source, adapter, used)
    other = tmp_path / "other"
    LlamaForCausalLM(LlamaConfig(**SHAPE | {"hidden_size": 32})).save_pretrained(other)
    with pytest.raises(ConfigError, match=r"\[32, 96\] in the base and \[64, 96\]"):
        merge_adapter(ModelSource(str(other)), adapter, out)
    config = adapter / "adapter_config.json"
    text = config.read_text()
    config.write_text(text.replace('"use_dora": false', '"use_dora": true'))
    with pytest.raises(ConfigError, match="use_dora"):
        merge_adapter(source, adapter, out)
    config.write_text(text)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("U", (), {"free": 1000})())
    with pytest.raises(DoesNotFitError, match="1000 B is free"):
        merge_adapter(source, adapter, out)
    assert not out.exists()
    assert (used / "mine.txt").read_text() == "mine"


def test_killed_in_the_middle_leaves_nothing_and_runs_again(tmp_path: Path) -> None:
    base, adapter = _made(tmp_path)

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_adapter(ModelSource(str(base)), adapter, tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists()
    merge_adapter(ModelSource(str(base)), adapter, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
