"""TRL's SFTTrainer step, traced: its own constructor, training_step and compute_loss on a meta model.

    python scripts/trace_trl.py MODEL TOKENS...      within the environment that trace_others.py makes

Of TRL run SFTTrainer.__init__ (get_peft_model, enable_input_require_grads, adapters cast to bf16, the fused
LM head), training_step, compute_loss, the patched forward, ChunkedLogProbFunction, forward and backward, and
OffloadActivations where asked; of accelerate prepare_model's cast of outputs; of transformers
Trainer.training_step and _clip_grad_norm; of peft and bitsandbytes all modules. What meta tensors cannot do
is replaced by what a GPU would allocate: nothing for Triton kernels and addmm(out=), FlashAttention-2 for
SDPA, lowvram's autocast. Not counted: temporaries inside masked_scatter and index_put.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
import trl.trainer.utils
from bench_context import RANK
from datasets import Dataset
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
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import BitsAndBytesConfig, PreTrainedTokenizerFast
from transformers.quantizers import AutoHfQuantizer
from trl import SFTConfig, SFTTrainer
from trl.kernels import chunked_logprob
from trl.models import activation_offloading

from lowvram.engine.adapters import trainable
from lowvram.engine.config import StepConfig
from lowvram.engine.model import skeleton
from lowvram.memory.autocast import Bf16Autocast, keep_in_recomputation
from lowvram.memory.load import record_loading
from lowvram.memory.trace import Trace
from lowvram.memory.weights import make_traceable

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def trace_layers(config: PretrainedConfig, seq_len: int, option: str) -> Trace:
    """Loading and one steady step of every layer of `config`."""
    recorder = StepRecorder()
    with (
        warnings.catch_warnings(),
        tempfile.TemporaryDirectory() as folder,
        _on_gpu(),
        offloading_on(recorder, activation_offloading),
    ):
        warnings.simplefilter("ignore")
        trainer = _trainer(config, folder, option)
        _trace(recorder, trainer, config, seq_len)
    return recorder.trace


def _trainer(config: PretrainedConfig, folder: str, option: str) -> SFTTrainer:
    """As a user makes one for QLoRA, over a model that is on the meta device."""
    arguments = SFTConfig(
        output_dir=folder,
        report_to=[],
        use_cpu=True,  # as which the constructor may run here
        per_device_train_batch_size=1,
        dataset_kwargs={"skip_prepare_dataset": True},
        activation_offloading=option == OFFLOADING,
    )
    arguments.__dict__["_setup_devices"] = torch.device("meta")  # the cached answer to "which device"
    model: Any = skeleton(config, StepConfig(base_precision="nf4", compute_dtype="bf16"))
    model.config.use_cache = False
    model.hf_quantizer = AutoHfQuantizer.from_config(
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    )
    lora = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": [[0, 1]], "labels": [[0, 1]]}),
        processing_class=_tokenizer(),
        peft_config=lora,
    )
    _as_trained(trainer)
    return trainer


def _tokenizer() -> PreTrainedTokenizerFast:
    words = models.WordLevel({"a": 0, "b": 1}, unk_token="a")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="b", pad_token="b")


def _as_trained(trainer: SFTTrainer) -> None:
    """What Trainer.train does to the model before its first step, and quantised weights."""
    model = trainer.model
    model.activation_checkpointing_enable(trainer.args.activation_checkpointing_kwargs)
    keep_in_recomputation(model.get_base_model())
    make_traceable(model, "cuda", AMPERE)
    model.forward = partial(_autocast, model.forward)
    trainer.accelerator.prepare_model(model, device_placement=False)
    if trainer.args.activation_offloading:
        trainer.maybe_activation_offload_context.update_model_params(model)  # which are other tensors now


def _autocast(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """accelerate's is torch.autocast, which leaves meta tensors alone."""
    with Bf16Autocast():
        return forward(*args, **kwargs)


def _trace(recorder: StepRecorder, trainer: SFTTrainer, config: PretrainedConfig, seq_len: int) -> None:
    recorder.watch(trainer.model, config.get_text_config().vocab_size)
    record_loading(recorder, trainer.model, "cuda")
    begin(recorder)
    optimizer = AdamW(recorder, trainable(trainer.model))
    trainer.accelerator.backward = partial(_backward, recorder)
    with recorder, recorder.during("forward"):
        ids = meta_ids(seq_len)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        loss = trainer.training_step(trainer.model, inputs, inputs["labels"].sum())
        recorder.at("")
        with recorder.during("clip"):
            trainer._clip_grad_norm(trainer.model)
        optimizer.step(recorder)
        trainer.model.zero_grad()
        del loss, inputs, ids
    recorder.let_go()


def _backward(recorder: StepRecorder, loss: torch.Tensor) -> None:
    """accelerate's, of a loss that it need not scale."""
    with recorder.during("backward"):
        recorder.at("")
        loss.backward()  # type: ignore[no-untyped-call]


class _Launch:
    """A Triton kernel: writes into what is there."""

    def __getitem__(self, _grid: Any) -> Any:
        return lambda *_args, **_kwargs: None


@contextmanager
def _on_gpu() -> Iterator[None]:
    """TRL's loss takes the way that it takes on a GPU."""
    chunked: Any = chunked_logprob
    chunked.triton = SimpleNamespace(cdiv=lambda a, b: -(-a // b))
    chunked._forward_kernel = chunked._backward_kernel = _Launch()
    chunked._addmm_fp32 = lambda _sum, _a, _b: None  # on a GPU into an output that is there
    chunked._use_triton = trl.trainer.utils._use_triton = lambda _device: True
    own = torch.is_autocast_enabled  # which does not know "meta"
    with (
        patch.object(torch, "is_autocast_enabled", lambda _kind="cuda": own("cuda")),
        patch.object(torch, "get_autocast_dtype", lambda _kind: torch.bfloat16),
        NoValues(),
    ):
        yield


if __name__ == "__main__":
    answer(trace_layers)
