"""Evaluations: held-out tasks played beside training. They never enter its counts and never hold it up."""

from __future__ import annotations

from collections import Counter

from slime_async.queue.events import EvaluationFinished, EvaluationOpened, TrajectoryMeta
from slime_async.queue.reservations import ReservationTable
from slime_async.trajectory import TaskRef, TrajectoryKey


class _Evaluation:
    def __init__(self, opened: EvaluationOpened) -> None:
        self.opened = opened
        self.rewards: dict[tuple[int, int], float] = {}
        """By index of the task and sample"""
        self.failed: set[tuple[int, int]] = set()
        self.versions: set[int] = set()

    def index(self, key: TrajectoryKey) -> int:
        return self.opened.first_serial - key.task

    def place(self, key: TrajectoryKey) -> tuple[int, int]:
        return self.index(key), key.sample

    @property
    def missing(self) -> int:
        return self.opened.num_tasks * self.opened.samples - len(self.rewards) - len(self.failed)

    @property
    def counts(self) -> tuple[int, ...]:
        """Results per task; empty for one sample each."""
        if self.opened.samples == 1:
            return ()
        given = Counter(index for index, _ in self.rewards)
        return tuple(given[index] for index in range(self.opened.num_tasks))


class Evaluations:
    """Evaluations of the present learner in progress. A restart of the hub begins the unfinished ones anew."""

    def __init__(self, reservations: ReservationTable) -> None:
        self._by_name: dict[str, _Evaluation] = {}
        self._by_serial: dict[int, _Evaluation] = {}
        self._reservations = reservations

    @property
    def unfinished(self) -> dict[str, int]:
        """Answers still to come, by name of the evaluation"""
        return {name: evaluation.missing for name, evaluation in self._by_name.items() if evaluation.missing}

    def open(self, opened: EvaluationOpened) -> None:
        evaluation = self._by_name[opened.name] = _Evaluation(opened)
        serials = range(opened.first_serial, opened.first_serial - opened.num_tasks, -1)
        self._by_serial |= dict.fromkeys(serials, evaluation)
        self._reservations.add(TrajectoryKey(serial, sample) for serial in serials for sample in range(opened.samples))

    def slots(self, actor_slots: int) -> int:
        """How many of an actor's slots evaluations may take: the largest share of those unfinished, at least one."""
        shares = [evaluation.opened.share for evaluation in self._by_name.values() if evaluation.missing]
        return max(1, int(max(shares) * actor_slots)) if shares else 0

    def forget_all(self) -> None:
        """Whatever still runs of them becomes unwanted."""
        for serial, evaluation in self._by_serial.items():
            for sample in range(evaluation.opened.samples):
                self._reservations.close(TrajectoryKey(serial, sample))
        self._by_name.clear()
        self._by_serial.clear()

    def task(self, key: TrajectoryKey) -> tuple[TaskRef, str]:
        """The task of a granted key, and the name of its evaluation."""
        evaluation = self._by_serial[key.task]
        return TaskRef(key.task, evaluation.opened.source, evaluation.index(key)), evaluation.opened.name

    def accept(self, meta: TrajectoryMeta) -> bool | None:
        """Whether this result is the sample's first; None when its evaluation is gone or gave the sample up."""
        evaluation = self._by_serial.get(meta.key.task)
        if evaluation is None or not 0 <= meta.key.sample < evaluation.opened.samples:
            return None
        place = evaluation.place(meta.key)
        if place in evaluation.failed:
            return None
        if place in evaluation.rewards:
            return False
        self._reservations.close(meta.key)
        evaluation.rewards[place] = meta.reward
        evaluation.versions.update(version for version, _ in meta.tokens_by_version)
        return True

    def give_up(self, key: TrajectoryKey) -> None:
        """This sample will have no result."""
        self._reservations.close(key)
        evaluation = self._by_serial[key.task]
        evaluation.failed.add(evaluation.place(key))

    def finish(self, key: TrajectoryKey) -> EvaluationFinished | None:
        """The result, once ``key`` was its last missing sample. Rewards of those that failed are left out."""
        evaluation = self._by_serial[key.task]
        if evaluation.missing:
            return None
        rewards = tuple(reward for _, reward in sorted(evaluation.rewards.items()))
        versions = tuple(sorted(evaluation.versions))
        return EvaluationFinished(evaluation.opened.name, rewards, len(evaluation.failed), versions, evaluation.counts)
