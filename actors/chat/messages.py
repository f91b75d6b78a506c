"""When two lists of messages are the same conversation, for finding the tokens behind what a client sends back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]


def text_of(content: Any) -> str:
    """A message's text: a string, nothing, or a list of text parts. Raises ``ValueError`` for images and the like."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(f"a message has content of type {kind!r}: only text is supported here")
        texts.append(str(part["text"]))
    return "".join(texts)


def signature(message: Message) -> str:
    """Equal for messages that say the same.

    Clients send answers back in their own form: with empty fields dropped, white space stripped, arguments serialised
    anew, ids of calls changed. None of this is a change of history.
    """
    said: dict[str, Any] = {"role": message.get("role"), "text": text_of(message.get("content")).strip()}
    calls = message.get("tool_calls")
    if calls:
        said["calls"] = [[call["function"]["name"], _parsed(call["function"].get("arguments"))] for call in calls]
    if message.get("name"):
        said["name"] = message["name"]
    return json.dumps(said, sort_keys=True)


def signatures(messages: Sequence[Message]) -> tuple[str, ...]:
    return tuple(signature(message) for message in messages)


def for_template(message: Message) -> dict[str, Any]:
    """The message as chat templates take it: plain text, and the arguments of calls as objects."""
    plain = {key: value for key, value in message.items() if value is not None}
    plain["content"] = text_of(message.get("content"))
    if plain.get("tool_calls"):
        plain["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": _parsed(call["function"].get("arguments"))}}
            for call in plain["tool_calls"]
        ]
    return plain


def _parsed(arguments: Any) -> Any:
    """JSON text as what it says; anything else as it is."""
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except json.JSONDecodeError:
        return arguments
