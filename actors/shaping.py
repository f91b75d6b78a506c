"""Overlong shaping: answers that come close to their length limit lose reward step by step, not all at once."""

from __future__ import annotations

from dataclasses import dataclass, replace

from slime_async.actors.episode import Episode
from slime_async.config.schema import Config


@dataclass(frozen=True, slots=True)
class Overlong:
    """Nothing is lost up to ``limit − buffer`` sampled tokens, ``penalty`` at ``limit``, linear between.

    Source: DAPO's soft overlong punishment, arXiv 2503.14476, eq. 13.
    """

    limit: int
    buffer: int
    penalty: float

    @classmethod
    def from_config(cls, config: Config) -> Overlong | None:
        """The limit is the episode's, or one turn's where episodes have none."""
        if not config.task.overlong_tokens:
            return None
        limit = config.sampling.max_episode_tokens or config.sampling.max_new_tokens
        return cls(limit, config.task.overlong_tokens, config.task.overlong_penalty)

    def loss(self, sampled_tokens: int) -> float:
        """What an episode of that length loses."""
        beyond = sampled_tokens - (self.limit - self.buffer)
        return self.penalty * min(1.0, max(0.0, beyond / self.buffer))

    def shape(self, episode: Episode) -> Episode:
        """The same episode with its reward less what it loses; ``overlong_loss`` among its metrics says how much."""
        lost = self.loss(int(episode.loss_mask.sum()))
        metrics = {**episode.metrics, "overlong_loss": lost}
        return replace(episode, reward=episode.reward - lost, metrics=metrics)
