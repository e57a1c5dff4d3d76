"""Each memory lever's loss and gradients on this device, beside those of the plain step and of float32.

Rows have `gradient_error`, |g - exact| / |exact| over all adapters, and `gradient_limit`; outcome "differs"
where it is over. Random weights: what is compared are two ways to compute one function, lever by lever, and
the parts that only a GPU has: copies on a stream of their own, masks drawn again, the causal kernel whose
queries are the last ones. On a CPU the same code runs with fewer tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit
from gpu_check_model import config_of, full_batch, random_model
from gpu_check_rows import Row
from gpu_check_step import ALL_LINEAR, shape_of
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from lowvram.engine import adapters, lora
from lowvram.engine.adapter_start import adapter_parameters
from lowvram.engine.adapters import add_adapters, trainable
from lowvram.engine.batch import Batch
from lowvram.engine.config import ComputeDtype, Levers, StepConfig
from lowvram.engine.head import TiledHead
from lowvram.engine.host import Host
from lowvram.engine.liger import is_installed
from lowvram.engine.nf4 import nf4_values
from lowvram.engine.shelf import Shelf
from lowvram.engine.step import SummedLoss
from lowvram.engine.tile_attention import last_queries_attention

Emit = Callable[[Row], None]
Found = tuple[float, dict[str, torch.Tensor]]  # loss and gradients
NO_LEVERS = Levers(gradient_checkpointing=False, loss_chunk_tokens=8192)
FLOAT32_LIMIT = 1e-4  # two orders of summing 2,048 tokens differ by 1e-6 to 1e-5
SAME_MASK_LIMIT = 1e-4  # other masks are off by 80 %
SLOPE_LIMIT = 0.02  # float32's loss and the third derivative; other masks are off by 20 % and more
KINDS: dict[str, dict[str, Any]] = {"": {}, ", DoRA": {"use_dora": True}, ", LoRA-FA": {"freeze_a": True}}
MORE_THAN_PLAIN = 1.5  # of the plain bf16 step's own distance from float32


def parity_checks(emit: Emit, device: str) -> None:
    """All checks; one that fails does not hide the others."""
    checks: list[Callable[[Emit, torch.device], None]] = [
        _shelf,
        _last_queries,
        _dropout,
        partial(_levers, "fp32"),
    ]
    if device != "cpu":  # where bf16 may take ten times as long
        checks.append(partial(_levers, "bf16"))
    for check in checks:
        name = getattr(check, "func", check).__name__.strip("_")
        try:
            check(emit, torch.device(device))
        except Exception as error:  # a lever that breaks must not hide the others
            text = (str(error).strip().splitlines() or [""])[0][:200]
            emit(Row(check=name, outcome="failed", note=f"{type(error).__name__}: {text}"))


def lever_sets(tile_tokens: int) -> dict[str, Levers]:
    """What is compared with NO_LEVERS: each lever by itself, and all with each head."""
    tiles = {"gradient_checkpointing": True, "tile_tokens": tile_tokens}
    offload = {"gradient_checkpointing": True, "offload_checkpoints": True}
    everything = {**tiles, **offload, "loss_chunk_tokens": 64, "embedding_on_host": True}
    changes: dict[str, dict[str, Any]] = {
        "none": {},
        "gradient_checkpointing": {"gradient_checkpointing": True},
        "kept_layers": {"gradient_checkpointing": True, "kept_layers": 1},
        "loss_chunk_tokens": {"loss_chunk_tokens": 64},
        "tile_tokens": tiles,
        "offload_checkpoints": offload,
        "embedding_on_host": {"embedding_on_host": True},
        **{f"head={kind}": {"head": kind} for kind in ("streamed", "nf4", "int8")},
        **{f"all, head={kind}": {**everything, "head": kind} for kind in ("streamed", "nf4", "int8")},
    }
    if is_installed():
        changes["liger"] = {"liger": True}
    return {name: Levers(**{**NO_LEVERS.model_dump(), **change}) for name, change in changes.items()}


def parity_step(dtype: ComputeDtype, device: torch.device, **changes: Any) -> StepConfig:
    """NF4 under bf16, float32 weights under float32; the last tile is shorter than the others."""
    return StepConfig(
        base_precision="nf4" if dtype == "bf16" else "fp32",
        compute_dtype=dtype,
        target_modules=ALL_LINEAR,
        seq_len=2048 if device.type == "cuda" else 96,
        micro_batch=2,
        accumulation=1,
        **{"dropout": 0.0, "levers": NO_LEVERS, **changes},
    )


def tile_of(step: StepConfig) -> int:
    """Seven tiles, the last of them shorter."""
    return step.seq_len // 7 + 1


def _levers(dtype: ComputeDtype, emit: Emit, device: torch.device) -> None:
    """bf16 against float32 on the same numbers: a lever may add half of what bf16 costs the plain step."""
    plain, batch = parity_step(dtype, device), _batch(parity_step(dtype, device))
    references: dict[str, Found] = {}
    limit = FLOAT32_LIMIT
    for name, levers in lever_sets(tile_of(plain)).items():
        step = plain.model_copy(update={"levers": levers})
        model = _with_adapters(random_model(config_of("small"), step, device.type), step)
        found, kind = loss_and_gradients(model, step, batch), levers.head
        function = kind if kind in ("nf4", "int8") else "16bit"  # these two heads are other functions
        if function not in references:
            references[function] = _exact(plain, _read_head(model), batch, device)
        error = deviation(found[1], references[function][1])
        if name == "none" and dtype == "bf16":
            limit = MORE_THAN_PLAIN * error
        off = found[0] / references[function][0] - 1
        emit(compared(step, f"{name}, {dtype}", error, limit, loss_error=off))


def _exact(plain: StepConfig, head: torch.Tensor, batch: Batch, device: torch.device) -> Found:
    """The plain step in float32 on the numbers that the bf16 one reads, its head's too."""
    base: Any = random_model(config_of("small"), plain, device.type)
    for name, module in list(base.named_modules()):
        if isinstance(module, Linear4bit):
            linear = nn.Linear(module.in_features, module.out_features, bias=False, device=device)
            linear.weight = nn.Parameter(nf4_values(module).float(), requires_grad=False)
            base.set_submodule(name, linear)
    base.is_loaded_in_4bit = base.is_quantized = False
    base.lm_head.weight = nn.Parameter(head, requires_grad=False)
    step = plain.model_copy(update={"base_precision": "fp32", "compute_dtype": "fp32"})
    return loss_and_gradients(_with_adapters(base.float(), step), step, batch)


