"""Tiled layers against plain transformers + peft, in float64 on tiny real architectures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
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
from lowvram.engine.batch import collate
from lowvram.engine.config import Levers, StepConfig
from lowvram.engine.model import attention_for
from lowvram.engine.step import SummedLoss

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
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
_LLAMA_LIKE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _exact_norms(model: PreTrainedModel) -> PreTrainedModel:
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


def _model(kind: str, step: StepConfig) -> Any:
    torch.manual_seed(0)
    base = _exact_norms(MODELS[kind]().double())
    register()
    base.set_attn_implementation(attention_for(base))
    model = add_adapters(base, step).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable(model).values():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2
    return model.train()


def _step(kind: str, **changes: Any) -> StepConfig:
    base = {"base_precision": "fp32", "compute_dtype": "fp32", "rank": 3, "alpha": 7, "dropout": 0.0}
    return StepConfig(**{**base, "target_modules": TARGETS.get(kind, _LLAMA_LIKE), **changes})


def _examples(lengths: tuple[int, ...], seed: int = 0) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for n in lengths:
        ids = torch.randint(1, 97, (n,), generator=generator).tolist()
        trained = [0] * (n // 3) + [1] * (n - n // 3)
        made.append(Example(tuple(ids), tuple(trained), "test:1"))
    return made


def _loss_and_gradients(
    model: Any, step: StepConfig, lengths: tuple[int, ...]
) -> tuple[float, dict[str, Any]]:
    batch = collate(_examples(lengths), 0)
    loss = SummedLoss(model, step)(*batch.tensors) / batch.trained_tokens
    loss.backward()
    return loss.item(), {name: p.grad for name, p in trainable(model).items()}


def _plain(kind: str, lengths: tuple[int, ...]) -> tuple[float, dict[str, Any]]:
    """transformers' own logits and SDPA (its eager softmax rounds to float32), one example at a time."""
    model = _model(kind, _step(kind, levers=Levers(gradient_checkpointing=False)))
    model.get_base_model().set_attn_implementation("sdpa")
    total, count = torch.zeros((), dtype=torch.float64), 0
    for example in _examples(lengths):
        labels = [i if t else -100 for i, t in zip(example.input_ids, example.trained, strict=True)][1:]
        logits = model(input_ids=torch.tensor([list(example.input_ids)])).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(
            logits, torch.tensor(labels, dtype=torch.int64), reduction="sum"
        )
        count += sum(label != -100 for label in labels)
    (total / count).backward()
    return (total / count).item(), {name: p.grad for name, p in trainable(model).items()}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("tile", [0, 4, 7, 64])
@pytest.mark.parametrize("lengths", [(21,), (9, 17, 4, 1, 12)])
def test_loss_and_gradients_equal_plain_transformers(kind: str, tile: int, lengths: tuple[int, ...]) -> None:
    levers = Levers(tile_tokens=tile, offload_checkpoints=tile in (0, 7), loss_chunk_tokens=16)
    step = _step(kind, levers=levers)
    loss, gradients = _loss_and_gradients(_model(kind, step), step, lengths)
    expected, references = _plain(kind, lengths)
    assert loss == pytest.approx(expected, rel=1e-9)
    for name, reference in references.items():
        assert reference.abs().max() > 1e-6
        torch.testing.assert_close(
            gradients[name], reference, rtol=1e-9, atol=1e-9 * float(reference.abs().max()), msg=name
        )
