"""Whether a merged model computes what its adapter does: both run on the same rows, weights streamed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F

from lowvram.engine.batch import Batch
from lowvram.engine.loss import logits_function
from lowvram.engine.source import ModelSource
from lowvram.errors import MergeError
from lowvram.export.layer_errors import LayerErrors
from lowvram.export.merged_tensors import BaseValues, MergedTensors
from lowvram.export.streamed_model import Read, Ticks, as_stored, streamed_model
from lowvram.export.tensor_changes import Rows
from lowvram.export.tensor_files import tensors_of_folder
from lowvram.frozen import Frozen

LOGITS_AT_ONCE = 1 << 24  # 64 MiB in float32, of which a comparison holds about five
# Rounding each weight of SmolLM2-135M once to bf16 changes its logits by 8 % of their size, ten eps: deep
# models pass errors on. Layers and copied tensors are checked far more sharply, one by one.
_EPSILONS = 40.0


class Comparison(Frozen):
    """A merged model against its adapter, in float32 on the same tokens."""

    adapter_loss: float
    merged_loss: float
    cosine: float  # of all logits of both
    max_error: float  # largest difference of two logits
    relative_error: float  # of all logits: norm of the difference over the adapter's norm around its mean
    allowed: float  # relative error that rounding the weights explains
    worst_layer: str = ""  # of the adapted linear ones
    worst_layer_error: float = 0.0  # of its output, over what its weights' sizes allow it to be

    @property
    def agrees(self) -> bool:
        return math.isfinite(self.relative_error) and self.relative_error <= self.allowed

    @property
    def loss_difference(self) -> float:
        return self.merged_loss - self.adapter_loss


class Lens:
    """A streamed model as the last hidden states of a batch's trained positions, and their logits."""

    def __init__(self, model: Any, device: torch.device) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.model, self._base, self.device = model, base, device
        self.vocabulary = int(base.config.get_text_config().vocab_size)
        self.logits_of = logits_function(base.get_output_embeddings(), base.config)

    @torch.no_grad()
    def hidden(self, batch: Batch) -> torch.Tensor:  # [N, H]
        given: dict[str, Any] = {"attention_mask": torch.ones_like(batch.input_ids)}
        if batch.source_ids is not None:
            encoder = self._base.get_encoder()
            encoded = encoder(input_ids=batch.source_ids, attention_mask=batch.source_mask)
            given = {
                "encoder_hidden_states": encoded.last_hidden_state,
                "encoder_attention_mask": batch.source_mask,
            }
        output = self._base.get_decoder()(input_ids=batch.input_ids, use_cache=False, **given)
        chosen: torch.Tensor = output.last_hidden_state.flatten(0, 1).index_select(0, batch.positions)
        return chosen


@torch.no_grad()
def loss_of(lens: Lens, batch: Batch) -> float:
    """Mean loss of a trained token."""
    batch = batch.to(lens.device)
    hidden, total = lens.hidden(batch), 0.0
    for rows in _chunks(lens, batch):
        logits = lens.logits_of(hidden[rows]).float()
        total += float(F.cross_entropy(logits, batch.targets[rows], reduction="sum"))
    return total / batch.trained_tokens


