"""The configuration: one TOML file, every field also a flag (``--learner.learning-rate 1e-4``).

Three families: the sections below are ours; ``[sglang]`` / ``--sglang-*`` goes to SGLang's servers, ``[megatron]`` /
``--megatron-*`` to Megatron's configs, unread. What follows from other fields is a property, never a field.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from slime_async.config.algorithm import AlgorithmConfig
from slime_async.config.base import Section


class RunConfig(Section):
    """The run as a whole."""

    name: str = "run"
    """Names the run directory, together with the time it started"""
    directory: Path = Path("runs")
    """Where run directories are made"""
    steps: PositiveInt = 200
    """How many batches RL trains, and so the last weight version"""
    time_limit_s: PositiveFloat | None = None
    """Seconds of RL after which no further batch is trained; the run then ends as after its last step"""
    seed: int = 0
    """Seeds data order, sampling and initialisation"""
    deterministic: bool = False
    """Bitwise repeatable at staleness 0, and after a resumption: one thread, fixed decoding slots, batches sorted by
    task, torch's deterministic algorithms; slower"""
    view: Literal["auto", "lines"] = "auto"
    """In a terminal ``auto`` fills the window with a live view; without one, and with ``lines``, lines are printed"""
    log_interval_s: PositiveFloat = 5.0
    """Seconds between progress lines"""


class ModelConfig(Section):
    """What is trained."""

    path: str = ""
    """A Hugging Face checkpoint directory; or module:function (directory, seed) that writes one"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the learner's model weights; the optimizer always keeps fp32 main weights"""


class SourceConfig(Section):
    """One source of tasks."""

    factory: str
    """module:callable; called with ``arguments`` it returns a sequence of tasks (len() and [index])"""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the factory"""
    dry_run: dict[str, Any] = Field(default_factory=dict)
    """Arguments that stand in for these with ``--dry-run``: a sample of the data that is always there"""
    weight: PositiveFloat = 1.0
    """Its share of the training tasks, relative to the other sources"""


class TaskConfig(Section):
    """What the policy is asked to do, and how it is judged."""

    train: dict[str, SourceConfig] = Field(default_factory=dict)
    """Training sources by name"""
    evaluation: dict[str, SourceConfig] = Field(default_factory=dict)
    """Held-out sources by name; never trained on"""
    generate: str = "slime_async.actors.single_turn:generate"
    """module:async function (task, policy) that plays one episode, or a class that has it as a method"""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of ``generate``: of the function, after (task, policy), or of the class"""
    reward: str = ""
    """module:function (task content, answer text, finish reason) → float; the single-turn default needs it"""
    group_reward: str = ""
    """module:function (group) → one reward per sample, which replace those of the episodes"""
    filter: str = ""
    """module:function (group) → whether to train on it; groups that are refused are replaced by others"""
    credit: Literal["episode", "to-go"] = "episode"
    """Every turn gets the whole return, or what its branch earned from that turn on"""
    on_truncated: Literal["train", "mask"] = "train"
    """Episodes that a limit ended: trained like others, or without weight in the loss; their rewards always count"""
    truncated_reward: float = 0.0
    """Final reward of an episode that a limit ended before its environment gave one"""
    overlong_tokens: int = Field(0, ge=0)
    """Sampled tokens before the limit from which on the reward shrinks; 0 turns it off"""
    overlong_penalty: float = Field(1.0, ge=0)
    """What an episode loses that used the whole limit; linear from 0 over ``overlong_tokens``"""
    processes: PositiveInt = 1
    """Worker processes per actor for slow functions and environments; see docs/tasks.md"""
    isolate_reward: bool = False
    """Call ``reward`` in a worker process: needed where it takes milliseconds, or may never return"""
    process_memory_bytes: PositiveInt = 2 << 30
    """Address space of one worker process; beyond it, its call fails"""
    process_timeout_s: PositiveFloat = 60.0
    """Of one call in a worker process; the worker is killed when it takes longer"""
    epochs: PositiveInt | None = None
    """Passes over the training sources; endless when not set"""
    shuffle: bool = True
    """Visit each source in an order drawn from the seed, anew in every epoch"""


