"""What a client may ask for, checked: everything else is refused by name, never silently left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from slime_async.actors.chat.messages import Message, text_of
from slime_async.actors.engine import SamplingParams

MAX_CHOICES = 64

KNOWN = frozenset(
    (
        *("messages", "model", "n", "stream", "stream_options", "tools", "tool_choice", "parallel_tool_calls"),
        *("max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "logprobs", "top_logprobs"),
        *("stop", "logit_bias", "frequency_penalty", "presence_penalty", "response_format", "prediction"),
        *("user", "metadata", "store", "service_tier", "reasoning_effort", "verbosity", "safety_identifier"),
        *("prompt_cache_key", "modalities", "chat_template_kwargs"),
    )
)
"""Known fields. Those that would change what is sampled are refused below unless they say nothing"""


HARMLESS: dict[str, tuple[Any, ...]] = {
    "stop": (None, [], ""),
    "logit_bias": (None, {}),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
    "tool_choice": (None, "auto", "none"),
    "prediction": (None,),
}
"""Values of such fields that say nothing"""


class RequestError(ValueError):
    """Told to the client as ``400``: the same request would fail again."""


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One request."""

    messages: tuple[Message, ...]
    tools: tuple[Any, ...]
    choices: int
    max_tokens: int | None
    stream: bool
    include_usage: bool
    logprobs: bool

    def sampling(self, default: SamplingParams) -> SamplingParams:
        """The run's own sampling parameters, and the client's length limit where it is lower.

        A client's temperature and top-p are left out: what is trained is the distribution of the run's.
        """
        limit = default.max_new_tokens if self.max_tokens is None else min(self.max_tokens, default.max_new_tokens)
        return replace(default, max_new_tokens=limit)


def read_request(body: Any) -> ChatRequest:
    """Raises ``RequestError`` for what is malformed or not supported here."""
    if not isinstance(body, Mapping):
        raise RequestError("the body must be a JSON object")
    if unknown := sorted(body.keys() - KNOWN):
        raise RequestError(f"unknown fields {', '.join(unknown)}")
    for field, harmless in HARMLESS.items():
        if body.get(field) not in harmless:
            raise RequestError(f"{field} = {body[field]!r:.200} is not supported here: leave it out")
    choices = body.get("n") or 1
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    for name, value in (("n", choices), ("max_tokens", limit)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise RequestError(f"{name} = {value!r}: must be a positive number")
    if choices > MAX_CHOICES:
        raise RequestError(f"n = {choices}: at most {MAX_CHOICES} answers to one request")
    tools = () if body.get("tool_choice") == "none" else tuple(body.get("tools") or ())
    return ChatRequest(
        messages=_messages(body.get("messages")),
        tools=tools,
        choices=choices,
        max_tokens=limit,
        stream=bool(body.get("stream")),
        include_usage=bool((body.get("stream_options") or {}).get("include_usage")),
        logprobs=bool(body.get("logprobs")),
    )


def _messages(raw: Any) -> tuple[Message, ...]:
    if not isinstance(raw, Sequence) or isinstance(raw, str) or not raw:
        raise RequestError("messages must be a list with at least one message")
    for message in raw:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(f"{message!r:.200} is no message: it needs a role and content")
        try:
            text_of(message.get("content"))
        except (ValueError, TypeError) as error:
            raise RequestError(str(error)) from error
        for call in message.get("tool_calls") or ():
            if not isinstance(call, Mapping) or not isinstance((call.get("function") or {}).get("name"), str):
                raise RequestError(f"{call!r:.200} is no call of a tool: it needs function.name and function.arguments")
    return tuple(raw)
