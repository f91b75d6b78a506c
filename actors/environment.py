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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from slime_async.actors.engine import SamplingParams
from slime_async.actors.episode import Episode, EpisodeBuilder, Turn
from slime_async.trajectory import TaskRef

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ContextFullError", "Episode", "EpisodeBuilder", "Generate", "Policy", "Reward", "Task", "Turn"]

Reward = Callable[[Any, str, str], float | Awaitable[float]]
"""(task content, answer text, finish reason) → reward. A plain function is called on the actor's event loop, so it must
be fast; one that waits for something must be ``async``."""


class ContextFullError(ValueError):
    """The prompt leaves no room for an answer within ``sampling.max_context_tokens``."""


class Policy(Protocol):
    """The model that is being trained, as an environment sees it."""

    async def sample(self, prompt_ids: Sequence[int], sampling: SamplingParams | None = None) -> Turn:
        """Sample one answer; ``sampling`` stands in for the run's own parameters in this one turn.

        Raises ``ContextFullError`` when ``room(prompt_ids)`` is 0.
        """

    def room(self, prompt_ids: Sequence[int]) -> int:
        """How many tokens could still be sampled after this prompt."""


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
        result = self.reward(self.content, answer, finish_reason)
        return float(await result if inspect.isawaitable(result) else result)


Generate = Callable[[Task, Policy], Awaitable[Episode]]
