"""Loading in the trace: what it leaves on the device, and what it takes on the way."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from lowvram.engine.adapter_start import adapter_parameters, is_start
from lowvram.engine.dora import start_magnitudes
from lowvram.engine.head import Nf4Head, TiledHead
from lowvram.engine.int8 import Int8Linear
from lowvram.engine.vocabulary import HostEmbedding, fill_embedding, fill_head
from lowvram.memory.recorder import Recorder, layer_of
from lowvram.memory.trace import OUTSIDE
from lowvram.memory.weights import source_bytes

_COMPONENTS = {"embedding": "embeddings", "head": "head"}


def record_loading(recorder: Recorder, model: Any, backend: str) -> None:
    """Base weights one after another by name, each quantised on the device; then embedding and head go
    where the levers say; then the adapters, if there are any, with DoRA's magnitudes of the base's weights.

    transformers first asks the GPU's allocator for all weights at once and gives that back, so that the
    weights come from one segment (`caching_allocator_warmup`).
    """
    base = base_of(model)
    ends = ends_as_loaded(base)
    loaded = _loaded(model, ends)
    if backend == "cuda":
        _warm_up(recorder, loaded)
    int8 = {p: m for m in base.modules() if isinstance(m, Int8Linear) for p in (m.weight, m.scale)}
    named = {weight: _COMPONENTS[end] for end, weight in reversed(ends.items())}
    for name, parameter in sorted(loaded, key=lambda item: _natural(item[0])):
        recorder.at(name)
        if parameter not in int8:
            record_weight(recorder, parameter, named.get(parameter, "base_weights"))
        elif parameter is int8[parameter].weight:  # the scales come with it
            record_int8(recorder, int8[parameter])
    del loaded, parameter, named, int8  # what has no other owner lives until it is placed
    place_ends(recorder, base, ends)
    for name, buffer in model.named_buffers():
        recorder.at(name)
        recorder.label(buffer, "adapters" if is_start(name) else "base_weights")
    for name, parameter in adapter_parameters(model).items():
        recorder.at(name)
        recorder.label(parameter, "adapters")
    recorder.at("")
    with recorder:
        start_magnitudes(model, recorder.at)


def base_of(model: Any) -> Any:
    """The model below its adapters, or the one that has none."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _loaded(model: Any, ends: dict[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """Frozen weights as the files have them: those that a placed head is made of are not among them."""
    base = base_of(model)
    modules = {"embedding": base.get_input_embeddings(), "head": base.get_output_embeddings()}
    head: Any = modules["head"]
    made = {id(p) for p in head.parameters() if p is not head.bias} if isinstance(head, TiledHead) else set()
    made |= {id(p) for p in adapter_parameters(model).values()}
    frozen = [(n, p) for n, p in model.named_parameters() if id(p) not in made]
    there = {id(p) for _, p in frozen}
    names = {id(module): name for name, module in model.named_modules()}
    placed = [(f"{names[id(modules[end])]}.weight", weight) for end, weight in ends.items()]
    return frozen + [(name, weight) for name, weight in placed if id(weight) not in there]


def ends_as_loaded(base: Any) -> dict[str, torch.Tensor]:
    """The embedding's and, where it has one of its own, the head's 16-bit weight."""
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    on_host = isinstance(embedding, HostEmbedding)
    ends = {"embedding": torch.empty_like(embedding.weight) if on_host else embedding.weight}
    if not isinstance(head, TiledHead):
        ends["head"] = head.weight
    elif not head.tied:
        ends["head"] = torch.empty((head.n_rows, head.width), dtype=head.dtype, device="meta")
    return ends


def place_ends(recorder: Recorder, base: Any, ends: dict[str, torch.Tensor]) -> None:
    """The engine's own placing, recorded; only bitsandbytes' quantising does not run on meta tensors."""
    embedding: Any = base.get_input_embeddings()
    head: Any = base.get_output_embeddings()
    recorder.at("")
    with recorder:
        fill_embedding(base, ends)
    recorder.label(embedding.weight, "embeddings")
    if isinstance(head, Nf4Head):
        for part in head.parts():
            record_quantized(recorder, part.weight, "head")
    elif isinstance(head, TiledHead):
        with recorder:
            fill_head(base, ends)
        kept: list[Any] = [head.weight, *head.parameters()]  # a streamed one's is no parameter
        for weight in kept:
            recorder.label(weight, "head")
    ends.clear()


def record_weight(recorder: Recorder, parameter: torch.Tensor, component: str) -> None:
    """A quantised weight was there in 16 bits while it was made."""
    if not _quantization_tensors(parameter):
        recorder.label(parameter, component)
        return
    with recorder.temporary(source_bytes(parameter), "bitsandbytes.quantize_4bit"):
        record_quantized(recorder, parameter, component)


def record_int8(recorder: Recorder, linear: Int8Linear) -> None:
    """The engine's own quantising, recorded; the source is what of the compute dtype came from the file."""
    with recorder:
        source = torch.empty(linear.weight.shape, dtype=linear.compute_dtype, device="meta")  # [out, in]
        recorder.label(source, "workspaces")
        linear.fill(source)
    recorder.label(linear.weight, "base_weights")
    recorder.label(linear.scale, "base_weights")


def record_quantized(recorder: Recorder, parameter: Any, component: str) -> None:
    """Made of a weight that is there already, its scales in float32 on the way."""
    state, tensors = parameter.quant_state, _quantization_tensors(parameter)
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


def _quantization_tensors(parameter: torch.Tensor) -> list[torch.Tensor]:
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return []
    tensors = [state.code, state.offset, state.absmax]
    if state.state2 is not None:
        tensors += [state.state2.code, state.state2.absmax]
    return [t for t in tensors if t is not None]


def _warm_up(recorder: Recorder, loaded: list[tuple[str, torch.Tensor]]) -> None:
    """All weights as transformers counts them: packed 4-bit ones without their scales."""
    by_layer: defaultdict[int, int] = defaultdict(int)
    for name, parameter in loaded:
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
