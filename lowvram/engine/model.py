"""The base model: its structure without weights (for the trace) and with weights (for training)."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lowvram.engine.attention import CAUSAL_ATTENTION, PADDED_ATTENTION, register
from lowvram.engine.config import QUANTIZED, BasePrecision, StepConfig
from lowvram.engine.host import Host
from lowvram.engine.int8_loading import Int8Config, replace_by_int8
from lowvram.engine.liger import apply_liger, require_liger
from lowvram.engine.linears import in_out_features, replace_linears, unquantized_modules
from lowvram.engine.nf4 import nf4_linear
from lowvram.engine.source import ModelSource
from lowvram.engine.structure import attention_modules
from lowvram.engine.vocabulary import place_vocabulary, without_vocabulary_levers
from lowvram.errors import ConfigError, first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_WHOLE = "Check that config.json and complete *.safetensors files of one model are there."
_TRAINABLE = "Use a model such as Llama, Qwen2, Qwen3, Mistral, Gemma, Phi-3, OPT, GPT-2 or T5."
_T5_TYPES = ("t5", "mt5", "umt5")  # encoder-decoders whose logits the loss knows how to make
NF4_BLOCK = 64  # weights that share one scale; bitsandbytes' default, the QLoRA paper's choice
NESTED_BLOCK = 256  # scales that share one second-level scale under double quantisation


def storage_dtype(base_precision: BasePrecision, compute_dtype: str) -> torch.dtype:
    """The dtype of what is not quantised: norms, embedding, head, and all weights of a 16-bit base."""
    return DTYPES[compute_dtype if base_precision in QUANTIZED else base_precision]


def skeleton(config: PretrainedConfig, step: StepConfig) -> PreTrainedModel:
    """The model on the meta device with quantised linears in place: every shape and dtype, but no weights.

    A config whose class is the model's own code was loaded with the user's --trust-remote-code; its model
    is then built from that code as well.

    Raises:
        ConfigError: transformers has no language model for this config, or lowvram cannot train it.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = _auto_class(config).from_config(
                copy.deepcopy(config),  # for it writes the attention's name into it
                dtype=storage_dtype(step.base_precision, step.compute_dtype),
                attn_implementation=register(),
                trust_remote_code=type(config).__module__.startswith("transformers_modules."),
            )
    except (ValueError, ImportError, KeyError, AttributeError, TypeError, AssertionError) as error:
        raise ConfigError(
            f"lowvram cannot build a language model of type '{config.model_type}': {first_line(error)}",
            _TRAINABLE,
        ) from error
    model.set_attn_implementation(attention_for(model))
    _untie_head(model)
    if step.base_precision == "nf4":
        _replace_by_nf4(model, step)
    elif step.base_precision == "int8":
        replace_by_int8(model, DTYPES[step.compute_dtype])
    with torch.device("meta"):  # host memory as well
        place_vocabulary(model, step, Host(torch.device("meta")))
    if step.levers.liger:
        apply_liger(model)
    return model


def _untie_head(model: PreTrainedModel) -> None:
    """FLAN-T5 and mT5 have a head of their own, which transformers finds only when it loads their weights."""
    config = model.config
    if config.is_encoder_decoder and not getattr(config, "scale_decoder_outputs", False):
        head: Any = model.get_output_embeddings()
        head.weight = nn.Parameter(torch.empty_like(head.weight), requires_grad=False)


def _auto_class(config: PretrainedConfig) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def attention_for(model: PreTrainedModel) -> str:
    """The attention that a model is trained with; one that would not obey ours is refused.

    transformers marks with these two attributes (no public ones exist) what goes through its attention
    interface (Bloom, XGLM, Falcon and Mamba do not: without a mask their tokens would see the future) and
    what SDPA computes. Gemma 2's soft cap and gpt-oss's sinks are not: they take transformers' own eager
    attention, of O(T^2) memory. BERT's attention goes through the interface but looks both ways.
    """
    directions = [module.is_causal for module in attention_modules(model)]
    if model.config.is_encoder_decoder and model.config.model_type in _T5_TYPES:
        return PADDED_ATTENTION
    causal = bool(directions) and all(directions) and not model.config.is_encoder_decoder
    if not causal or not model._supports_attention_backend:
        raise ConfigError(
            f"lowvram cannot train models of type '{model.config.model_type}': their attention is not the "
            "causal one that it computes without a mask.",
            _TRAINABLE,
        )
    return CAUSAL_ATTENTION if model._supports_sdpa else "eager"


