"""From an answer's text to what the protocol wants of it: content, reasoning, and calls of tools."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

REASONING = re.compile(r"^\s*(?:<think>)?(.*?)</think>\s*", re.DOTALL)
TAGGED_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ToolCall:
    id: str
    name: str
    arguments: str
    """JSON text, as the protocol has it"""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer, taken apart."""

    content: str
    reasoning: str
    calls: tuple[ToolCall, ...]

    def as_message(self) -> dict[str, Any]:
        """As a response carries it."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content or (None if self.calls else "")}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.calls
            ]
        return message


ToolParser = Callable[[str], tuple[str, list[tuple[str, dict[str, Any]]]]]
"""An answer's text → the text without its calls, and (name, arguments) of each"""


def parse_tagged(text: str) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
    """``<tool_call>{"name": …, "arguments": {…}}</tool_call>``, as Qwen and Hermes models write calls.

    A call that is no such JSON stays in the text: the agent sees it, and may complain.
    """
    calls: list[tuple[str, dict[str, Any]]] = []

    def take(match: re.Match[str]) -> str:
        try:
            call = json.loads(match[1])
            name, arguments = call["name"], call.get("arguments", {})
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            return match[0]
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return match[0]
        calls.append((name, arguments))
        return ""

    return TAGGED_CALL.sub(take, text), calls


def parse_answer(text: str, parser: ToolParser | None) -> Answer:
    """Take an answer apart; without ``parser`` (the request named no tools) nothing counts as a call."""
    reasoning = ""
    if "</think>" in text and (match := REASONING.match(text)):
        reasoning, text = match[1].strip(), text[match.end() :]
    calls: list[tuple[str, dict[str, Any]]] = []
    if parser is not None:
        text, calls = parser(text)
    named = tuple(ToolCall(f"call_{uuid.uuid4().hex[:24]}", name, json.dumps(args)) for name, args in calls)
    return Answer(text.strip() if calls else text, reasoning, named)
