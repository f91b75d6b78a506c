"""What must survive a restart of the hub, as small events: the queue's durable state is their fold, and nothing else.

The queue decides, emits an event, and applies it; a replay applies the same events without deciding again.
``to_plain`` and ``from_plain`` turn events into lists of plain values that JSON and msgpack can carry.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from slime_async.trajectory import TaskRef, Trajectory, TrajectoryKey

DropReason = Literal["stale", "failed", "equal_rewards", "filtered"]


@dataclass(frozen=True, slots=True)
class TrajectoryMeta:
    """All that the queue needs to know about one delivered trajectory; its payload lies elsewhere."""

    key: TrajectoryKey
    attempt: int
    num_tokens: int
    num_sampled: int
    size_bytes: int
    tokens_by_version: tuple[tuple[int, int], ...]
    """(version, tokens sampled with it), oldest version first"""
    reward: float

    @classmethod
    def of(cls, trajectory: Trajectory, size_bytes: int) -> TrajectoryMeta:
        by_version = tuple(trajectory.tokens_by_version().items())
        return cls(
            key=trajectory.key,
            attempt=trajectory.attempt,
            num_tokens=len(trajectory.token_ids),
            num_sampled=sum(count for _, count in by_version),
            size_bytes=size_bytes,
            tokens_by_version=by_version,
            reward=trajectory.reward,
        )


@dataclass(frozen=True, slots=True)
class BatchShape:
    """The first event of a run. A journal can only be carried on with the shape it was written with."""

    group_size: int
    groups_per_batch: int


@dataclass(frozen=True, slots=True)
class SourcesDeclared:
    sizes: dict[str, int]


@dataclass(frozen=True, slots=True)
class GroupOpened:
    task: TaskRef


@dataclass(frozen=True, slots=True)
class Accepted:
    """``delivered_version``: the published version then, or the newest of its tokens' where that is ahead of it."""

    meta: TrajectoryMeta
    delivered_version: int


@dataclass(frozen=True, slots=True)
class GroupJudged:
    """A complete group's rewards, by sample, in the place of its trajectories' own"""

    serial: int
    rewards: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class GroupDropped:
    serial: int
    reason: DropReason


@dataclass(frozen=True, slots=True)
class Leased:
    incarnation: int
    train_version: int
    groups: tuple[int, ...]
    """Serials, in the order of the batch"""


@dataclass(frozen=True, slots=True)
class Committed:
    train_version: int


@dataclass(frozen=True, slots=True)
class WeightsPublished:
    version: int


@dataclass(frozen=True, slots=True)
class MadeDurable:
    version: int
    """Batches that trained versions below this one are in a durable checkpoint"""


@dataclass(frozen=True, slots=True)
class LearnerJoined:
    incarnation: int
    version: int


@dataclass(frozen=True, slots=True)
class EvaluationOpened:
    """Its tasks have the serials ``first_serial``, ``first_serial − 1``, …: negative, apart from training's."""

    name: str
    source: str
    num_tasks: int
    first_serial: int
    samples: int = 1
    share: float = 1.0
    """Of each actor's slots, that it may take at once"""


@dataclass(frozen=True, slots=True)
class EvaluationFinished:
    """Every task has a result or has failed for good; see ``protocol.EvaluationResult``."""

    name: str
    rewards: tuple[float, ...]
    failed: int
    versions: tuple[int, ...]
    counts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The whole durable state; as a journal's first event it stands for everything before it."""

    shape: BatchShape
    published: int
    awaits_weights: bool
    trained: int
    durable: int
    incarnation: int
    next_evaluation_serial: int
    largest_bytes: int
    tasks: dict[str, dict[str, int]]
    evaluations: tuple[EvaluationOpened, ...]
    results: tuple[EvaluationFinished, ...]
    groups: tuple[tuple[TaskRef, tuple[Accepted, ...], tuple[float, ...]], ...]
    """Every group that is neither durable nor dropped, by serial, with the rewards that its judge gave"""
    batches: tuple[tuple[Leased, str, bool], ...]
    """(composition and holder, state, retrained) by version"""
    totals: dict[str, int]


Event = (
    BatchShape
    | SourcesDeclared
    | GroupOpened
    | Accepted
    | GroupJudged
    | GroupDropped
    | Leased
    | Committed
    | WeightsPublished
    | MadeDurable
    | LearnerJoined
    | EvaluationOpened
    | EvaluationFinished
    | Snapshot
)

_CLASSES: dict[str, type[Any]] = {
    cls.__name__: cls
    for cls in (
        TaskRef, TrajectoryMeta, BatchShape, SourcesDeclared, GroupOpened, Accepted, GroupJudged, GroupDropped, Leased,
        Committed, WeightsPublished, MadeDurable, LearnerJoined, EvaluationOpened, EvaluationFinished, Snapshot,
    )
}  # fmt: skip
_TAG = "@"
"""Marks a list that stands for an object; no string of an event begins with it alone"""


_FIELDS = {cls: tuple(field.name for field in dataclasses.fields(cls)) for cls in _CLASSES.values()}


def to_plain(value: Any) -> Any:
    """An event, or anything inside one, as lists, dicts and scalars."""
    cls = type(value)
    if cls is int or cls is str or cls is float:  # nearly everything is; one event is written per trajectory
        return value
    if names := _FIELDS.get(cls):
        return [_TAG, cls.__name__, *[to_plain(getattr(value, name)) for name in names]]
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: to_plain(item) for name, item in value.items()}
    return value


def from_plain(plain: Any) -> Any:
    """The event that ``to_plain`` made this from. Raises ``ValueError`` for a class that no event contains."""
    if isinstance(plain, dict):
        return {name: from_plain(item) for name, item in plain.items()}
    if not isinstance(plain, Sequence) or isinstance(plain, str | bytes):
        return plain
    if len(plain) < 2 or plain[0] != _TAG:
        return tuple(from_plain(item) for item in plain)
    cls = _CLASSES.get(plain[1])
    if cls is None:
        raise ValueError(f"unknown event {plain[1]!r}: the journal was written by another version of slime_async")
    fields = [from_plain(item) for item in plain[2:]]
    if cls is TrajectoryMeta:
        fields[0] = TrajectoryKey(*fields[0])
    return cls(*fields)
