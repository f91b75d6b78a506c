"""An agent as an episode: ``task.generate = "slime_async.actors.chat:AgentEpisode"``."""

from __future__ import annotations

import asyncio
import inspect
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from slime_async.actors.chat.server import ChatServer
from slime_async.actors.chat.session import ChatSession
from slime_async.actors.chat.tools import parse_tagged
from slime_async.actors.environment import Episode, Policy, Task
from slime_async.objects import load_callable


class AgentEpisode:
    """Plays episodes by calling an agent that talks to an OpenAI-compatible endpoint.

    ::

        [task]
        generate = "slime_async.actors.chat:AgentEpisode"
        arguments = { agent = "my_agent:solve" }

    ``solve(content, base_url, api_key)`` is a coroutine function, or a plain one that runs in a thread. It returns a
    number, which is the reward, or an answer's text, which ``task.reward`` judges.
    """

    def __init__(self, agent: str, tool_parser: str = "", threads: int = 256) -> None:
        """``tool_parser`` names a ``module:function`` for models that do not write ``<tool_call>`` tags; ``threads``
        bounds how many agents that are plain functions run at once."""
        self._agent = load_callable(agent, "task.arguments.agent")
        self._parser = load_callable(tool_parser, "task.arguments.tool_parser") if tool_parser else parse_tagged
        self._server = ChatServer()
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="agent")

    async def generate(self, task: Task, policy: Policy) -> Episode:
        """An agent that fails because a limit refused its request has played a truncated episode; one that fails by
        itself has failed."""
        async with self._server.session(task, policy, self._parser) as session:
            try:
                result = await self._call(task.content, session)
            except Exception:
                if session.truncated is None:
                    raise
                return session.finish(0.0)
        if isinstance(result, str):
            result = await task.judge(result, session.truncated or "stop")
        if not isinstance(result, int | float):
            raise TypeError(
                f"the agent returned a {type(result).__name__}: it must return a reward or an answer's text"
            )
        return session.finish(float(result))

    async def close(self) -> None:
        await self._server.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _call(self, content: Any, session: ChatSession) -> Any:
        if inspect.iscoroutinefunction(self._agent):
            return await self._agent(content, session.base_url, session.key)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._agent, content, session.base_url, session.key)
