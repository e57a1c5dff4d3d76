"""Template: a conversation's turns as its model's chat template, or else lowvram's, shows them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from lowvram.data.conversations import Conversation, Message
from lowvram.data.tool_calls import with_written_arguments
from lowvram.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_CHAT_TEMPLATE = (
    "{% if tools %}{{ raise_exception('the default template knows no tools') }}{% endif %}"
    "{% if bos_token %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['tool_calls'] %}{{ raise_exception('the default template knows no tools') }}{% endif %}"
    "{{ '### ' + message['role'] | capitalize + ':\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)

Turn = dict[str, Any]


class Template:
    """Renders turns of one conversation, with its tools."""

    def __init__(
        self, conversation: Conversation, messages: list[Turn], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self._tokenizer = tokenizer
        self.tools = list(conversation.tools)
        self.messages = messages
        self.where = conversation.where
        self._whole: str | None = None

    def whole(self) -> str:
        """As `text` of all its turns, rendered once however often it is asked for."""
        if self._whole is None:
            self._whole = self.text(self.messages)
        return self._whole

    def text(self, messages: Sequence[Turn], *, prompt: bool = False, with_tools: bool = True) -> str:
        """Of these messages, with the generation prompt if `prompt`.

        Raises:
            DataError: the template raised something.
        """
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages),
                    tools=(self.tools if with_tools else None) or None,
                    chat_template=None if self._tokenizer.chat_template else DEFAULT_CHAT_TEMPLATE,
                    add_generation_prompt=prompt,
                    tokenize=False,
                )
            )
        except Exception as error:  # a template is a program of the model's author: it raises what it likes
            raise DataError(
                f"{self.where}: the model's chat template refuses this conversation ({error}).",
                "Change the row to turns that this model knows, or use another model.",
            ) from error


def template_of(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> Template:
    """With the arguments of calls as its template takes them: DeepSeek's wants them as text."""
    messages = [_as_dict(message) for message in conversation.messages]
    given = Template(conversation, messages, tokenizer)
    if any(message.get("tool_calls") for message in messages):
        written = Template(conversation, [_written(message) for message in messages], tokenizer)
        for template in (given, written):
            with suppress(DataError):
                template.whole()
                return template
    return given  # if both are refused, then for the arguments as they were


def _as_dict(message: Message) -> Turn:
    return {**message.extra, "role": message.role, "content": message.content}


def _written(message: Turn) -> Turn:
    calls = message.get("tool_calls")
    return {**message, "tool_calls": with_written_arguments(calls)} if calls else message
