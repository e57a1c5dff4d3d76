"""The models of gpu_check: published shapes, the engine's own model with random weights, full batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lowvram.engine.batch import Batch
from lowvram.engine.config import StepConfig
from lowvram.engine.host import Host
from lowvram.engine.int8 import Int8Linear
from lowvram.engine.known_models import known_config
from lowvram.engine.model import skeleton, storage_dtype
from lowvram.engine.vocabulary import place_vocabulary, without_vocabulary_levers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

HUB_IDS = {
    "qwen2-7b": "Qwen/Qwen2-7B",
    "llama-8b": "meta-llama/Llama-3.1-8B",
    "13b": "meta-llama/Llama-2-13b-hf",
    "30b": "huggyllama/llama-30b",
}
_POSITIONS = 131072  # for all, so that memory and not the model ends the longest context
_TINY: dict[str, Any] = {  # for the self-check on a CPU, and for the recorded snapshot
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
_SMALL = {"tiny": {"vocab_size": 2048}, "small": {"vocab_size": 20_000}}  # a tile of a head is 8,192 rows


def config_of(model: str) -> PretrainedConfig:
    """The published shape from lowvram's own table, or one of the small ones."""
    from transformers import AutoConfig

    if model in _SMALL:
        return AutoConfig.for_model("llama", **_TINY, **_SMALL[model])
    name, _, layers = model.partition("/")
    config = known_config(HUB_IDS[name])
    assert config is not None, f"{HUB_IDS[name]} is not in lowvram's table"
    if layers:
        config.num_hidden_layers = int(layers)
    config.max_position_embeddings = _POSITIONS
    return config


def random_model(config: PretrainedConfig, step: StepConfig, device: str) -> PreTrainedModel:
    """The engine's model with random weights on `device`, in the layout and order in which training loads it.

    One parameter after the other, so that beside the finished part only one linear layer in 16 bits is alive
    (136 MB in Qwen2-7B). Nothing is downloaded.
    """
    torch.manual_seed(0)
    model = skeleton(config, without_vocabulary_levers(step))
    places: defaultdict[nn.Parameter, list[tuple[nn.Module, str]]] = defaultdict(list)  # several where tied
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            places[parameter].append((module, name))
    _warm_up(places, device)
    for _, parameter in sorted(model.named_parameters(), key=lambda item: _natural(item[0])):
        owner, name = places[parameter][0]
        if isinstance(owner, Int8Linear) and name != "bias":
            if name == "weight":  # which makes the scales as well
                owner.fill(_random_values(name, parameter, step, device))
            continue
        made = _random_parameter(owner, name, parameter, step, device)
        for module, name in places[parameter]:
            setattr(module, name, made)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            # RoPE's frequencies: any within (0, 1] cost the same
            setattr(module, name, torch.rand(buffer.shape, device=device).to(buffer.dtype))
    place_vocabulary(model, step, Host(torch.device(device)))
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # as engine.model.load: evaluation may not repack them
    model.config.use_cache = False
    return model


def _warm_up(parameters: Iterable[nn.Parameter], device: str) -> None:
    """transformers' caching_allocator_warmup: one segment for all weights, packed ones without scales."""
    n_bytes = 0
    for parameter in parameters:
        packed = hasattr(parameter, "quant_type")
        n_bytes += parameter.numel() // 2 if packed else parameter.numel() * parameter.element_size()
    if device != "cpu":
        torch.empty(n_bytes, dtype=torch.uint8, device=device)


def _natural(name: str) -> tuple[int | str, ...]:
    """transformers' order: layers.2 before layers.10."""
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))


def _random_parameter(
    module: Any, name: str, old: nn.Parameter, step: StepConfig, device: str
) -> nn.Parameter:
    import bitsandbytes as bnb

    value = _random_values(name, old, step, device)
    if isinstance(module, bnb.nn.Linear4bit) and name == "weight":
        # as transformers' own loader does (integrations/bitsandbytes.py, Bnb4bitQuantize)
        return bnb.nn.Params4bit(value, requires_grad=False, **old.__dict__).to(device)
    return nn.Parameter(value, requires_grad=False)


def _random_values(name: str, like: nn.Parameter, step: StepConfig, device: str) -> torch.Tensor:
    dtype = storage_dtype(step.base_precision, step.compute_dtype)
    value = torch.empty(like.shape, dtype=dtype, device=device)
    if like.dim() > 1:
        return value.normal_(std=0.02)
    return value.fill_(1.0 if name == "weight" else 0.0)  # norms and biases


def full_batch(step: StepConfig, vocab_size: int) -> Batch:
    """A micro-batch of the step's full shape in which every token is trained, as the prediction assumes."""
    rows, length = step.micro_batch, step.seq_len
    positions = torch.arange(rows * length).view(rows, length)[:, :-1].flatten()
    return Batch(
        torch.randint(vocab_size, (rows, length)),
        positions,
        torch.randint(vocab_size, (rows * (length - 1),)),
    )
