"""vLLM takes the adapter folder as it is: whether it can serve this one, and the command that does."""

from __future__ import annotations

from pathlib import Path

from lowvram.errors import ConfigError
from lowvram.export.adapter_files import Adapter
from lowvram.shell import typed

# What --max-lora-rank may be (vLLM's LoRAConfig); a request above it is refused when the server starts.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_MERGED = "Merge it and serve that: lowvram merge RUN, then: vllm serve RUN/merged"


def vllm_command(adapter: Adapter, base: str, name: str) -> str:
    """The line that serves base and adapter; a request asks for it with "model": `name`.

    Raises:
        ConfigError: vLLM does not serve this kind of adapter.
    """
    wrong = {
        "a rank of {rank}; vLLM's largest is {largest}": rank_of(adapter) > _RANKS[-1],
        "DoRA": any(u.magnitude is not None for u in adapter.modules.values()),
        "trained biases": any(
            u.lora_bias is not None or "bias" in u.replaced for u in adapter.modules.values()
        ),
        "whole weights (modules_to_save)": any("weight" in u.replaced for u in adapter.modules.values()),
        "single trained tokens": any(u.token_rows is not None for u in adapter.modules.values()),
    }
    found = [text.format(rank=rank_of(adapter), largest=_RANKS[-1]) for text, is_so in wrong.items() if is_so]
    if found:
        raise ConfigError(f"vLLM cannot serve this adapter: it has {', '.join(found)}.", _MERGED)
    largest = next(rank for rank in _RANKS if rank >= rank_of(adapter))
    folder = typed(f"{name}={Path(adapter.folder)}")
    return f"vllm serve {typed(base)} --enable-lora --max-lora-rank {largest} --lora-modules {folder}"


def rank_of(adapter: Adapter) -> int:
    """The largest of its modules."""
    return max((u.a.shape[0] for u in adapter.modules.values() if u.a is not None), default=0)
