"""An adapter as LoRA-GGUF: a real llama.cpp with base and adapter answers as peft does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from peft import LoraConfig, get_peft_model

from lowvram.engine.source import ModelSource
from lowvram.errors import ConfigError
from lowvram.export.adapter_files import read_adapter
from lowvram.export.gguf_lora import GgufLora, gguf_lora
from lowvram.export.gguf_types import FILE_TYPES
from tests.llama_cpp import LlamaCpp, assert_agrees
from tests.test_gguf import PROMPT, reference, written
from tests.tiny_gguf import saved_model

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(base: Path, folder: Path, **options: Any) -> Any:
    torch.manual_seed(3)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **options})
    model = get_peft_model(reference(base), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model.eval()


def lora_of(base: Path, adapter: Path, kind: str = "f32") -> GgufLora:
    return gguf_lora(read_adapter(adapter), ModelSource(str(base)).config, "tiny", FILE_TYPES[kind])


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"layers.1.mlp.up_proj": 2}, "alpha_pattern": {"q_proj": 24}},
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_base_and_adapter_answer_as_peft(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    base = saved_model(tmp_path / "base", kind)
    model = adapted(base, tmp_path / "adapter", **options)
    lora_of(base, tmp_path / "adapter").write(tmp_path / "lora.gguf")
    engine = LlamaCpp(written(tmp_path, base), tmp_path / "lora.gguf")
    assert_agrees(model, engine, PROMPT, 12, tolerance=0.03)
    with pytest.raises(AssertionError):
        assert_agrees(reference(base), engine, PROMPT, 12, tolerance=0.03)


def test_what_the_file_says(tmp_path: Path) -> None:
    base = saved_model(tmp_path / "base", "llama")
    adapted(base, tmp_path / "adapter", use_rslora=True, r=4, lora_alpha=8)
    lora_of(base, tmp_path / "adapter", "f16").write(tmp_path / "lora.gguf")
    read = GGUFReader(tmp_path / "lora.gguf")
    said = {name: field.contents() for name, field in read.fields.items()}
    assert (said["general.type"], said["adapter.type"]) == ("adapter", "lora")
    assert said["general.architecture"] == "llama"
    assert said["adapter.lora.alpha"] == pytest.approx(16)  # 16 / 4 is 8 / sqrt(4)
    assert len(read.tensors) == 2 * 7 * 2
    assert {tensor.tensor_type.name for tensor in read.tensors} == {"F16"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_dora": True}, "uses DoRA"),
        ({"bias": "lora_only"}, "trains a bias"),
        ({"modules_to_save": ["lm_head"]}, "replaces the whole weight"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "changes an embedding"),
        ({"trainable_token_indices": [1, 2]}, "trains single tokens"),
    ],
)
def test_what_llama_cpp_cannot_add_is_refused(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    base = saved_model(tmp_path / "base", "llama with biases", tie_word_embeddings=False)
    adapted(base, tmp_path / "adapter", **options)
    with pytest.raises(ConfigError, match=said) as refused:
        lora_of(base, tmp_path / "adapter")
    assert "lowvram export RUN --to gguf" in refused.value.remedy


def test_a_tied_head_and_block_types_are_refused(tmp_path: Path) -> None:
    base = saved_model(tmp_path / "base", "qwen2")
    adapted(base, tmp_path / "plain")
    with pytest.raises(ConfigError, match="not written as q8_0"):
        lora_of(base, tmp_path / "plain", "q8_0")
    adapted(base, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    with pytest.raises(ConfigError, match="head that is the embedding"):
        lora_of(base, tmp_path / "adapter")
