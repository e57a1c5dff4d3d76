"""Tiny real models of the families that lowvram trains, adapted, in float64 without rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lowvram.data.tokens import Example
from lowvram.engine.adapters import add_adapters, trainable
from lowvram.engine.attention import register
from lowvram.engine.config import Levers, StepConfig
from lowvram.engine.model import attention_for
from tests.tiny import SHAPE as TINY
from tests.tiny import plain_loss

SHAPE = {**TINY, "pad_token_id": 0}
_PERIOD = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=8)),
    "mistral with a window": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=5)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, **_PERIOD, head_dim=8)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SHAPE)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            vocab_size=97,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
            dropout=0.0,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            n_embd=32,
            n_layer=3,
            n_head=4,
            vocab_size=97,
            n_positions=64,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    ),
}
TARGETS = {
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
}
LLAMA_LIKE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def exact_norms(model: PreTrainedModel) -> PreTrainedModel:
    """transformers' RMSNorm rounds to float32 whatever it is given; here it may not hide anything."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _float64_norm(module)
    return model


def _float64_norm(module: Any) -> Any:
    epsilon = getattr(module, "variance_epsilon", None) or module.eps
    gemma = type(module).__name__.startswith("Gemma")

    def forward(x: torch.Tensor) -> torch.Tensor:
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)
        return normed * (1.0 + module.weight if gemma else module.weight)

    return forward


def adapted_model(kind: str, step: StepConfig) -> Any:
    torch.manual_seed(0)
    base = exact_norms(MODELS[kind]().double())
    register()
    base.set_attn_implementation(attention_for(base))
    model = add_adapters(base, step).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable(model).values():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2
    return model.train()


def exact_step(kind: str, **changes: Any) -> StepConfig:
    base = {"base_precision": "fp32", "compute_dtype": "fp32", "rank": 3, "alpha": 7, "dropout": 0.0}
    return StepConfig(**{**base, "target_modules": TARGETS.get(kind, LLAMA_LIKE), **changes})


def plain_loss_and_gradients(kind: str, rows: list[Example]) -> tuple[float, dict[str, Any]]:
    """transformers' own logits and SDPA (its eager softmax rounds to float32), one example at a time."""
    model = adapted_model(kind, exact_step(kind, levers=Levers(gradient_checkpointing=False)))
    model.get_base_model().set_attn_implementation("sdpa")
    loss = plain_loss(model, rows)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in trainable(model).items()}


def assert_same(gradients: dict[str, Any], references: dict[str, Any]) -> None:
    """To 1e-9; where a gradient is zero (a first token's only key) both are rounding of the largest ones."""
    rounding = 1e-15 * max(float(reference.abs().max()) for reference in references.values())
    for name, reference in references.items():
        atol = 1e-9 * float(reference.abs().max()) + rounding
        torch.testing.assert_close(gradients[name], reference, rtol=1e-9, atol=atol, msg=name)


def save_llama(tokens_of: Path, folder: Path, **shape: Any) -> Path:
    """A Llama of that shape and random weights over the vocabulary of another model, with its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tokens_of)
    LlamaForCausalLM(LlamaConfig(**shape, vocab_size=len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
