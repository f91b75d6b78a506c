"""A conversation of texts on top of tokens: what text environments have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slime_async.actors.chat.template import ChatTemplate
from slime_async.actors.environment import Episode, EpisodeBuilder, Policy, Task
from slime_async.actors.turn import Turn


class Dialogue:
    """The environment tells, the policy answers, and the answer may be rewarded before the next word.

    With a chat template, what is told are messages of a user; without one it is plain text, put in front of the next
    answer as it is. Answers keep the tokens that were sampled in either case.
    """

    def __init__(self, task: Task, policy: Policy, system: str = "") -> None:
        self._task = task
        self._policy = policy
        self._episode = EpisodeBuilder()
        self._last: Turn | None = None
        self._reward = 0.0
        self._system = system
        chats = bool(task.tokenizer.chat_template)
        self._template = ChatTemplate(task.tokenizer, task.sampling.stop_token_ids) if chats else None

    async def ask(self, text: str) -> str:
        """The policy's answer to ``text``, without the token that ended it."""
        self._settle()
        self._last = await self._policy.sample(self._prompt(text))
        return self._task.answer_text(self._last)

    def reward(self, value: float) -> None:
        """What the last answer earned on the spot; several add up."""
        self._reward += value

    def finish(
        self, reward: float = 0.0, *, finish_reason: str | None = None, metrics: Mapping[str, float] | None = None
    ) -> Episode:
        """As ``EpisodeBuilder.finish``."""
        self._settle()
        return self._episode.finish(reward, finish_reason=finish_reason, metrics=metrics)

    @property
    def cut(self) -> bool:
        """The last answer hit a limit of length or time."""
        return self._last is not None and self._last.finish_reason != "stop"

    def _settle(self) -> None:
        if self._last is not None:
            self._episode.add(self._last, self._reward)
        self._last, self._reward = None, 0.0

    def _prompt(self, text: str) -> list[int]:
        known = self._episode.token_ids
        if self._template is None:
            return known + self._task.encode(text if known or not self._system else f"{self._system}\n{text}")
        message: dict[str, Any] = {"role": "user", "content": text}
        if known:
            return self._template.go_on(known, [message], ())
        system = [{"role": "system", "content": self._system}] if self._system else []
        return self._template.begin([*system, message], ())
