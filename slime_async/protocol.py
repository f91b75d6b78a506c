"""Every message that crosses a process border, as typed, immutable values. No I/O here.

Two patterns only. A *call* has one reply (or an ``ErrorReply``) and a deadline; a *note* has none. Either side of a
connection may start either. ``T ──► H`` below reads: T sends it to the hub.

==================  ====================  ============================================================
message             from ──► to           reply, or (note)
==================  ====================  ============================================================
Hello               any ──► hub           Welcome
Heartbeat           any ◄─► hub           (note) carries the role's latest report
Goodbye             any ──► hub           (note) leaves on purpose, now
Leaving             actor ──► hub         Ok; nothing is granted to it from now on, what it holds it may deliver
Granted             hub ──► actor         (note) reservations; these are the actor's credits
Started             actor ──► hub         (note) a reservation's generation began
Deliver             actor ──► hub         Delivered, once the trajectory is safe with the hub
Failed              actor ──► hub         Ok; the sample is granted again
EnginesChanged      actor ──► hub         (note) an engine of the actor's died, or came up again
Ejected             hub ──► actor         (note) the learner gave an engine up: it has to be restarted
Lease               learner ──► hub       Batch, or NotReady when the deadline came first
FollowLease         learner ──► hub       Batch of what is stored, or NotReady; a rank asks what the lease was given
Fetch               learner ──► hub       Fetched; a rank takes its share of a leased batch
Commit              learner ──► hub       Ok; idempotent by (incarnation, train_version)
Published           learner ──► hub       Ok; every live engine holds these weights now
Durable             learner ──► hub       Ok; a checkpoint holds these weights, what trained them is needed no more
Drain               learner ──► hub       Ok, when no trajectory is being generated; none is granted until Published
Evaluate            learner ──► hub       EvaluationResult
Membership          hub ──► learner       (note) the set of engines changed
Eject               learner ──► hub       Ok; the engine is no member any more, and its actor is told
Relay               learner ──► hub       the reply of the actor to the message inside
  JoinWeightGroup   … ──► actor           Ok, when the engine is a member
  PrepareWeights    … ──► actor           Ok, when the engine is well and can use what the manifest names
  PauseEngine       … ──► actor           Ok, when no token is being sampled
  ReceiveWeights    … ──► actor           Received, when the new weights are in use
  ResumeEngine      … ──► actor           Ok
GetStatus           any ──► hub           RunStatus
GetTime             any ──► hub           HubTime
Finish              learner ──► hub       Ok; the hub tells everyone to leave
Shutdown            hub ──► any           (note) leave now, and why
==================  ====================  ============================================================
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from slime_async.trajectory import TaskRef, Trajectory, TrajectoryKey, WeightId

PROTOCOL_VERSION = 4
"""Peers of different protocol versions refuse each other, naming both."""

Role = Literal["actor", "learner", "observer"]
Scalar = bool | int | float | str
SOLVED = 1.0
"""A task counts as solved from this reward on"""
Report = dict[str, Scalar]
"""Flat metrics of one role, by documented name; what the live view and the run's metrics are made of."""


class Message:
    """Base of everything that can be sent. Subclasses are frozen dataclasses; the codec knows them by class name."""

    __slots__ = ()


# ------------------------------------------------------------------------------------------------ connection


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """One engine as the learner needs to know it for weight groups."""

    engine_id: str
    actor: str
    num_ranks: int
    takes_buffers: bool = False
    """Weights may come to it side by side in large buffers; else each tensor by itself"""


@dataclass(frozen=True, slots=True)
class Hello(Message):
    """First message of every connection. ``name`` is unique among the living; a second life needs a new name."""

    role: Role
    name: str
    slots: int = 0
    """Actors: how many trajectories may run here at once"""
    engines: tuple[EngineInfo, ...] = ()
    sources: dict[str, int] = field(default_factory=dict)
    """Actors: the task sources it can look up and how many tasks each holds; all actors must agree"""
    running: tuple[Reservation, ...] = ()
    """Actors that come back: what they still work on"""
    incarnation: int = 0
    """Learners only"""
    version: int = 0
    """Learners only: the version whose weights it holds now"""


