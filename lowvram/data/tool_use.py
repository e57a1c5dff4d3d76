"""Tool use: a row is refused whose tools, calls or answers its chat template leaves out."""

from __future__ import annotations

from collections.abc import Iterator

from lowvram.data.template import Template, Turn
from lowvram.errors import DataError

_REMEDY = (
    "Use a model whose chat template shows tools, such as Qwen2.5 or Llama 3.1; write tools and calls into "
    "the turns' text; or leave such rows out: --skip-bad."
)


def require_shown(template: Template) -> None:
    """One rendering for the tools and one for each call, without it, beside that with all of them.

    Raises:
        DataError: one that is the same as the whole.
    """
    for turns in _without_a_call(template.messages):
        if _same(template, turns, with_tools=True):
            raise DataError(
                f"{template.where}: this model's chat template has no place for a tool call of the row: it "
                "shows the same without it, so the model would not learn to call.",
                _REMEDY,
            )
    if template.tools and _same(template, template.messages, with_tools=False):
        raise DataError(
            f"{template.where}: this model's chat template has no place for the tools of the row "
            f"({len(template.tools)}): it shows the same without them, so the model would not see them.",
            _REMEDY,
        )


def require_said(template: Template, turn: int, only_ends: bool) -> None:
    """Raises: DataError, if a turn that says or calls something is shown as its end only (`only_ends`)."""
    message = template.messages[turn]
    if only_ends and (message["content"].strip() or message.get("tool_calls")):
        raise DataError(
            f"{template.where}: this model's chat template shows nothing of an assistant turn but its "
            "end, so the model would learn to answer nothing.",
            "Use a model with another chat template, or leave such rows out: --skip-bad.",
        )


def _without_a_call(messages: list[Turn]) -> Iterator[list[Turn]]:
    """The messages once for each call, without that call."""
    for at, message in enumerate(messages):
        calls = message.get("tool_calls") or []
        for number in range(len(calls)):
            kept = [*calls[:number], *calls[number + 1 :]]
            fewer = {name: value for name, value in message.items() if name != "tool_calls"}
            yield [*messages[:at], fewer | ({"tool_calls": kept} if kept else {}), *messages[at + 1 :]]


def _same(template: Template, turns: list[Turn], *, with_tools: bool) -> bool:
    try:
        return template.text(turns, with_tools=with_tools) == template.whole()
    except DataError:  # a template that misses it has looked at it
        return False
