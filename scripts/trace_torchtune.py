"""torchtune's QLoRA step, traced: its recipe's loss step, models, NF4 weights and loss on the meta device.

    python scripts/trace_torchtune.py MODEL TOKENS...      within the environment that trace_others.py makes

Of torchtune run the model builders, set_trainable_params, set_activation_checkpointing, the single-device
recipe's own _loss_step, CEWithChunkedOutputLoss and scale_grads; of torchao NF4Tensor and LinearNF4, forward
and backward, whose dequantising is made of torch's operators. Written here are the few lines of the recipe's
train() between them, without accumulation. Of SDPA the trace sees FlashAttention-2, as a GPU would take.
The recipe's loading is left out: the weights are there. torch.compile is off, as in the recipe's file; with
it the loss would not keep the float32 softmax of every chunk, which is the most of what grows with tokens.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torchtune
from bench_context import RANK
from others_offload import offloading_on
from others_step import (
    ALPHA,
    AMPERE,
    OFFLOADING,
    AdamW,
    NoValues,
    StepRecorder,
    answer,
    begin,
    meta_ids,
)
from torch import nn
from torchtune import modules, training
from torchtune.models.llama3_1 import lora_llama3_1
from torchtune.models.llama3_1._position_embeddings import Llama3ScaledRoPE
from torchtune.models.qwen2 import lora_qwen2
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.modules.peft import get_adapter_params, set_trainable_params
from torchtune.training import _activation_offloading

from lowvram.memory.kernels import sdpa_of
from lowvram.memory.trace import Trace
from lowvram.memory.weights import onto_meta

if TYPE_CHECKING:
    from transformers import PretrainedConfig
LINEARS = ["q_proj", "k_proj", "v_proj", "output_proj"]


def trace_layers(config: PretrainedConfig, seq_len: int, option: str) -> Trace:
    """One steady step of every layer of `config`."""
    recorder = StepRecorder()
    with warnings.catch_warnings(), NoValues(), offloading_on(recorder, _activation_offloading):
        warnings.simplefilter("ignore")
        _trace(recorder, _model(config), config, seq_len, option)
    return recorder.trace


def _model(config: PretrainedConfig) -> Any:
    """As the recipe's _setup_model makes it."""
    shape = {
        "vocab_size": config.vocab_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "embed_dim": config.hidden_size,
        "intermediate_dim": config.intermediate_size,
        "max_seq_len": config.max_position_embeddings,
    }
    lora = {"apply_lora_to_mlp": True, "lora_rank": RANK, "lora_alpha": ALPHA, "quantize_base": True}
    build = {"llama": lora_llama3_1, "qwen2": lora_qwen2}[config.model_type]
    with training.set_default_dtype(torch.bfloat16), torch.device("meta"), _real_rope():
        model: Any = build(LINEARS, **shape, **lora)
    set_trainable_params(model, get_adapter_params(model))
    training.set_activation_checkpointing(model, auto_wrap_policy={modules.TransformerSelfAttentionLayer})
    onto_meta(model)
    for module in model.modules():
        if isinstance(module, modules.MultiHeadAttention):
            module._attention_call = partial(_flash, module._attention_call)
    return model


def _flash(attention: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    with sdpa_of("cuda", AMPERE):
        return attention(*args, **kwargs)


@contextmanager
def _real_rope() -> Iterator[None]:
    """Llama 3.1's rotary cache is made only from frequencies that have values."""
    own = Llama3ScaledRoPE.rope_init

    def on_cpu(rope: Llama3ScaledRoPE) -> None:
        with torch.device("cpu"):
            own(rope)

    Llama3ScaledRoPE.rope_init = on_cpu
    yield
    Llama3ScaledRoPE.rope_init = own


def _trace(recorder: StepRecorder, model: Any, config: PretrainedConfig, seq_len: int, option: str) -> None:
    recorder.watch(model, config.vocab_size)
    for module in model.modules():  # those that all layers share are the caller's, not layer 0's
        if isinstance(module, (type(model.layers[0].attn.pos_embeddings), nn.SiLU)):
            module._forward_pre_hooks.clear()
    _record_weights(recorder, model)
    begin(recorder)
    optimizer = AdamW(recorder, {n: p for n, p in model.named_parameters() if p.requires_grad})
    recipe = _recipe(model, option)
    recorder.label(recipe.ignore_labels_cache, "base_weights")
    with recorder, recorder.during("forward"):
        _step(recorder, recipe, optimizer, seq_len)
    recorder.let_go()


def _record_weights(recorder: StepRecorder, model: nn.Module) -> None:
    ends = {"tok_embeddings.weight": "embeddings", "output.weight": "head"}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        recorder.at(name)
        component = "adapters" if tensor.requires_grad else ends.get(name, "base_weights")
        inner = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else []
        for part in [getattr(tensor, attribute) for attribute in inner] or [tensor]:
            recorder.label(part, component)
    recorder.at("")


def _recipe(model: Any, option: str) -> Any:
    """What the recipe's _loss_step reads of the recipe."""
    loss = CEWithChunkedOutputLoss()
    model.set_num_output_chunks(loss.num_output_chunks)
    return SimpleNamespace(
        _model=model,
        _loss_fn=loss,
        activations_handling_ctx=training.get_act_offloading_ctx_manager(model, option == OFFLOADING),
        ignore_labels_cache=torch.full((1, 1), loss.ignore_index, device="meta"),
    )


def _step(recorder: StepRecorder, recipe: Any, optimizer: AdamW, seq_len: int) -> None:
    """A pass of the loop in the recipe's train()."""
    ids = meta_ids(seq_len)
    batch = {"tokens": ids, "labels": ids.clone()}
    num_tokens = (batch["labels"] != recipe._loss_fn.ignore_index).sum()
    loss = _recipe_class()._loss_step(recipe, batch) * num_tokens
    recorder.at("")
    with recorder.during("backward"):
        loss.backward()  # type: ignore[no-untyped-call]
    recorder.at("")
    training.scale_grads(recipe._model, 1 / num_tokens)
    optimizer.step(recorder)
    recipe._model.zero_grad(set_to_none=True)
    del loss, batch, ids


def _recipe_class() -> Any:
    """From its file: the folder of recipes refuses to be imported."""
    path = Path(torchtune.__file__).parent.parent / "recipes" / "lora_finetune_single_device.py"
    spec = importlib.util.spec_from_file_location("torchtune_recipe", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LoRAFinetuneRecipeSingleDevice


if __name__ == "__main__":
    answer(trace_layers)
