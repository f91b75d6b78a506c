"""The order in which tasks are opened: several weighted sources, shuffled per epoch, finite or endless, resumable."""

from __future__ import annotations

from collections.abc import Mapping

from slime_async.config.schema import Config
from slime_async.queue.shuffle import permuted
from slime_async.trajectory import TaskRef


class TaskStream:
    """A deterministic function of how many tasks each source has given so far; those counts are its whole state.

    The next task comes from the source with the smallest ``(given + ½) / weight`` (Webster's rule: the shares of any
    prefix are as close to the weights as whole numbers allow), ties to the first by name. Within a source, task
    number ``k`` belongs to epoch ``k // size``; each epoch has its own order, drawn from the seed.

    Sizes come later than the stream: actors hold the sources, and the first one to connect declares them.

    >>> stream = TaskStream({"easy": 2.0, "hard": 1.0}, seed=0, shuffle=False)
    >>> stream.declare_sources({"easy": 100, "hard": 100})
    >>> stream.peek()
    TaskRef(serial=0, source='easy', index=0, epoch=0)
    >>> stream.advance("easy")
    >>> stream.peek()
    TaskRef(serial=1, source='hard', index=0, epoch=0)
    """

    def __init__(
        self, weights: Mapping[str, float], *, seed: int = 0, epochs: int | None = None, shuffle: bool = True
    ) -> None:
        for name, weight in weights.items():
            if weight <= 0:
                raise ValueError(f"source {name!r} has weight {weight}: weights must be positive")
        self._weights = dict(sorted(weights.items()))
        self._seed = seed
        self._epochs = epochs
        self._shuffle = shuffle
        self._sizes: dict[str, int] = {}
        self._given = dict.fromkeys(self._weights, 0)
        self._next: TaskRef | None = None

    @classmethod
    def from_config(cls, config: Config) -> TaskStream:
        weights = {name: source.weight for name, source in config.task.train.items()}
        return cls(weights, seed=config.run.seed, epochs=config.task.epochs, shuffle=config.task.shuffle)

    @property
    def sizes(self) -> dict[str, int]:
        """Tasks of every declared source, those of evaluation included; empty before the declaration."""
        return dict(self._sizes)

    @property
    def position(self) -> int:
        """Tasks given so far; the serial number of the next one"""
        return sum(self._given.values())

    @property
    def exhausted(self) -> bool:
        """Sources are declared and none of them has a task left."""
        return bool(self._sizes) and self.peek() is None

    def check_sources(self, sizes: Mapping[str, int]) -> bool:
        """Whether this declaration is news. Raises ``ValueError`` when it contradicts an earlier one or the weights."""
        if missing := [name for name in self._weights if name not in sizes]:
            raise ValueError(f"training sources {missing} are not among those declared: {sorted(sizes)}")
        if empty := [name for name, size in sizes.items() if size < 1]:
            raise ValueError(f"sources {empty} hold no tasks")
        if not self._sizes:
            return bool(sizes)
        for name in sorted(self._sizes.keys() | sizes.keys()):
            known, declared = self._sizes.get(name, 0), sizes.get(name, 0)
            if known != declared:
                raise ValueError(
                    f"source {name!r} holds {declared} tasks here and {known} on the actors before: "
                    "all actors must be started with the same sources"
                )
        return False

    def declare_sources(self, sizes: Mapping[str, int]) -> None:
        """Say how many tasks each source holds. The same declaration again does nothing."""
        if self.check_sources(sizes):
            self._sizes = dict(sizes)
            self._next = None

    def peek(self) -> TaskRef | None:
        """The task that comes next; None before the declaration and after the last task."""
        if self._next is None and self._sizes:
            self._next = self._compute_next()
        return self._next

    def advance(self, source: str) -> None:
        """Count one task as given by ``source``."""
        self._given[source] = self._given.get(source, 0) + 1
        self._next = None

    def state(self) -> dict[str, dict[str, int]]:
        """All there is to carry on from: sizes and tasks given, by source."""
        return {"sizes": dict(self._sizes), "given": dict(self._given)}

    def restore(self, state: Mapping[str, Mapping[str, int]]) -> None:
        """Carry on from ``state``; sources that are new in the weights start with no tasks given."""
        self._sizes = dict(state["sizes"])
        self._given = dict.fromkeys(self._weights, 0) | dict(state["given"])
        self._next = None

    def _compute_next(self) -> TaskRef | None:
        best, best_rank = "", float("inf")
        for name, weight in self._weights.items():
            given = self._given[name]
            if self._epochs is not None and given >= self._epochs * self._sizes[name]:
                continue
            rank = (given + 0.5) / weight
            if rank < best_rank:
                best, best_rank = name, rank
        if not best:
            return None
        epoch, index = divmod(self._given[best], self._sizes[best])
        if self._shuffle:
            index = permuted(index, self._sizes[best], seed=self._seed, source=best, epoch=epoch)
        return TaskRef(self.position, best, index, epoch)
