"""One episode's side of the endpoint: requests become turns of the policy, turns become the episode."""

from __future__ import annotations

import asyncio
import json
import uuid
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slime_async.actors.chat.messages import signature, signatures
from slime_async.actors.chat.request import ChatRequest
from slime_async.actors.chat.template import ChatTemplate
from slime_async.actors.chat.tools import Answer, ToolParser, parse_answer, parse_tagged
from slime_async.actors.environment import EpisodeTruncated, Policy, Task
from slime_async.actors.episode import Episode
from slime_async.actors.recorder import EpisodeRecorder
from slime_async.actors.turn import Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer to a request, as text and as what was sampled."""

    answer: Answer
    turn: Turn

    @property
    def finish_reason(self) -> str:
        """In the protocol's words."""
        if self.answer.calls:
            return "tool_calls"
        return "stop" if self.turn.finish_reason == "stop" else "length"


class ChatSession:
    """Finds each request's conversation, samples, and records.

    A conversation is known by the tools and the messages that led to an answer, the answer included. A request that
    begins with a known one goes on from its tokens; any other begins a branch, rendered from its text.
    """

    def __init__(self, task: Task, policy: Policy, parser: ToolParser = parse_tagged) -> None:
        """Raises ``ValueError`` when the tokenizer has no chat template."""
        self.key = uuid.uuid4().hex
        """Secret: the path below which only this episode's agent finds it"""
        self.base_url = ""
        """Set by the server"""
        self._task = task
        self._policy = policy
        self._parser = parser
        self._template = ChatTemplate(task.tokenizer, task.sampling.stop_token_ids)
        self._recorder = EpisodeRecorder()
        self._known: dict[tuple[str, tuple[str, ...]], array[int]] = {}
        """(tools, signatures of messages) → the tokens behind them"""
        self._running: set[asyncio.Task[Turn]] = set()
        self.truncated: str | None = None
        """Why a request was refused, if one was: a limit of the episode"""
        self.failure: BaseException | None = None
        """What a request died of, if one did: it is raised when the episode is to be finished"""

    async def complete(self, request: ChatRequest) -> list[Choice]:
        """Sample the answers to one request. Raises ``EpisodeTruncated`` at the episode's limits."""
        prompt_ids = self.prompt_ids(request)
        sampling = request.sampling(self._task.sampling)
        tasks = [asyncio.create_task(self._policy.sample(prompt_ids, sampling)) for _ in range(request.choices)]
        self._running.update(tasks)
        try:
            turns = [await task for task in tasks]
        except EpisodeTruncated as truncation:
            self.truncated = truncation.reason
            raise
        except Exception as error:
            self.failure = error
            raise
        finally:
            await _end(tasks)
            self._running.difference_update(tasks)
        return [self._take(request, turn) for turn in turns]

    async def close(self) -> None:
        """Cancel what the agent did not wait for."""
        await _end(list(self._running))

    def prompt_ids(self, request: ChatRequest) -> list[int]:
        """The tokens of a request: those of the longest known conversation that it goes on with, then what is new."""
        tools, said = _tools_key(request), signatures(request.messages)
        for length in range(len(said) - 1, 0, -1):
            known = self._known.get((tools, said[:length]))
            if known is not None:
                return self._template.go_on(known, request.messages[length:], request.tools)
        return self._template.begin(request.messages, request.tools)

    def _take(self, request: ChatRequest, turn: Turn) -> Choice:
        self._recorder.add(turn)
        answer = parse_answer(self._task.answer_text(turn), self._parser if request.tools else None)
        said = (*signatures(request.messages), signature(answer.as_message()))
        self._known[_tools_key(request), said] = array("i", [*turn.prompt_ids, *turn.output_ids])
        return Choice(answer, turn)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._task.tokenizer

    def finish(
        self, reward: float, *, finish_reason: str | None = None, metrics: Mapping[str, float] | None = None
    ) -> Episode:
        """End the episode with its reward; it ended by truncation if a limit refused a request.

        Raises what a request died of: an episode in which the engine failed is none.
        """
        if self.failure is not None:
            raise self.failure
        return self._recorder.builder.finish(reward, finish_reason=finish_reason or self.truncated, metrics=metrics)


async def _end(tasks: Sequence[asyncio.Task[Turn]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _tools_key(request: ChatRequest) -> str:
    return json.dumps(request.tools, sort_keys=True)