class SamplingConfig(Section):
    """How actors sample in training. Evaluation takes the same unless its section says otherwise."""

    max_new_tokens: PositiveInt = 128
    """Per turn"""
    temperature: float = Field(1.0, ge=0)
    """0 is greedy"""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the likeliest tokens that together have this probability; 1 keeps all"""
    top_k: int = -1
    """Sample from this many likeliest tokens; −1 keeps the whole vocabulary"""
    max_context_tokens: PositiveInt = 4096
    """Prompt and answer together"""
    max_episode_tokens: PositiveInt | None = None
    """Sampled in all turns of an episode; the episode is truncated where they run out"""
    turn_timeout_s: PositiveFloat | None = None
    """A turn that takes longer ends with what it has"""
    truncate_after_s: PositiveFloat | None = None
    """An episode is truncated then; ``actor.episode_timeout_s`` fails one that takes still longer"""


class ActorConfig(Section):
    """Actor processes and the engines they hold."""

    count: int = Field(1, ge=0)
    """Actor processes that ``slime-async train`` starts; 0 when they are started elsewhere"""
    engine: Literal["embedded", "sglang"] = "embedded"
    """Which engine an actor runs"""
    engines: PositiveInt = 1
    """Engines in one actor, each with its own copy of the weights, on [sglang] tp_size × pp_size devices each"""
    engine_urls: tuple[str, ...] = ()
    """SGLang servers that run elsewhere, in place of engines of the actor's own"""
    devices: tuple[int, ...] = ()
    """GPUs of this machine's actors, in order, shared out among their SGLang servers; empty: what CUDA shows"""
    engine_stall_timeout_s: PositiveFloat = 120.0
    """An SGLang server that has requests and samples nothing for this long is taken for hung, and restarted"""
    record_routing: bool = False
    """SGLang servers report which experts each token took, for learner.replay_routing; external ones need
    --enable-return-routed-experts"""
    prefill_fraction: float = Field(1 / 16, ge=0, le=0.5)
    """Requests enter an SGLang server in bunches, of this fraction of those in it: each prefill holds up all that
    decode. 0: each enters at once"""
    prefill_wait_s: PositiveFloat = 1.0
    """How long a request waits for others to enter with, at most; less where answers are short"""
    health_interval_s: PositiveFloat = 5.0
    """Between two health checks of each engine"""
    slots: PositiveInt = 128
    """Trajectories that run at once in one actor"""
    max_running_requests: PositiveInt = 128
    """Requests that the embedded engine decodes in one batch"""
    threads: PositiveInt = 1
    """CPU threads of the embedded engine"""
    device: str = "cpu"
    """Of the embedded engine"""
    max_restarts: int = Field(8, ge=0)
    """How many times dead actors are started again, all together, before the run fails; within an actor, its engines"""
    startup_timeout_s: PositiveFloat = 600.0
    """Until an engine is up"""
    episode_timeout_s: PositiveFloat = 600.0
    """An episode that takes longer fails, is counted, and its sample is granted again"""
    drain_timeout_s: float = Field(30.0, ge=0)
    """How long an actor that is told to leave (SIGTERM, SIGUSR1) goes on with what it has begun; the rest is
    generated elsewhere. Keep it below the notice that the scheduler gives"""
    delay_s: float = Field(0.0, ge=0)
    """Artificial latency before each delivery, for tests and benchmarks of staleness"""


class StalenessConfig(Section):
    """How far behind the learner the trained tokens may be: paced at admission, bounded at consumption."""

    max_staleness: int = Field(2, ge=0)
    """η: no token that is older than this many versions has weight in the loss; 0 is synchronous RL"""
    on_stale: Literal["mask", "drop", "wait", "train"] = "mask"
    """Tokens beyond the bound: masked; or their whole group dropped; or batches wait in strict order of grants; or
    they train and are counted"""


class BatchConfig(Section):
    """The shape of a training batch, and what the queue may hold."""

    group_size: PositiveInt = 8
    """n: trajectories per task that share a baseline"""
    groups: PositiveInt = 32
    """Groups per batch; the batch B has groups · group_size trajectories"""
    queue_trajectories: PositiveInt | None = None
    """Bound on trajectories held by the hub; (η + 1) · B when not set"""
    queue_bytes: PositiveInt | None = None
    """Bound on bytes held by the hub, a full queue stops the grants; when not set, 4 GiB or one batch of the largest
    trajectories, whichever is more"""
    max_trajectory_bytes: PositiveInt = 64 << 20
    """A larger trajectory is refused with an error"""
    max_attempts: PositiveInt = 8
    """A sample that failed this often takes its whole group with it"""
    drop_equal_rewards: bool = False
    """Drop complete groups whose rewards are all equal, and generate others instead"""

    @property
    def trajectories(self) -> int:
        """B"""
        return self.groups * self.group_size


