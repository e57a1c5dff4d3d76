"""Answering under the recorder: loading, the longest prompt read in parts, and a step at a full KV cache."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from lowvram.engine.adapter_folder import AdapterFolder
from lowvram.engine.decoding import PREFILL_TOKENS, Reader, prepare_for_decoding
from lowvram.engine.inference_config import InferenceStep
from lowvram.engine.model import skeleton
from lowvram.engine.sampling import Sampler, Sampling
from lowvram.engine.switching import add_layers, require_fitting
from lowvram.engine.vocabulary import use_host
from lowvram.memory.estimate import estimate_of
from lowvram.memory.inference_estimate import InferenceEstimate
from lowvram.memory.kernels import cublas_bytes
from lowvram.memory.layers import trace_repeating
from lowvram.memory.load import base_of, record_loading
from lowvram.memory.recorder import Recorder
from lowvram.memory.run import TracedHost
from lowvram.memory.trace import ALLOC_ROUNDING, Backend, Capability, Trace
from lowvram.memory.weights import make_traceable

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_DRAWN = Sampling(temperature=1.0, top_p=0.5)  # takes more memory than the likeliest token


def require_adapters_fit(
    config: PretrainedConfig, step: InferenceStep, adapters: Sequence[AdapterFolder]
) -> None:
    """Refuse an adapter of another base by the names and shapes of its tensors, without a weight.

    Raises:
        ConfigError: names the adapter and what is wrong.
    """
    if adapters:
        with torch.device("meta"):
            require_fitting(add_layers(skeleton(config, step.model_step), adapters), adapters)


def inference_estimate(
    config: PretrainedConfig,
    step: InferenceStep,
    adapters: Sequence[AdapterFolder],
    backend: Backend = "cuda",
    capability: Capability = None,
) -> InferenceEstimate:
    """Trace the whole model's answering and replay it through the allocator.

    Args:
        adapters: that fit the base (`require_adapters_fit`), all on the device, one of them on.
    """
    trace = trace_all_layers(config, step, adapters, backend, capability)
    found = estimate_of(trace, step.model_step, backend)
    kept = (a for a in trace.allocations if a.component == "kv_cache" and a.phase == "prefill")
    return InferenceEstimate(**found.model_dump(), kv_cache_bytes=sum(a.n_bytes for a in kept))


def trace_all_layers(
    config: PretrainedConfig,
    step: InferenceStep,
    adapters: Sequence[AdapterFolder],
    backend: Backend,
    capability: Capability = None,
) -> Trace:
    """The whole model's trace: extended from a few layers where they repeat, else of every layer."""

    def trace(some_layers: PretrainedConfig, _kept: int = 0) -> Trace:
        return trace_inference(some_layers, step, adapters, backend, capability)

    if all(adapter.alike_in_all_layers for adapter in adapters):
        return trace_repeating(config, trace)
    return trace(config)


def trace_inference(
    config: PretrainedConfig,
    step: InferenceStep,
    adapters: Sequence[AdapterFolder],
    backend: Backend,
    capability: Capability = None,
) -> Trace:
    """Rows whose prompts fill the context but for one token; where there are several, they are padded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' deprecations
        model = _meta_model(config, step, adapters, backend, capability)
    recorder = Recorder(backend, ALLOC_ROUNDING if backend == "cuda" else 1)
    recorder.watch(model, config.get_text_config().vocab_size)
    base = base_of(model)
    use_host(base, TracedHost(recorder, backend))
    record_loading(recorder, model, backend)
    for n_bytes in cublas_bytes(capability) if backend == "cuda" else ():
        recorder.keep(n_bytes, "cublas workspace")
    with recorder, torch.no_grad():
        _answer(recorder, base, step)
    recorder.let_go()
    return recorder.trace


def _meta_model(
    config: PretrainedConfig,
    step: InferenceStep,
    adapters: Sequence[AdapterFolder],
    backend: Backend,
    capability: Capability,
) -> Any:
    with torch.device("meta"):
        base = skeleton(config, step.model_step)
        base.config.pad_token_id = None  # or GPT-2 would look for it among the ids
        prepare_for_decoding(base)
        model = add_layers(base, adapters)
    make_traceable(model, backend, capability)
    return model.eval()


def _answer(recorder: Recorder, base: Any, step: InferenceStep) -> None:
    """As `engine.decoding.decoded` does it."""
    device = torch.device("meta")
    recorder.at("")
    ids = torch.empty((step.batch, step.context - 1), dtype=torch.int64, device=device)
    mask = torch.empty(ids.shape, dtype=torch.bool, device=device) if step.batch > 1 else None
    reader = Reader(base, step.batch, step.context, mask)
    sampler = Sampler(_DRAWN, range(step.batch), device)
    with recorder.during("prefill"):
        for part in _as_read(ids):
            logits = reader.prefill(part)
        recorder.at("")
        _label(recorder, reader)
        tokens = sampler(logits)
    with recorder.during("decode"):
        logits = reader.step(tokens)
        recorder.at("")
        _label(recorder, reader)
        sampler(logits)


def first_part(length: int) -> int:
    """Tokens that a chat of `length` reads first where it takes the most memory: the rest are whole passes.

    Of those the last looks back on all there is. Where one pass would take all, one token comes first.
    """
    return 1 if length <= PREFILL_TOKENS else (length - 1) % PREFILL_TOKENS + 1


def _as_read(ids: torch.Tensor) -> tuple[torch.Tensor, ...]:  # [B, P] -> parts of it
    """One row as a chat reads it that goes on: all but the first part look back, through a mask."""
    n_rows, length = ids.shape
    if n_rows > 1 or length < 2:
        return (ids,)
    first = first_part(length)
    return torch.split(ids, [first, length - first], dim=1)


def _label(recorder: Recorder, reader: Reader) -> None:
    for index, layer in enumerate(reader.cache.layers):
        recorder.at(f"layers.{index}")
        for kept in (layer.keys, layer.values):
            if kept is not None:
                recorder.label(kept, "kv_cache")
    recorder.at("")
