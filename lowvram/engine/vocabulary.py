"""Places the two ends of the model, embedding and head, where the levers say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lowvram.engine.config import Levers, StepConfig
from lowvram.engine.head import StreamedHead, TiledHead, on_host, tiled_head
from lowvram.engine.host import Host
from lowvram.engine.loss import Head, WholeHead, logits_function, shaping_of
from lowvram.engine.tiled_loss import TiledLoss
from lowvram.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PLAIN = "Use --levers embedding_on_host=off,head=16bit."


class HostEmbedding(nn.Module):
    """An embedding whose table stays in host memory: looked up there, only the rows travel.

    The table is no submodule: nothing that moves the model takes it to the device, and the model's own
    `device` is that of its layers. A batch of 8 x 1,024 tokens of Qwen2-7B moves 59 MB, its table is 1.09 GB.
    """

    def __init__(self, table: nn.Module, host: Host) -> None:
        super().__init__()
        self._table: list[Any] = [table]
        self.host = host

    @property
    def weight(self) -> torch.Tensor:  # [V, H]
        weight: torch.Tensor = self._table[0].weight
        return weight

    def fill(self, weight: torch.Tensor) -> None:
        """Keep a copy of `weight` [V, H], and the table's own scale (Gemma) beside it."""
        table = self._table[0]
        table.weight = nn.Parameter(on_host(weight, self.host), requires_grad=False)
        for name, buffer in list(table.named_buffers()):
            setattr(table, name, buffer.to(table.weight.device))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # [B, T] -> [B, T, H]
        with self.host.at_work():
            rows = self._table[0](ids.to(self.weight.device))
        return self.host.to_device(rows)


def place_vocabulary(model: PreTrainedModel, step: StepConfig, host: Host) -> None:
    """Replace embedding and head of a 16-bit model, on the meta device as with weights.

    Raises:
        ConfigError: the model's embedding or head cannot be placed so.
    """
    levers = step.levers
    if levers.head == "16bit" and not levers.embedding_on_host:
        return
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    tied = head.weight is embedding.weight
    _require_possible(model, head, levers, tied)
    weights = {"embedding": embedding.weight.data}
    if not tied:
        weights["head"] = head.weight.data
    if levers.head != "16bit":
        model.set_output_embeddings(tiled_head(head, levers, host, tied=tied))
    if levers.embedding_on_host:
        model.set_input_embeddings(HostEmbedding(embedding, host))
    del head  # or an untied 16-bit weight would live on until the end
    fill_embedding(model, weights)
    fill_head(model, weights)


def fill_embedding(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """From `weights["embedding"]` on the device, taken out where nothing else reads it: so it is freed."""
    embedding = model.get_input_embeddings()
    if isinstance(embedding, HostEmbedding):
        embedding.fill(weights.pop("embedding") if "head" in weights else weights["embedding"])


def fill_head(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """From `weights["head"]`, or the embedding's where they are tied; a host copy serves both."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(head, TiledHead):
        return
    if isinstance(head, StreamedHead) and head.tied and isinstance(embedding, HostEmbedding):
        head.weight = embedding.weight.data  # not the Parameter, which the module would take for its own
    else:
        head.fill(weights["embedding" if head.tied else "head"])


def head_of(model: PreTrainedModel) -> Head:
    """The head as the loss takes it."""
    head: Any = model.get_output_embeddings()
    if isinstance(head, TiledHead):
        return TiledLoss(head, shaping_of(model.config))
    return WholeHead(logits_function(head, model.config))


def use_host(model: nn.Module, host: Host) -> None:
    """What is kept off the device is moved by `host` from now on."""
    for module in model.modules():
        if isinstance(module, (HostEmbedding, StreamedHead)):
            module.host = host


def without_vocabulary_levers(step: StepConfig) -> StepConfig:
    """The step whose model is as transformers loads it."""
    plain = {"embedding_on_host": False, "head": "16bit"}
    return step.model_copy(update={"levers": step.levers.model_copy(update=plain)})


def _require_possible(model: PreTrainedModel, head: Any, levers: Levers, tied: bool) -> None:
    kind = model.config.model_type
    if model.config.is_encoder_decoder:
        raise ConfigError(
            f"The levers embedding_on_host and head are for decoder-only models, not for '{kind}': its "
            "encoder and decoder share one embedding, and its head shrinks what it reads.",
            _PLAIN,
        )
    if tied and levers.head == "16bit":
        raise ConfigError(
            f"The embedding of this '{kind}' cannot stay on the host while its head is 16bit: both are one "
            "weight, and the head needs it on the device.",
            "Use --levers embedding_on_host=on,head=nf4 (or int8, or streamed).",
        )
    if levers.head != "16bit" and type(head) is not nn.Linear:
        raise ConfigError(
            f"The head of '{kind}' is a {type(head).__name__}, not a plain linear layer that could be "
            f"{levers.head}.",
            "Use --levers head=16bit.",
        )
