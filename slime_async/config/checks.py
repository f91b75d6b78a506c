"""What is wrong between fields: each complaint names the numbers that clash and what to change."""

from __future__ import annotations

import re
from collections.abc import Iterator

from slime_async.addresses import is_loopback
from slime_async.config.schema import Config

FUNCTION_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")

SGLANG_KEYS = frozenset({"api_key", "admin_api_key"})
"""Fields of ``[sglang]`` that are needed to speak to a server, too"""


def complaints(config: Config) -> list[str]:
    """Everything that cannot work, in the schema's order; empty when the configuration is sound."""
    return [
        *_names(config),
        *_tasks(config),
        *_function_paths(config),
        *_lengths(config),
        *_queue(config),
        *_engines(config),
        *_training(config),
        *_hub(config),
        *_cluster(config),
    ]


def function_paths(config: Config) -> dict[str, str]:
    """Every module:function of the configuration by its key; empty ones are left out."""
    paths = {
        "model.path": config.model.path if ":" in config.model.path else "",
        "task.generate": config.task.generate,
        "task.reward": config.task.reward,
        "task.group_reward": config.task.group_reward,
        "task.filter": config.task.filter,
        "warm_start.demonstrations": config.warm_start.demonstrations,
    }
    for family, sources in (("train", config.task.train), ("evaluation", config.task.evaluation)):
        paths |= {f"task.{family}.{name}.factory": source.factory for name, source in sources.items()}
    return {key: path for key, path in paths.items() if path}


def _names(config: Config) -> Iterator[str]:
    if not re.fullmatch(r"[\w.-]+", config.run.name) or config.run.name.startswith("."):
        yield f"run.name = {config.run.name!r} names a directory: use letters, digits, '-', '_' and '.'"


def _tasks(config: Config) -> Iterator[str]:
    if not config.model.path:
        yield "model.path is not set: give a Hugging Face checkpoint directory, or module:function that writes one"
    if not config.task.train:
        yield "no training source: add a table [task.train.NAME] with factory = 'module:function'"
    if not config.task.evaluation:
        asked = [f"evaluation.{when}" for when in ("before", "after") if getattr(config.evaluation, when)]
        asked += ["evaluation.interval_versions"] if config.evaluation.interval_versions else []
        if asked:
            yield (
                f"{' and '.join(asked)} ask{'s' if len(asked) == 1 else ''} for an evaluation, but there is no "
                f"[task.evaluation.NAME]: add one, or set {' and '.join(f'{key} = false' for key in asked)}"
            )
    for name in sorted(config.task.train.keys() & config.task.evaluation.keys()):
        yield f"source {name!r} is both in task.train and in task.evaluation: sources need names of their own"


def _function_paths(config: Config) -> Iterator[str]:
    for key, path in function_paths(config).items():
        if not FUNCTION_PATH.fullmatch(path):
            yield f"{key} = {path!r} is no function's path: write package.module:function"


def _lengths(config: Config) -> Iterator[str]:
    new, context = config.sampling.max_new_tokens, config.sampling.max_context_tokens
    if new >= context:
        yield (
            f"sampling.max_new_tokens = {new} leaves no room for a prompt in sampling.max_context_tokens = {context}: "
            f"lower the first below {context} or raise the second"
        )

    limit = config.sampling.max_episode_tokens or new
    if config.task.overlong_tokens > limit:
        yield (
            f"task.overlong_tokens = {config.task.overlong_tokens} is more than the limit of {limit} sampled tokens "
            "before which it begins: every answer would lose reward; lower it"
        )
    truncated, failed = config.sampling.truncate_after_s, config.actor.episode_timeout_s
    if truncated is not None and truncated >= failed:
        yield (
            f"sampling.truncate_after_s = {truncated} is not before actor.episode_timeout_s = {failed}: episodes would "
            "fail before they could be truncated; raise the second"
        )


def _queue(config: Config) -> Iterator[str]:
    batch = config.batch
    size = f"a batch of {batch.trajectories} trajectories (batch.groups = {batch.groups} × batch.group_size = "
    size += f"{batch.group_size})"
    if batch.queue_trajectories is not None and batch.queue_trajectories < batch.trajectories:
        yield (
            f"batch.queue_trajectories = {batch.queue_trajectories} can never hold {size}: training would wait "
            f"for ever; use {batch.trajectories} or more, or leave it out"
        )
    if batch.queue_bytes is not None and batch.max_trajectory_bytes > batch.queue_bytes:
        yield (
            f"batch.max_trajectory_bytes = {batch.max_trajectory_bytes} does not fit into batch.queue_bytes = "
            f"{batch.queue_bytes}: raise the second or lower the first"
        )
    if batch.groups % config.learner.optimizer_steps:
        yield (
            f"batch.groups = {batch.groups} does not divide into learner.optimizer_steps = "
            f"{config.learner.optimizer_steps} minibatches of whole groups: use a multiple"
        )


