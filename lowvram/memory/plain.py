"""The step that plain transformers + peft would run, traced: what other projects measured and published."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import Field
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv

from lowvram.engine.adapters import trainable
from lowvram.engine.attention import PADDED_ATTENTION, mask_for_window_only
from lowvram.engine.config import StepConfig
from lowvram.engine.model import skeleton
from lowvram.frozen import Frozen
from lowvram.memory.allocator import replay_allocated
from lowvram.memory.autocast import Bf16Autocast, keep_in_recomputation
from lowvram.memory.estimate import peak_of
from lowvram.memory.kernels import choose_kernels, cublas_bytes
from lowvram.memory.layers import trace_repeating
from lowvram.memory.load import record_weight
from lowvram.memory.recorder import Recorder
from lowvram.memory.run import label_gradients
from lowvram.memory.trace import ALLOC_ROUNDING, Backend, Capability, Trace
from lowvram.memory.weights import onto_meta, quantize_weight

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    Model = Any  # a PreTrainedModel or a PeftModel around one

_MAX_NORM = 1.0
_WARM_UP = "warm-up"


class PlainStep(Frozen):
    """One optimizer step by a hand-written loop or by transformers' Trainer: AdamW(foreach=True)."""

    method: Literal["full", "lora", "qlora"] = "lora"
    precision: Literal["bf16", "fp32"] = Field("bf16", description="of what is not quantised")
    autocast: bool = Field(False, description="forward and loss under torch.autocast to bf16")
    rank: int = Field(16, ge=1)
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    dropout: float = Field(0.0, ge=0, lt=1)
    batch: int = Field(1, ge=1)
    seq_len: int = Field(2048, ge=8)
    checkpointing: Literal["no", "reentrant", "non-reentrant"] = "no"
    attention: Literal["sdpa", "fa2", "eager"] = "sdpa"
    builds_mask: bool = Field(
        False, description="SDPA gets a [T, T] mask, as from transformers 4.5x without padding or a mask"
    )
    expands_kv: bool = Field(
        False,
        description="repeats K and V for all query heads, as Mistral in transformers 4.45 does",
    )
    norms_in_fp32: bool = Field(False, description="as prepare_model_for_kbit_training leaves them")
    loss: Literal["padded-labels", "shifted-logits", "fp32-head"] = Field(
        "padded-labels",
        description="transformers from 4.49, 4.46 to 4.48, and before: which copies of the logits exist",
    )
    keeps_outputs: bool = Field(False, description="the loop holds the logits until backward is over")
    keeps_gradients: bool = Field(False, description="zero_grad(set_to_none=False)")
    empties_cache: bool = Field(False, description="before the measured step, and resets the peak")
    clips: bool = Field(False, description="clip_grad_norm_ before the optimizer")
    more_inputs: int = Field(0, ge=0, description="[B, T] int64 tensors on the device besides the ids")


def plain_peak_bytes(
    config: PretrainedConfig, plain: PlainStep, backend: Backend = "cuda", capability: Capability = None
) -> int:
    """Peak of allocated bytes (torch.cuda.max_memory_allocated) of a steady step, before any margin.

    On CUDA with the blocks that the allocator does not split, and cuBLAS's workspaces.
    """
    trace = trace_plain(config, plain, backend, capability)
    if backend == "cpu":
        return peak_of(trace)[0]
    sizes = [a.n_bytes for a in trace.allocations]
    start = steady_start(trace) if plain.empties_cache else 0
    return replay_allocated(trace.events, sizes, start) + sum(cublas_bytes(capability))


def steady_start(trace: Trace) -> int:
    """The event at which the second step begins."""
    return next(a.born for a in trace.allocations if a.phase == "forward")


def trace_plain(
    config: PretrainedConfig, plain: PlainStep, backend: Backend = "cuda", capability: Capability = None
) -> Trace:
    """The whole model's trace: extended from a few layers where they repeat, else of every layer."""
    return trace_repeating(config, lambda c, _kept: trace_plain_layers(c, plain, backend, capability))