class WeightsConfig(Section):
    """How weights reach the engines."""

    publish: Literal["in_flight", "batch_boundary"] = "in_flight"
    """While requests run, or only between batches (one-step-off)"""
    pause: Literal["in_place", "retract", "abort"] = "in_place"
    """What happens to requests in flight: keep their KV cache, recompute it, or resubmit them"""
    backend: Literal["auto", "gloo", "nccl", "ipc"] = "auto"
    """What carries them: a broadcast over gloo or nccl (auto: as the learner's device wants it), or ipc, through memory
    that learner and engine share, for both on one GPU"""
    sources: PositiveInt = 1
    """Ranks of the learner that send: 1 has everything brought to its first rank; several send what they hold
    themselves, each a part, over groups of their own, to different engines at the same time"""
    timeout_s: PositiveFloat = 60.0
    """Deadline of each phase of a publish; an engine that misses it is ejected"""
    buffer_bytes: PositiveInt = 256 << 20
    """They go over side by side, in buffers of so many bytes: large enough for the link's rate, small enough that an
    engine has room for the one that it loads and those that come, 2 or 3 in all"""
    engine_buffer_bytes: PositiveInt = 8 << 30
    """An SGLang server that gets weights tensor by tensor holds a call's whole beside what it has: so many bytes at
    most, and what is larger comes in several calls"""

    @property
    def command_timeout_s(self) -> float:
        """Of one command in an actor: the weight group's own deadline, which says more, comes first"""
        return 1.5 * self.timeout_s

    @property
    def reply_timeout_s(self) -> float:
        """Of one command as the learner sees it: whoever waits longest ejects"""
        return 2 * self.timeout_s


class LearnerConfig(Section):
    """Training."""

    ranks: PositiveInt = 1
    """Processes of the learner, one per device"""
    learning_rate: PositiveFloat = 1e-6
    """Of Adam, after the warm-up"""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up"""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled from the gradient, as in AdamW"""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the gradient's mean"""
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    """Decay of the squared gradient's mean"""
    adam_eps: PositiveFloat = 1e-8
    """Added to the root of the squared gradient's mean"""
    clip_grad: float = Field(1.0, ge=0)
    """Bound on the gradient's norm; 0 turns it off"""
    microbatch_tokens: PositiveInt = 16384
    """Token budget of one packed microbatch"""
    keep_logits: bool = False
    """Keep the logits of a microbatch (2 bytes per token and vocabulary entry) from the forward to the backward pass,
    instead of computing them twice"""
    recompute_elementwise: bool = False
    """Compute norms and SwiGLU again in the backward pass: a quarter of the activations less, for little time"""
    replay_routing: bool = True
    """Send a token through the experts that the engine took for it, where the engine recorded them"""
    optimizer_steps: PositiveInt = 1
    """Optimizer steps per batch, on disjoint minibatches of whole groups, with π_prox held"""
    threads: PositiveInt = 1
    """CPU threads per rank while RL runs"""
    lease_timeout_s: PositiveFloat = 600.0
    """Waiting this long for a batch ends the run with an error that says what was missing"""
    max_restarts: int = Field(4, ge=0)
    """How many times a dead learner is started again, from its latest checkpoint, before the run fails; without
    checkpoint.interval_steps it never is"""


class CriticConfig(Section):
    """The critic that ``algorithm.advantage = "gae"`` trains: a head of its own on the policy's last hidden states."""

    gamma: float = Field(1.0, ge=0, le=1)
    """Discount per sampled token"""
    gae_lambda: float = Field(0.95, ge=0, le=1)
    """1 trusts returns, 0 trusts the critic's next value"""
    normalize: bool = True
    """Bring the batch's advantages to mean 0 and standard deviation 1"""
    loss_coef: float = Field(0.5, gt=0)
    """Weight of the value loss beside the policy's"""
    clip: PositiveFloat | None = 0.2
    """How far a value may move from what it was before the batch and still count as better; not clipped when not set"""
    train_trunk: bool = True
    """Let the value loss change the policy's own weights too; false trains the head alone"""


