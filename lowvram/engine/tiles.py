"""Tiles: a decoder that takes a stretch of the sequence at a time through each layer, forward and backward.

Everything in a decoder layer but the keys and values belongs to one token. So a layer runs tile by tile, as
a chat model reads a long prompt: the tile's keys and values go into a buffer for the whole sequence, its
queries look at what is there so far. Backward goes the other way: the last tile first, each recomputed and
differentiated at once, with the gradients of keys and values summed up until the tile that made them comes.
On the device lie the keys, the values and their gradients of one layer, and a tile's activations; the
layers' inputs are kept there or on the host.

transformers' own layers run, called with a cache of ours (its public way to say where keys and values go)
and through an attention function of ours; no model's code is copied. Prior art for parts of this: Arctic
long sequence training (arXiv 2506.13996), Unsloth's offloaded checkpoints, FlashAttention's backward for
keys seen by many queries (arXiv 2307.08691).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lowvram.engine.batch import tile_bounds
from lowvram.engine.host import Host
from lowvram.engine.shelf import Shelf
from lowvram.engine.tile_attention import KeysAndValues, KeysKnown

# Loss of a tile: (last hidden states [B, t, H], number of the tile) -> []
TileLoss = Callable[[torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True)
class Tile:
    """Tokens `start` to `end` of every row, and how transformers calls each layer for them."""

    index: int
    start: int
    end: int
    calls: list[inspect.BoundArguments] = field(repr=False)


class _Station:
    """Stands before a layer's own forward: lets a call through, or notes it down and returns its input."""

    def __init__(self, layer: nn.Module) -> None:
        self._forward = layer.forward
        self._signature = inspect.signature(layer.forward)
        names = self._signature.parameters
        self.hidden_name = next(iter(names))
        self.cache_name = "cache" if "cache" in names else "past_key_values"
        self.noted: list[inspect.BoundArguments] | None = None
        self.answer: torch.Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.noted is None:
            return self._forward(*args, **kwargs)
        call = self._signature.bind(*args, **kwargs)
        hidden = call.arguments.pop(self.hidden_name)
        self.noted.append(call)
        return hidden if self.answer is None else self.answer


