"""Small agents, written with the openai package and nothing of ours, as users have them."""

from __future__ import annotations

import json
from typing import Any

from openai import AsyncOpenAI, OpenAI

TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers",
            "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
        },
    }
]


async def solve(content: dict[str, Any], base_url: str, api_key: str) -> str:
    """Calls tools until the model gives an answer without one."""
    async with AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        messages: list[Any] = [
            {"role": "system", "content": "Use the tool."},
            {"role": "user", "content": content["q"]},
        ]
        for _ in range(5):
            reply = await client.chat.completions.create(model="any", messages=messages, tools=TOOLS, temperature=0.2)
            message = reply.choices[0].message
            messages.append(message)
            if not message.tool_calls:
                return message.content or ""
            for call in message.tool_calls:
                arguments = json.loads(call.function.arguments)  # type: ignore[union-attr]
                result = str(arguments["a"] + arguments["b"])
                messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return ""


def solve_in_a_thread(content: dict[str, Any], base_url: str, api_key: str) -> float:
    """Streams, and judges itself."""
    with OpenAI(base_url=base_url, api_key=api_key) as client:
        stream = client.chat.completions.create(
            model="any", messages=[{"role": "user", "content": content["q"]}], stream=True
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    return float(text == content["a"])


async def gives_nothing(content: dict[str, Any], base_url: str, api_key: str) -> None: ...