class CheckpointConfig(Section):
    """What a learner goes on from after its death or with --resume, and exports for others."""

    interval_steps: int = Field(0, ge=0)
    """Batches between two checkpoints; 0 writes only the one at the end"""
    keep: PositiveInt = 2
    """How many checkpoints stay: the latest ones"""
    async_write: bool = True
    """Write behind the next steps, from a copy in host memory; false stops training meanwhile and still copies"""
    timeout_s: PositiveFloat = 600.0
    """A checkpoint that takes longer to write ends the run"""
    hf_interval_steps: int = Field(0, ge=0)
    """Batches between two Hugging Face exports below checkpoints/hf, which all stay; 0 exports only the last weights"""


class WarmStartConfig(Section):
    """An optional supervised phase on the same learner, before version 0 is published."""

    steps: int = Field(0, ge=0)
    """0 skips it"""
    demonstrations: str = ""
    """module:callable (seed) that returns a sequence of (prompt text, answer text)"""
    batch_size: PositiveInt = 64
    """Demonstrations per step"""
    learning_rate: PositiveFloat = 1e-3
    """Of this phase, constant"""
    threads: PositiveInt = 1
    """CPU threads of this phase, while actors are idle"""
    control_steps: int = Field(0, ge=0)
    """Also train a copy this many further supervised steps and report its accuracy: what RL has to beat"""


class EvaluationConfig(Section):
    """Held-out accuracy, by the actors themselves."""

    before: bool = True
    """At version 0"""
    after: bool = True
    """At the last version"""
    interval_versions: PositiveInt | None = None
    """Also at every so many versions, beside training; never when not set"""
    tasks: PositiveInt = 512
    """Tasks per evaluation, the first ones of each source"""
    samples: PositiveInt = 1
    """Answers per task; with several, pass@k is reported, too"""
    share: float = Field(0.125, gt=0, le=1)
    """Of each actor's slots, that evaluations beside training may take; those before and after take all"""
    timeout_s: PositiveFloat = 300.0
    """Deadline of one evaluation"""


class BenchConfig(Section):
    """What ``slime-async bench`` compares, and how it measures."""

    modes: tuple[str, ...] = (
        "colocated",
        "disaggregated",
        "one-step-off",
        "async-1",
        "async-2",
        "async-4",
        "async-8",
    )
    """Synchronous on all devices, synchronous on separate ones, one-step-off, asynchronous with η"""
    devices: PositiveInt = 2
    """What every mode has: CPU cores for embedded engines on the CPU, otherwise GPUs"""
    splits: tuple[str, ...] = ("1:1",)
    """Learner's devices : actors' devices, of the modes that separate them"""
    warmup_s: PositiveFloat = 10.0
    """Of each mode, not measured; at least one batch"""
    windows: int = Field(3, ge=2)
    """Repeated measurements of each mode"""
    window_s: PositiveFloat = 30.0
    """Of one of them"""
    saturated_s: PositiveFloat = 6.0
    """For each measurement of an engine that is kept full, and of a learner fed from memory"""
    target_accuracy: float | None = Field(None, gt=0, le=1)
    """Also report how long each mode takes to this share of solved tasks in a batch"""


class LoggersConfig(Section):
    """Where metrics go besides the run directory's ``metrics.jsonl``."""

    tensorboard: bool = False
    """Event files in the run directory; needs the extra ``tensorboard``"""
    wandb: bool = False
    """Weights & Biases; needs the extra ``wandb``, and a login unless it is offline"""
    wandb_project: str = "slime-async"
    """The project that the run appears in"""
    wandb_mode: Literal["online", "offline"] = "online"
    """Offline writes files only, for ``wandb sync`` later"""
    prometheus: bool = False
    """Every role serves its numbers to Prometheus, which finds it by a file (see the next)"""
    prometheus_targets: Path | None = None
    """Directory of the files RUN-PROCESS.json that Prometheus discovers; when not set, ``prometheus`` in the run's"""
    prometheus_address: str = "127.0.0.1"
    """Where it listens; 0.0.0.0 lets other machines scrape it, unauthenticated: keep the port inside the cluster"""
    prometheus_port: int = Field(0, ge=0, le=65435)
    """The first port that is tried, processes of one machine take the next free ones; 0 takes any"""
    format: Literal["text", "json"] = "text"
    """Of the roles' log lines; json has role, host and version in every line, for a log collector"""


