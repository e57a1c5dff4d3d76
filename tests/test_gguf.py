"""A model as GGUF: a real llama.cpp computes with it what transformers does; refusals write nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, quants
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lowvram.engine.source import ModelSource
from lowvram.errors import ConfigError, DoesNotFitError, refusals_of_the_system
from lowvram.export.gguf_hyperparameters import rope_factors
from lowvram.export.gguf_model import GgufModel
from lowvram.export.gguf_types import FILE_TYPES
from lowvram.export.merged_tensors import MergedTensors
from tests.llama_cpp import LlamaCpp, assert_agrees
from tests.tiny_gguf import CONFIGS, byte_level, saved_model, sentencepiece_like

PROMPT = [int(i) for i in torch.randint(3, 400, (60,), generator=torch.Generator().manual_seed(0))]


def model_of(base: Path, kind: str = "f16", adapter: Path | None = None) -> GgufModel:
    source = ModelSource(str(base))
    tensors = MergedTensors.open(source, adapter)
    return GgufModel(tensors, source.config, source.tokenizer, "tiny", FILE_TYPES[kind])


def written(folder: Path, base: Path, kind: str = "f16", adapter: Path | None = None) -> Path:
    file = folder / f"{kind}.gguf"
    model_of(base, kind, adapter).write(file)
    return file


def reference(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_llama_cpp_computes_what_transformers_does(tmp_path: Path, kind: str) -> None:
    """Past the sliding windows of 24 and the 64 tokens of the scaled positions."""
    tokenizer = sentencepiece_like("plain") if kind.startswith("gemma") else byte_level("gpt-2")
    base = saved_model(tmp_path / "base", kind, tokenizer)
    engine = LlamaCpp(written(tmp_path, base))
    assert_agrees(reference(base), engine, PROMPT, 16, tolerance=0.02)


def _with_adapter(base: Path, folder: Path, **options: Any) -> Any:
    """A peft model whose adapter is large enough to change every answer; saved in `folder`."""
    torch.manual_seed(3)
    targets = ["q_proj", "k_proj", "v_proj", "down_proj"]
    model = get_peft_model(
        reference(base), LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets, **options})
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return model.eval()


def test_adapter_is_added_on_the_way(tmp_path: Path) -> None:
    """Straight from base and adapter into the file, in float32 where the base has it."""
    base = saved_model(tmp_path / "base", "llama", dtype=torch.float32)
    adapted = _with_adapter(base, tmp_path / "adapter", use_rslora=True)
    engine = LlamaCpp(written(tmp_path, base, "f32", tmp_path / "adapter"))
    assert_agrees(adapted, engine, PROMPT, 16, tolerance=0.02)
    with pytest.raises(AssertionError):
        assert_agrees(reference(base), engine, PROMPT, 16, tolerance=0.02)


def test_llama3_factors_are_those_of_transformers() -> None:
    config = CONFIGS["llama"]()
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / 10_000.0 ** (torch.arange(0, 16, 2) / 16)
    found = rope_factors(config)
    assert found is not None
    torch.testing.assert_close(plain / found, scaled)
    assert 1 < float(found[-1]) <= 8


def _tensors(file: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in GGUFReader(file).tensors}


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_values_of_each_type(tmp_path: Path, kind: str) -> None:
    """Read back with the gguf package: matrices as rounded once by torch or by gguf itself, norms exact."""
    base = saved_model(tmp_path / "base", "qwen2", dtype=torch.bfloat16)
    weights = reference(base).state_dict()
    found = _tensors(written(tmp_path, base, kind))
    down = weights["model.layers.1.mlp.down_proj.weight"]
    stored = found["blk.1.ffn_down.weight"]
    rounded = {
        "f32": down,
        "f16": down.half().float(),
        "bf16": down,
        "q8_0": torch.from_numpy(
            quants.dequantize(
                quants.quantize(down.numpy(), GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0
            )
        ),
    }
    values = quants.dequantize(stored.data, stored.tensor_type)
    np.testing.assert_array_equal(values.reshape(down.shape), rounded[kind].numpy())
    assert (kind == "q8_0") == bool((values.reshape(down.shape) != down.numpy()).any())
    norm = found["output_norm.weight"]
    assert norm.tensor_type == GGMLQuantizationType.F32
    np.testing.assert_array_equal(norm.data, weights["model.norm.weight"].numpy())
    assert found["blk.0.attn_q.bias"].tensor_type == GGMLQuantizationType.F32
    assert "output.weight" not in found  # tied


@pytest.mark.parametrize("kind", ["q4_k_m", "q5_k_m", "q6_k"])
def test_mixed_types(tmp_path: Path, kind: str) -> None:
    """ggml's own blocks, in llama.cpp's own mix; it runs, close to transformers."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8}
    base = saved_model(tmp_path / "base", "llama", **shape)
    file = written(tmp_path, base, kind)
    types = {name: tensor.tensor_type.name for name, tensor in _tensors(file).items()}
    main = {"q4_k_m": "Q4_K", "q5_k_m": "Q5_K", "q6_k": "Q6_K"}[kind]
    wide = [name for name, found in types.items() if found == "Q6_K" and found != main]
    layers = [0, 3, 6, 7]  # the first and last eighth, and every third of those between
    expected = {
        "output.weight",
        *(f"blk.{i}.{part}.weight" for i in layers for part in ("attn_v", "ffn_down")),
    }
    assert set(wide) == (set() if kind == "q6_k" else expected)
    assert types["blk.1.attn_q.weight"] == types["token_embd.weight"] == main
    up = _tensors(file)["blk.1.ffn_up.weight"]
    exact = reference(base).state_dict()["model.layers.1.mlp.up_proj.weight"].numpy()
    error = np.abs(quants.dequantize(up.data, up.tensor_type) - exact).mean() / np.abs(exact).mean()
    assert error < {"q4_k_m": 0.09, "q5_k_m": 0.045, "q6_k": 0.025}[kind]
    LlamaCpp(file).goes_on(PROMPT, 4)


