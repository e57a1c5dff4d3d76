"""InferenceEstimate: the predicted peak of answering, and what the KV cache takes of it."""

from __future__ import annotations

from pydantic import Field

from lowvram.memory.estimate import MemoryEstimate


class InferenceEstimate(MemoryEstimate):
    """Predicted device memory of answering, before any margin."""

    kv_cache_bytes: int = Field(description="keys and values of all layers at the full context")
