"""Episodes from nothing but their turns: each goes where the tokens before it fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from slime_async.actors.episode import BranchBuilder, EpisodeBuilder
from slime_async.actors.turn import Turn


class EpisodeRecorder:
    """Finds the branch of each turn by its prompt.

    A turn whose prompt begins with all tokens of a branch continues the longest such branch. Any other (a history that
    was rewritten, a second conversation) begins a branch, with its whole prompt as context.
    """

    def __init__(self) -> None:
        self.builder = EpisodeBuilder()
        self._branches: list[BranchBuilder] = []

    def find(self, prompt_ids: Sequence[int]) -> BranchBuilder | None:
        """The branch that a turn with this prompt continues."""
        fitting = [branch for branch in self._branches if branch.continues(prompt_ids)]
        return max(fitting, key=lambda branch: len(branch.token_ids), default=None)

    def add(self, turn: Turn) -> BranchBuilder:
        """Append the turn where it belongs; returns the branch."""
        branch = self.find(turn.prompt_ids)
        if branch is None:
            branch = self.builder.branch() if self._branches else self.builder
            self._branches.append(branch)
        branch.add(turn)
        return branch


def record(turns: Iterable[Turn]) -> EpisodeBuilder:
    """The episode that these turns make."""
    recorder = EpisodeRecorder()
    for turn in turns:
        recorder.add(turn)
    return recorder.builder
