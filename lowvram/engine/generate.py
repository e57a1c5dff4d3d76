"""Answers: what a model writes to prompts, batched or as a stream of text, up to a stop token or a limit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field

from lowvram.data.conversations import Message
from lowvram.data.prompting import prompt_ids, stop_ids
from lowvram.engine.decoding import Thread, decoded, prepare_for_decoding
from lowvram.engine.sampling import Sampler, Sampling
from lowvram.frozen import Frozen

_CUT = "\ufffd"  # what a tokenizer writes for a character whose other bytes are still to come


class Answer(Frozen):
    """What the model wrote, without its stop token, and whether it wrote one."""

    text: str
    stopped: bool
    n_tokens: int = Field(0, description="written, the stop token included")


@dataclass(frozen=True)
class Answers:
    """A model that answers, with its tokenizer.

    Of the model's generation_config only the stop tokens count; how to sample is what the caller says.
    """

    model: Any  # the base model, prepared (decoding.prepare_for_decoding), adapted or not
    tokenizer: Any
    stops: frozenset[int]

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> Answers:
        """`model` is prepared here.

        Raises:
            ConfigError: an encoder-decoder.
        """
        prepare_for_decoding(model)
        return cls(model, tokenizer, frozenset(_stops(model, tokenizer)))

    def to(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008  # frozen
        rows: Sequence[int] | None = None,
    ) -> list[Answer]:
        """One answer to each prompt, in one batch.

        Args:
            prompts: token ids of each.
            rows: each prompt's number among all that are asked with this seed; None: from 0 on.
        """
        written: list[list[int]] = [[] for _ in prompts]
        sampler = self._sampler(sampling, range(len(prompts)) if rows is None else rows)
        for tokens in decoded(self.model, prompts, max_new_tokens, sampler):
            for row, token in zip(written, tokens.tolist(), strict=True):
                if not self._ended(row):
                    row.append(token)
            if all(map(self._ended, written)):
                break
        return [self._answer(row) for row in written]

    def stream(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
        row: int = 0,
        thread: tuple[Thread, str] | None = None,
    ) -> AnswerStream:
        """The answer to one prompt while it is written.

        Args:
            thread: the conversation that the prompt goes on with, and the name of the adapter that is on.
        """
        sampler = self._sampler(sampling, [row])
        if thread is None:
            return AnswerStream(self, decoded(self.model, [prompt], max_new_tokens, sampler))
        kept, voice = thread
        return AnswerStream(self, kept.decoded(voice, prompt, max_new_tokens, sampler))

    def _sampler(self, sampling: Sampling, rows: Sequence[int]) -> Sampler:
        return Sampler(sampling, rows, self.model.device)

    def _ended(self, row: list[int]) -> bool:
        return bool(row) and row[-1] in self.stops

    def _answer(self, row: list[int]) -> Answer:
        return Answer(text=self.text(row), stopped=self._ended(row), n_tokens=len(row))

    def text(self, row: list[int]) -> str:
        """Without control tokens, and with all spaces that were written: a longer text then begins the same.

        A stop token need not be a control token: it is left out by its number.
        """
        shown = row[:-1] if self._ended(row) else row
        return str(self.tokenizer.decode(shown, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class AnswerStream:
    """Pieces of an answer's text as they are written; `answer` is what there is of it so far."""

    def __init__(self, answers: Answers, steps: Iterator[torch.Tensor]) -> None:
        self._answers, self._steps = answers, steps
        self._row: list[int] = []

    def __iter__(self) -> Iterator[str]:
        sent = ""
        for tokens in self._steps:
            self._row.append(int(tokens))
            text = self._answers.text(self._row)
            if not text.endswith(_CUT) and len(text) > len(sent):
                yield text[len(sent) :]
                sent = text
            if self.answer.stopped:
                break
        if rest := self._answers.text(self._row)[len(sent) :]:
            yield rest

    @property
    def answer(self) -> Answer:
        return self._answers._answer(self._row)


def greedy_answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int
) -> list[Answer]:
    """The most likely answer of a peft model in training to each prompt, of at most `max_new_tokens`.

    Prompts run one by one, so that no memory is asked for beside one row's; afterwards the model trains on.
    """
    base = model.get_base_model()
    was_training, trained_with = model.training, base.config._attn_implementation
    answers = Answers.of(base, tokenizer)
    asked = [prompt_ids([Message(role="user", content=prompt)], tokenizer) for prompt in prompts]
    given = [answers.to([ids], max_new_tokens)[0] for ids in asked]
    base.set_attn_implementation(trained_with)
    model.train(was_training)
    return given


def _stops(model: Any, tokenizer: Any) -> set[int]:
    """The model's own stop tokens, as generation takes them, and those that training shows it."""
    own = model.generation_config.eos_token_id
    listed = own if isinstance(own, (list, tuple)) else [own]
    return stop_ids(tokenizer) | {int(stop) for stop in listed if stop is not None}
