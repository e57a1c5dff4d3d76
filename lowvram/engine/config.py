"""StepConfig: everything that decides what one training step computes and what memory it takes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from lowvram.frozen import Frozen

BasePrecision = Literal["nf4", "int8", "bf16", "fp16", "fp32"]
ComputeDtype = Literal["bf16", "fp16", "fp32"]
TaskType = Literal["CAUSAL_LM", "SEQ2SEQ_LM"]
HeadKind = Literal["16bit", "nf4", "int8", "streamed"]
OptimizerName = Literal["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"]
Bias = Literal["none", "all", "lora_only"]
AdapterInit = Literal["default", "pissa", "olora", "loftq", "eva", "lora_ga", "lora_one"]
PAGED: tuple[OptimizerName, ...] = ("paged_adamw", "paged_adamw8bit")  # their state may move to the host
QUANTIZED = ("int8", "nf4")  # of a base and of a head
GRADIENT_INITS = ("lora_ga", "lora_one")  # made from the gradient of the whole weight
DATA_INITS = (*GRADIENT_INITS, "eva")  # look at the first micro-batches
RANKS_TAKEN: dict[AdapterInit, int] = {  # of a layer's directions, times r; none: A is random, B zero
    **dict.fromkeys(("pissa", "olora", "loftq", "eva", "lora_one"), 1),
    "lora_ga": 2,  # A takes the first r, B the next
}
DORA_INITS = ("default", "eva")  # leave the base's rows as they are, whose norms DoRA starts from
DIFFERENCE_INITS = ("pissa", "olora", "lora_ga")  # start at B A != 0, which is subtracted again
TILE_ROWS = 8192  # of a head read in tiles: 59 MB of Qwen2-7B's in bf16, whose 152,064 rows take 1.09 GB


class Levers(Frozen):
    """Switches that trade time for memory; each one is visible to the memory trace."""

    double_quantization: bool = Field(
        True, description="quantise NF4's block scales as well (0.37 bit/weight)"
    )
    gradient_checkpointing: bool = Field(True, description="keep one activation a layer, recompute the rest")
    kept_layers: int = Field(
        0, ge=0, description="of the recomputed layers, so many of the last keep all and are not recomputed"
    )
    loss_chunk_tokens: int = Field(
        1024, ge=16, description="trained tokens whose logits exist at one time; the full logits never do"
    )
    tile_tokens: int = Field(
        0,
        ge=0,
        description="a layer runs on so many tokens at a time, forward and backward; 0: on all at once",
    )
    offload_checkpoints: bool = Field(
        False,
        description="what recomputing starts from is kept in host memory: layers * tokens * hidden size",
    )
    embedding_on_host: bool = Field(
        False, description="the input embedding stays in host memory; only the batch's rows travel"
    )
    head: HeadKind = Field(
        "16bit",
        description="the frozen head on the device: whole, quantised, or streamed from host memory in tiles",
    )
    liger: bool = Field(
        False,
        description="Liger's Triton kernels for norms and the gated MLP: fewer bytes kept, fewer passes",
    )
    expandable_segments: bool = Field(
        False,
        description="the CUDA allocator grows its segments instead of adding fixed ones: less is wasted",
    )
    empty_cache: bool = Field(
        False,
        description="after each step the CUDA allocator gives back what it caches: for other programs, not "
        "for this one's peak",
    )

    @property
    def tiles(self) -> bool:
        """Whether the layers are run by engine/tiles.py, the sequence whole or in parts."""
        return self.tile_tokens > 0 or self.offload_checkpoints

    @model_validator(mode="after")
    def _recomputes_what_it_tiles(self) -> Levers:
        if self.tiles and not self.gradient_checkpointing:
            raise ValueError(
                "tile_tokens and offload_checkpoints recompute: they need gradient_checkpointing=on"
            )
        if self.kept_layers and (self.tiles or not self.gradient_checkpointing):
            raise ValueError(
                "kept_layers are an exception from gradient_checkpointing=on, "
                "and tile_tokens and offload_checkpoints know none"
            )
        return self


class StepConfig(Frozen):
    """One optimizer step: precision, adapter, shapes, optimizer and levers."""

    task_type: TaskType = Field("CAUSAL_LM", description="SEQ2SEQ_LM for T5-type models")
    base_precision: BasePrecision = Field("nf4", description="of the frozen weights: 4, 8, 16 or 32 bits")
    compute_dtype: ComputeDtype = Field("bf16", description="of activations and products")
    rank: int = Field(8, ge=1, description="LoRA rank r")
    alpha: float = Field(
        16, gt=0, description="LoRA alpha; the update is scaled by alpha/r, or alpha/sqrt(r)"
    )
    dropout: float = Field(0.05, ge=0, lt=1, description="dropout on the adapter's input")
    bias: Bias = Field(
        "none", description="which bias vectors train: all, or the adapted layers' (lora_only)"
    )
    use_rslora: bool = Field(False, description="scale by alpha/sqrt(r) (arXiv 2312.03732)")
    target_modules: tuple[str, ...] = Field(
        ("q_proj", "v_proj"), min_length=1, description="linear layers that get an adapter"
    )
    init: AdapterInit = Field("default", description="adapter initialisation; default: A random, B zero")
    init_batches: int = Field(8, ge=1, description="micro-batches that eva, lora_ga and lora_one look at")
    use_dora: bool = Field(False, description="magnitude and direction train apart (DoRA, arXiv 2402.09353)")
    lora_plus_ratio: float = Field(
        1.0, ge=1, description="learning rate of B over that of A (LoRA+, arXiv 2402.12354)"
    )
    freeze_a: bool = Field(False, description="only B trains (LoRA-FA, arXiv 2308.03303)")
    inference_mode: bool = Field(False, description="the adapter is only used: nothing trains")
    seq_len: int = Field(1024, ge=8, description="longest sequence, tokens; of a T5-type model its source")
    target_len: int | None = Field(None, ge=1, description="longest target of a T5-type model, tokens")
    micro_batch: int = Field(1, ge=1, description="sequences in one forward pass")
    accumulation: int = Field(8, ge=1, description="forward passes in one optimizer step")
    packing: bool = Field(
        False,
        description="a step's examples share rows of up to micro_batch * seq_len tokens without padding; "
        "fewer passes, the same gradients",
    )
    optimizer: OptimizerName = Field(
        "adamw", description="its state in float32 or in 8 bits; a paged one gives way to the host"
    )
    weight_decay: float = Field(0.0, ge=0, description="of the adapter's matrices")
    max_grad_norm: float = Field(1.0, gt=0, description="longer gradients are scaled down to it")
    levers: Levers = Field(Levers(), description="switches that trade time for memory")

    @model_validator(mode="after")
    def _packs_what_it_can(self) -> StepConfig:
        if self.packing and self.levers.tiles:
            raise ValueError(
                "packing knows no tiles: leave tile_tokens and offload_checkpoints off, or packing"
            )
        if self.packing and self.task_type == "SEQ2SEQ_LM":
            raise ValueError("packing is for decoder-only models: leave it off for SEQ2SEQ_LM")
        return self

    @model_validator(mode="after")
    def _initialises_as_it_can(self) -> StepConfig:
        if self.use_dora and self.init not in DORA_INITS:
            raise ValueError(f"init={self.init} and use_dora: DoRA's magnitudes are those of the base itself")
        if self.init == "loftq" and self.base_precision not in QUANTIZED:
            raise ValueError(f"init=loftq repairs a quantised base; {self.base_precision} has lost nothing")
        if self.init == "eva" and (self.levers.tiles or self.task_type == "SEQ2SEQ_LM"):
            raise ValueError("init=eva looks at whole sequences of decoder-only models: use no tiles, no T5")
        return self

    @model_validator(mode="after")
    def _has_two_rates_for_two_factors(self) -> StepConfig:
        if self.freeze_a and self.lora_plus_ratio != 1:
            raise ValueError("lora_plus_ratio is B's learning rate over A's: freeze_a leaves A none")
        return self

    @property
    def effective_batch(self) -> int:
        """Sequences in one optimizer step."""
        return self.micro_batch * self.accumulation

    @property
    def subtracts_start(self) -> bool:
        """Whether the adapter adds B A - B0 A0 instead of B A."""
        return self.init in DIFFERENCE_INITS

    @property
    def scaling(self) -> float:
        """What B A is multiplied with."""
        return float(self.alpha / (self.rank**0.5 if self.use_rslora else self.rank))