@dataclass(frozen=True, slots=True)
class Welcome(Message):
    run_id: str
    heartbeat_interval_s: float
    heartbeat_timeout_s: float
    """Silence after which each side takes the other for dead"""
    version: int
    """The published version, −1 before the first publication"""
    engines: tuple[EngineInfo, ...] = ()
    """Learners only: the engines that live now"""


@dataclass(frozen=True, slots=True)
class Heartbeat(Message):
    report: Report = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Goodbye(Message):
    pass


@dataclass(frozen=True, slots=True)
class Leaving(Message):
    """An actor that was told to go finishes what it has begun first; its goodbye returns the rest."""


@dataclass(frozen=True, slots=True)
class Ok(Message):
    pass


@dataclass(frozen=True, slots=True)
class ErrorReply(Message):
    """A call that failed at the other side. ``code`` is the exception's class, ``message`` says what to do."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Shutdown(Message):
    reason: str
    failed: bool = False


# ---------------------------------------------------------------------------------------------- trajectories


@dataclass(frozen=True, slots=True)
class Reservation:
    """The right, and the duty, to generate one trajectory. ``attempt`` counts how often it was granted before."""

    task: TaskRef
    sample: int
    attempt: int
    evaluation: str = ""
    """The evaluation it belongs to; empty for training"""

    @property
    def key(self) -> TrajectoryKey:
        return TrajectoryKey(self.task.serial, self.sample)


@dataclass(frozen=True, slots=True)
class Granted(Message):
    reservations: tuple[Reservation, ...]


@dataclass(frozen=True, slots=True)
class Started(Message):
    key: TrajectoryKey
    attempt: int


@dataclass(frozen=True, slots=True)
class Deliver(Message):
    trajectory: Trajectory
    evaluation: str = ""


@dataclass(frozen=True, slots=True)
class Delivered(Message):
    """``accepted``, ``duplicate`` (another attempt came first), ``unwanted`` (its group is gone): all final."""

    outcome: Literal["accepted", "duplicate", "unwanted"]


@dataclass(frozen=True, slots=True)
class Failed(Message):
    key: TrajectoryKey
    attempt: int
    reason: str
    evaluation: str = ""
    kind: str = ""
    """What it is counted as: the exception's class, with its own reason where it carries one"""


@dataclass(frozen=True, slots=True)
class EnginesChanged(Message):
    """The actor's engines that run now; one that was restarted has a new id."""

    engines: tuple[EngineInfo, ...]


@dataclass(frozen=True, slots=True)
class Ejected(Message):
    engine_id: str
    reason: str


# --------------------------------------------------------------------------------------------------- learner


@dataclass(frozen=True, slots=True)
class Lease(Message):
    """Ask for the batch that takes the weights from ``train_version`` to ``train_version + 1``."""

    incarnation: int
    train_version: int
    wait_s: float
    """How long the hub may hold the call before it answers ``NotReady``"""
    payloads: bool = True
    """Whether the trajectories come along; without them, ``Batch.stored`` says what there is to be fetched"""


@dataclass(frozen=True, slots=True)
class FollowLease(Message):
    """Ask what the learner's ``Lease`` of the same incarnation and version was given, as soon as it was."""

    incarnation: int
    train_version: int
    wait_s: float


@dataclass(frozen=True, slots=True)
class StoredTrajectory:
    """What planning needs to know about one trajectory of a leased batch, and where it lies."""

    key: TrajectoryKey
    tokens: int
    size_bytes: int
    oldest_version: int
    """Of its sampled tokens; −1 where none was"""
    newest_version: int
    reward: float
    store: str = ""
    """Address of the store that holds it; empty: whoever said so does"""


