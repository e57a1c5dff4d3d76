"""What check_liger.py runs where Liger is: loss, gradients and traced bytes, with the lever and without."""

from __future__ import annotations

import gc
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import liger_kernel.ops.geglu
import liger_kernel.ops.rms_norm
import numpy as np
import torch
import triton.language as tl
from transformers import AutoConfig, AutoModelForCausalLM
from triton.runtime import interpreter

from lowvram.data.tokens import Example
from lowvram.engine.adapters import add_adapters, trainable
from lowvram.engine.attention import register
from lowvram.engine.batch import Batch, collate
from lowvram.engine.config import Levers, StepConfig
from lowvram.engine.liger import GATES, apply_liger
from lowvram.engine.model import attention_for, load
from lowvram.engine.source import ModelSource
from lowvram.engine.step import SummedLoss
from lowvram.engine.tiles import why_not_tiled
from lowvram.memory.estimate import peak_of
from lowvram.memory.profiled import executed_step_bytes
from lowvram.memory.run import trace_step

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
WIDER = {**SHAPE, "hidden_size": 128, "intermediate_size": 320}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FUSED_TARGETS = {"phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")}
MOST_LOSS, MOST_GRADIENT = 1e-6, 1e-4  # relative, float32
MOST_UNDER, MOST_OVER = -0.005, 0.01  # of tests/test_memory.py
PARTS = ({"gradient_checkpointing": False}, {}, {"tile_tokens": 5})
HELD = {"base_weights", "embeddings", "head", "adapters", "optimizer_state"}


def teach_the_interpreter() -> None:
    """Three things that Triton's compiler does and its interpreter (3.9) does not.

    Scalars come as float32 and not as Python's floats; functions of the device's library exist; a launch
    keeps nothing alive (its closures are cycles, which hold every tensor until Python collects them).
    """
    own_conversion, own_launch = interpreter._implicit_cvt, interpreter.GridExecutor.__call__

    def conversion(value: Any) -> Any:
        if not isinstance(value, float):
            return own_conversion(value)
        return tl.tensor(interpreter.TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        own_launch(self, *args, **kwargs)
        del args, kwargs
        gc.collect()

    interpreter._implicit_cvt, interpreter.GridExecutor.__call__ = conversion, launch
    liger_kernel.ops.rms_norm.rsqrt = lambda x: tl.math.rsqrt(x)
    liger_kernel.ops.geglu.tanh = lambda x: 2 * tl.sigmoid(2 * x) - 1


def config_of(kind: str, shape: dict[str, Any]) -> Any:
    own_width = {} if kind in ("llama", "mistral", "phi3", "qwen2") else {"head_dim": 8}
    return AutoConfig.for_model(kind, **shape, **own_width)


def step_of(kind: str, changes: dict[str, Any], liger: bool) -> StepConfig:
    """Small, in float32; `changes` are levers."""
    return StepConfig(
        base_precision="fp32",
        compute_dtype="fp32",
        rank=4,
        dropout=0.0,
        seq_len=128,
        accumulation=1,
        target_modules=FUSED_TARGETS.get(kind, TARGETS),
        levers=Levers(liger=liger, loss_chunk_tokens=16, **changes),
    )


def adapted(kind: str, step: StepConfig) -> Any:
    """The same random model each time, large enough in its weights that every layer shows in the loss."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config_of(kind, SHAPE), attn_implementation=register())
    base.set_attn_implementation(attention_for(base))
    for parameter in base.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2 + (parameter.dim() == 1)
    if step.levers.liger:
        apply_liger(base)
    model = add_adapters(base, step).train()
    for parameter in trainable(model).values():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def loss_and_gradients(kind: str, step: StepConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = adapted(kind, step)
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(2, 97, (n,), generator=generator).tolist() for n in (9, 5)]
    batch = collate([Example(tuple(row), (0, 0) + (1,) * (len(row) - 2), "random") for row in ids], 0)
    loss = SummedLoss(model, step)(*batch.tensors)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in trainable(model).items()}


def equals(kind: str, changes: dict[str, Any]) -> bool:
    if changes.get("tile_tokens") and why_not_tiled(adapted(kind, step_of(kind, {}, False)).get_decoder()):
        return True  # Gemma 2
    loss, gradients = loss_and_gradients(kind, step_of(kind, changes, False))
    other_loss, others = loss_and_gradients(kind, step_of(kind, changes, True))
    of_loss = abs(float(other_loss / loss - 1))
    of_gradient = max(float((others[n] - g).norm() / g.norm()) for n, g in gradients.items())
    good = of_loss < MOST_LOSS and of_gradient < MOST_GRADIENT
    print(
        f"{kind:12} {changes!s:34} loss {of_loss:.1e}, worst gradient {of_gradient:.1e}{_bad(good)}",
        flush=True,
    )
    return good


def executed_bytes(source: ModelSource, step: StepConfig) -> int:
    """Peak of what the step allocates beyond weights and optimizer state."""
    positions, ids = torch.arange(step.seq_len - 1), torch.randint(2, 97, (1, step.seq_len))
    model = add_adapters(load(source, step, "cpu"), step).train()
    return executed_step_bytes(model, step, lambda: [Batch(ids.clone(), positions, ids[0, 1:].clone())])


def traced_equals_executed(kind: str, changes: dict[str, Any], liger: bool) -> bool:
    step = step_of(kind, changes, liger)
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config_of(kind, WIDER)).save_pretrained(folder)
        source = ModelSource(folder)
        trace = trace_step(source.config, step, "cpu")
        held = sum(a.n_bytes for a in trace.allocations if a.component in HELD)
        traced, executed = peak_of(trace)[0], held + executed_bytes(source, step)
    error = traced / executed - 1
    good = MOST_UNDER < error < MOST_OVER
    row = f"{kind:12} {changes!s:34} liger {'on ' if liger else 'off'}"
    print(f"{row} traced {traced:,}, executed {executed:,} bytes, {error:+.4%}{_bad(good)}", flush=True)
    return good


def _bad(good: bool) -> str:
    return "" if good else "  <- WRONG"


def main() -> int:
    teach_the_interpreter()
    gc.freeze()  # what is there stays: each collection looks at the step's own objects only
    checks: list[Callable[[], bool]] = [lambda k=k, c=c: equals(k, c) for k in GATES for c in PARTS]
    for kind in ("llama", "phi3", "gemma3_text"):
        for changes in PARTS:
            levers = {**changes, "tile_tokens": 48} if changes.get("tile_tokens") else changes
            checks += [
                lambda k=kind, c=levers, on=on: traced_equals_executed(k, c, on) for on in (False, True)
            ]
    failed = [check for check in checks if not check()]
    gc.unfreeze()  # or Triton would report at the end what is not collected
    print(f"{len(checks) - len(failed)} of {len(checks)} comparisons hold")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
