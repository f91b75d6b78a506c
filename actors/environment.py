"""What an environment is: an async function from a task and a policy to an episode.

    async def generate(task: Task, policy: Policy) -> Episode

::

    hub ── reservation ──► Rollout ── task, policy ──► generate ── Episode ──► Trajectory ──► hub
                                                        │    ▲
                                            prompt ids  ▼    │  Turn (ids, log μ, version spans)
                                                       Policy ──► engine

Multi-turn is the general case: ``generate`` calls ``policy.sample`` as often as it likes. A single turn is an episode
with one turn (``slime_async.actors.single_turn``). docs/tasks.md shows both.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from slime_async.actors.engine import SamplingParams
from slime_async.actors.episode import BranchBuilder, Episode, EpisodeBuilder
from slime_async.actors.isolation import WorkerError, WorkerPool
from slime_async.actors.turn import Turn
from slime_async.trajectory import TaskRef

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "BranchBuilder",
    "ContextFullError",
    "Episode",
    "EpisodeBuilder",
    "EpisodeTruncated",
    "Generate",
    "Policy",
    "Reward",
    "Task",
    "Turn",
    "WorkerError",
    "WorkerPool",
]

Reward = Callable[[Any, str, str], float | Awaitable[float]]
"""(task content, answer text, finish reason) → reward. A plain function is called on the actor's event loop, so it must
be fast, or isolated (``task.isolate_reward``); one that waits for something must be ``async``."""


class EpisodeTruncated(Exception):
    """A limit ended the episode. ``reason`` is one of ``TRUNCATED``.

    An environment may catch it and finish with a reward of its own. Left alone, the episode is what was sampled so far
    and ``task.truncated_reward``; one in which nothing was sampled has failed.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class ContextFullError(EpisodeTruncated, ValueError):
    """The prompt leaves no room for an answer within ``sampling.max_context_tokens``."""

    def __init__(self, message: str) -> None:
        super().__init__("context_full", message)


class Policy(Protocol):
    """The model that is being trained, as an environment sees it."""

    async def sample(self, prompt_ids: Sequence[int], sampling: SamplingParams | None = None) -> Turn:
        """Sample one answer; ``sampling`` stands in for the run's own parameters in this one turn.

        A turn that meets its deadline ends with what it has. Raises ``EpisodeTruncated`` when the episode's time or
        tokens are used up, and ``ContextFullError``, which is one, when the prompt leaves no room.
        """

    def room(self, prompt_ids: Sequence[int]) -> int:
        """How many tokens could still be sampled after this prompt."""

    @property
    def time_left_s(self) -> float | None:
        """Until the episode is truncated; None without such a limit."""

    @property
    def turns(self) -> Sequence[Turn]:
        """Everything sampled so far."""


@dataclass(frozen=True, slots=True)
class Task:
    """One task, with what an environment needs to play it."""

    ref: TaskRef
    sample: int
    """Which of the group's samples this is"""
    content: Any
    """What the source holds at ``ref.index``"""
    sampling: SamplingParams
    tokenizer: PreTrainedTokenizerBase
    reward: Reward | None = None
    """The function that ``task.reward`` names in the configuration"""
    isolate_reward: bool = False
    """Call it in a worker process"""
    workers: WorkerPool = field(default_factory=lambda: WorkerPool(1))
    """The actor's processes for slow functions and environments; none is started before it is used"""

    def encode(self, text: str) -> list[int]:
        """Token ids of text that goes between turns: no special tokens are added."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def answer_text(self, turn: Turn) -> str:
        """What the policy wrote, without the token that ended it.

        Special tokens elsewhere stay visible: an answer with padding in its middle is not the answer without it.
        """
        ids = list(turn.output_ids)
        if turn.finish_reason == "stop" and ids and ids[-1] in self.sampling.stop_token_ids:
            ids.pop()
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

    async def judge(self, answer: str, finish_reason: str) -> float:
        """The reward of an answer, by the configured function. Raises ``ValueError`` when none is configured."""
        if self.reward is None:
            raise ValueError("this episode needs a reward function: set task.reward to module:function")
        if self.isolate_reward:
            return float(await self.workers.call(self.reward, self.content, answer, finish_reason))
        result = self.reward(self.content, answer, finish_reason)
        return float(await result if inspect.isawaitable(result) else result)


Generate = Callable[[Task, Policy], Awaitable[Episode]]
