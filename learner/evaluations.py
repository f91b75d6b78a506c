"""Evaluations on schedule, beside training: asked of the hub, collected between steps, never waited for.

::

    version v published, v a multiple of evaluation.interval_versions
        │ Evaluate (a call that stays open)
        ▼
    the hub grants its tasks within evaluation.share of the actors' slots ── training goes on in the others
        │ EvaluationResult
        ▼
    the next step finds it: one line in events.jsonl, one entry in that step's metrics

An evaluation that is due while the one before still runs is left out, and that is logged: results would come later and
later. Weights change while it runs, so a result names the versions that produced it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Protocol

from slime_async.config import Config
from slime_async.evaluation import EvaluationStatistics
from slime_async.protocol import Evaluate, EvaluationResult, Message, Scalar
from slime_async.telemetry.events import EventLog
from slime_async.transport.errors import RemoteError

log = logging.getLogger(__name__)

CALL_MARGIN_S = 60.0
"""For the hub's answer, beyond the time that it has for the evaluation"""


class Caller(Protocol):
    """What this needs of the connection to the hub."""

    def begin(self, message: Message, timeout_s: float, *, retry: bool = False) -> Future[Message]: ...


class ScheduledEvaluations:
    """All evaluations during training; at most one per source runs at a time."""

    def __init__(
        self,
        config: Config,
        client: Caller,
        events: EventLog,
        clock: Callable[[], float] = time.monotonic,
        start: int = 0,
    ) -> None:
        """``start`` is the version that this learner begins from; one that was due there is asked again, as the learner
        before may not have lived to see its result."""
        self._config = config.evaluation
        self._sources = list(config.task.evaluation) if config.evaluation.interval_versions else []
        self._client = client
        self._events = events
        self._clock = clock
        self._last = max(0, start - 1)
        """The version that was evaluated last, or 0: that is what ``evaluation.before`` is for"""
        self._open: dict[str, tuple[int, float, Future[Message]]] = {}
        """By source: the version it was for, when it began, and the call"""

    def published(self, version: int) -> None:
        """Engines hold ``version`` now: begin what is due. Versions may be skipped between two calls."""
        interval = self._config.interval_versions
        if interval is None or version // interval <= self._last // interval:
            return
        self._last = version
        for source in self._sources:
            if source in self._open:
                log.warning(
                    "version %d is not evaluated on %s: version %d still is", version, source, self._open[source][0]
                )
                continue
            message = Evaluate(
                f"version_{version}/{source}",
                source,
                self._config.tasks,
                self._config.timeout_s,
                self._config.samples,
                self._config.share,
            )
            call = self._client.begin(message, self._config.timeout_s + CALL_MARGIN_S, retry=True)
            self._open[source] = (version, self._clock(), call)

    def collect(self) -> dict[str, float]:
        """Metrics of what has finished since; at once. An evaluation that failed is logged, not raised: training does
        not depend on it."""
        metrics: dict[str, float] = {}
        for source, (version, begun, call) in list(self._open.items()):
            if not call.done():
                continue
            del self._open[source]
            error = call.exception()
            if isinstance(error, RemoteError | TimeoutError):
                log.warning("the evaluation of version %d on %s failed: %s", version, source, error)
                continue
            result = call.result()
            assert isinstance(result, EvaluationResult)
            seconds = self._clock() - begun
            write_result(self._events, f"version_{version}", source, result, self._config.samples, seconds)
            metrics |= result_metrics(source, result, self._config.samples)
        return metrics

    def finish(self, timeout_s: float) -> dict[str, float]:
        """At the end of training: wait for what still runs, at most so long, and collect it."""
        wait([call for _, _, call in self._open.values()], timeout_s)
        for source, (version, _, call) in self._open.items():
            if not call.done():
                log.warning("the evaluation of version %d on %s did not finish", version, source)
        return self.collect()


def write_result(
    events: EventLog, name: str, source: str, result: EvaluationResult, samples: int, seconds: float
) -> None:
    """One line in the event log, with everything that is known of an evaluation."""
    statistics = EvaluationStatistics.of(result, samples)
    fields: dict[str, Scalar] = {
        "accuracy": statistics.accuracy,
        "accuracy_low": statistics.accuracy_low,
        "accuracy_high": statistics.accuracy_high,
        **{f"pass@{k}": value for k, value in statistics.pass_at.items() if k > 1},
        "tasks": result.tasks,
        "samples": samples,
        "failed": result.failed,
        "version": result.versions[-1] if result.versions else -1,
        "version_first": result.versions[0] if result.versions else -1,
        "pinned": result.pinned,
        "seconds": seconds,
    }
    if result.rewards:
        fields["reward_mean"] = statistics.reward_mean
    events.write("evaluation", name=name, source=source, **fields)
    log.info(
        "evaluation %s on %s: %.3f (%.3f to %.3f) over %d tasks, versions %s",
        *(name, source, statistics.accuracy, statistics.accuracy_low, statistics.accuracy_high, result.tasks),
        "–".join(map(str, sorted({result.versions[0], result.versions[-1]}))) if result.versions else "none",
    )


def result_metrics(source: str, result: EvaluationResult, samples: int) -> dict[str, float]:
    """The same for a step's metrics: ``evaluation/SOURCE/…``."""
    statistics = EvaluationStatistics.of(result, samples)
    values = {
        "accuracy": statistics.accuracy,
        "accuracy_low": statistics.accuracy_low,
        "accuracy_high": statistics.accuracy_high,
        "version_first": float(result.versions[0]) if result.versions else -1.0,
        "version_last": float(result.versions[-1]) if result.versions else -1.0,
        **{f"pass@{k}": value for k, value in statistics.pass_at.items() if k > 1},
    }
    if result.rewards:
        values["reward_mean"] = statistics.reward_mean
    return {f"evaluation/{source}/{name}": value for name, value in values.items()}