def test_rows_that_no_block_fills_take_smaller_ones(tmp_path: Path) -> None:
    """hidden 64 and 96 are no multiples of 256: Q4_K_M has Q5_0 and Q8_0 there, as llama.cpp's own."""
    file = written(tmp_path, saved_model(tmp_path / "base", "llama"), "q4_k_m")
    types = {name: tensor.tensor_type.name for name, tensor in _tensors(file).items()}
    assert (types["blk.0.attn_q.weight"], types["output.weight"]) == ("Q5_0", "Q8_0")
    LlamaCpp(file).goes_on(PROMPT, 4)


def test_without_ggml_mixed_types_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = saved_model(tmp_path / "base", "llama")
    monkeypatch.setattr("lowvram.export.gguf_kquants._MODULE", "no_such_module")
    with pytest.raises(ConfigError, match="quantize to q4_k_m") as refused:
        model_of(base, "q4_k_m")
    assert "pip install xllamacpp" in refused.value.remedy


def test_refusals_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = saved_model(tmp_path / "base", "llama")
    out = tmp_path / "out"
    out.mkdir()
    used = out / "used.gguf"
    used.write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        model_of(base).write(used)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("U", (), {"free": 1000})())
    with pytest.raises(DoesNotFitError, match="1000 B is free"):
        model_of(base).write(out / "new.gguf")
    assert [file.name for file in out.iterdir()] == ["used.gguf"]
    assert used.read_text() == "mine"


def test_a_full_disk_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    """A file that may grow to 100 kB: numpy's own error for it has no number."""
    resource = pytest.importorskip("resource")
    model = model_of(saved_model(tmp_path / "base", "llama"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with (
            pytest.raises(DoesNotFitError, match=r"No space left|File too large"),
            refusals_of_the_system("a", "b"),
        ):
            model.write(tmp_path / "new.gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [file.name for file in tmp_path.iterdir()] == ["base"]


def test_killed_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    """An interrupt removes the half file; what a SIGKILL leaves is hidden and goes with the next export."""
    model = model_of(saved_model(tmp_path / "base", "llama"))
    out = tmp_path / "out"
    out.mkdir()

    def interrupt(done: int, total: int) -> None:
        assert 0 < done < total
        assert [file.name for file in out.iterdir()] == [".new.gguf.partial"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.write(out / "new.gguf", interrupt)
    assert not list(out.iterdir())
    (out / ".new.gguf.partial").write_text("of a killed process")
    model.write(out / "new.gguf")
    assert [file.name for file in out.iterdir()] == ["new.gguf"]


def test_unsupported_architectures_are_refused_with_the_supported_ones(tmp_path: Path) -> None:
    shape = {"n_embd": 64, "n_layer": 1, "n_head": 4, "vocab_size": 600, "n_positions": 32}
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(tmp_path)
    byte_level("gpt-2").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"'GPT2LMHeadModel' .* Gemma2ForCausalLM.* LlamaForCausalLM"):
        model_of(tmp_path)


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("llama", {"hidden_act": "gelu"}, "activation gelu"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "'dynamic'",
        ),
        ("gemma2", {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar 99"),
        ("gemma3", {"layer_types": ["full_attention"] * 6}, "order of sliding windows"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 1]}, "rope-free layers"),
    ],
)
def test_variants_that_llama_cpp_computes_otherwise_are_refused(
    tmp_path: Path, kind: str, change: dict[str, Any], said: str
) -> None:
    base = saved_model(tmp_path, kind, **change)
    with pytest.raises(ConfigError, match=said):
        model_of(base)


def test_values_beyond_f16_are_refused(tmp_path: Path) -> None:
    """A bfloat16 model may hold 1e6; in F16 it would be infinite."""
    base = saved_model(tmp_path / "base", "llama", dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = 1e6
    model.save_pretrained(base)
    with pytest.raises(ConfigError, match=r"'blk.1.ffn_up.weight' holds 999,424") as refused:
        model_of(base).write(tmp_path / "f16.gguf")
    assert "--type bf16" in refused.value.remedy
    assert not list(tmp_path.glob("*.gguf"))
    model_of(base, "bf16").write(tmp_path / "bf16.gguf")


def test_a_head_of_its_own_in_a_tied_model_is_kept(tmp_path: Path) -> None:
    """modules_to_save=["lm_head"] unties: the file then holds both."""
    base = saved_model(tmp_path / "base", "qwen2")
    model = get_peft_model(
        reference(base), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    torch.nn.init.normal_(model.base_model.model.lm_head.modules_to_save["default"].weight, std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    file = written(tmp_path, base, "f32", tmp_path / "adapter")
    assert "output.weight" in _tensors(file)
    merged = PeftModel.from_pretrained(reference(base), tmp_path / "adapter").eval()
    assert_agrees(merged, LlamaCpp(file), PROMPT[::-1], 16, tolerance=0.02)
