"""The model families that a GGUF can hold here: llama.cpp's name, and what differs between the two."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

from lowvram.errors import ConfigError

_SWIGLU = ("silu",)
_GEGLU = ("gelu_pytorch_tanh",)


@dataclass(frozen=True)
class Architecture:
    """One of transformers' architectures as llama.cpp knows it."""

    arch: MODEL_ARCH
    neighbours: bool = False  # llama.cpp rotates feature 2i with 2i + 1 there, transformers i with i + d/2
    norm_offset: float = 0.0  # Gemma stores its norms' weights less one, llama.cpp whole
    activations: tuple[str, ...] = _SWIGLU

    @property
    def name(self) -> str:
        """As the file says it, and the prefix of its keys."""
        return str(MODEL_ARCH_NAMES[self.arch])

    def renamed(self, names: Iterable[str], n_layers: int) -> dict[str, str]:
        """llama.cpp's name of each tensor; those for which it has none are missing."""
        known = get_tensor_name_map(self.arch, n_layers)
        found = {name: known.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}
        return {name: str(other) for name, other in found.items() if other}


_GEMMA: dict[str, Any] = {"norm_offset": 1.0, "activations": _GEGLU}
ARCHITECTURES = {
    "LlamaForCausalLM": Architecture(MODEL_ARCH.LLAMA, neighbours=True),
    "MistralForCausalLM": Architecture(MODEL_ARCH.LLAMA, neighbours=True),
    "SmolLM3ForCausalLM": Architecture(MODEL_ARCH.SMOLLM3, neighbours=True),
    "Qwen2ForCausalLM": Architecture(MODEL_ARCH.QWEN2),
    "Qwen3ForCausalLM": Architecture(MODEL_ARCH.QWEN3),
    "GemmaForCausalLM": Architecture(MODEL_ARCH.GEMMA, **_GEMMA),
    "Gemma2ForCausalLM": Architecture(MODEL_ARCH.GEMMA2, **_GEMMA),
    "Gemma3ForCausalLM": Architecture(MODEL_ARCH.GEMMA3, **_GEMMA),
}
MERGE_INSTEAD = "Merge it instead, for plain transformers and vLLM: lowvram merge RUN"


def architecture_of(config: Any) -> Architecture:
    """The family of a model by its config.

    Raises:
        ConfigError: none of the supported ones, or a variant that llama.cpp would compute otherwise.
    """
    name = (config.architectures or ["no architecture"])[0]
    if name not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ConfigError(f"'{name}' cannot be written as GGUF here; these can: {known}.", MERGE_INSTEAD)
    found = ARCHITECTURES[name]
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    differing = [] if activation in found.activations else [f"the activation {activation}"]
    differing += [text for wrong, text in _variants(config, found.arch) if wrong]
    if differing:
        raise ConfigError(f"llama.cpp's {found.name} does not know {', '.join(differing)}.", MERGE_INSTEAD)
    return found


def _variants(config: Any, arch: MODEL_ARCH) -> list[tuple[bool, str]]:
    """What a config can ask for and llama.cpp has built in otherwise."""
    layers = range(config.num_hidden_layers)
    found = [(bool(getattr(config, "use_bidirectional_attention", False)), "bidirectional attention")]
    if arch == MODEL_ARCH.SMOLLM3:
        found += [
            (
                list(config.no_rope_layers) != [int((i + 1) % 4 != 0) for i in layers],
                "these rope-free layers",
            ),
            (bool(config.use_sliding_window), "a sliding window"),
        ]
    if arch in (MODEL_ARCH.GEMMA2, MODEL_ARCH.GEMMA3):
        period = 2 if arch == MODEL_ARCH.GEMMA2 else 6
        full = [kind == "full_attention" for kind in config.layer_types]
        largest = config.num_hidden_layers == (
            46 if arch == MODEL_ARCH.GEMMA2 else 62
        )  # 27B, told by its depth
        scale = config.hidden_size // config.num_attention_heads if largest else config.head_dim
        found += [
            (full != [(i + 1) % period == 0 for i in layers], "this order of sliding windows"),
            (config.query_pre_attn_scalar != scale, f"query_pre_attn_scalar {config.query_pre_attn_scalar}"),
        ]
    return found
