"""Evaluations: tasks played once each beside training. They never enter its counts and never hold it up."""

from __future__ import annotations

from slime_async.queue.events import EvaluationFinished, EvaluationOpened, TrajectoryMeta
from slime_async.queue.reservations import ReservationTable
from slime_async.trajectory import TaskRef, TrajectoryKey


class _Evaluation:
    def __init__(self, opened: EvaluationOpened) -> None:
        self.opened = opened
        self.rewards: dict[int, float] = {}
        """By index of the task"""
        self.failed: set[int] = set()
        self.versions: set[int] = set()

    def index(self, key: TrajectoryKey) -> int:
        return self.opened.first_serial - key.task

    @property
    def missing(self) -> int:
        return self.opened.num_tasks - len(self.rewards) - len(self.failed)


class Evaluations:
    """Evaluations of the present learner in progress. A restart of the hub begins the unfinished ones anew."""

    def __init__(self, reservations: ReservationTable) -> None:
        self._by_name: dict[str, _Evaluation] = {}
        self._by_serial: dict[int, _Evaluation] = {}
        self._reservations = reservations

    @property
    def unfinished(self) -> dict[str, int]:
        """Tasks without a result, by name of the evaluation"""
        return {name: evaluation.missing for name, evaluation in self._by_name.items() if evaluation.missing}

    def open(self, opened: EvaluationOpened) -> None:
        evaluation = self._by_name[opened.name] = _Evaluation(opened)
        serials = range(opened.first_serial, opened.first_serial - opened.num_tasks, -1)
        self._by_serial |= dict.fromkeys(serials, evaluation)
        self._reservations.add(TrajectoryKey(serial, 0) for serial in serials)

    def forget_all(self) -> None:
        """Whatever still runs of them becomes unwanted."""
        for serial in self._by_serial:
            self._reservations.close(TrajectoryKey(serial, 0))
        self._by_name.clear()
        self._by_serial.clear()

    def task(self, key: TrajectoryKey) -> tuple[TaskRef, str]:
        """The task of a granted key, and the name of its evaluation."""
        evaluation = self._by_serial[key.task]
        return TaskRef(key.task, evaluation.opened.source, evaluation.index(key)), evaluation.opened.name

    def accept(self, meta: TrajectoryMeta) -> bool | None:
        """Whether this result is the task's first; None when its evaluation is gone or gave the task up."""
        evaluation = self._by_serial.get(meta.key.task)
        if evaluation is None or meta.key.sample != 0 or evaluation.index(meta.key) in evaluation.failed:
            return None
        index = evaluation.index(meta.key)
        if index in evaluation.rewards:
            return False
        self._reservations.close(meta.key)
        evaluation.rewards[index] = meta.reward
        evaluation.versions.update(version for version, _ in meta.tokens_by_version)
        return True

    def give_up(self, key: TrajectoryKey) -> None:
        """This task will have no result."""
        self._reservations.close(key)
        evaluation = self._by_serial[key.task]
        evaluation.failed.add(evaluation.index(key))

    def finish(self, key: TrajectoryKey) -> EvaluationFinished | None:
        """The result, once ``key`` was its last missing task. Rewards of tasks that failed are left out."""
        evaluation = self._by_serial[key.task]
        if evaluation.missing:
            return None
        rewards = tuple(reward for _, reward in sorted(evaluation.rewards.items()))
        versions = tuple(sorted(evaluation.versions))
        return EvaluationFinished(evaluation.opened.name, rewards, len(evaluation.failed), versions)
