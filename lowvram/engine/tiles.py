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
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import nn

from lowvram.engine.batch import tile_bounds
from lowvram.engine.host import Host
from lowvram.engine.recompute import layers_of
from lowvram.engine.shelf import Shelf
from lowvram.engine.station import Tile, numbered_in, station_of, with_tensors
from lowvram.engine.structure import attention_modules, why_not_apart
from lowvram.engine.tile_attention import KeysAndValues, KeysKnown
from lowvram.errors import ConfigError

# Loss of a tile: (last hidden states [B, t, H], number of the tile) -> []
TileLoss = Callable[[torch.Tensor, int], torch.Tensor]
Fetch = Callable[[], torch.Tensor]  # -> [B, t, H]


class TiledDecoder:
    """A decoder-only model's layers, run by tiles.

    Raises:
        ConfigError: this model's cannot.

    Args:
        decoder: transformers' decoder, embedding to last norm; its adapters are in place.
        tile_tokens: of the sequence in one tile; 0 takes the whole sequence as one.
        host: where the layers' inputs are kept when `offloads`.
    """

    def __init__(self, decoder: Any, tile_tokens: int, host: Host, offloads: bool) -> None:
        if refusal := why_not_tiled(decoder):
            raise ConfigError(
                f"The layers of this model cannot be run by tiles: {refusal}.",
                "Leave tile_tokens and offload_checkpoints off.",
            )
        self._decoder, self.tile_tokens = decoder, tile_tokens
        self._host, self._offloads = host, offloads
        self._layers = layers_of(decoder)
        self._stations = [station_of(layer) for layer in self._layers]
        inside = {id(p) for layer in self._layers for p in layer.parameters()}
        self.ends = [p for p in decoder.parameters() if p.requires_grad and id(p) not in inside]
        self._attention = attention_modules(decoder)

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

    def tiles(self, input_ids: torch.Tensor, shelf: Shelf) -> list[Tile]:
        """[B, T] -> its tiles, and how transformers calls the layers for each.

        What is the same for all layers, such as RoPE's tables, goes on the shelf: kept on the device, 512
        bytes a token of Llama 8B would be an eighth of its keys and values.
        """
        tiles = []
        for index, (start, end) in enumerate(tile_bounds(input_ids.shape[1], self.tile_tokens)):
            calls: list[dict[str, Any]] = []
            tile = Tile(index, start, end, calls)
            with self._noting(calls):
                self._run(input_ids, tile)
            found: list[torch.Tensor] = []
            calls[:] = [{name: numbered_in(value, found) for name, value in call.items()} for call in calls]
            for number, tensor in enumerate(found):
                shelf.put((index, number), tensor)
            tiles.append(tile)
        return tiles

    def enter(self, input_ids: torch.Tensor, tile: Tile) -> torch.Tensor:  # [B, T] -> [B, t, H]
        """What the decoder does before its first layer, for one tile."""
        entered: list[torch.Tensor] = []
        hook = self._layers[0].register_forward_hook(lambda _module, _args, hidden: entered.append(hidden))
        try:
            with self._noting([]):
                self._run(input_ids, tile)
        finally:
            hook.remove()
        return entered[0].detach()

    def leave(self, input_ids: torch.Tensor, tile: Tile, hidden: torch.Tensor) -> torch.Tensor:
        """What the decoder does after its last layer, for one tile: [B, t, H] -> [B, t, H]."""
        with self._noting([]):
            self._stations[-1].answer = hidden
            try:
                output: torch.Tensor = self._run(input_ids, tile)
            finally:
                self._stations[-1].answer = None
        return output

    def _run(self, input_ids: torch.Tensor, tile: Tile) -> torch.Tensor:
        """The decoder's own forward on a tile's ids; its layers only note how they are called."""
        ids = input_ids[:, tile.start : tile.end]

        def with_positions(_module: nn.Module, args: Any, kwargs: Any) -> Any:
            positions = torch.arange(tile.start, tile.end, device=ids.device)[None]
            return args, {**kwargs, "position_ids": positions, "attention_mask": torch.ones_like(ids)}

        # in a hook: what is made there is the decoder's, and no layer's that ran before, to a trace as well
        hook = self._decoder.register_forward_pre_hook(with_positions, with_kwargs=True)
        try:
            hidden: torch.Tensor = self._decoder(input_ids=ids, use_cache=False).last_hidden_state
        finally:
            hook.remove()
        return hidden

    @contextmanager
    def _noting(self, calls: list[dict[str, Any]]) -> Iterator[None]:
        for station in self._stations:
            station.noted = calls
        try:
            yield
        finally:
            for station in self._stations:
                station.noted = None

    def run_layer(
        self,
        index: int,
        tile: Tile,
        hidden: Fetch,
        numbered: Callable[[int], torch.Tensor],
        cache: KeysAndValues,
    ) -> torch.Tensor:  # [B, t, H]
        """One layer's own forward on tensors that it fetches itself: to a trace too they are the layer's."""
        station = self._stations[index]
        arguments = {**tile.calls[index], station.cache_name: cache}

        def fetch(given: dict[str, Any]) -> dict[str, Any]:
            found = {name: with_tensors(value, numbered) for name, value in given.items()}
            return {**found, station.hidden_name: hidden()}

        cache.at(tile.start, tile.end)
        for module in self._attention:
            module.lowvram_tile = cache
        try:
            output = self._layers[index](**{station.hidden_name: fetch}, **arguments)
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


