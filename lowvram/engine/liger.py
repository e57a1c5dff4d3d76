"""Liger's Triton kernels for RMSNorm and the gated MLP, put into one model where they are installed."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lowvram.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_OLDEST = (0, 8, 5)
_OFF = "Use --levers liger=off."
_COMPILER = "Install gcc or clang, or use --levers liger=off."
# Families that scripts/check_liger.py compares with plain transformers, and the gate that Liger computes
# for each whatever the config says (a Llama with gelu would silently get silu).
_SILU, _TANH_GELU = ("silu", "swish"), ("gelu_pytorch_tanh",)
GATES: dict[str, tuple[str, ...]] = {
    "llama": _SILU,
    "mistral": _SILU,
    "phi3": _SILU,
    "qwen2": _SILU,
    "qwen3": _SILU,
    "gemma": _TANH_GELU,
    "gemma2": _TANH_GELU,
    "gemma3_text": _TANH_GELU,
}


def why_not_liger(config: PretrainedConfig) -> str:
    """Why this model cannot be given Liger's kernels here; "" where it can."""
    gates = GATES.get(config.model_type)
    if type(config).__module__.startswith("transformers_modules."):
        return "the model brings its own code"
    if gates is None:
        return f"lowvram has compared them for {', '.join(GATES)}, not for '{config.model_type}'"
    gate = getattr(config, "hidden_activation", None) or config.hidden_act
    if gate not in gates:
        return f"they compute {gates[0]}, this '{config.model_type}' has {gate}"
    missing = _missing()
    return f"{' and '.join(missing)} not installed" if missing else ""


def is_installed() -> bool:
    """Liger's package, and Triton's, which a CUDA build of torch brings along."""
    return not _missing()


def _missing() -> list[str]:
    missing = [name for name in ("liger_kernel", "triton") if find_spec(name) is None]
    return missing or ([f"liger-kernel {'.'.join(map(str, _OLDEST))} or newer"] if _is_old() else [])


def _is_old() -> bool:
    """Older than the one that scripts/check_liger.py has compared."""
    try:
        numbers = version("liger-kernel").split(".")[: len(_OLDEST)]
    except PackageNotFoundError:  # on the path without having been installed
        return False
    return tuple(int(n) if n.isdigit() else 0 for n in numbers) < _OLDEST


def require_liger(config: PretrainedConfig, device: str) -> None:
    """Refuse where the kernels would not work; `device` may be "meta".

    Raises:
        ConfigError: they are not installed, do not run on `device`, or are not for this model.
    """
    if reason := why_not_liger(config):
        raise ConfigError(f"The lever liger cannot be used: {reason}.", _remedy(reason))
    if os.environ.get("TRITON_INTERPRET") == "1":  # Triton's own switch: runs anywhere, very slowly
        return
    if device not in ("cuda", "meta"):
        raise ConfigError(f"The lever liger needs a GPU: Triton compiles nothing for '{device}'.", _OFF)
    if device == "cuda" and not can_compile():
        raise ConfigError("The lever liger needs a C compiler: Triton builds with it.", _COMPILER)


def can_compile() -> bool:
    """Whether Triton finds a C compiler; on Windows it brings its own."""
    found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return bool(found) or os.name == "nt"


def _remedy(reason: str) -> str:
    if "not installed" not in reason:
        return _OFF
    return "Type pip install 'lowvram[liger]', or use --levers liger=off."


def apply_liger(model: PreTrainedModel) -> None:
    """Replace norms and gated MLPs of `model`, on the meta device as with weights; no other model changes.

    Rotary embeddings stay transformers' own: Liger can replace them for all models of the process only.

    Raises:
        ConfigError: as `require_liger`.
    """
    require_liger(model.config, model.device.type)
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    with _only_this_model(model):
        _apply_liger_kernel_to_instance(
            model=model,
            rms_norm=True,
            swiglu=True,
            geglu=True,
            rope=False,
            cross_entropy=False,
            fused_linear_cross_entropy=False,
        )


@contextmanager
def _only_this_model(model: Any) -> Iterator[None]:
    """Liger also replaces the classes in transformers' module, from which models yet to come are made."""
    module = vars(sys.modules[type(model).__module__])
    before = dict(module)
    try:
        yield
    finally:
        module.update(before)