def _chunks(lens: Lens, batch: Batch) -> Iterator[slice]:
    """Trained positions whose logits exist at one time."""
    step = max(LOGITS_AT_ONCE // lens.vocabulary, 16)
    for start in range(0, batch.trained_tokens, step):
        yield slice(start, start + step)


@torch.no_grad()
def compared(adapter: Lens, merged: Lens, batch: Batch, allowed: float) -> Comparison:
    """Both models on the batch, logits a few rows at a time."""
    batch = batch.to(adapter.device)
    hidden = [lens.hidden(batch) for lens in (adapter, merged)]  # [N, H] twice
    sums = torch.zeros(7, dtype=torch.float64)  # losses, products, and what errors are measured by
    max_error = 0.0
    for rows in _chunks(adapter, batch):
        one, other = (
            lens.logits_of(h[rows]).float() for lens, h in zip((adapter, merged), hidden, strict=True)
        )
        losses = [F.cross_entropy(x, batch.targets[rows], reduction="sum") for x in (one, other)]
        centred = one - one.mean(-1, keepdim=True)
        parts = (*losses, (one * other).sum(), one.square().sum(), other.square().sum())
        parts = (*parts, (one - other).square().sum(), centred.square().sum())
        sums += torch.stack([part.double().cpu() for part in parts])
        max_error = max(max_error, float((one - other).abs().max()))
    return Comparison(
        adapter_loss=float(sums[0]) / batch.trained_tokens,
        merged_loss=float(sums[1]) / batch.trained_tokens,
        cosine=float(sums[2] / (sums[3] * sums[4]).sqrt()),
        max_error=max_error if math.isfinite(float(sums[5])) else math.nan,
        relative_error=float((sums[5] / sums[6]).sqrt()),
        allowed=allowed,
    )


def adapter_lens(
    tensors: MergedTensors, adapter: Path, device: torch.device, ticks: Ticks, onto: BaseValues | None = None
) -> Lens:
    """Base and adapter as plain peft runs them, unmerged.

    Args:
        onto: `values_as_trained` of the run, for the base that it was trained on.
    """
    read: Read = as_stored if onto is None else lambda name, stored: _whole(onto(name, stored))
    return Lens(streamed_model(tensors.source, device, adapter, read, ticks), device)


def merged_lens(source: ModelSource, device: torch.device, ticks: Ticks) -> Lens:
    """A merged folder."""
    return Lens(streamed_model(source, device, ticks=ticks), device)


def _whole(rows: Rows) -> torch.Tensor:
    return torch.cat([rows.rows(*span) for span in rows.spans()]) if rows.shape else rows.rows(0, 1)


def require_agreement(
    tensors: MergedTensors, adapter: Lens, merged: Lens, folder: Path, batch: Batch
) -> Comparison:
    """Compare what was written to `folder` with base and adapter, layer by layer and as a whole.

    Raises:
        MergeError: they differ by more than rounding explains.
    """
    _require_copies(tensors, folder)
    layers = LayerErrors(adapter.model, folder, adapter.device)
    found = compared(adapter, merged, batch, _allowed(tensors))
    layers.remove()
    name, error, explained = layers.worst()
    if not error <= explained:
        _refuse(
            f"'{name}' changes its layer's output by {error:.2%}, where rounding explains {explained:.2%}"
        )
    if not found.agrees:
        _refuse(
            f"its logits differ by {found.relative_error:.2%} of their size, where rounding explains "
            f"{found.allowed:.2%}; loss {found.merged_loss:.4f} against {found.adapter_loss:.4f}"
        )
    return found.model_copy(update={"worst_layer": name, "worst_layer_error": error})


def _require_copies(tensors: MergedTensors, folder: Path) -> None:
    """What the adapter does not change is in the folder bit for bit."""
    written = tensors_of_folder(folder)
    for name in tensors.copied:
        pieces = zip(tensors.pieces(name), written[name].spans(), strict=True)
        if not all(_same_bits(piece, written[name].rows(*span)) for piece, span in pieces):
            _refuse(f"'{name}' is no copy of the base's")


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Also of numbers that are none."""
    return one.shape == other.shape and torch.equal(
        one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    )


def _refuse(why: str) -> NoReturn:
    raise MergeError(
        f"The merged model does not compute what base and adapter do: {why}. It was removed.",
        "Merge again; if it happens twice, check disk and memory, and report it.",
    )


def _allowed(tensors: MergedTensors) -> float:
    """By the coarsest dtype that is written; float32 arithmetic itself differs by some 1e-5."""
    epsilon = max(torch.finfo(tensors.dtype(name)).eps for name in tensors.names if _is_float(tensors, name))
    return min(_EPSILONS * epsilon, 0.5) + 1e-3


def _is_float(tensors: MergedTensors, name: str) -> bool:
    return tensors.dtype(name).is_floating_point
