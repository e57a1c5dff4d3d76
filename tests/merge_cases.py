"""Adapters of every kind that peft's LoRA files hold, over tiny bases, with what plain peft makes of them."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

LLAMA: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 32}
_T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 128}


@dataclass(frozen=True)
class Case:
    """A base and an adapter for it."""

    lora: dict[str, Any] = field(default_factory=dict)
    base: str = "llama"
    config: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16
    shard: str = "1GB"
    n_changed: int | None = None


CASES = {
    "plain": Case(n_changed=4),
    "alpha": Case({"r": 2, "lora_alpha": 32}),
    "rslora": Case({"use_rslora": True}),
    "patterns": Case({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 40}}),
    "patterns, rslora": Case({"rank_pattern": {"q_proj": 2}, "use_rslora": True}),
    "dora": Case({"use_dora": True}),
    "dora, float32": Case({"use_dora": True}, dtype=torch.float32),
    "float32": Case(dtype=torch.float32),
    "float16": Case(dtype=torch.float16),
    "bias all": Case({"bias": "all"}, config={"attention_bias": True}),
    "bias lora_only": Case({"bias": "lora_only"}, config={"attention_bias": True}),
    "lora_bias": Case(
        {"lora_bias": True, "target_modules": ["q_proj"]}, config={"attention_bias": True}, n_changed=4
    ),
    "tied": Case(config={"tie_word_embeddings": True}),
    "sharded": Case(shard="40KB"),
    "gpt2": Case({"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, "gpt2", n_changed=6),
    "gpt2, short names": Case({"target_modules": ["c_attn", "c_proj"]}, "gpt2 short", n_changed=6),
    "gpt2, dora": Case({"target_modules": ["c_attn", "c_proj"], "use_dora": True}, "gpt2"),
    "gpt2, bias all": Case({"target_modules": ["c_attn"], "bias": "all"}, "gpt2"),
    "t5": Case({"target_modules": ["q", "v", "wo"], "task_type": "SEQ_2_SEQ_LM"}, "t5", n_changed=16),
    "head saved": Case({"modules_to_save": ["lm_head"]}, n_changed=5),
    "embedding and head saved": Case({"modules_to_save": ["embed_tokens", "lm_head"]}, n_changed=6),
    "norm saved": Case({"modules_to_save": ["norm"]}),
    "head adapted": Case({"target_modules": ["q_proj", "lm_head"]}),
    "embedding adapted": Case({"target_modules": ["q_proj", "embed_tokens"]}, n_changed=3),
    "embedding adapted, dora": Case({"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "tokens": Case({"trainable_token_indices": [1, 5, 127]}, n_changed=5),
}
# The base ties embedding and head; peft's merge changes both where unmerged they differ, so logits judge.
TIED = {
    "head saved": {"modules_to_save": ["lm_head"]},
    "embedding saved": {"modules_to_save": ["embed_tokens"]},
    "both saved, tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "embedding adapted": {"target_modules": ["q_proj", "embed_tokens"]},
    "head adapted": {"target_modules": ["q_proj", "lm_head"]},
    "tokens": {"trainable_token_indices": [1, 5, 127]},
}


def save_base(case: Case, folder: Path) -> Path:
    """Random weights, as transformers writes them."""
    torch.manual_seed(0)
    if case.base.startswith("gpt2"):
        model: Any = GPT2LMHeadModel(GPT2Config(**_GPT2, **case.config))
    elif case.base == "t5":
        model = T5ForConditionalGeneration(T5Config(**_T5, decoder_start_token_id=0, **case.config))
    else:
        model = LlamaForCausalLM(LlamaConfig(**LLAMA, **case.config))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.to(case.dtype).save_pretrained(folder, max_shard_size=case.shard)
    if case.base == "gpt2 short":
        file = folder / "model.safetensors"
        tensors = {n.removeprefix("transformer."): t for n, t in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    return folder


def load_plain(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """As plain transformers loads it."""
    is_t5 = json.loads((folder / "config.json").read_text())["model_type"] == "t5"
    kind = AutoModelForSeq2SeqLM if is_t5 else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=dtype or "auto").eval()


def save_adapter(base: Path, case: Case, folder: Path) -> Path:
    """Every number that the adapter holds is random: none is where it started."""
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **case.lora}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied layers, of embeddings that are saved, of fan_in_fan_out
        model = get_peft_model(load_plain(base), LoraConfig(**lora))
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                with torch.no_grad():
                    if "magnitude" in name:
                        parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
                    else:
                        parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder)
    return folder


def adapted(base: Path, adapter: Path, dtype: torch.dtype | None = None) -> Any:
    """Base and adapter through plain peft."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(load_plain(base, dtype), adapter).eval()


def logits(model: Any) -> torch.Tensor:
    """Of a fixed text."""
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 127, 5]])
    given = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, **given).logits
    return found