class HubConfig(Section):
    """The hub's address and its patience."""

    address: str = "tcp://127.0.0.1:0"
    """Where the hub listens; port 0 takes a free one"""
    insecure: bool = False
    """Allow an address beyond loopback without authentication"""
    keys: Path | None = None
    """Directory of CURVE keys (``slime-async keygen DIR``): with it every connection is authenticated and encrypted"""
    key: str = "client"
    """Which pair in ``keys`` this machine's actors, learner and observers show; the hub has its own"""
    journal: bool = True
    """Keep a journal in the run directory, so that a hub that is killed goes on where it was"""
    journal_fsync: bool = False
    """Have the journal survive power loss too: every batch of writes waits for the disk"""
    max_restarts: int = Field(8, ge=0)
    """How often a hub that was killed is started again before the run fails; without a journal, never"""
    reconnect_s: PositiveFloat = 60.0
    """For how long actors and learner try to reach a hub that went away; longer than ``heartbeat_timeout_s``"""
    heartbeat_interval_s: PositiveFloat = 1.0
    """Between the signs of life, and reports, of every process"""
    heartbeat_timeout_s: PositiveFloat = 10.0
    """A peer silent for this long is dead: its reservations are granted again"""
    stall_timeout_s: PositiveFloat = 120.0
    """When nothing moves for this long, the log names what everybody waits for"""


class ClusterConfig(Section):
    """What roles need of a cluster's machines; only the launchers ``slurm`` and ``ray`` read it."""

    actor_gpus: int = Field(0, ge=0)
    """GPUs of one actor process"""
    actor_gpu_kind: str = ""
    """As the scheduler names it (Ray: an accelerator type, H100; Slurm: a gres type, h100); empty takes any"""
    actor_cpus: PositiveInt = 1
    """CPU cores of one actor process"""
    learner_gpus: int = Field(0, ge=0, le=1)
    """GPUs of one learner rank"""
    learner_gpu_kind: str = ""
    """As for actors; a kind of its own keeps the learner off the actors' machines"""
    learner_cpus: PositiveInt = 1
    """CPU cores of one learner rank"""
    learner_ranks_per_node: PositiveInt | None = None
    """Ranks that share a machine; all of them when not set"""
    hub_cpus: PositiveInt = 2
    """CPU cores of the hub, which the launcher shares"""
    rendezvous_port: int = Field(29500, ge=1024, le=65535)
    """Where the learner's machines meet, on the first of them; unused on a learner of one machine"""
    sbatch: str = ""
    """Options of sbatch for all components of a Slurm job: "--account=lab --time=24:00:00" """
    sbatch_hub: str = ""
    """Options for the hub's component alone: "--partition=cpu" """
    sbatch_learner: str = ""
    """Options for the learner's component alone: "--partition=h200 --exclusive" """
    sbatch_actors: str = ""
    """Options for the actors' component alone"""
    setup: str = ""
    """Shell lines that a Slurm job begins with: modules, a virtual environment, NCCL's variables"""

    def learner_nodes(self, ranks: int) -> int:
        """Machines of a learner of so many ranks."""
        return ranks // (self.learner_ranks_per_node or ranks)


class Config(Section):
    """Everything about one run."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    sampling: SamplingConfig = SamplingConfig()
    actor: ActorConfig = ActorConfig()
    staleness: StalenessConfig = StalenessConfig()
    batch: BatchConfig = BatchConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    weights: WeightsConfig = WeightsConfig()
    learner: LearnerConfig = LearnerConfig()
    critic: CriticConfig = CriticConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    hub: HubConfig = HubConfig()
    bench: BenchConfig = BenchConfig()
    loggers: LoggersConfig = LoggersConfig()
    cluster: ClusterConfig = ClusterConfig()
    sglang: dict[str, Any] = Field(default_factory=dict)
    """Arguments of SGLang's servers, by their own names"""
    megatron: dict[str, Any] = Field(default_factory=dict)
    """Fields of Megatron's model, DDP and optimizer configs, by their own names"""

    @property
    def has_critic(self) -> bool:
        """Whether a value head is trained."""
        return self.algorithm.advantage == "gae"

    @property
    def hub_restarts(self) -> int:
        """How many times a hub that was killed is started again: never where it would have forgotten everything."""
        return self.hub.max_restarts if self.hub.journal else 0

    @property
    def learner_restarts(self) -> int:
        """How many times a dead learner is started again: never where it would have to begin anew."""
        return self.learner.max_restarts if self.checkpoint.interval_steps else 0
