"""The planner's shortcut on the shapes of real models: equal to the trace of every layer, to the byte."""

from __future__ import annotations

import pytest

from lowvram.engine.config import StepConfig, TaskType
from lowvram.engine.known_models import known_config
from lowvram.engine.shape import shape_of
from lowvram.memory.estimate import COMPONENTS, estimate, estimate_of
from lowvram.memory.layers import blocks_of
from lowvram.memory.run import trace_step

_REPEATING = (
    "meta-llama/Llama-3.2-1B",
    "meta-llama/Llama-3.2-3B",
    "meta-llama/Llama-3.1-8B",
    "meta-llama/Llama-2-13b-hf",
    "huggyllama/llama-30b",
    "meta-llama/Llama-3.1-70B",
    "Qwen/Qwen2-0.5B",
    "Qwen/Qwen2-7B",
    "Qwen/Qwen2-72B",
    "Qwen/Qwen2.5-14B",
    "Qwen/Qwen2.5-32B",
    "Qwen/Qwen3-8B",
    "Qwen/Qwen3-30B-A3B",
    "mistralai/Mistral-7B-v0.1",
    "google/gemma-2-2b",
    "microsoft/Phi-3-mini-4k-instruct",
    "facebook/opt-1.3b",
    "openai-community/gpt2",
)
_WHOLE = (  # traced whole: two stacks of layers; 26 layers in periods of 6, of which four blocks save nothing
    "google-t5/t5-base",
    "google/gemma-3-1b-pt",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", _REPEATING + _WHOLE)
def test_shortcut_equals_the_whole_trace_and_components_sum(name: str) -> None:
    config = known_config(name)
    assert config is not None
    assert (blocks_of(config) is None) == (name in _WHOLE)
    task: TaskType = "SEQ2SEQ_LM" if config.is_encoder_decoder else "CAUSAL_LM"
    targets = shape_of(config).resolve_targets("all-linear")
    step = StepConfig(
        task_type=task,
        target_modules=targets,
        seq_len=512,
        target_len=128 if config.is_encoder_decoder else None,
    )
    short = estimate(config, step, "cuda", (8, 6))
    whole = estimate_of(trace_step(config, step, "cuda", (8, 6)), step, "cuda")
    # clipping makes a norm of 4 bytes for each gradient; those of repeated layers are not repeated
    other = {"n_events", "phases_bytes"}
    assert short.model_dump(exclude=other) == whole.model_dump(exclude=other)
    assert short.phases_bytes == pytest.approx(whole.phases_bytes, rel=1e-3)
    assert sum(short.components_bytes.values()) == short.peak_allocated_bytes <= short.peak_reserved_bytes
    assert set(short.components_bytes) <= set(COMPONENTS)
    phase, module, operator = short.peak_moment.split(", ")
    assert phase in short.phases_bytes
    assert module
    assert operator.startswith(("aten.", "bitsandbytes."))
