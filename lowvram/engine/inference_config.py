"""InferenceStep: everything that decides what answering computes and what memory it takes."""

from __future__ import annotations

from pydantic import Field

from lowvram.engine.config import BasePrecision, ComputeDtype, HeadKind, Levers, StepConfig
from lowvram.frozen import Frozen


class InferenceStep(Frozen):
    """A base in some precision that reads and writes rows of at most `context` tokens."""

    base_precision: BasePrecision = Field(description="of the weights: 4, 8, 16 or 32 bits")
    compute_dtype: ComputeDtype = Field(description="of activations, products and the KV cache")
    context: int = Field(ge=2, description="tokens of prompt and answer together, for which there is room")
    batch: int = Field(1, ge=1, description="rows that are answered at one time")
    double_quantization: bool = Field(True, description="of NF4's block scales")
    embedding_on_host: bool = Field(False, description="the input embedding stays in host memory")
    head: HeadKind = Field("16bit", description="how the head is kept")
    expandable_segments: bool = Field(False, description="the CUDA allocator grows its segments")

    @property
    def model_step(self) -> StepConfig:
        """As the model's loader takes it; what a StepConfig says of training has no meaning here."""
        names = ("double_quantization", "embedding_on_host", "head", "expandable_segments")
        levers = Levers.model_validate({name: getattr(self, name) for name in names})
        return StepConfig(base_precision=self.base_precision, compute_dtype=self.compute_dtype, levers=levers)
