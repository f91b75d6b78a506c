"""Arbitrary interleavings of everything that can happen to the queue, against a model that only remembers."""

from __future__ import annotations

import json

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from queue_driver import make_limits, make_meta

from slime_async.protocol import Reservation
from slime_async.queue import (
    Event,
    Exhausted,
    LeasedBatch,
    QueueStatistics,
    TaskStream,
    TrajectoryMeta,
    TrajectoryQueue,
    from_plain,
    to_plain,
)
from slime_async.trajectory import TrajectoryKey

ACTORS = ("a", "b", "c")
SOURCES = {"one": 5, "two": 9, "held-out": 4}
MAX_BYTES = 50
DURABLE_COUNTS = (
    "accepted",
    "queued",
    "leased",
    "trained",
    "to_retrain",
    "durable",
    "dropped",
    "complete_groups",
    "open_groups",
    "held",
    "held_bytes",
    "published_version",
    "trained_version",
    "durable_version",
    "incarnation",
)
"""Statistics that a replay restores"""


class QueueMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.journal: list[Event] = []
        self.running: dict[str, list[tuple[Reservation, int]]] = {actor: [] for actor in ACTORS}
        """What each actor holds, with the published version at its grant"""
        self.lost: list[tuple[Reservation, int]] = []
        """What dead actors held, and what was granted before the hub restarted"""
        self.seen: list[tuple[Reservation, int]] = []
        self.accepted: set[TrajectoryKey] = set()
        self.released: set[TrajectoryKey] = set()
        self.metas: dict[TrajectoryKey, TrajectoryMeta] = {}
        self.verdicts: dict[int, tuple[float, ...]] = {}
        """The rewards that a judge gave, by group"""
        self.leases: dict[int, LeasedBatch] = {}
        """By version, in the lineage of the present weights"""
        self.incarnation = 1
        self.restarted = False
        """Batches to retrain, and work that comes back, may exceed the bounds; nothing may be granted beyond them"""
        self.returned = False
        """Attempts are counted anew after a restart: two actors may hold the same one, and only one of them counts"""

    @initialize(
        group_size=st.integers(1, 3),
        groups=st.integers(1, 2),
        eta=st.integers(0, 2),
        on_stale=st.sampled_from(["mask", "drop", "wait", "train"]),
        extra_trajectories=st.one_of(st.none(), st.integers(0, 4)),
        extra_bytes=st.integers(0, 300),
        max_attempts=st.integers(1, 3),
        epochs=st.sampled_from([None, None, 2]),
        filtered=st.booleans(),
        judged=st.booleans(),
    )
    def build(  # type: ignore[no-untyped-def]
        self,
        group_size,
        groups,
        eta,
        on_stale,
        extra_trajectories,
        extra_bytes,
        max_attempts,
        epochs,
        filtered,
        judged,
    ):
        batch = group_size * groups
        self.limits = make_limits(
            group_size=group_size,
            groups=groups,
            eta=eta,
            on_stale=on_stale,
            trajectories=None if extra_trajectories is None else batch + extra_trajectories,
            queue_bytes=batch * MAX_BYTES + extra_bytes,
            trajectory_bytes=MAX_BYTES,
            max_attempts=max_attempts,
            drop_equal_rewards=filtered and group_size > 1,
            judge_groups=judged,
        )
        self.epochs = epochs
        self.queue = TrajectoryQueue(self.limits, self.new_stream())
        self.queue.declare_sources(SOURCES)
        self.queue.learner_joined(1, 0, self.tick())
        assert self.queue.grant("a", 10, self.tick()) == ()
        self.queue.publish(1, 0, self.tick())
        self.drain()

    # ------------------------------------------------------------------------------------------------ helpers

    def new_stream(self) -> TaskStream:
        return TaskStream({"one": 1.0, "two": 2.0}, seed=1, epochs=self.epochs)

    def tick(self) -> float:
        self.now += 1.0
        return self.now

    def drain(self) -> None:
        self.journal += self.queue.take_events()
        released = self.queue.take_released()
        assert len(set(released)) == len(released)
        assert self.released.isdisjoint(released)
        self.released.update(released)

    def statistics(self) -> QueueStatistics:
        return self.queue.statistics(self.now)

    def grant_to(self, actor: str, slots: int) -> int:
        before = self.statistics()
        granted = self.queue.grant(actor, slots, self.tick())
        assert len(granted) <= max(0, slots)
        training = [r for r in granted if not r.evaluation]
        after = self.statistics()
        if training:
            assert after.pacing <= after.pacing_limit
        if after.held > before.held:
            assert after.held <= after.held_limit
            assert after.held_bytes <= after.held_bytes_limit
        assert all(r.key not in self.accepted for r in granted)
        holds = [(r, max(0, self.queue.published_version)) for r in granted]
        self.running[actor] += holds
        self.seen += holds
        return len(training)

    def deliver_to_queue(self, held: tuple[Reservation, int], actor: str, late: int, size: int, reward: float) -> None:
        """``late``: how many of its tokens are as old as its grant; the others are of the newest weights."""
        reservation, granted_version = held
        newest = max(granted_version, self.queue.published_version)
        spans = ((granted_version, late), (newest, 4 - late)) if newest > granted_version else ((newest, 4),)
        spans = tuple((version, count) for version, count in spans if count)
        meta = make_meta(reservation, spans=spans, size_bytes=size, reward=reward)
        before = self.statistics()
        outcome = self.queue.deliver(meta, actor, self.tick())
        if reservation.evaluation:
            assert self.statistics().accepted == before.accepted
            return
        was_new = reservation.key not in self.accepted
        assert was_new or outcome != "accepted"
        if outcome == "accepted":
            self.accepted.add(reservation.key)
            self.metas[reservation.key] = meta
        elif outcome == "unwanted":
            assert reservation.key not in self.queue.payload_keys()
        else:
            assert not was_new

    def check_new_batch(self, batch: LeasedBatch) -> None:
        tasks = [key.task for key in batch.keys]
        assert len(batch.keys) == self.limits.batch
        assert list(batch.keys) == sorted(batch.keys)
        assert all(tasks.count(task) == self.limits.group_size for task in tasks)
        bound = batch.train_version - self.limits.max_staleness
        versions = {key: [v for v, _ in self.metas[key].tokens_by_version] for key in batch.keys}
        if self.limits.on_stale in ("drop", "wait"):
            assert all(min(v) >= bound for v in versions.values())
        if self.limits.on_stale == "mask":
            for task in set(tasks):
                assert any(max(v) >= bound for key, v in versions.items() if key.task == task)
        assert batch.min_version == (None if self.limits.on_stale == "train" else bound)
        others = {key for version, b in self.leases.items() if version != batch.train_version for key in b.keys}
        assert others.isdisjoint(batch.keys)
        serials = tasks[:: self.limits.group_size]
        verdicts = (
            [reward for serial in serials for reward in self.verdicts[serial]] if self.limits.judge_groups else []
        )
        assert list(batch.rewards) == verdicts

    def judge_all(self) -> None:
        """Kept, with rewards that differ."""
        for serial in self.queue.groups_to_judge():
            self.verdicts[serial] = tuple(float(sample) for sample in range(self.limits.group_size))
            self.queue.judge(serial, self.verdicts[serial], True, self.tick())

    def lease(self) -> LeasedBatch | None:
        """Lease the next version; None while there is no batch."""
        statistics = self.statistics()
        version = statistics.trained_version + statistics.leased // self.limits.batch
        answer = self.queue.lease(self.incarnation, version, self.tick())
        if not isinstance(answer, LeasedBatch):
            assert answer.reason
            return None
        assert answer == self.queue.lease(self.incarnation, version, self.tick())
        if answer.retrained:
            first = self.leases[version]
            assert (answer.keys, answer.rewards, answer.staleness, answer.min_version) == (
                first.keys,
                first.rewards,
                first.staleness,
                first.min_version,
            )
        else:
            self.check_new_batch(answer)
        self.leases[version] = answer
        return answer

    def commit(self) -> None:
        version = self.queue.trained_version
        self.queue.commit(self.incarnation, version, self.tick())
        self.queue.commit(self.incarnation, version, self.tick())
        assert self.queue.trained_version == version + 1

    # ------------------------------------------------------------------------------------------------- actors

    @rule(actor=st.sampled_from(ACTORS), slots=st.integers(-1, 6))
    def grant(self, actor: str, slots: int) -> None:
        self.grant_to(actor, slots)

    @precondition(lambda self: any(self.running.values()))
    @rule(data=st.data())
    def start(self, data: st.DataObject) -> None:
        reservation, _ = data.draw(st.sampled_from(self.seen))
        self.queue.start(reservation.key, reservation.attempt, self.tick())

    @precondition(lambda self: any(self.running.values()))
    @rule(
        data=st.data(),
        count=st.integers(1, 4),
        late=st.integers(0, 4),
        size=st.integers(1, MAX_BYTES),
        reward=st.sampled_from([0.0, 1.0]),
    )
    def deliver(self, data: st.DataObject, count: int, late: int, size: int, reward: float) -> None:
        for _ in range(count):
            actors = [actor for actor in ACTORS if self.running[actor]]
            if not actors:
                return
            actor = data.draw(st.sampled_from(actors))
            index = data.draw(st.integers(0, len(self.running[actor]) - 1))
            self.deliver_to_queue(self.running[actor].pop(index), actor, late, size, reward)

    @precondition(lambda self: self.seen)
    @rule(data=st.data(), actor=st.sampled_from(ACTORS))
    def deliver_something_old_again(self, data: st.DataObject, actor: str) -> None:
        held = data.draw(st.sampled_from([*self.lost, *self.seen][-30:]))
        if all(reservation != held[0] for reservation, _ in self.running[actor]):
            self.deliver_to_queue(held, actor, 2, 10, 0.5)

    @precondition(lambda self: any(self.running.values()))
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        actor = data.draw(st.sampled_from([actor for actor in ACTORS if self.running[actor]]))
        reservation, _ = self.running[actor].pop(data.draw(st.integers(0, len(self.running[actor]) - 1)))
        self.queue.fail(reservation.key, reservation.attempt, "raised", self.tick())

    @rule(actor=st.sampled_from(ACTORS))
    def actor_dies(self, actor: str) -> None:
        lost = self.queue.lose_actor(actor, self.tick())
        assert set(lost) <= {reservation.key for reservation, _ in self.running[actor]}
        assert self.queue.outstanding(actor) == 0
        self.lost += self.running[actor]
        self.running[actor] = []

    # -------------------------------------------------------------------------------------------------- judge

    @precondition(lambda self: self.queue.groups_to_judge())
    @rule(
        data=st.data(),
        verdict=st.sampled_from(["keep", "keep", "keep", "refuse", "fail"]),
        reward=st.sampled_from([0.0, 0.5]),
        spread=st.sampled_from([0.0, 1.0]),
    )
    def judge(self, data: st.DataObject, verdict: str, reward: float, spread: float) -> None:
        """Any complete group, once; telling the same again changes nothing."""
        serial = data.draw(st.sampled_from(self.queue.groups_to_judge()))
        keys = {TrajectoryKey(serial, sample) for sample in range(self.limits.group_size)}
        assert keys <= self.accepted - self.released
        assert serial not in self.verdicts
        self.verdicts[serial] = tuple(reward + spread * sample for sample in range(self.limits.group_size))
        for _ in range(2):
            if verdict == "fail":
                self.queue.give_up_group(serial, "raised", self.tick())
            else:
                self.queue.judge(serial, self.verdicts[serial], verdict == "keep", self.tick())
        self.drain()
        equal = self.limits.drop_equal_rewards and not spread
        assert (keys <= self.released) == (verdict != "keep" or equal)
        assert serial not in self.queue.groups_to_judge()

    # ------------------------------------------------------------------------------------------------ learner

    @precondition(lambda self: self.statistics().leased < 2 * self.limits.batch)
    @rule()
    def learner_leases(self) -> None:
        self.lease()

    @precondition(lambda self: self.statistics().leased)
    @rule()
    def learner_commits(self) -> None:
        self.commit()

    @precondition(lambda self: self.queue.trained_version > self.queue.published_version)
    @rule()
    def learner_publishes(self) -> None:
        self.queue.publish(self.incarnation, self.queue.published_version + 1, self.tick())

    @precondition(lambda self: self.queue.trained_version > self.statistics().durable_version)
    @rule(data=st.data())
    def learner_checkpoints(self, data: st.DataObject) -> None:
        version = data.draw(st.integers(self.statistics().durable_version + 1, self.queue.trained_version))
        self.queue.make_durable(self.incarnation, version)

    @precondition(lambda self: self.statistics().leased or self.queue.trained_version)
    @rule(data=st.data())
    def learner_restarts(self, data: st.DataObject) -> None:
        statistics = self.statistics()
        reached = statistics.trained_version + statistics.leased // self.limits.batch
        version = data.draw(st.integers(statistics.durable_version, reached))
        proven = max(version, statistics.trained_version)
        if not statistics.to_retrain:  # otherwise every lease is one of a batch that was trained before
            self.leases = {v: batch for v, batch in self.leases.items() if v < proven or batch.retrained}
        self.incarnation += 1
        self.restarted = True
        self.queue.learner_joined(self.incarnation, version, self.tick())

    # ------------------------------------------------------------------------------------------ hub, evaluation

    @rule(snapshot=st.booleans(), plain=st.booleans(), returning=st.sets(st.sampled_from(ACTORS)))
    def hub_restarts(self, snapshot: bool, plain: bool, returning: set[str]) -> None:
        self.drain()
        before = self.queue.state(), [getattr(self.statistics(), name) for name in DURABLE_COUNTS]
        unjudged = self.queue.groups_to_judge()
        if snapshot:
            self.journal = [self.queue.state()]
        if plain:
            self.journal = [from_plain(json.loads(json.dumps(to_plain(event)))) for event in self.journal]
        self.queue = TrajectoryQueue.replay(self.limits, self.new_stream(), self.journal)
        self.queue.take_released()
        assert self.queue.take_events() == ()
        assert (self.queue.state(), [getattr(self.statistics(), name) for name in DURABLE_COUNTS]) == before
        assert self.queue.groups_to_judge() == unjudged
        for actor in ACTORS:
            if actor not in returning:
                self.lost += self.running[actor]
                self.running[actor] = []
        for actor in sorted(returning):
            self.come_back(actor)

    def come_back(self, actor: str) -> None:
        self.returned = self.restarted = True
        missing = self.statistics().pacing
        self.queue.adopt(actor, [reservation for reservation, _ in self.running[actor]], self.tick())
        assert self.statistics().pacing <= missing + len(self.running[actor])

    @rule(actor=st.sampled_from(ACTORS))
    def connection_breaks_and_the_actor_comes_back(self, actor: str) -> None:
        before = self.statistics()
        self.queue.lose_actor(actor, self.tick())
        self.come_back(actor)
        after = self.statistics()
        assert (after.pacing, after.held) == (before.pacing, before.held)

    @rule(number=st.integers(1, 2), tasks=st.integers(1, 4), samples=st.integers(1, 2))
    def evaluate(self, number: int, tasks: int, samples: int) -> None:
        before = self.statistics()
        self.queue.evaluate(f"{number}/{tasks}/{samples}", "held-out", tasks, self.tick(), samples=samples)
        assert self.statistics().pacing == before.pacing

    @rule(versions=st.integers(1, 4), straggling=st.integers(0, 2))
    def one_actor_runs_ahead_of_the_others(self, versions: int, straggling: int) -> None:
        """What the others hold grows old; a lease may drop it, mask it, or wait for it."""
        self.grant_to("c", straggling)
        for _ in range(2 * versions):
            self.grant_to("a", 4)
            while self.running["a"]:
                held = self.running["a"].pop()
                self.deliver_to_queue(held, "a", 2, 20, float(held[0].sample))
            self.judge_all()
            if self.statistics().leased or self.lease() is not None:
                self.commit()
                self.queue.publish(self.incarnation, self.queue.trained_version, self.tick())
        while self.running["c"]:
            held = self.running["c"].pop()
            self.deliver_to_queue(held, "c", 4, 20, float(held[0].sample))

    @rule()
    def drive_to_the_next_batch(self) -> None:
        """No deadlock: with one actor and a willing learner, the next batch comes, or the tasks are used up."""
        for _ in range(self.limits.max_attempts + 60):
            statistics = self.statistics()
            if statistics.leased:
                self.commit()
                continue
            self.queue.publish(self.incarnation, self.queue.trained_version, self.tick())
            self.judge_all()
            if self.lease() is not None:
                return
            version = self.queue.trained_version
            if isinstance(self.queue.lease(self.incarnation, version, self.tick()), Exhausted):
                return
            self.grant_to("a", 8)
            for actor in ACTORS:
                for held in self.running[actor]:
                    self.deliver_to_queue(held, actor, 0, MAX_BYTES, float(held[0].sample))
                self.running[actor] = []
        raise AssertionError(f"no batch: {self.queue.waiting_for(self.now)}")

    # ---------------------------------------------------------------------------------------------- invariants

    @invariant()
    def nothing_is_lost_and_nothing_is_twice(self) -> None:
        self.drain()
        s = self.statistics()
        assert s.accepted == len(self.accepted)
        assert s.accepted == s.queued + s.leased + s.trained + s.to_retrain + s.durable + s.dropped
        payloads = self.queue.payload_keys()
        assert len(set(payloads)) == len(payloads)
        assert set(payloads) | self.released == self.accepted
        assert self.released.isdisjoint(payloads)
        assert s.durable + s.dropped == len(self.released)

    @invariant()
    def bounds_hold(self) -> None:
        s = self.statistics()
        assert s.pacing >= 0
        if not self.restarted:
            assert s.pacing <= s.pacing_limit
            assert s.held <= s.held_limit
        assert s.leased <= 2 * self.limits.batch
        for actor in ACTORS:
            outstanding = self.queue.outstanding(actor)
            assert outstanding <= len(self.running[actor])
            assert outstanding == len(self.running[actor]) or self.returned
        assert "learner" in self.queue.waiting_for(self.now)

    def teardown(self) -> None:
        if hasattr(self, "limits"):
            self.drive_to_the_next_batch()
            self.nothing_is_lost_and_nothing_is_twice()


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=100, stateful_step_count=50)