def why_not_tiled(decoder: Any) -> str:
    """What stands against running this model's layers by tiles; "" where nothing does."""
    if refusal := why_not_apart(decoder):
        return refusal
    caches = {"cache", "past_key_values"}
    if not all(caches & set(inspect.signature(type(m).forward).parameters) for m in layers_of(decoder)):
        return "its layers take no cache"
    return ""


class _Pass:
    """One micro-batch on its way through the layers and back."""

    def __init__(self, decoder: TiledDecoder, input_ids: torch.Tensor, loss_of: TileLoss) -> None:
        self._decoder, self._ids, self._loss_of = decoder, input_ids, loss_of
        self._hidden = decoder.shelf()  # (layer, tile) -> its input; the first layer's is looked up again
        self._gradients = decoder.shelf()  # tile -> of the current layer's output
        self._same = decoder.shelf()  # (tile, number) -> what all layers are called with
        self._tiles: list[Tile] = []
        self._of_ends: list[torch.Tensor] = []  # gradients of what trains behind the last layer
        self._keeps = torch.is_grad_enabled()
        seeded = decoder.is_random() and not input_ids.is_meta
        self._seed = int(torch.randint(1 << 62, ())) if seeded else None

    @torch.no_grad()
    def forward(self) -> torch.Tensor:
        self._tiles = self._decoder.tiles(self._ids, self._same)
        for layer in range(self._decoder.n_layers):
            self._forward_layer(layer)
        return self._losses()

    def _forward_layer(self, layer: int) -> None:
        cache = KeysAndValues(self._ids.shape[1])
        for tile in self._tiles:
            fetch = partial(self._input, layer, tile, tile.index + 1)
            output = self._run(layer, tile, fetch, tile.index + 1, cache)
            if not self._keeps:
                self._drop_input(layer, tile)
            self._hidden.put((layer + 1, tile.index), output)
            del output

    def _losses(self) -> torch.Tensor:
        """Sum over the tiles; with gradients on, those of the last layer's outputs replace the outputs."""
        total: torch.Tensor | None = None
        last = self._decoder.n_layers
        for tile in self._tiles:
            hidden = self._input(last, tile, tile.index + 1)
            self._drop_input(last, tile)
            with torch.set_grad_enabled(self._keeps):
                hidden = hidden.detach().requires_grad_(self._keeps)
                loss = self._loss_of(self._decoder.leave(self._ids, tile, hidden), tile.index)
            if self._keeps:
                gradient, *more = torch.autograd.grad(loss, (hidden, *self._decoder.ends))
                before = self._of_ends or [torch.zeros_like(one) for one in more]
                self._of_ends = [a.add_(b) for a, b in zip(before, more, strict=True)]
                self._gradients.put(tile.index, gradient)
                del gradient, more, before
            total = loss.detach() if total is None else total + loss.detach()
            del hidden, loss
        assert total is not None
        return total

    def backward(self, scale: torch.Tensor) -> None:
        """Gradients of all parameters, from the last layer to the first, times `scale`."""
        for parameter, gradient in zip(self._decoder.ends, self._of_ends, strict=True):
            torch.autograd.backward(parameter, gradient * scale)
        self._of_ends = []
        for layer in reversed(range(self._decoder.n_layers)):
            self._backward_layer(layer, scale if layer == self._decoder.n_layers - 1 else None)
        self._gradients.clear()
        self._same.clear()

    def _backward_layer(self, layer: int, scale: torch.Tensor | None) -> None:
        cache = KeysAndValues(self._ids.shape[1])
        if len(self._tiles) > 1:
            self._fill(layer, cache)
        cache.sums_gradients = len(self._tiles) > 1
        for tile in reversed(self._tiles):
            self._gradients.put(tile.index, self._backward_tile(layer, tile, scale, cache))

    @torch.no_grad()
    def _fill(self, layer: int, cache: KeysAndValues) -> None:
        """Keys and values of the whole sequence once more; each layer's forward ends where they are known."""
        cache.stops_when_known = True
        for tile in self._tiles:
            fetch = partial(self._input, layer, tile, tile.index + 1)
            with suppress(KeysKnown):
                self._run(layer, tile, fetch, tile.index + 1, cache)
        cache.stops_when_known = False

    @torch.enable_grad()
    def _backward_tile(
        self, layer: int, tile: Tile, scale: torch.Tensor | None, cache: KeysAndValues
    ) -> torch.Tensor:  # -> [B, t, H]
        """Adds to the parameters' gradients; returns that of the tile's input."""
        fetched: list[torch.Tensor] = []

        def fetch() -> torch.Tensor:
            hidden = self._input(layer, tile, tile.index - 1)
            self._drop_input(layer, tile)
            fetched.append(hidden.detach().requires_grad_())
            return fetched[0]

        output = self._run(layer, tile, fetch, tile.index - 1, cache)
        torch.autograd.backward(output, self._gradient(tile, scale))
        gradient = fetched[0].grad
        assert gradient is not None
        return gradient

    def _run(
        self, layer: int, tile: Tile, hidden: Fetch, following: int, cache: KeysAndValues
    ) -> torch.Tensor:  # [B, t, H]
        """A layer on a tile, with the random numbers of every time that it is run on it."""

        def same(number: int) -> torch.Tensor:
            soon = ((following, number),) if 0 <= following < len(self._tiles) else ()
            return self._same.get((tile.index, number), *soon)

        with self._random(layer, tile):
            return self._decoder.run_layer(layer, tile, hidden, same, cache)

    def _gradient(self, tile: Tile, scale: torch.Tensor | None) -> torch.Tensor:  # [B, t, H]
        """Of the tile's output, which is needed once."""
        gradient = self._gradients.get(tile.index, *range(max(tile.index - 1, 0), tile.index))
        self._gradients.drop(tile.index)
        if scale is not None:
            gradient.mul_(scale)  # in place: no layer allocates what the others do not
        return gradient

    def _input(self, layer: int, tile: Tile, following: int) -> torch.Tensor:  # [B, t, H]
        """Of a layer; `following` is the tile that is wanted next, where there is one."""
        if layer == 0:
            with self._random(-1, tile):  # GPT-2 drops here
                return self._decoder.enter(self._ids, tile)
        soon = ((layer, following),) if 0 <= following < len(self._tiles) else ()
        return self._hidden.get((layer, tile.index), *soon)

    def _drop_input(self, layer: int, tile: Tile) -> None:
        if layer > 0:
            self._hidden.drop((layer, tile.index))

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
