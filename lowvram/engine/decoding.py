"""Decoding: prompts are read a part at a time, then one token a row a step; what runs is what is traced."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lowvram.engine.attention import GENERATING_ATTENTION, register
from lowvram.engine.kv_cache import FixedLayer, kv_cache
from lowvram.engine.sampling import Sampler
from lowvram.errors import ConfigError

PREFILL_TOKENS = 1024  # of all rows in one pass: Qwen2-7B's MLP takes 0.12 GB for them, 0.9 GB for 8,192
_UNSEEN = 0  # stands for padding: attention never looks there


def prepare_for_decoding(model: Any) -> None:
    """Give the base model the attention that decodes: transformers' SDPA, or eager where it cannot be that.

    Raises:
        ConfigError: an encoder-decoder.
    """
    if model.config.is_encoder_decoder:
        raise ConfigError(
            f"lowvram answers with decoder-only models; '{model.config.model_type}' has an encoder.",
            "Load it in Python: peft's AutoPeftModelForSeq2SeqLM.from_pretrained(RUN/adapter).",
        )
    register()
    model.set_attn_implementation(GENERATING_ATTENTION if model._supports_sdpa else "eager")
    model.eval()


class Reader:
    """Rows of tokens that one model reads, with what it keeps of them."""

    def __init__(self, model: Any, n_rows: int, length: int, prompt_mask: torch.Tensor | None = None) -> None:
        """Nothing is read yet.

        Args:
            model: the base model, prepared, adapted or not.
            length: most tokens of a row, prompt and answer.
            prompt_mask: bool [B, P], False for padding on the left; None where no row has any.
        """
        self._model, self._n_rows = model, n_rows
        self.n_read = 0  # tokens of each row, padding included
        self.cache = kv_cache(model.config, length)
        self._mask = None if prompt_mask is None else _whole_mask(prompt_mask, length)
        knows = inspect.signature(model.forward).parameters
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in knows else {}
        self._takes_positions = "position_ids" in knows

    @property
    def can_rewind(self) -> bool:
        """Not where a layer keeps a window only: what left it is gone."""
        return all(isinstance(layer, FixedLayer) for layer in self.cache.layers)

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens of what was read whole."""
        assert length <= self.n_read
        for layer in self.cache.layers:
            layer.rewind(length)
        self.n_read = length

    def prefill(self, ids: torch.Tensor) -> torch.Tensor:  # [B, P] -> [B, V]
        """Logits behind the last token of each row."""
        at_once = max(PREFILL_TOKENS // self._n_rows, 1)
        for part in torch.split(ids, at_once, dim=1):
            logits = self._pass(part)
        return logits

    def step(self, tokens: torch.Tensor) -> torch.Tensor:  # [B] -> [B, V]
        """Logits behind one more token of each row."""
        return self._pass(tokens[:, None])

    def _pass(self, ids: torch.Tensor) -> torch.Tensor:  # [B, t] -> [B, V]
        start, end = self.n_read, self.n_read + ids.shape[1]
        given: dict[str, Any] = dict(self._options)
        if self._mask is not None:
            given["attention_mask"] = self._mask[:, :end]
            if self._takes_positions:
                given["position_ids"] = _positions(given["attention_mask"])[:, start:]
        output = self._model(input_ids=ids, cache=self.cache, use_cache=True, **given)
        self.n_read = end
        logits: torch.Tensor = output.logits[:, -1]
        return logits


def _whole_mask(prompt_mask: torch.Tensor, length: int) -> torch.Tensor:  # bool [B, P] -> [B, T]
    """Every token of an answer is seen."""
    mask = prompt_mask.new_ones((prompt_mask.shape[0], length))
    mask[:, : prompt_mask.shape[1]] = prompt_mask
    return mask


def _positions(mask: torch.Tensor) -> torch.Tensor:  # bool [B, T] -> int64 [B, T]
    """Of each row's first real token 0; padding's are never looked at."""
    return mask.cumsum(-1).sub_(1).clamp_(min=0)


def padded(
    prompts: Sequence[Sequence[int]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Ids [B, P] with padding on the left, and its mask, None where all are of one length."""
    length = max(map(len, prompts))
    rows = [[_UNSEEN] * (length - len(ids)) + list(ids) for ids in prompts]
    even = all(len(ids) == length for ids in prompts)
    mask = None if even else torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts]).bool()
    return torch.tensor(rows, device=device), None if mask is None else mask.to(device)


@torch.no_grad()
def decoded(
    model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampler: Sampler
) -> Iterator[torch.Tensor]:  # of [B]
    """The next token of each row, again and again, `max_new_tokens` times.

    Args:
        model: the base model, prepared, adapted or not.
        prompts: token ids of each row.
    """
    ids, mask = padded(prompts, model.device)
    reader = Reader(model, len(prompts), ids.shape[1] + max_new_tokens, mask)
    yield from _written(reader, ids, max_new_tokens, sampler)


def _written(
    reader: Reader, ids: torch.Tensor, max_new_tokens: int, sampler: Sampler
) -> Iterator[torch.Tensor]:  # of [B]
    logits = reader.prefill(ids)
    for n_more in reversed(range(max_new_tokens)):
        tokens = sampler(logits)
        yield tokens
        if n_more:
            logits = reader.step(tokens)


class Thread:
    """One conversation's keys and values, so that a prompt that goes on from it is read from there on only.

    Its buffers are of the whole context from the start, as planned.
    """

    def __init__(self, model: Any, context: int) -> None:
        self._model, self._context = model, context
        self._reader: Reader | None = None
        self._read: list[int] = []  # token ids; the reader knows how many of them were read whole
        self._voice = ""

    @torch.no_grad()
    def decoded(
        self, voice: str, prompt: Sequence[int], max_new_tokens: int, sampler: Sampler
    ) -> Iterator[torch.Tensor]:  # of [1]
        """As `decoded` of one prompt. `voice`: which adapter is on; another one's keys are of no use."""
        reader = self._reader_at_start_of(voice, prompt)
        self._read = list(prompt)
        ids = torch.tensor([list(prompt[reader.n_read :])], device=self._model.device)
        for tokens in _written(reader, ids, max_new_tokens, sampler):
            self._read.append(int(tokens))
            yield tokens

    def _reader_at_start_of(self, voice: str, prompt: Sequence[int]) -> Reader:
        """Rewound to what the prompt has in common with what was read; its last token is always read."""
        known = self._reader
        if known is None or not known.n_read or voice != self._voice or not known.can_rewind:
            self._reader = known = None  # before the next one is made
            self._reader, self._voice = Reader(self._model, 1, self._context), voice
            return self._reader
        pairs = zip(self._read[: known.n_read], prompt[:-1], strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(known.n_read, len(prompt) - 1))
        known.rewind(same)
        return known
