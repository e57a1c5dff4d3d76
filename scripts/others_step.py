"""What the traced steps of other projects have in common: recorder, missing values, optimizer, peaks."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from bench_context import CARDS_GIB, CONTEXT_BYTES, RANK
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lowvram.engine.config import StepConfig
from lowvram.engine.known_models import known_config
from lowvram.memory.allocator import replay_reserved
from lowvram.memory.estimate import peak_of
from lowvram.memory.kernels import cublas_bytes
from lowvram.memory.layers import trace_repeating
from lowvram.memory.plain import PlainRecorder
from lowvram.memory.recorder import Recorder
from lowvram.memory.rig import OptimizerTwin
from lowvram.memory.run import label_gradients
from lowvram.memory.trace import ALLOC_ROUNDING, Trace
from lowvram.units import GiB, MiB

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ALPHA = 2 * RANK  # which changes no byte
AMPERE = (8, 6)
DEFAULTS, OFFLOADING = OPTIONS = ("defaults", "activation_offloading")  # off by default in both projects
TraceLayers = Callable[[Any, int, str], Trace]  # (config, tokens, option): one step of every layer


class StepRecorder(PlainRecorder):
    """Leaves out wrappers, whose inner tensors are what has bytes, and what is really on the host."""

    def __init__(self) -> None:
        super().__init__("cuda", ALLOC_ROUNDING)

    def _record(self, tensor: torch.Tensor, op: str) -> None:
        if is_traceable_wrapper_subclass(tensor):
            return
        if isinstance(tensor, FakeTensor):  # of the optimizer's twins
            Recorder._record(self, tensor, op)
        else:
            super()._record(tensor, op)


class NoValues(TorchFunctionMode):
    """Answers what a step asks of tensors that have no values: each number is 1, each mask is full."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.item, torch.Tensor.__bool__) and args[0].is_meta:
            return func is torch.Tensor.__bool__ or 1
        if func is torch.Tensor.__getitem__ and _is_mask(args[1]):
            mask = args[1]
            found = torch.empty((mask.numel(), mask.dim()), dtype=torch.int64, device=mask.device)
            return args[0][found.unbind(1)]  # what torch does, too: nonzero, then an index for each dimension
        return func(*args, **(kwargs or {}))


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.is_meta and index.dtype == torch.bool


class AdamW(OptimizerTwin):
    """torch's fused AdamW, the default of both projects; its state is there before the step."""

    def __init__(self, recorder: StepRecorder, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__(parameters, StepConfig(optimizer="adamw"))
        label_gradients(recorder, parameters)
        for name, parameter in parameters.items():
            recorder.own(parameter, name)
        with recorder.during("optimizer"):
            self.record_state(recorder)


def begin(recorder: StepRecorder) -> None:
    """What a process holds from its first matrix product on."""
    for n_bytes in cublas_bytes(AMPERE):
        recorder.keep(n_bytes, "cublas workspace")


def meta_ids(seq_len: int) -> torch.Tensor:
    """One sequence of ids [1, T]."""
    return torch.empty((1, seq_len), dtype=torch.int64, device="meta")


def peak_bytes(
    config: PretrainedConfig, trace: Callable[[PretrainedConfig], Trace], option: str
) -> tuple[int, int]:
    """Peaks of allocated and of reserved bytes, by the allocator's default settings, before any margin.

    Offloading lets go of a layer's input five layers later, which a trace of four layers cannot show.
    """
    whole = (
        trace(config)
        if option == OFFLOADING
        else trace_repeating(config, lambda some_layers, _kept: trace(some_layers))
    )
    sizes = [a.n_bytes for a in whole.allocations]
    return peak_of(whole)[0], replay_reserved(whole.events, sizes)


def longest(reserved_bytes: Callable[[int], int], budget_bytes: int, most: int) -> int:
    """The most tokens within the budget, to 64 tokens or 1 %; 0 when not even 64 are.

    Bytes are nearly a line over tokens: between one length that fits and one that does not, the line's
    meeting with the budget is tried, a little before and a little beyond it by turns.
    """
    if reserved_bytes(most) <= budget_bytes:
        return most
    if reserved_bytes(64) > budget_bytes:
        return 0
    least, beyond, outward = 64, most, False
    while beyond - least > max(64, least // 100):
        slope = (reserved_bytes(beyond) - reserved_bytes(least)) / (beyond - least)
        meeting = least + (budget_bytes - reserved_bytes(least)) / slope
        tried = int(meeting * (1.004 if outward else 0.996)) // 64 * 64
        tried = min(max(tried, least + 64), (beyond - 1) // 64 * 64)
        fits = reserved_bytes(tried) <= budget_bytes
        least, beyond = (tried, beyond) if fits else (least, tried)
        outward = fits
    return least


def answer(trace_layers: TraceLayers) -> None:
    """The command line: peaks at given lengths, or without any the longest context of each card."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("tokens", type=int, nargs="*")
    parser.add_argument("--option", choices=OPTIONS, default=DEFAULTS)
    asked = parser.parse_args()
    known = known_config(asked.model)
    if known is None:
        parser.error(f"{asked.model} is not among lowvram's known models")
    config = known.get_text_config()

    def measure(n: int) -> tuple[int, int]:
        return peak_bytes(config, lambda c: trace_layers(c, n, asked.option), asked.option)

    for n in asked.tokens:
        allocated, reserved = measure(n)
        print(f"{n:>7} tokens: {allocated / MiB:9.1f} MiB allocated, {reserved / MiB:9.1f} MiB reserved")
    if not asked.tokens:
        _contexts(config, cache(lambda n: measure(n)[1]))


def _contexts(config: PretrainedConfig, reserved_bytes: Callable[[int], int]) -> None:
    """A line of JSON for each card."""
    for card_gib in CARDS_GIB:
        tokens = longest(reserved_bytes, card_gib * GiB - CONTEXT_BYTES, config.max_position_embeddings)
        print(json.dumps({"card_gib": card_gib, "traced_tokens": tokens}), flush=True)
