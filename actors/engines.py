"""From the configuration to the engines of one actor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from slime_async.actors.embedded.engine import EmbeddedEngine
from slime_async.actors.engine import Engine
from slime_async.actors.pool import EnginePool, MakeEngine
from slime_async.actors.sglang.arguments import check_arguments, command_line, num_ranks
from slime_async.actors.sglang.engine import SGLangEngine
from slime_async.actors.sglang.loader import LOADER
from slime_async.actors.sglang.model import ModelFacts
from slime_async.actors.sglang.server import LaunchSpec, share_devices
from slime_async.actors.sglang.versions import features_of, installed_version, weight_label
from slime_async.config import Config
from slime_async.config.errors import ConfigError
from slime_async.telemetry.spans import SpanRecorder
from slime_async.trajectory import WeightId

CONTEXT_MARGIN_TOKENS = 8
"""SGLang ends an answer a token or two before its context is full"""


def make_pool(config: Config, name: str, log_directory: Path, recorder: SpanRecorder) -> EnginePool:
    """The pool of actor ``name``, not started. Servers log to ``log_directory``.

    Raises ``ConfigError`` for engines that cannot be had: unknown server arguments, too few devices.
    """
    actor = config.actor
    makers = _embedded(config, recorder) if actor.engine == "embedded" else _sglang(config, log_directory, recorder)
    return EnginePool(
        name,
        makers,
        startup_timeout_s=actor.startup_timeout_s,
        health_interval_s=actor.health_interval_s,
        max_restarts=actor.max_restarts,
    )


def _embedded(config: Config, recorder: SpanRecorder) -> list[MakeEngine]:
    def make(engine_id: str) -> Engine:
        return EmbeddedEngine(
            Path(config.model.path),
            engine_id=engine_id,
            slots=config.actor.max_running_requests,
            max_context=config.sampling.max_context_tokens,
            device=config.actor.device,
            threads=config.actor.threads,
            fixed_slots=config.run.deterministic,
            on_busy=lambda start_ns, end_ns: recorder.add("generate", start_ns, end_ns),
        )

    return [make] * config.actor.engines


def _sglang(config: Config, log_directory: Path, recorder: SpanRecorder) -> list[MakeEngine]:
    check_arguments(config.sglang)
    actor, keys = config.actor, config.sglang
    checkpoint = Path(config.model.path)
    engine = partial(
        SGLangEngine,
        checkpoint,
        max_context=config.sampling.max_context_tokens,
        startup_timeout_s=actor.startup_timeout_s,
        stall_timeout_s=actor.engine_stall_timeout_s,
        call_bytes=config.weights.engine_buffer_bytes,
        api_key=str(keys.get("api_key", "")),
        admin_key=str(keys.get("admin_api_key", "")),
        record_routing=actor.record_routing,
        prefill_fraction=actor.prefill_fraction,
        prefill_wait_s=actor.prefill_wait_s,
        on_busy=lambda start_ns, end_ns: recorder.add("generate", start_ns, end_ns),
    )

    def external(url: str) -> MakeEngine:
        return lambda engine_id: engine(engine_id=engine_id, url=url)

    def own(arguments: tuple[str, ...], devices: tuple[int, ...]) -> MakeEngine:
        def make(engine_id: str) -> Engine:
            log = log_directory / f"sglang-{engine_id.replace('/', '-')}.log"
            return engine(engine_id=engine_id, launch=LaunchSpec(arguments, log, devices))

        return make

    if actor.engine_urls:
        return [external(url) for url in actor.engine_urls]
    check_installed()
    arguments = server_arguments(
        checkpoint, config.sampling.max_context_tokens, config.sglang, record_routing=actor.record_routing
    )
    try:
        shares = share_devices(actor.devices, actor.engines, num_ranks(config.sglang))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return [own(arguments, devices) for devices in shares]


def server_arguments(
    checkpoint: Path,
    max_context: int,
    arguments: Mapping[str, Any],
    weights: WeightId | None = None,
    *,
    record_routing: bool = False,
) -> tuple[str, ...]:
    """The command line of a server. Without ``weights`` it starts with random ones, and waits for a broadcast."""
    features = features_of(installed_version())
    ours: dict[str, Any] = {
        "model_path": str(checkpoint),
        "skip_tokenizer_init": True,
        "incremental_streaming_output": True,
        "context_length": min(max_context + CONTEXT_MARGIN_TOKENS, ModelFacts.read(checkpoint).max_positions),
        "stream_interval": features.stream_interval,
        "enable_return_routed_experts": record_routing,
        "disable_overlap_schedule": record_routing and not features.records_overlapped,
    }
    ours |= {"load_format": "dummy"} if weights is None else {"weight_version": weight_label(weights)}
    theirs = arguments.get("custom_weight_loader", [])
    loaders = [LOADER, *(theirs if isinstance(theirs, list) else [theirs])]
    return tuple(command_line({**ours, **arguments, "custom_weight_loader": loaders}))


def check_installed() -> None:
    """Raise ``ConfigError`` where SGLang is missing or too old."""
    version = installed_version()
    if not version:
        raise ConfigError(
            "actor.engine = 'sglang', but SGLang is not installed here: pip install 'slime-async[sglang]', or name "
            "servers that run elsewhere in actor.engine_urls"
        )
    features_of(version)


def check_engines(config: Config) -> None:
    """Raise ``ConfigError`` for what keeps this machine's SGLang servers from starting, before any process does."""
    if config.actor.engine != "sglang" or config.actor.engine_urls:
        return
    if config.actor.count:
        check_installed()
    check_arguments(config.sglang)
    per_actor: Sequence[int] = config.actor.devices[: len(config.actor.devices) // max(1, config.actor.count)]
    if config.actor.devices:
        try:
            share_devices(per_actor, config.actor.engines, num_ranks(config.sglang))
        except ValueError as error:
            raise ConfigError(f"{error}; they are shared by actor.count = {config.actor.count} actors") from None