def _engines(config: Config) -> Iterator[str]:
    actor = config.actor
    if actor.engine == "embedded":
        if actor.engine_urls:
            yield (
                f"actor.engine_urls = {list(actor.engine_urls)} name SGLang servers, but actor.engine = 'embedded': "
                "set actor.engine = 'sglang'"
            )
        if config.sglang:
            yield f"[sglang] sets {', '.join(config.sglang)}, but actor.engine = 'embedded' has no SGLang server"
        if actor.record_routing:
            yield "actor.record_routing = true needs actor.engine = 'sglang': the embedded engine runs no experts"
        return
    for url in actor.engine_urls:
        if not re.fullmatch(r"https?://[^/\s]+(/.*)?", url):
            yield f"actor.engine_urls: {url!r} is no URL: write http://HOST:PORT"
    if actor.engine_urls and (idle := config.sglang.keys() - SGLANG_KEYS):
        yield (
            f"[sglang] sets {', '.join(sorted(idle))}, but the servers of actor.engine_urls are started elsewhere: "
            "give it to them there; api_key and admin_api_key belong here"
        )
    if actor.engine_urls and actor.count > 1:
        yield (
            f"actor.engine_urls are the engines of one actor, but actor.count = {actor.count}: use 1, or start actors "
            "with URLs of their own"
        )
    if config.run.deterministic:
        yield "run.deterministic = true needs actor.engine = 'embedded': SGLang's batches depend on timing"


def _training(config: Config) -> Iterator[str]:
    if config.warm_start.steps and not config.warm_start.demonstrations:
        yield (
            f"warm_start.steps = {config.warm_start.steps} needs warm_start.demonstrations = 'module:function', "
            "or warm_start.steps = 0"
        )
    if config.warm_start.control_steps and not config.warm_start.steps:
        yield (
            f"warm_start.control_steps = {config.warm_start.control_steps} goes on where warm_start.steps = 0 ended: "
            "set warm_start.steps too, or warm_start.control_steps = 0"
        )
    if config.run.deterministic and config.staleness.max_staleness:
        yield (
            f"run.deterministic = true needs staleness.max_staleness = 0, which is {config.staleness.max_staleness}: "
            "asynchronous runs depend on timing"
        )
    sources, ranks = config.weights.sources, config.learner.ranks
    if sources > ranks:
        yield f"weights.sources = {sources} are more than learner.ranks = {ranks}: use at most as many"
    if sources > 1 and config.weights.backend == "ipc":
        yield (
            f"weights.sources = {sources} send over process groups, but weights.backend = 'ipc' shares the memory of "
            "one rank: set weights.sources = 1, or weights.backend = 'nccl' with devices of their own"
        )
    for section in ("actor", "learner", "warm_start"):
        threads = getattr(config, section).threads
        if config.run.deterministic and threads > 1:
            yield f"run.deterministic = true needs {section}.threads = 1, which is {threads}: sums over threads vary"


def _hub(config: Config) -> Iterator[str]:
    hub = config.hub
    if not re.fullmatch(r"tcp://[^/\s]+:(\d+)", hub.address):
        yield f"hub.address = {hub.address!r} is no address: write tcp://HOST:PORT, port 0 takes a free one"
    elif not (is_loopback(hub.address) or hub.keys or hub.insecure):
        yield (
            f"hub.address = {hub.address!r} can be reached from the network and nothing authenticates who connects: "
            "set hub.keys (slime-async keygen DIR makes them), use tcp://127.0.0.1:PORT, or, where everybody on the "
            "network is trusted, hub.insecure = true"
        )
    if hub.reconnect_s <= hub.heartbeat_timeout_s:
        yield (
            f"hub.reconnect_s = {hub.reconnect_s} ends before the hub notices that a connection is dead "
            f"(hub.heartbeat_timeout_s = {hub.heartbeat_timeout_s}): use more than that"
        )
    if hub.heartbeat_timeout_s <= 2 * hub.heartbeat_interval_s:
        yield (
            f"hub.heartbeat_timeout_s = {hub.heartbeat_timeout_s} with hub.heartbeat_interval_s = "
            f"{hub.heartbeat_interval_s} takes one late heartbeat for a death: use more than "
            f"{2 * hub.heartbeat_interval_s}"
        )


def _cluster(config: Config) -> Iterator[str]:
    ranks, per_node = config.learner.ranks, config.cluster.learner_ranks_per_node
    if per_node is not None and ranks % per_node:
        yield (
            f"learner.ranks = {ranks} does not fill machines of cluster.learner_ranks_per_node = {per_node}: use a "
            "multiple, or fewer on each"
        )
