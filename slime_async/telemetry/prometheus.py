"""A Prometheus endpoint for a role's process, and the file by which Prometheus finds it.

``RUN/prometheus/PROCESS.json`` is one target of Prometheus' file-based service discovery; it goes with the process::

    scrape_configs:
      - job_name: slime-async
        file_sd_configs: [{files: ["/shared/runs/*/prometheus/*.json"]}]

Numbers are computed when they are asked for; nothing is kept beyond what the process tells of itself anyway.
"""

from __future__ import annotations

import errno
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from slime_async import __version__
from slime_async.addresses import own_address
from slime_async.config import ConfigError
from slime_async.config.schema import LoggersConfig
from slime_async.telemetry.exposition import PREFIX, Sample, exported, help_of
from slime_async.telemetry.process import Process

DIRECTORY = "prometheus"
PORTS = 100
"""From the configured one on: processes that share a machine take the next that is free"""


class ProcessMetrics:
    """A collector of ``prometheus_client``: what a process tells of itself at the moment of the scrape."""

    def __init__(self, process: Process, sampled: Mapping[str, str]) -> None:
        self._process = process
        self._sampled = sampled

    def collect(self) -> Iterator[Metric]:
        process = self._process
        about = GaugeMetricFamily(
            f"{PREFIX}_process_info", "Where this runs, and its release", labels=["host", "version"]
        )
        about.add_metric([process.host, __version__], 1.0)  # role and process are the target's own labels
        yield about
        warnings = CounterMetricFamily(f"{PREFIX}_process_warnings", "Warnings and errors logged since the start")
        warnings.add_metric([], process.warnings)
        yield warnings
        by_name: dict[str, list[Sample]] = defaultdict(list)
        for sample in exported(process.role, process.numbers()):
            by_name[sample.name].append(sample)
        for samples in by_name.values():
            yield self._family(samples)

    def _family(self, samples: list[Sample]) -> Metric:
        first = samples[0]
        labels = list(first.labels)
        kind = CounterMetricFamily if first.counter else GaugeMetricFamily
        family = kind(first.name, help_of(self._process.role, first.source, self._sampled), labels=labels)
        for sample in samples:
            family.add_metric([sample.labels[label] for label in labels], sample.value)
        return family


@contextmanager
def served(config: LoggersConfig, process: Process, run_directory: Path, sampled: Mapping[str, str]) -> Iterator[str]:
    """While inside, the endpoint is there and findable; gives its address, HOST:PORT. Nothing where it is not wanted.

    Raises ``ConfigError`` when no port is free.
    """
    if not config.prometheus:
        yield ""
        return
    registry = CollectorRegistry()
    registry.register(ProcessMetrics(process, sampled))
    ProcessCollector(registry=registry)
    server, thread = _listen(config, registry)
    target = run_directory / DIRECTORY / f"{process.name}.json"
    try:
        host = config.prometheus_address
        address = f"{own_address() if host in ('0.0.0.0', '::') else host}:{server.server_port}"
        _write_target(target, address, process, run_directory.name)
        yield address
    finally:
        target.unlink(missing_ok=True)
        server.shutdown()
        server.server_close()
        thread.join()


def _listen(config: LoggersConfig, registry: CollectorRegistry) -> tuple[Any, Thread]:
    host, first = config.prometheus_address, config.prometheus_port
    for port in range(first, first + PORTS) if first else (0,):
        try:
            return start_http_server(port, addr=host, registry=registry)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ConfigError(f"loggers.prometheus_address = {host!r}: {error.strerror}") from error
    raise ConfigError(f"loggers.prometheus_port = {first}: it and the next {PORTS - 1} are in use; take another, or 0")


def _write_target(file: Path, address: str, process: Process, run: str) -> None:
    """As ``file_sd_configs`` reads it; complete or absent."""
    file.parent.mkdir(parents=True, exist_ok=True)
    labels = {"run": run, "role": process.role, "process": process.name}
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps([{"targets": [address], "labels": labels}]) + "\n")
    partial.rename(file)
