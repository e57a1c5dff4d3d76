"""`lowvram chat`: a conversation with history and commands, and base and adapters to choose from."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from lowvram.answering import Loaded, memory_errors
from lowvram.data.conversations import Message
from lowvram.data.prompting import prompt_ids
from lowvram.engine.decoding import Thread
from lowvram.engine.generate import Answer, AnswerStream
from lowvram.engine.sampling import Sampling
from lowvram.engine.switching import BASE
from lowvram.errors import ConfigError, DataError, LowvramError

HELP = {
    "/base": "ask the model without any adapter",
    "/adapter NAME": "ask with this adapter; without a name: which there are",
    "/system TEXT": "the system prompt from now on; without a text: none",
    "/temperature N": "0 for the likeliest answer; higher is more varied",
    "/top-p N": "draw from the likeliest tokens that make up this share",
    "/clear": "forget the conversation",
    "/help": "these lines",
    "/quit": "leave (as Ctrl-D); Ctrl-C stops an answer",
}


class View(Protocol):
    """What shows the chat."""

    interactive: bool

    def lines(self) -> Iterator[str]: ...

    def note(self, text: str) -> None: ...

    def refuse(self, error: LowvramError) -> None: ...

    def help(self, commands: dict[str, str]) -> None: ...

    def answer(self, name: str, stream: AnswerStream) -> None: ...

    def side_by_side(self, streams: Iterator[tuple[str, AnswerStream]]) -> None: ...


@dataclass
class Chat:
    """What was said, and to whom. In `compare` base and adapter each have a history of their own."""

    loaded: Loaded
    view: View
    sampling: Sampling
    max_new_tokens: int
    system: str = ""
    compare: bool = False
    _turns: dict[str, list[Message]] = field(default_factory=dict)
    _n_answers: int = 0  # so that the same question is not answered with the same draws

    def __post_init__(self) -> None:
        self._thread = Thread(self.loaded.answers.model, self.loaded.plan.context)

    def run(self) -> None:
        """Until the lines end or /quit.

        Raises:
            LowvramError: a line that cannot be answered, where nobody is there to change it.
        """
        for line in self.view.lines():
            if line.strip() == "/quit":
                return
            try:
                self._take(line.strip())
            except KeyboardInterrupt:
                if not self.view.interactive:
                    raise
                self.view.note("stopped")
            except (ConfigError, DataError) as error:
                if not self.view.interactive:
                    raise
                self.view.refuse(error)

    def _take(self, line: str) -> None:
        if not line:
            return
        if line.startswith("/"):
            self._command(*line.split(maxsplit=1))
        elif self.compare:
            self._ask_both(line)
        else:
            self._ask(line)

    def _command(self, name: str, value: str = "") -> None:
        switch, note = self.loaded.switch, self.view.note
        if name == "/base":
            self._use(BASE)
        elif name == "/adapter":
            self._use(value) if value else note(f"adapters: {', '.join(switch.names) or 'none'}")
        elif name == "/system":
            self.system = value
            note(f"system prompt: {value or 'none'}")
        elif name in ("/temperature", "/top-p"):
            self._sample(name[1:].replace("-", "_"), value)
        elif name == "/clear":
            self._turns.clear()
            note("the conversation is forgotten")
        elif name == "/help":
            self.view.help(HELP)
        else:
            raise ConfigError(f"There is no {name}.", "Type /help for what there is.")

    def _use(self, name: str) -> None:
        if self.compare and name == BASE:
            raise ConfigError("--compare asks the base beside the adapter.", "Choose one: /adapter NAME")
        self.loaded.switch.to(name)
        self.view.note(f"now answering: {name}")

    def _sample(self, name: str, value: str) -> None:
        try:
            number = float(value)
            self.sampling = Sampling(**{**dict(self.sampling), name: number})
        except ValueError as error:
            least = "from 0 on" if name == "temperature" else "above 0 and up to 1"
            raise ConfigError(f"'{value}' is no {name}.", f"Give a number {least}.") from error
        self.view.note(f"{name.replace('_', '-')}: {number:g}")

    def _ask(self, question: str) -> None:
        active = self.loaded.switch.active
        with self._answered(active, "", question) as stream:
            self.view.answer(active, stream)

    def _ask_both(self, question: str) -> None:
        with closing(self._both(question)) as streams:
            self.view.side_by_side(streams)

    def _both(self, question: str) -> Generator[tuple[str, AnswerStream], None, None]:
        """The base first, then the adapter, to the same question."""
        for name in (BASE, self.loaded.switch.active):
            with self._answered(name, "base" if name == BASE else "adapter", question) as stream:
                yield name, stream

    @contextmanager
    def _answered(self, name: str, side: str, question: str) -> Iterator[AnswerStream]:
        """A stream from `name`; what was written of it when the block ends is part of the history of `side`.

        An answer that Ctrl-C cut is kept as far as it went, for that is what the user has read.
        """
        turns, switch = self._turns.setdefault(side, []), self.loaded.switch
        active, asked = switch.active, Message(role="user", content=question)
        ids = self._fitted(turns, asked)
        room = min(self.max_new_tokens, self.loaded.plan.context - len(ids))
        known = self._thread, name
        stream = self.loaded.answers.stream(ids, room, self.sampling, self._n_answers, known)
        try:
            switch.to(name)
            with memory_errors(self.loaded.plan):
                yield stream
        finally:
            switch.to(active)
            self._n_answers += 1
            if stream.answer.text:
                turns += [asked, Message(role="assistant", content=stream.answer.text)]
        self._say_if_cut(stream.answer, room)

    def _say_if_cut(self, answer: Answer, room: int) -> None:
        if not answer.stopped and answer.n_tokens >= room:
            full = room < self.max_new_tokens
            limit = "the context is full: --context N" if full else "--max-new-tokens N"
            self.view.note(f"cut after {answer.n_tokens:,} tokens ({limit})")

    def _fitted(self, turns: list[Message], asked: Message) -> list[int]:
        """The prompt; the oldest questions and answers are dropped from `turns` until there is room for more.

        Raises:
            DataError: not even the question alone leaves room.
        """
        context = self.loaded.plan.context
        kept = min(self.max_new_tokens, math.ceil(context / 4))  # for the answer, at the least
        n_before = len(turns)
        ids = self._prompt(turns, asked)
        while len(ids) + kept > context and turns:
            del turns[:2]
            ids = self._prompt(turns, asked)
        if len(ids) + kept > context:
            raise DataError(
                f"The question takes {len(ids):,} of {context:,} tokens of context, and {kept:,} are kept "
                "for the answer.",
                f"Ask a shorter one, or start again with --context {len(ids) + kept}.",
            )
        if dropped := (n_before - len(turns)) // 2:
            self.view.note(f"the context of {context:,} tokens is full; oldest turns forgotten: {dropped}")
        return ids

    def _prompt(self, turns: list[Message], asked: Message) -> list[int]:
        first = [Message(role="system", content=self.system)] if self.system else []
        return prompt_ids([*first, *turns, asked], self.loaded.tokenizer)
