"""Which of a model's linear layers a quantised base keeps in few bits, and their replacement."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def is_linear(module: nn.Module) -> bool:
    """GPT-2's Conv1D is a linear layer whose weight lies the other way."""
    return isinstance(module, (nn.Linear, Conv1D))


def in_out_features(module: Any) -> tuple[int, int]:
    """Widths of a linear layer's input and output."""
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    return int(module.in_features), int(module.out_features)


def is_turned(module: Any) -> bool:
    """Whether its weight is [in, out] on disk, as GPT-2's; a quantised layer knows what it was made of."""
    return Conv1D in (type(module), getattr(module, "source_cls", None))


def unquantized_modules(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers that stay in 16 bits: the head, and T5's wo, which overflows."""
    head = model.get_output_embeddings()
    wide = set(model._keep_in_fp32_modules or ())
    return [n for n, m in model.named_modules() if m is head or (is_linear(m) and wide & set(n.split(".")))]


def replace_linears(model: PreTrainedModel, make: Callable[[Any], Any]) -> None:
    """Every linear layer but those becomes what `make` makes of it; it keeps its bias."""
    keep = set(unquantized_modules(model))
    for name, module in list(model.named_modules()):
        if type(module) not in (nn.Linear, Conv1D) or name in keep:
            continue
        new = make(module)
        new.source_cls = type(module)  # a mark that transformers sets as well
        if module.bias is not None:
            new.bias = nn.Parameter(module.bias.data, requires_grad=False)
        model.set_submodule(name, new)