def _replace_by_nf4(model: PreTrainedModel, step: StepConfig) -> None:
    """Every linear layer but the head becomes bitsandbytes' Linear4bit, as transformers does when loading."""

    def make(module: Any) -> Any:
        return nf4_linear(
            *in_out_features(module),
            bias=module.bias is not None,
            compute_dtype=DTYPES[step.compute_dtype],
            double_quantization=step.levers.double_quantization,
        )

    replace_linears(model, make)
    # peft reads these two marks, which transformers sets when it loads in 4 bits
    model.is_loaded_in_4bit = True
    model.is_quantized = True


def load(source: ModelSource, step: StepConfig, device: str) -> PreTrainedModel:
    """The model with its weights, quantised while loading, on `device`.

    Raises:
        ConfigError: weights are missing, pickled or do not match the config or the levers.
    """
    source.require_weights()
    if step.levers.liger:
        require_liger(source.config, torch.device(device).type)
    kwargs: dict[str, Any] = {
        "dtype": storage_dtype(step.base_precision, step.compute_dtype),
        "device_map": {"": device},
        "attn_implementation": register(),
        "trust_remote_code": source.trust_remote_code,
        "local_files_only": source.refusal is not None,  # cached weights; the hub's client would try in vain
        "use_safetensors": True,
    }
    if step.base_precision == "nf4":
        kwargs["quantization_config"] = _nf4_config(source, step)
    elif step.base_precision == "int8":
        kwargs["quantization_config"] = Int8Config(DTYPES[step.compute_dtype])
    try:
        model: PreTrainedModel
        kind = _auto_class(source.config)
        model, report = kind.from_pretrained(source.name, output_loading_info=True, **kwargs)
    except (OSError, ValueError, AssertionError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"The weights of '{source.name}' could not be loaded: {reason[0]}", _WHOLE
        ) from error
    _require_all_weights(source, report)
    model.set_attn_implementation(attention_for(model))
    model.config.use_cache = False
    if step.base_precision in QUANTIZED:
        _leave_files(model)
    # transformers loads to one device (its split over several adds hooks to every module), so embedding and
    # head are there in 16 bits first, at the end of loading, when the step's activations are not
    place_vocabulary(model, step, Host(torch.device(device)))
    if step.levers.liger:
        apply_liger(model)
    keep_nf4_layout(model)
    return model


def _leave_files(model: nn.Module) -> None:
    """Copy what still lies in a mapped weights file: one norm that does keeps the whole file in memory.

    SmolLM2-135M in 4 bits on a CPU: 257 MB of its file for 57 MB of embedding and norms.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.is_floating_point():
            parameter.data = parameter.data.clone()


def _require_all_weights(source: ModelSource, report: dict[str, Any]) -> None:
    """transformers fills what the files lack with random numbers; nobody wants to train on those."""
    wrong = {*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])}
    wrong -= {f"{name.removesuffix('weight')}scale" for name in wrong}  # int8's own, which no file has
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ConfigError(
            f"The weights of '{source.name}' lack {', '.join(sorted(wrong)[:3])}{more}, or hold them in "
            "another shape than config.json says.",
            _WHOLE,
        )


def _nf4_config(source: ModelSource, step: StepConfig) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=step.levers.double_quantization,
        bnb_4bit_compute_dtype=DTYPES[step.compute_dtype],
        llm_int8_skip_modules=unquantized_modules(skeleton(source.config, without_vocabulary_levers(step))),
    )


def keep_nf4_layout(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking weights on an evaluation pass.

    On a CPU with AVX512-BF16 its Linear4bit converts the weights in place to an inference-only layout the
    first time it runs outside training; the next backward would read them wrongly.
    """
    modules: Any = model.modules()
    for module in modules:
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
