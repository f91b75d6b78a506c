"""Answers in the protocol's form: one object, or a stream of chunks."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from slime_async.actors.chat.session import Choice

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_CHARACTERS = 16
"""Of content in one streamed chunk. An answer is streamed once it is complete: its parts are known only then."""


def completion(model: str, choices: Sequence[Choice], tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """A ``chat.completion`` object, with log-probabilities when a tokenizer is given to name the tokens."""
    return {
        **_head(model, "chat.completion"),
        "choices": [
            {
                "index": index,
                "message": choice.answer.as_message(),
                "finish_reason": choice.finish_reason,
                "logprobs": None if tokenizer is None else _logprobs(choice, tokenizer),
            }
            for index, choice in enumerate(choices)
        ],
        "usage": usage(choices),
    }


def chunks(model: str, choices: Sequence[Choice], include_usage: bool) -> Iterator[bytes]:
    """The same as server-sent events."""
    head = _head(model, "chat.completion.chunk")

    def event(index: int, delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        return _event({**head, "choices": [{"index": index, "delta": delta, "finish_reason": finish_reason}]})

    for index, choice in enumerate(choices):
        message = choice.answer.as_message()
        yield event(index, {"role": "assistant", "content": ""})
        for name in ("reasoning_content", "content"):
            text = message.get(name) or ""
            for start in range(0, len(text), CHUNK_CHARACTERS):
                yield event(index, {name: text[start : start + CHUNK_CHARACTERS]})
        for position, call in enumerate(message.get("tool_calls", ())):
            yield event(index, {"tool_calls": [{"index": position, **call}]})
        yield event(index, {}, choice.finish_reason)
    if include_usage:
        yield _event({**head, "choices": [], "usage": usage(choices)})
    yield b"data: [DONE]\n\n"


def usage(choices: Sequence[Choice]) -> dict[str, int]:
    """Tokens as they were, not as they would be tokenised again."""
    prompt = len(choices[0].turn.prompt_ids)
    sampled = sum(len(choice.turn.output_ids) for choice in choices)
    return {"prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled}


def error(message: str, kind: str, code: str) -> dict[str, Any]:
    """An ``error`` object."""
    return {"error": {"message": message, "type": kind, "code": code, "param": None}}


def _head(model: str, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def _event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()


def _logprobs(choice: Choice, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    texts = [str(tokenizer.decode([token])) for token in choice.turn.output_ids]
    return {
        "content": [
            {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}
            for text, logprob in zip(texts, choice.turn.logprobs, strict=True)
        ],
        "refusal": None,
    }