def _read_head(model: PeftModel) -> torch.Tensor:  # [V, H]
    head = model.get_base_model().get_output_embeddings()
    if isinstance(head, TiledHead):
        return torch.cat([tile.clone() for _, tile in head.tiles()])
    weight: torch.Tensor = head.weight
    return weight.detach().clone()


def _batch(step: StepConfig) -> Batch:
    torch.manual_seed(2)
    return full_batch(step, config_of("small").vocab_size)


def _with_adapters(base: PreTrainedModel, step: StepConfig) -> PeftModel:
    """The same for every model, B not zero; about a tenth of what the layer itself computes."""
    model, generator = add_adapters(base, step), torch.Generator().manual_seed(1)
    for name, parameter in sorted(adapter_parameters(model).items()):
        if parameter.dim() == 1:
            continue  # DoRA's magnitudes
        std = 0.02 if "lora_B" in name else parameter.shape[1] ** -0.5
        parameter.data.copy_(std * torch.randn(parameter.shape, generator=generator))
    return model.train()


def loss_and_gradients(model: PeftModel, step: StepConfig, batch: Batch) -> Found:
    """Of one micro-batch, its dropout drawn from one seed."""
    torch.manual_seed(7)
    device = next(model.parameters()).device
    loss = SummedLoss(model, step)(*batch.to(device).tensors) / batch.trained_tokens
    loss.backward()
    gradients = {}
    for name, parameter in trainable(model).items():
        assert parameter.grad is not None, f"{name} has no gradient"
        gradients[name], parameter.grad = parameter.grad, None
    return float(loss.detach()), gradients


