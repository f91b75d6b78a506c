"""Actors, learner and publisher around the real queue, in virtual time.

::

    grants ──► episodes: turn (engine) ─ environment ─ turn … ──► deliver ──► TrajectoryQueue ──► lease
       ▲                                                                                           │
       └──── publish(v + 1) ◄─── publisher: [drain] … pause, resume ◄─── commit ◄─── training ◄────┘

What the hub does after every change is done here after every event: grants are spread by the same code, in the same
order. The learner leases one batch ahead, and waits with its next publication until the one before has begun.

On a machine whose devices take from each other (cores of one CPU), either side is slower while the other computes.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from slime_async.queue import LeasedBatch, TaskStream, TrajectoryMeta, TrajectoryQueue
from slime_async.queue.spread import spread_grants
from slime_async.simulate.draws import Draws
from slime_async.simulate.engine import Request, SimulatedEngine
from slime_async.simulate.outcome import Outcome, Step, staleness_of
from slime_async.simulate.scenario import Scenario
from slime_async.trajectory import TrajectoryKey

INCARNATION = 1
TASKS = 1 << 40
"""More than any simulation opens"""
MAX_EVENTS = 200_000_000
"""A simulation that needs more is stuck, or far beyond what is sensible"""


@dataclass(slots=True)
class Episode:
    """One trajectory on its way."""

    key: TrajectoryKey
    attempt: int
    actor: int
    turns_left: int
    life: int
    """Of its actor; an episode of an earlier life is gone"""
    sampled: float = 0.0
    by_version: dict[int, float] = field(default_factory=dict)


class Cluster:
    """One simulation. ``run`` it once."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._queue = TrajectoryQueue(scenario.limits(), TaskStream({"tasks": 1.0}, shuffle=False))
        self._queue.declare_sources({"tasks": TASKS})
        self._queue.learner_joined(INCARNATION, 0, 0.0)
        steps: dict[int, tuple[float, float]] = {}
        self._engines = [SimulatedEngine(scenario.engine, steps) for _ in range(scenario.engines)]
        self._lives = [0] * scenario.engines
        self._slots = {str(index): scenario.slots for index in range(scenario.engines)}
        self._free = [scenario.slots] * scenario.engines
        self._has_room = dict.fromkeys(range(scenario.engines))
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.now = 0.0
        self._episodes: dict[int, Episode] = {}
        self._ids = itertools.count()
        self._lengths = Draws(scenario.lengths, scenario.seed)
        self._delays = Draws(scenario.environment_s, scenario.seed + 1) if scenario.environment_s else None
        self._rng = np.random.default_rng(scenario.seed + 2)
        self._accepted: dict[int, int] = {}
        self._group_version: dict[int, int] = {}
        self._complete = 0
        self._draining = False
        self._drain_waits: Callable[[], None] | None = None
        self._leased: dict[int, LeasedBatch] = {}
        self._wanted = 0
        """The version to lease next"""
        self._training: int | None = None
        self._work_s = 0.0
        """Left of its training, as long as that takes alone"""
        self._worked_at = 0.0
        self._slowdown = 1.0
        self._trained: Callable[[], None] = lambda: None
        self._deadline = 0
        """Counts changes of when training ends"""
        self._beside = max(scenario.engine.beside, scenario.learner.beside) > 1
        self._ready_to_train = 0
        self._publishing = False
        self._pending: int | None = None
        self._stalled: int | None = None
        """A version whose publication the learner waits to hand over"""
        self._steps: list[Step] = []
        self._busy: list[tuple[float, float]] = []
        self._engine_busy_at: list[float] = []
        self._failures = self._returned = 0

    # --------------------------------------------------------------------------------------------------------- running

    def run(self) -> Outcome:
        """Until all batches are trained. Raises ``RuntimeError`` when nothing can happen any more."""
        for engine in self._engines:
            engine.use(0, 0.0)
        self._queue.publish(INCARNATION, 0, 0.0)
        for index in range(len(self._engines)):
            self._schedule_failure(index)
        self._after_change()
        for _ in range(MAX_EVENTS):
            if len(self._steps) >= self._scenario.steps:
                return self._outcome()
            if not self._events:
                raise RuntimeError(f"nothing can happen any more: {self._queue.waiting_for(self.now)}")
            self.now, _, happen = heapq.heappop(self._events)
            happen()
            if self._beside:
                self._share_machine()
        raise RuntimeError(
            f"{MAX_EVENTS} events and only {len(self._steps)} steps: {self._queue.waiting_for(self.now)}"
        )

    def _at(self, when: float, happen: Callable[[], None]) -> None:
        if when < math.inf:
            heapq.heappush(self._events, (when, next(self._order), happen))

    def _share_machine(self) -> None:
        """Each side takes the longer, the more of the other devices compute."""
        scenario, computing = self._scenario, [engine.computing for engine in self._engines]
        others = self._scenario.devices - scenario.engine.devices
        training = scenario.learner.devices * (self._training is not None and not scenario.colocated)
        for index, engine in enumerate(self._engines):
            busy = training + scenario.engine.devices * (sum(computing) - computing[index])
            slowdown = 1 + (scenario.engine.beside - 1) * busy / max(1, others)
            if slowdown != engine.slowdown:
                engine.slow_down(self.now, slowdown)
                self._schedule_end(index)
        slowdown = 1 + (scenario.learner.beside - 1) * sum(computing) / len(computing)
        if slowdown != self._slowdown:
            self._work_on(slowdown)

    def _after_change(self) -> None:
        """As the hub after every change: grant, and see whether the learner has its batch."""
        if not self._draining and self._has_room and self._queue.admission_closed_by() is None:
            self._grant()
        self._lease()
        self._queue.take_events()
        self._queue.take_released()

    # ---------------------------------------------------------------------------------------------------------- actors

    def _grant(self) -> None:
        free = {str(index): self._free[index] for index in self._has_room}
        touched = []
        for name, reservations in spread_grants(self._queue, free, self._slots, self.now).items():
            index = int(name)
            self._take_slots(index, len(reservations))
            for reservation in reservations:
                key = reservation.key
                self._group_version.setdefault(key.task, self._queue.published_version)
                episode = Episode(key, reservation.attempt, index, self._scenario.turns, self._lives[index])
                identity = next(self._ids)
                self._episodes[identity] = episode
                self._queue.start(key, reservation.attempt, self.now)
                self._begin_turn(identity, episode)
            touched.append(index)
        for index in touched:
            self._schedule_end(index)

    def _take_slots(self, index: int, count: int) -> None:
        self._free[index] -= count
        if self._free[index] <= 0:
            self._has_room.pop(index, None)
        elif index not in self._has_room and not self._engines[index].down:
            self._has_room[index] = None

    def _begin_turn(self, identity: int, episode: Episode) -> None:
        tokens = max(1.0, float(round(self._lengths.next())))
        self._engines[episode.actor].submit(Request(identity, tokens), self.now)

    def _schedule_end(self, index: int) -> None:
        engine = self._engines[index]
        epoch = engine.epoch

        def end() -> None:
            if engine.epoch == epoch:
                self._end_turns(index)

        self._at(engine.next_end_s(), end)

    def _end_turns(self, index: int) -> None:
        engine = self._engines[index]
        for request in engine.finish(self.now):
            episode = self._episodes[request.episode]
            episode.sampled += request.tokens
            for version, tokens in engine.versions_of(request):
                episode.by_version[version] = episode.by_version.get(version, 0.0) + tokens
            episode.turns_left -= 1
            if episode.turns_left:
                self._at(self.now + self._delay(), self._resumer(request.episode))
            else:
                self._at(self.now + self._scenario.delivery_s, self._deliverer(request.episode))
        self._schedule_end(index)

    def _delay(self) -> float:
        return self._delays.next() if self._delays is not None else 0.0

    def _resumer(self, identity: int) -> Callable[[], None]:
        def resume() -> None:
            episode = self._episodes.get(identity)
            if episode is not None and episode.life == self._lives[episode.actor]:
                self._begin_turn(identity, episode)
                self._schedule_end(episode.actor)

        return resume

    def _deliverer(self, identity: int) -> Callable[[], None]:
        def deliver() -> None:
            episode = self._episodes.pop(identity, None)
            if episode is None or episode.life != self._lives[episode.actor]:
                return
            versions = tuple(sorted((version, max(1, round(n))) for version, n in episode.by_version.items()))
            sampled = sum(n for _, n in versions)
            total = int(sampled + self._scenario.prompt_tokens)
            meta = TrajectoryMeta(episode.key, episode.attempt, total, sampled, 1, versions, 0.0)
            if self._queue.deliver(meta, str(episode.actor), self.now) == "accepted":
                self._count(episode.key.task)
            self._take_slots(episode.actor, -1)
            self._drained()
            self._after_change()

        return deliver

    def _count(self, group: int) -> None:
        self._accepted[group] = self._accepted.get(group, 0) + 1
        if self._accepted[group] == self._scenario.group_size:
            del self._accepted[group]
            self._complete += 1

    # --------------------------------------------------------------------------------------------------------- failures

    def _schedule_failure(self, index: int) -> None:
        mean = self._scenario.engine.mean_time_between_failures_s
        if mean is not None:
            self._at(self.now + float(self._rng.exponential(mean)), lambda: self._fail(index))

    def _fail(self, index: int) -> None:
        self._failures += 1
        self._lives[index] += 1
        self._engines[index].fail(self.now)
        self._returned += len(self._queue.lose_actor(str(index), self.now))
        self._episodes = {i: e for i, e in self._episodes.items() if e.life == self._lives[e.actor]}
        self._free[index] = self._scenario.slots
        self._has_room.pop(index, None)
        self._at(self.now + self._scenario.engine.restart_s, lambda: self._restart(index))
        self._drained()
        self._after_change()

    def _restart(self, index: int) -> None:
        self._engines[index].restart(self._queue.published_version, self.now)
        self._has_room[index] = None
        self._schedule_failure(index)
        self._after_change()

    # ---------------------------------------------------------------------------------------------------------- learner

    def _lease(self) -> None:
        """One batch for now and one ahead, once there is a complete one."""
        ahead = self._ready_to_train + (self._training is not None)
        while self._wanted <= ahead and self._complete >= self._scenario.groups:
            batch = self._queue.lease(INCARNATION, self._wanted, self.now)
            if not isinstance(batch, LeasedBatch):
                self._forget_dropped()
                return
            self._leased[self._wanted] = batch
            self._wanted += 1
            self._complete -= self._scenario.groups
        if self._training is None and self._stalled is None and self._ready_to_train in self._leased:
            self._train(self._ready_to_train)

    def _forget_dropped(self) -> None:
        """The queue dropped groups as stale: ask it how many are left."""
        self._complete = self._queue.statistics(self.now).complete_groups

    def _train(self, version: int) -> None:
        batch = self._leased.pop(version)
        self._training = version
        sampled = batch.staleness.tokens
        tokens = sampled + self._scenario.prompt_tokens * self._scenario.batch
        seconds = self._scenario.learner.fixed_s + tokens * self._scenario.learner.token_s
        began = self.now
        groups = {key.task for key in batch.keys}
        age = sum(version - self._group_version.pop(group) for group in groups) / len(groups)

        def trained() -> None:
            self._busy.append((began, self.now))
            stale = batch.staleness.stale_tokens
            self._steps.append(Step(began, self.now, sampled, tokens, batch.staleness.histogram, stale, age))
            self._engine_busy_at.append(sum(engine.busy_s for engine in self._engines))
            self._queue.commit(INCARNATION, version, self.now)
            self._training, self._ready_to_train = None, version + 1
            self._hand_over(version + 1)
            self._after_change()

        self._work_s, self._worked_at, self._trained = seconds, self.now, trained
        self._work_on(self._slowdown)
        self._lease_ahead()

    def _work_on(self, slowdown: float) -> None:
        """What is left of the training takes ``slowdown`` times as long from now on."""
        self._work_s -= (self.now - self._worked_at) / self._slowdown
        self._worked_at, self._slowdown = self.now, slowdown
        self._deadline += 1
        deadline, trained = self._deadline, self._trained

        def end() -> None:
            if deadline == self._deadline:
                trained()

        if self._training is not None:
            self._at(self.now + max(0.0, self._work_s) * slowdown, end)

    def _lease_ahead(self) -> None:
        if self._wanted <= self._ready_to_train + 1 and self._complete >= self._scenario.groups:
            self._lease()

    # -------------------------------------------------------------------------------------------------------- publisher

    def _hand_over(self, version: int) -> None:
        """To the publisher, which keeps one beside the one that it sends; the learner waits for more."""
        if not self._publishing:
            self._publish(version)
        elif self._pending is None:
            self._pending = version
        else:
            self._stalled = version

    def _publish(self, version: int) -> None:
        self._publishing = True
        if self._scenario.publish == "batch_boundary":
            self._draining, self._drain_waits = True, partial(self._send, version)
            self._drained()
        else:
            self._send(version)

    def _drained(self) -> None:
        if self._drain_waits is not None and not self._episodes:
            begin, self._drain_waits = self._drain_waits, None
            begin()

    def _send(self, version: int) -> None:
        pause_s = min(self._scenario.pause_s, self._scenario.publish_s)

        def pause() -> None:
            for engine in self._engines:
                engine.pause(self.now, True)

        def resume() -> None:
            for index, engine in enumerate(self._engines):
                engine.pause(self.now, False)
                if not engine.down:
                    engine.use(version, self.now)
                self._schedule_end(index)
            self._queue.publish(INCARNATION, version, self.now)
            self._queue.make_durable(INCARNATION, version)
            self._publishing = self._draining = False
            self._next_publication()
            self._after_change()

        self._at(self.now + self._scenario.publish_s - pause_s, pause)
        self._at(self.now + self._scenario.publish_s, resume)

    def _next_publication(self) -> None:
        if self._pending is not None:
            version, self._pending = self._pending, self._stalled
            self._stalled = None
            self._publish(version)

    # ---------------------------------------------------------------------------------------------------------- outcome

    def _outcome(self) -> Outcome:
        scenario = self._scenario
        first, counted = self._steps[scenario.warmup_steps - 1], self._steps[scenario.warmup_steps :]
        seconds = counted[-1].trained_s - first.trained_s
        sampled = sum(step.sampled_tokens for step in counted)
        busy = self._engine_busy_at[-1] - self._engine_busy_at[scenario.warmup_steps - 1]
        full = scenario.engines * scenario.engine.max_running / scenario.engine.step_with(scenario.engine.max_running)
        learner = sum(
            min(end, counted[-1].trained_s) - max(start, first.trained_s)
            for start, end in self._busy
            if end > first.trained_s
        )
        ages = staleness_of(counted)
        stale = sum(step.stale_tokens for step in counted)
        engines_full = sampled / seconds / full
        return Outcome(
            name=scenario.name,
            devices=scenario.devices,
            step_s=seconds / len(counted),
            samples_per_s=scenario.batch * len(counted) / seconds,
            sampled_tokens_per_s=sampled / seconds,
            tokens_per_s_per_device=sampled / seconds / scenario.devices,
            learner_busy=learner / seconds,
            engines_busy=busy / seconds / scenario.engines,
            engines_full=engines_full,
            staleness_mean=sum(age * share for age, share in ages.items()),
            staleness_max=max(ages, default=0),
            staleness=ages,
            group_age_mean=sum(step.group_age for step in counted) / len(counted),
            masked_fraction=stale / sampled if scenario.on_stale == "mask" else 0.0,
            failures=self._failures,
            returned=self._returned,
            bottleneck="training" if learner / seconds >= 0.95 else "generation",
            simulated_s=self.now,
        )


def simulate(scenario: Scenario) -> Outcome:
    return Cluster(scenario).run()