@dataclass(frozen=True, slots=True)
class Fetch(Message):
    """Ask for trajectories of a batch that is leased."""

    train_version: int
    keys: tuple[TrajectoryKey, ...]


@dataclass(frozen=True, slots=True)
class Fetched(Message):
    trajectories: tuple[Trajectory, ...]
    """In the order of the keys"""


@dataclass(frozen=True, slots=True)
class Batch(Message):
    """Complete groups, oldest grant first; a leased batch stays leased until its commit."""

    train_version: int
    trajectories: tuple[Trajectory, ...]
    stale_tokens_dropped: int = 0
    """Sampled tokens of groups dropped whole as stale since the batch before"""
    rewards: tuple[float, ...] = ()
    """In the place of the trajectories' own, where groups are judged (``task.group_reward``); else empty"""
    groups_filtered: int = 0
    """Groups dropped for equal rewards, or by ``task.filter``, since the batch before"""
    tokens_filtered: int = 0
    """Sampled in them"""
    episodes_failed: dict[str, int] = field(default_factory=dict)
    """By what they are counted as, since the batch before; each was granted again, or its group dropped"""
    stored: tuple[StoredTrajectory, ...] = ()
    """In the place of ``trajectories``, where the ranks fetch their own"""


@dataclass(frozen=True, slots=True)
class NotReady(Message):
    """``reason`` names what is missing, for the log and the live view."""

    reason: str


@dataclass(frozen=True, slots=True)
class Commit(Message):
    incarnation: int
    train_version: int


@dataclass(frozen=True, slots=True)
class Published(Message):
    weights: WeightId


@dataclass(frozen=True, slots=True)
class Durable(Message):
    """A checkpoint of ``version`` is complete: whatever happens, no batch below it is ever trained again."""

    incarnation: int
    version: int


@dataclass(frozen=True, slots=True)
class Drain(Message):
    """Publishing at batch boundaries: wait until everything granted has been delivered, failed or lost.

    Nothing is granted meanwhile, nor afterwards until ``Published``; a drain that fails lets grants go on.
    """

    wait_s: float


@dataclass(frozen=True, slots=True)
class Evaluate(Message):
    """Run ``num_tasks`` tasks of ``source``, beside training, with whatever weights the engines hold."""

    name: str
    source: str
    num_tasks: int
    wait_s: float
    samples: int = 1
    """Answers per task"""
    share: float = 1.0
    """Of each actor's slots, that it may take at once"""


@dataclass(frozen=True, slots=True)
class EvaluationResult(Message):
    name: str
    rewards: tuple[float, ...]
    """Of all answers, by index of the task, then by sample; those without a result are left out"""
    failed: int
    """Answers without a result"""
    versions: tuple[int, ...]
    """The versions that produced the answers, ascending"""
    counts: tuple[int, ...] = ()
    """How many of the rewards are each task's, by index; empty for one answer per task"""

    @property
    def tasks(self) -> int:
        return len(self.counts) or len(self.rewards) + self.failed

    @property
    def accuracy(self) -> float:
        """Share of the answers with a reward of at least ``SOLVED``; one without a result is not solved."""
        return sum(reward >= SOLVED for reward in self.rewards) / max(1, len(self.rewards) + self.failed)

    @property
    def pinned(self) -> bool:
        """All answers came from one version whole; otherwise weights changed meanwhile, and the result spans several"""
        return len(self.versions) == 1


@dataclass(frozen=True, slots=True)
class Finish(Message):
    reason: str


# --------------------------------------------------------------------------------------------------- weights