def trace_plain_layers(
    config: PretrainedConfig, plain: PlainStep, backend: Backend = "cuda", capability: Capability = None
) -> Trace:
    """Weights, the first step, in which the optimizer's state comes about, and a steady one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' deprecations
        model = plain_model(config, plain, backend, capability)
        recorder = PlainRecorder(backend, ALLOC_ROUNDING if backend == "cuda" else 1)
        recorder.watch(model, config.get_text_config().vocab_size)
        parameters = trainable(model)
        _record_weights(recorder, model)
        label_gradients(recorder, parameters)
        for name, parameter in parameters.items():
            recorder.own(parameter, name)
        optimizer = torch.optim.AdamW(parameters.values(), lr=1e-5, foreach=True)
        for phase in (_WARM_UP, "forward"):
            with recorder, recorder.during(phase):
                _run(recorder, model, optimizer, parameters, plain)
        recorder.stop()
    return recorder.trace


class PlainRecorder(Recorder):  # type: ignore[no-untyped-call]
    """Knows operators over lists, too: result i belongs to the owner of element i. The host costs nothing."""

    _elements: Iterator[torch.Tensor] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if not name.startswith("aten._foreach_"):
            result = super().__torch_dispatch__(func, types, args, kwargs)
            if name == "aten.zeros_like.default" and self.owner_of(args[0]):
                self.label(result, "optimizer_state")
                self.own(result, self.owner_of(args[0]))
            return result
        self._elements = iter(args[0])
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self._elements = None
        self.at("")
        return result

    def stop(self) -> None:
        """What is released from now on is no part of the step."""
        self._index_of.clear()

    def _record(self, tensor: torch.Tensor, op: str) -> None:
        if not tensor.is_meta:
            return
        if self._elements is not None:
            self.at(self.owner_of(next(self._elements)))
        super()._record(tensor, op)


def plain_model(
    config: PretrainedConfig, plain: PlainStep, backend: Backend, capability: Capability
) -> Model:
    """transformers' model with peft's own LoRA layers, whose float32 adapters cast activations up."""
    model: Model = skeleton(config, _as_step(plain))
    model.config.use_cache = False
    if plain.attention == "eager":
        model.set_attn_implementation("eager")
    elif plain.builds_mask:
        model.set_attn_implementation(PADDED_ATTENTION)
    _set_loss(model, plain)
    if plain.method != "full":
        model = _with_adapters(model, plain)
    else:
        model.requires_grad_(True)
    if plain.checkpointing != "no":
        _checkpoint(model, plain)
    onto_meta(model)
    choose_kernels(model, backend, capability)
    if plain.expands_kv:
        _expand_kv(model)
    return model.train()


def _expand_kv(model: Model) -> None:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    inner: Any = AttentionInterface()[base.config._attn_implementation]
    name = f"{base.config._attn_implementation}_expanded"

    def attention(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:  # [B, Hq, T, D], [B, Hkv, T, D] twice
        groups = module.num_key_value_groups
        return inner(module, query, repeat_kv(key, groups), repeat_kv(value, groups), *args, **kwargs)

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask_for_window_only)
    base.set_attn_implementation(name)


def _as_step(plain: PlainStep) -> StepConfig:
    """What `skeleton` looks at."""
    base: Any = "nf4" if plain.method == "qlora" else plain.precision
    return StepConfig(base_precision=base, compute_dtype=plain.precision)


def _with_adapters(model: Model, plain: PlainStep) -> PeftModel:
    import bitsandbytes as bnb

    if plain.norms_in_fp32:
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.data = parameter.data.float()
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=plain.rank,
        lora_alpha=plain.rank,
        lora_dropout=plain.dropout,
        target_modules=list(plain.targets),
    )
    peft_model = get_peft_model(model, config)
    for module in peft_model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            quantize_weight(module)
    return peft_model


def _checkpoint(model: Model, plain: PlainStep) -> None:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    reentrant = plain.checkpointing == "reentrant"
    base.activation_checkpointing_enable({"use_reentrant": reentrant})
    if plain.autocast:
        keep_in_recomputation(base)
    if reentrant and plain.method != "full":
        base.enable_input_require_grads()


def _set_loss(model: Model, plain: PlainStep) -> None:
    """The loss of older transformers, which copies the logits to leave out the last position."""
    if plain.loss == "fp32-head":
        model.lm_head.register_forward_hook(lambda _module, _args, logits: logits.float())
    if plain.loss != "padded-labels":
        model.loss_function = _shifted_loss


def _shifted_loss(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **_: Any) -> torch.Tensor:
    logits = logits.float()
    shifted = logits[..., :-1, :].contiguous()
    wanted = labels[..., 1:].contiguous()
    return nn.functional.cross_entropy(shifted.view(-1, vocab_size), wanted.view(-1))


def _record_weights(recorder: Recorder, model: Model) -> None:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    named = {base.get_output_embeddings().weight: "head", base.get_input_embeddings().weight: "embeddings"}
    for name, parameter in model.named_parameters():
        recorder.at(name)
        is_adapter = "lora_" in name
        record_weight(recorder, parameter, "adapters" if is_adapter else named.get(parameter, "base_weights"))
    for name, buffer in model.named_buffers():
        recorder.at(name)
        recorder.label(buffer, "base_weights")
    recorder.at("")


def _run(
    recorder: PlainRecorder,
    model: Model,
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
    plain: PlainStep,
) -> None:
    recorder.at("")
    ids = torch.empty((plain.batch, plain.seq_len), dtype=torch.int64, device="meta")
    kept = [torch.empty_like(ids) for _ in range(plain.more_inputs)]
    unseen = torch.ones_like(ids)  # else transformers looks into the ids' values for packed sequences
    recorder.exclude(unseen)
    loss, outputs = _forward(model, ids, unseen, plain)
    recorder.at("")
    with recorder.during(_named("backward", recorder)):
        loss.backward()  # type: ignore[no-untyped-call]
    recorder.at("")
    del loss, outputs
    if plain.clips:
        with recorder.during(_named("clip", recorder)):
            nn.utils.clip_grad_norm_(parameters.values(), _MAX_NORM)
    with recorder.during(_named("optimizer", recorder)):
        optimizer.step()
    optimizer.zero_grad(set_to_none=not plain.keeps_gradients)
    del kept


def _named(phase: str, recorder: Recorder) -> str:
    return _WARM_UP if recorder.phase == _WARM_UP else phase


def _forward(
    model: Model, ids: torch.Tensor, mask: torch.Tensor, plain: PlainStep
) -> tuple[torch.Tensor, Any]:
    with Bf16Autocast() if plain.autocast else nullcontext():
        outputs = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False)
        loss: torch.Tensor = outputs.loss
    return loss, outputs if plain.keeps_outputs else None