class TiledDecoder:
    """A decoder-only model's layers, run by tiles.

    Args:
        decoder: transformers' decoder, embedding to last norm; its adapters are in place.
        tile_tokens: of the sequence in one tile; 0 takes the whole sequence as one.
        host: where the layers' inputs are kept when `offloads`.
    """

    def __init__(self, decoder: Any, tile_tokens: int, host: Host, offloads: bool) -> None:
        self._decoder, self.tile_tokens = decoder, tile_tokens
        self._host, self._offloads = host, offloads
        self._layers = [m for m in decoder.modules() if isinstance(m, GradientCheckpointingLayer)]
        self._stations = [station_of(layer) for layer in self._layers]
        self._attention = [m for m in decoder.modules() if hasattr(m, "is_causal")]

    def summed_loss(self, input_ids: torch.Tensor, loss_of: TileLoss) -> torch.Tensor:
        """Sum of the tiles' losses; differentiable where gradients are on, once.

        Args:
            input_ids: [B, T]
            loss_of: of a tile's last hidden states.
        """
        if not torch.is_grad_enabled():
            return _Pass(self, input_ids, loss_of).forward()
        anchor = torch.zeros((), device=input_ids.device, requires_grad=True)  # parameters are reached inside
        loss: torch.Tensor = _TiledLoss.apply(anchor, _Pass(self, input_ids, loss_of))  # type: ignore[no-untyped-call]
        return loss

    def tiles(self, input_ids: torch.Tensor) -> Iterator[tuple[Tile, torch.Tensor]]:
        """Each tile with its input to the first layer [B, t, H]."""
        length = input_ids.shape[1]
        for index, (start, end) in enumerate(tile_bounds(length, self.tile_tokens)):
            calls: list[inspect.BoundArguments] = []
            with self._noting(calls):
                hidden = self._enter(input_ids, start, end)
            yield Tile(index, start, end, calls), hidden

    def leave(self, input_ids: torch.Tensor, tile: Tile, hidden: torch.Tensor) -> torch.Tensor:
        """What the decoder does after its last layer, for one tile: [B, t, H] -> [B, t, H]."""
        with self._noting([]):
            self._stations[-1].answer = hidden
            try:
                output: torch.Tensor = self._run(input_ids, tile.start, tile.end)
            finally:
                self._stations[-1].answer = None
        return output

    def _enter(self, input_ids: torch.Tensor, start: int, end: int) -> torch.Tensor:
        entered: list[torch.Tensor] = []
        hook = self._layers[0].register_forward_hook(lambda _module, _args, hidden: entered.append(hidden))
        try:
            self._run(input_ids, start, end)
        finally:
            hook.remove()
        return entered[0].detach()

    def _run(self, input_ids: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """The decoder's own forward on a tile's ids; its layers only note how they are called."""
        ids = input_ids[:, start:end]
        positions = torch.arange(start, end, device=ids.device)[None]
        mask = torch.ones_like(ids)
        output = self._decoder(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    @contextmanager
    def _noting(self, calls: list[inspect.BoundArguments]) -> Iterator[None]:
        for station in self._stations:
            station.noted = calls
        try:
            yield
        finally:
            for station in self._stations:
                station.noted = None

    def run_layer(
        self, index: int, tile: Tile, hidden: torch.Tensor, cache: KeysAndValues
    ) -> torch.Tensor:  # [B, t, H] -> [B, t, H]
        """One layer's own forward on one tile."""
        call, station = tile.calls[index], self._stations[index]
        arguments = {**call.arguments, **call.arguments.get("kwargs", {}), station.cache_name: cache}
        arguments.pop("kwargs", None)
        if "attention_mask" in arguments:
            arguments["attention_mask"] = None  # ours knows what a tile may see
        cache.at(tile.start, tile.end)
        for module in self._attention:
            module.lowvram_tile = cache
        try:
            output = self._layers[index](**{station.hidden_name: hidden}, **arguments)
        finally:
            for module in self._attention:
                module.lowvram_tile = None
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result

    @property
    def n_layers(self) -> int:
        return len(self._layers)

    def shelf(self) -> Shelf:
        return Shelf(self._host if self._offloads else None)

    def is_random(self) -> bool:
        """Whether a layer draws random numbers, which must be the same when it is computed again."""
        return any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in self._decoder.modules())


def station_of(layer: Any) -> _Station:
    """The layer's own: a second decoder over the same layers finds the first one's."""
    if not isinstance(layer.forward, _Station):
        layer.forward = _Station(layer)
    station: _Station = layer.forward
    return station


class _Pass:
    """One micro-batch on its way through the layers and back."""

    def __init__(self, decoder: TiledDecoder, input_ids: torch.Tensor, loss_of: TileLoss) -> None:
        self._decoder, self._ids, self._loss_of = decoder, input_ids, loss_of
        self._hidden = decoder.shelf()  # (layer, tile) -> its input
        self._gradients = decoder.shelf()  # tile -> of the current layer's output
        self._tiles: list[Tile] = []
        self._keeps = torch.is_grad_enabled()
        seeded = decoder.is_random() and not input_ids.is_meta
        self._seed = int(torch.randint(1 << 62, ())) if seeded else None

    @torch.no_grad()
    def forward(self) -> torch.Tensor:
        for tile, hidden in self._decoder.tiles(self._ids):
            self._tiles.append(tile)
            self._hidden.put((0, tile.index), hidden)
        for layer in range(self._decoder.n_layers):
            self._forward_layer(layer)
        return self._losses()

    def _forward_layer(self, layer: int) -> None:
        cache = KeysAndValues(self._ids.shape[1])
        for tile in self._tiles:
            hidden = self._hidden.get((layer, tile.index), *self._beside(layer, tile.index + 1))
            with self._random(layer, tile):
                output = self._decoder.run_layer(layer, tile, hidden, cache)
            if not self._keeps:
                self._hidden.drop((layer, tile.index))
            self._hidden.put((layer + 1, tile.index), output)
            del hidden, output

    def _losses(self) -> torch.Tensor:
        """Sum over the tiles; with gradients on, those of the last layer's outputs replace the outputs."""
        total: torch.Tensor | None = None
        last = self._decoder.n_layers
        for tile in self._tiles:
            hidden = self._hidden.get((last, tile.index), *self._beside(last, tile.index + 1))
            self._hidden.drop((last, tile.index))
            with torch.set_grad_enabled(self._keeps):
                hidden = hidden.detach().requires_grad_(self._keeps)
                loss = self._loss_of(self._decoder.leave(self._ids, tile, hidden), tile.index)
            if self._keeps:
                (gradient,) = torch.autograd.grad(loss, hidden)
                self._gradients.put(tile.index, gradient)
                del gradient
            total = loss.detach() if total is None else total + loss.detach()
            del hidden, loss
        assert total is not None
        return total

    def backward(self, scale: torch.Tensor) -> None:
        """Gradients of all parameters, from the last layer to the first, times `scale`."""
        for layer in reversed(range(self._decoder.n_layers)):
            self._backward_layer(layer, scale if layer == self._decoder.n_layers - 1 else None)
        self._gradients.clear()

    def _backward_layer(self, layer: int, scale: torch.Tensor | None) -> None:
        cache = KeysAndValues(self._ids.shape[1])
        if len(self._tiles) > 1:
            self._fill(layer, cache)
        cache.sums_gradients = len(self._tiles) > 1
        for tile in reversed(self._tiles):
            hidden = self._hidden.get((layer, tile.index), *self._beside(layer, tile.index - 1))
            self._hidden.drop((layer, tile.index))
            gradient = self._gradients.get(tile.index, *range(max(tile.index - 1, 0), tile.index))
            self._gradients.drop(tile.index)
            if scale is not None:
                gradient.mul_(scale)  # in place: no layer allocates what the others do not
            self._gradients.put(tile.index, self._backward_tile(layer, tile, hidden, gradient, cache))
            del hidden, gradient

    @torch.no_grad()
    def _fill(self, layer: int, cache: KeysAndValues) -> None:
        """Keys and values of the whole sequence once more; each layer's forward ends where they are known."""
        cache.stops_when_known = True
        for tile in self._tiles:
            hidden = self._hidden.get((layer, tile.index), *self._beside(layer, tile.index + 1))
            try:
                with self._random(layer, tile):
                    self._decoder.run_layer(layer, tile, hidden, cache)
            except KeysKnown:
                pass
            del hidden
        cache.stops_when_known = False

    @torch.enable_grad()
    def _backward_tile(
        self, layer: int, tile: Tile, hidden: torch.Tensor, gradient: torch.Tensor, cache: KeysAndValues
    ) -> torch.Tensor:  # [B, t, H] -> [B, t, H]
        hidden = hidden.detach().requires_grad_()
        with self._random(layer, tile):
            output = self._decoder.run_layer(layer, tile, hidden, cache)
        torch.autograd.backward(output, gradient)
        assert hidden.grad is not None
        return hidden.grad

    def _beside(self, layer: int, tile: int) -> tuple[tuple[int, int], ...]:
        """The tile that is wanted next, where there is one."""
        return ((layer, tile),) if 0 <= tile < len(self._tiles) else ()

    def _random(self, layer: int, tile: Tile) -> AbstractContextManager[None]:
        if self._seed is None:
            return nullcontext()
        return _seeded(hash((self._seed, layer, tile.index)) & (1 << 63) - 1, self._ids.device)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers from `seed`; those of everybody else go on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class _TiledLoss(torch.autograd.Function):
    """The pass as one function of autograd; the parameters' gradients are made inside its backward."""

    @staticmethod
    def forward(ctx: Any, _anchor: torch.Tensor, run: _Pass) -> torch.Tensor:  # [] -> []
        ctx.run = run
        return run.forward()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        run, ctx.run = ctx.run, None  # a second backward would find nothing
        run.backward(grad_outputs[0])
        return torch.zeros_like(grad_outputs[0]), None