@dataclass(frozen=True, slots=True)
class WeightGroupSpec:
    """How to find a weight group. Rank 0 is a source rank of the learner; ``epoch`` counts memberships."""

    name: str
    epoch: int
    master_address: str
    master_port: int
    world_size: int
    backend: Literal["gloo", "nccl"]
    timeout_s: float


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One Hugging Face tensor: its checkpoint name, dtype (``bfloat16``, …) and whole shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WeightManifest:
    """What one publication carries, in sending order."""

    tensors: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class CudaMemory:
    """A CUDA allocation as other processes can open it; the fields are torch's own."""

    device: int
    handle: bytes
    size: int
    offset: int
    ref_counter: bytes
    ref_counter_offset: int
    event: bytes
    event_sync_required: bool


@dataclass(frozen=True, slots=True)
class HostMemory:
    """A shared memory object by name; the fields are torch's own."""

    manager: bytes
    handle: bytes
    size: int


@dataclass(frozen=True, slots=True)
class SharedTensor:
    """A tensor in memory that processes of one machine share; its name, dtype and shape are in a manifest."""

    offset: int
    """In elements"""
    memory: CudaMemory | HostMemory


@dataclass(frozen=True, slots=True)
class Membership(Message):
    engines: tuple[EngineInfo, ...]


@dataclass(frozen=True, slots=True)
class Eject(Message):
    """Give up an engine that did not answer in time."""

    engine: EngineInfo
    reason: str


@dataclass(frozen=True, slots=True)
class JoinWeightGroup(Message):
    engine_id: str
    spec: WeightGroupSpec
    rank_offset: int
    others: tuple[WeightGroupSpec, ...] = ()
    """Where several ranks of the learner send: the same engines' groups with the sources after the first"""


@dataclass(frozen=True, slots=True)
class PrepareWeights(Message):
    engine_id: str
    weights: WeightId
    manifest: WeightManifest


@dataclass(frozen=True, slots=True)
class PauseEngine(Message):
    engine_id: str
    mode: Literal["in_place", "retract", "abort"]


@dataclass(frozen=True, slots=True)
class ReceiveWeights(Message):
    engine_id: str
    manifest: WeightManifest
    weights: WeightId
    shared: tuple[SharedTensor, ...] = ()
    """Where the tensors lie, in the manifest's order; empty when they are broadcast"""
    shares: tuple[int, ...] = ()
    """How many of the tensors come over each of the engine's groups, in the order it joined them; empty: it has one"""
    buffer_bytes: int = 0
    """They are broadcast side by side in buffers of so many bytes (``transport.weight_layout``); 0: each by itself"""


@dataclass(frozen=True, slots=True)
class Received(Message):
    """The engine uses the new weights."""

    requests_in_flight: int
    """That were being sampled when they arrived"""


@dataclass(frozen=True, slots=True)
class ResumeEngine(Message):
    engine_id: str


EngineCommand = JoinWeightGroup | PrepareWeights | PauseEngine | ReceiveWeights | ResumeEngine


@dataclass(frozen=True, slots=True)
class Relay(Message):
    """Hand ``message`` to the actor that holds its engine, and its reply back, within ``wait_s``."""

    actor: str
    message: EngineCommand
    wait_s: float


# ---------------------------------------------------------------------------------------------------- status


@dataclass(frozen=True, slots=True)
class GetStatus(Message):
    pass


@dataclass(frozen=True, slots=True)
class GetTime(Message):
    """What time the hub has, to lay the spans of several machines over each other."""


@dataclass(frozen=True, slots=True)
class HubTime(Message):
    time_ns: int
    """Since the Unix epoch"""


@dataclass(frozen=True, slots=True)
class PeerStatus:
    """One connected role, as the hub sees it."""

    role: Role
    name: str
    silent_s: float
    """Since its last message"""
    report: Report


@dataclass(frozen=True, slots=True)
class RunStatus(Message):
    run_id: str
    queue: Report
    """``QueueStatistics``, flattened"""
    peers: tuple[PeerStatus, ...]
    hub: Report = field(default_factory=dict)
    """What the hub's process tells of itself (``slime_async.telemetry.process``), as every peer's report does"""
