"""Loading in the trace: what it leaves on the device, and what it takes on the way."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lowvram.memory.recorder import Recorder, layer_of
from lowvram.memory.trace import OUTSIDE
from lowvram.memory.weights import source_bytes

if TYPE_CHECKING:
    from peft import PeftModel


def record_loading(recorder: Recorder, model: PeftModel, backend: str) -> None:
    """Base weights one after another by name, each quantised on the device; then the adapters.

    transformers first asks the GPU's allocator for all weights at once and gives that back, so that the
    weights come from one segment (`caching_allocator_warmup`).
    """
    base = model.get_base_model()
    frozen = [(n, p) for n, p in model.named_parameters() if not p.requires_grad]
    if backend == "cuda":
        _warm_up(recorder, frozen)
    named = {base.get_output_embeddings().weight: "head", base.get_input_embeddings().weight: "embeddings"}
    for name, parameter in sorted(frozen, key=lambda item: _natural(item[0])):
        recorder.at(name)
        record_weight(recorder, parameter, named.get(parameter, "base_weights"))
    for name, buffer in model.named_buffers():
        recorder.at(name)
        recorder.label(buffer, "base_weights")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            recorder.at(name)
            recorder.label(parameter, "adapters")
    recorder.at("")


def record_weight(recorder: Recorder, parameter: nn.Parameter, component: str) -> None:
    """A quantised weight was there in 16 bits, with its scales in float32, while it was made."""
    tensors = _quantization_tensors(parameter)
    if not tensors:
        recorder.label(parameter, component)
        return
    state: Any = parameter.quant_state  # type: ignore[attr-defined]  # bitsandbytes puts it there
    with recorder.temporary(source_bytes(parameter), "bitsandbytes.quantize_4bit"):
        recorder.label(parameter, component)
        if state.state2 is None:
            _label(recorder, tensors, component)
            return
        scales_bytes = 4 * int(state.absmax.numel())
        with recorder.temporary(scales_bytes, "absmax"), recorder.temporary(scales_bytes, "absmax - offset"):
            _label(recorder, tensors, component)


def _label(recorder: Recorder, tensors: Iterable[torch.Tensor], component: str) -> None:
    for tensor in tensors:
        recorder.label(tensor, component)


def _quantization_tensors(parameter: nn.Parameter) -> list[torch.Tensor]:
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return []
    tensors = [state.code, state.offset, state.absmax]
    if state.state2 is not None:
        tensors += [state.state2.code, state.state2.absmax]
    return [t for t in tensors if t is not None]


def _warm_up(recorder: Recorder, frozen: list[tuple[str, nn.Parameter]]) -> None:
    """All weights as transformers counts them: packed 4-bit ones without their scales."""
    by_layer: defaultdict[int, int] = defaultdict(int)
    for name, parameter in frozen:
        by_layer[layer_of(name)] += parameter.numel() * parameter.element_size()
    layers = tuple(by_layer[i] for i in range(max(by_layer, default=OUTSIDE) + 1))
    with recorder.temporary(sum(by_layer.values()), "caching_allocator_warmup", bytes_by_layer=layers):
        pass


def _natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """The order in which transformers loads: "layers.2" before "layers.10"."""
    return tuple(_parts(name))


def _parts(name: str) -> Iterator[tuple[int, int, str]]:
    for part in re.split(r"\.", name):
        yield (0, int(part), "") if part.isdigit() else (1, 0, part)
