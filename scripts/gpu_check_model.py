"""The models of gpu_check: published shapes, the engine's model with random weights, full batches."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lowvram.engine.batch import Batch
from lowvram.engine.config import StepConfig
from lowvram.engine.model import skeleton, storage_dtype

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# The config.json of each, as published; but 13B and 30B with more positions than their 4,096 and 2,048, so
# that memory and not the model ends the longest context.
_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2-7b": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
    "llama-8b": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
    },
    "13b": {  # Llama-2-13B
        **_LLAMA,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "vocab_size": 32000,
        "max_position_embeddings": 131072,
    },
    "30b": {  # LLaMA-30B
        **_LLAMA,
        "hidden_size": 6656,
        "intermediate_size": 17920,
        "num_hidden_layers": 60,
        "num_attention_heads": 52,
        "num_key_value_heads": 52,
        "vocab_size": 32000,
        "max_position_embeddings": 131072,
    },
    "tiny": {  # for the self-check on a CPU, and for the recorded snapshot
        **_LLAMA,
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 2048,
        "max_position_embeddings": 4096,
    },
}
_KNOWN = {"qwen2-7b": "Qwen/Qwen2-7B", "llama-8b": "meta-llama/Llama-3.1-8B"}


def config_of(model: str) -> PretrainedConfig:
    """The transformers config of one of the shapes, from lowvram's own table where it is in there."""
    from transformers import AutoConfig

    with suppress(ImportError):  # until the table is merged
        from lowvram.engine.known_models import known_config

        if model in _KNOWN and (known := known_config(_KNOWN[model])) is not None:
            return known
    shape = dict(SHAPES[model])
    return AutoConfig.for_model(shape.pop("model_type"), **shape)


def random_model(config: PretrainedConfig, step: StepConfig, device: str) -> PreTrainedModel:
    """The engine's model with random weights on `device`, in the layout in which training loads it.

    One parameter after the other, so that beside the finished part only one linear layer in 16 bits is alive
    (136 MB in Qwen2-7B). Nothing is downloaded.
    """
    torch.manual_seed(0)
    model = skeleton(config, step)
    made: dict[int, nn.Parameter] = {}  # by the old one, so that tied weights stay tied
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            if id(old) not in made:
                made[id(old)] = _random_parameter(module, name, old, step, device)
            setattr(module, name, made[id(old)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            # RoPE's frequencies: any within (0, 1] cost the same
            setattr(module, name, torch.rand(buffer.shape, device=device).to(buffer.dtype))
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # as engine.model.load: evaluation may not repack them
    model.config.use_cache = False
    return model


def _random_parameter(
    module: nn.Module, name: str, old: nn.Parameter, step: StepConfig, device: str
) -> nn.Parameter:
    import bitsandbytes as bnb

    dtype = storage_dtype(step.base_precision, step.compute_dtype)
    value = torch.empty(old.shape, dtype=dtype, device=device)
    if old.dim() > 1:
        value.normal_(std=0.02)
    else:
        value.fill_(1.0 if name == "weight" else 0.0)  # norms and biases
    if isinstance(module, bnb.nn.Linear4bit) and name == "weight":
        # as transformers' own loader does (integrations/bitsandbytes.py, Bnb4bitQuantize)
        return bnb.nn.Params4bit(value, requires_grad=False, **old.__dict__).to(device)
    return nn.Parameter(value, requires_grad=False)


def full_batch(step: StepConfig, vocab_size: int, device: str) -> Batch:
    """A micro-batch of the step's full shape in which every token is trained, as the prediction assumes."""
    rows, length = step.micro_batch, step.seq_len
    positions = torch.arange(rows * length).view(rows, length)[:, :-1].flatten()
    return Batch(
        torch.randint(vocab_size, (rows, length)),
        positions,
        torch.randint(vocab_size, (rows * (length - 1),)),
    ).to(device)
