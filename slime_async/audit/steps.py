"""The journal's batches against the learner's own record: what was committed is what was trained."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from slime_async.audit.book import Book

TOLERANCE = 1e-6
"""Of a mean of rewards, which the learner adds up in another order"""


@dataclass(frozen=True, slots=True)
class Steps:
    """What the metrics say of the batches in the final lineage."""

    agreeing: int
    """Steps that are their batch"""
    masked: int
    """Trajectories in them without any weight in the loss: every token beyond the staleness bound, or truncated and
    masked for it"""


def check_steps(book: Book, metrics: Iterable[Mapping[str, Any]], finished: bool) -> Steps:
    """Adds to ``book.violations``.

    Each batch of the final lineage has its line (the last of its step), with the batch's own number of sampled tokens
    and mean reward. A run that is going on or was killed may lack the newest lines, and may have lines of batches that
    it trained, lost with their learner, and has yet to train again.
    """
    lines = {int(line["step"]): line for line in metrics}
    newest = max(lines, default=-1)
    agreeing = masked = 0
    for version in range(book.first_version, book.trained):
        batch = book.batches.get(version)
        if batch is None:
            continue  # noted when it was committed
        line = lines.get(version)
        if line is None:
            if finished or version < newest:
                text = f"batch {version} was committed, but the metrics have no step {version}"
                book.violation(text, book.keys_of(batch.groups))
            continue
        problem = _difference(book, batch.groups, line)
        if problem:
            book.violation(
                f"step {version} of the metrics is not batch {version}: {problem}", book.keys_of(batch.groups)
            )
        else:
            agreeing += 1
            masked += sum(1 for _ in book.keys_of(batch.groups)) - int(line["trajectories"])
    for step in sorted(step for step in lines if step >= (book.trained if finished else book.trained_ever)):
        book.violation(f"the metrics have step {step}, but batch {step} was never committed")
    return Steps(agreeing, masked)


def _difference(book: Book, serials: Iterable[int], line: Mapping[str, Any]) -> str:
    groups = [book.groups[serial] for serial in serials if serial in book.groups]
    rewards = [reward for group in groups for reward in group.trained_rewards]
    if not rewards:
        return "the batch is empty"
    tokens = sum(count for group in groups for count, _ in group.samples.values())
    reward = math.fsum(rewards) / len(rewards)
    if missing := [name for name in ("sampled_tokens", "reward_mean", "trajectories") if name not in line]:
        return f"it lacks {', '.join(missing)}"
    said_tokens, said_reward = line["sampled_tokens"], line["reward_mean"]
    if said_tokens != tokens:
        return f"{said_tokens:.0f} sampled tokens against {tokens}"
    if not math.isclose(said_reward, reward, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
        return f"mean reward {said_reward:.6f} against {reward:.6f}"
    return ""
