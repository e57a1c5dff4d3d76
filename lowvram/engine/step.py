"""The step: the one function that is trained, traced for memory and timed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from lowvram.engine.adapters import trainable
from lowvram.engine.batch import Batch, tile_bounds, trained_by_tile
from lowvram.engine.config import StepConfig
from lowvram.engine.host import Host
from lowvram.engine.loss import summed_cross_entropy
from lowvram.engine.packing import PackedRow, require_packable
from lowvram.engine.recompute import keep_last
from lowvram.engine.tiles import TiledDecoder
from lowvram.engine.vocabulary import head_of, use_host


class SummedLoss(nn.Module):
    """A peft model as a function from a micro-batch to the summed loss of its trained tokens."""

    def __init__(self, model: PeftModel, step: StepConfig, host: Host | None = None) -> None:
        """`host`: where what a lever keeps off the device is; the memory trace brings its own."""
        super().__init__()
        self.model = model
        base = model.get_base_model()
        self._host = host or Host(next(model.parameters()).device)
        use_host(model, self._host)
        self._decoder = [base.get_decoder()]  # in lists: not registered a second time
        self._encoder = [base.get_encoder()] if base.config.is_encoder_decoder else []
        self._head = [head_of(base)]
        self._chunk_tokens = step.levers.loss_chunk_tokens
        self._tiles = _tiled(base.get_decoder(), step, self._host)
        keep_last(base, step.levers)
        if step.packing:
            require_packable(base.get_decoder())

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        targets: torch.Tensor,
        source_ids: torch.Tensor | None = None,
        source_mask: torch.Tensor | None = None,
        lengths: tuple[int, ...] | None = None,
    ) -> torch.Tensor:  # [B, T], [N], [N], [B, S], [B, S] -> []
        if self._tiles is not None:
            return self._tiled_loss(self._tiles, input_ids, positions, targets)
        given = self._encoded(source_ids, source_mask)
        if lengths is None:  # a given mask keeps transformers from looking for packed rows
            given["attention_mask"] = torch.ones_like(input_ids)
        else:
            given.update(PackedRow(lengths).arguments(input_ids.device))
        output = self._decoder[0](input_ids=input_ids, use_cache=False, **given)
        hidden = output.last_hidden_state.flatten(0, 1).index_select(0, positions)  # [N, H]
        return summed_cross_entropy(hidden, targets, self._head[0], self._chunk_tokens)

    def _tiled_loss(
        self, tiles: TiledDecoder, input_ids: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:  # [B, T], [N], [N] -> []
        batch_size, length = input_ids.shape
        trained = trained_by_tile(positions, targets, batch_size, tile_bounds(length, tiles.tile_tokens))

        def loss_of(hidden: torch.Tensor, tile: int) -> torch.Tensor:  # [B, t, H] -> []
            chosen, wanted = trained[tile]
            rows = hidden.flatten(0, 1).index_select(0, chosen)
            return summed_cross_entropy(rows, wanted, self._head[0], self._chunk_tokens)

        return tiles.summed_loss(input_ids, loss_of)

    def _encoded(
        self, ids: torch.Tensor | None, mask: torch.Tensor | None
    ) -> dict[str, Any]:  # [B, S] -> [B, S, H]
        """What a T5-type decoder reads of its source; nothing for a decoder-only model."""
        if ids is None:
            return {}
        hidden = self._encoder[0](input_ids=ids, attention_mask=mask).last_hidden_state
        return {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}


def _tiled(decoder: nn.Module, step: StepConfig, host: Host) -> TiledDecoder | None:
    levers = step.levers
    if not levers.tiles:
        return None
    return TiledDecoder(decoder, levers.tile_tokens, host, levers.offload_checkpoints)


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did."""

    loss: torch.Tensor  # [] mean over the step's trained tokens
    grad_norm: torch.Tensor  # [] before clipping
    trained_tokens: int


Backward = Callable[[torch.Tensor], None]
Clip = Callable[[Iterable[nn.Parameter], float], torch.Tensor]


def train_step(
    loss_of: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    *,
    max_grad_norm: float,
    backward: Backward = torch.Tensor.backward,
    clip: Clip = nn.utils.clip_grad_norm_,
    unsynced: Callable[[], AbstractContextManager[object]] = nullcontext,
    update: Callable[[], None] | None = None,
    empty_cache: bool = False,
) -> StepResult:
    """Forward and backward over all micro-batches, clip, update.

    Each token weighs the same however it is split into micro-batches: the summed losses are divided by the
    whole step's trained tokens (the fault of transformers before PR 34198 was to average averages).

    Args:
        batches: the step's micro-batches; each moves to the model's device when its turn comes.
        backward, clip: accelerate's versions while training.
        update: instead of `optimizer.step`.
        unsynced: context of all micro-batches but the last, under DDP `no_sync`.
        empty_cache: the lever of that name.
    """
    tokens = sum(batch.trained_tokens for batch in batches)
    parameters = trainable(loss_of).values()
    device = next(iter(parameters)).device
    total: torch.Tensor | None = None
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        with nullcontext() if last else unsynced():
            loss = loss_of(*batch.to(device).tensors, lengths=batch.lengths) / tokens
            backward(loss)
        total = loss.detach() if total is None else total + loss.detach()
        del loss
    assert total is not None, "a step needs at least one micro-batch"
    grad_norm = clip(parameters, max_grad_norm)
    (update or optimizer.step)()
    optimizer.zero_grad(set_to_none=True)
    if empty_cache and device.type == "cuda":
        torch.cuda.empty_cache()
    return StepResult(total, torch.as_tensor(grad_norm), tokens)


@torch.no_grad()
def evaluate_batch(loss_of: nn.Module, batch: Batch) -> torch.Tensor:
    """Summed loss of one micro-batch; the memory trace runs it too."""
    loss: torch.Tensor = loss_of(*batch.tensors, lengths=batch.lengths)
    return loss


def evaluate(loss_of: nn.Module, batches: Iterable[Batch], device: torch.device | str) -> float:
    """Mean loss per trained token, through the same chunked loss, without dropout."""
    was_training = loss_of.training
    loss_of.eval()
    total, tokens = 0.0, 0
    for batch in batches:
        total += float(evaluate_batch(loss_of, batch.to(device)))
        tokens += batch.trained_tokens
    loss_of.train(was_training)
    return total / max(tokens, 1)