def deviation(gradients: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """|g - exact| / |exact| over all adapters."""
    wrong = sum(float((gradients[name] - g).double().pow(2).sum()) for name, g in exact.items())
    whole = sum(float(g.double().pow(2).sum()) for g in exact.values())
    return float((wrong / whole) ** 0.5)


def compared(step: StepConfig, note: str, error: float, limit: float, loss_error: float | None = None) -> Row:
    """A row that says whether the error is within its limit."""
    row = Row(check="parity", model="small", note=note, gradient_error=error, gradient_limit=limit)
    outcome = "ran" if error <= limit else "differs"  # NaN differs
    return row.model_copy(update={"outcome": outcome, "loss_error": loss_error, **shape_of(step)})


def _dropout(emit: Emit, device: torch.device) -> None:
    """Masks that are drawn again against those that peft keeps; for those of tiles the loss's own slope."""
    step = parity_step("fp32", device, dropout=0.3)
    batch = _batch(step)
    for kind, change in KINDS.items():
        _drawn_again(emit, step.model_copy(update=change), f"dropout drawn again{kind}", batch, device)
    trial = step.model_copy(update={"levers": lever_sets(tile_of(step))["all, head=streamed"]})
    emit(compared(trial, "dropout in tiles, slope", slope_error(trial, device, batch), SLOPE_LIMIT))


def _drawn_again(emit: Emit, step: StepConfig, note: str, batch: Batch, device: torch.device) -> None:
    """Ours against peft's own layers, which keep torch's masks; with all activations kept, and recomputed."""
    with patch.object(adapters, "_formula", lambda _layer: None):
        kept = loss_and_gradients(_small(step, device), step, batch)[1]
    checkpointing = Levers(loss_chunk_tokens=8192)
    for name, levers in {"": NO_LEVERS, " under gradient_checkpointing": checkpointing}.items():
        trial = step.model_copy(update={"levers": levers})
        with patch.object(lora, "_redraws", lambda *_: True):
            found = loss_and_gradients(_small(trial, device), trial, batch)[1]
        emit(compared(trial, f"{note}{name}", deviation(found, kept), SAME_MASK_LIMIT))


def _small(step: StepConfig, device: torch.device) -> PeftModel:
    return _with_adapters(random_model(config_of("small"), step, device.type), step)


def slope_error(step: StepConfig, device: torch.device, batch: Batch) -> float:
    """|slope / |g| - 1| of the loss along its gradient g: had backward other masks, g were too long."""
    model = _small(step, device)
    with patch.object(lora, "_redraws", lambda *_: True):
        _, gradients = loss_and_gradients(model, step, batch)
        length = sum(float(g.pow(2).sum()) for g in gradients.values()) ** 0.5
        ends = []
        for at in (0.02, -0.04):  # the loss changes by 0.02: float32 knows that to 1e-4
            for name, parameter in trainable(model).items():
                parameter.data += at / length**2 * gradients[name]
            ends.append(loss_and_gradients(model, step, batch)[0])
    return abs((ends[0] - ends[1]) / 0.04 - 1)


def _last_queries(emit: Emit, device: torch.device) -> None:
    """Of t queries at the end of s keys, against float64 and beside SDPA with a mask tensor."""
    sizes = ((64, 320, 64), (333, 1000, 128), (2048, 16384, 128) if device.type == "cuda" else (32, 99, 32))
    for dtype in (torch.float32, torch.bfloat16):
        for length, seen, width in sizes:
            exact = _attention(_masked, length, seen, width, torch.float64, device)
            masked = deviation(_attention(_masked, length, seen, width, dtype, device), exact)
            ours = deviation(_attention(_causal, length, seen, width, dtype, device), exact)
            note = f"last {length} queries of {seen} keys, {width} wide, {str(dtype).removeprefix('torch.')}"
            limit = MORE_THAN_PLAIN * masked + 1e-6
            outcome = "ran" if ours <= limit else "differs"
            row = Row(check="parity", outcome=outcome, note=note)
            emit(row.model_copy(update={"gradient_error": ours, "gradient_limit": limit}))


Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return last_queries_attention(q, k, v, dropout_p=0.0, scale=None)


def _masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    length, seen = q.shape[2], k.shape[2]
    at = torch.arange(seen - length, seen, device=q.device)[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=at >= torch.arange(seen, device=q.device))


def _attention(
    attend: Attention, length: int, seen: int, width: int, dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    """Output and gradients of two heads, for numbers that bf16 holds exactly."""
    generator = torch.Generator().manual_seed(3)

    def drawn(tokens: int) -> torch.Tensor:
        made = torch.randn((1, 2, tokens, width), generator=generator).bfloat16()
        return made.to(device, dtype).requires_grad_()

    q, k, v = drawn(length), drawn(seen), drawn(seen)
    weight = drawn(length).detach()
    output = attend(q, k, v)
    gradients = torch.autograd.grad(output, (q, k, v), weight)
    return {name: t.detach() for name, t in zip("oqkv", (output, *gradients), strict=True)}


def _shelf(emit: Emit, device: torch.device) -> None:
    """Tensors that left and came back, while what was freed is overwritten and the copies are late."""
    wrong, host = 0, Host(device)
    shelf, n = Shelf(host), 24

    def number(index: int) -> torch.Tensor:
        return torch.full((1 << 20,), float(index), device=device)

    for index in range(n):
        _delay(host, device)
        shelf.put(index, number(index))
        number(-1)  # takes the block of a tensor that was freed too early
    for index in reversed(range(n)):
        _delay(host, device)
        found = shelf.get(index, *range(max(index - 1, 0), index))
        wrong += int((found != index).any())
        shelf.drop(index)
        number(-1)
    note = f"{n} tensors of 4 MiB kept on the host, {wrong} came back wrong"
    row = Row(check="parity", outcome="differs" if wrong else "ran", note=note)
    emit(row.model_copy(update={"gradient_error": wrong / n, "gradient_limit": 0.0}))


def _delay(host: Host, device: torch.device) -> None:
    """Some milliseconds during which the copy that comes next has not begun."""
    if device.type == "cuda":
        with torch.cuda.stream(host._stream):
            torch.cuda._sleep(10_000_000)  # type: ignore[no-untyped-call]
