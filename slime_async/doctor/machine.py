"""Cores, memory, disk, open files, and the network that processes of one run find each other through."""

from __future__ import annotations

import os
import resource
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from slime_async.config import Config
from slime_async.doctor.finding import Finding, error, ok, warning
from slime_async.telemetry.environment import memory_gib, usable_cpus

GIB = 2**30
MEMORY_GIB = 4.0
"""Three processes with torch in them take about this much before any model"""
DISK_WARNING_GIB, DISK_ERROR_GIB = 10.0, 1.0
SHM_GIB = 1.0
"""NCCL and torch's loaders share memory there; containers start with 64 MiB"""
OPEN_FILES = 4096
"""ZeroMQ needs two or three per peer and connection"""


def check_machine(config: Config) -> Iterator[Finding]:
    yield _cores(config, usable_cpus())
    yield from _memory(memory_gib())
    yield from _shared_memory(Path("/dev/shm"))
    yield _disk(config.run.directory)
    yield _open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def check_network(config: Config) -> Iterator[Finding]:
    yield _listen(config.hub.address)
    yield _host_name()


def _cores(config: Config, cores: int) -> Finding:
    wanted = config.actor.count * config.actor.threads + config.learner.ranks * config.learner.threads + 1
    text = f"{cores} usable"
    if cores < wanted and config.actor.device == "cpu":
        parts = f"actor.count × actor.threads + learner.ranks × learner.threads + the hub = {wanted}"
        return warning("CPU cores", f"{text}, {parts}", "runs take longer: lower them, or use a larger machine")
    return ok("CPU cores", text)


def _memory(total_gib: float | None) -> Iterator[Finding]:
    if total_gib is None:
        return
    text = f"{total_gib:.1f} GiB"
    if total_gib < MEMORY_GIB:
        yield warning(
            "memory", text, f"below {MEMORY_GIB:g} GiB processes may be killed: use a larger machine or limit"
        )
    else:
        yield ok("memory", text)


def _shared_memory(path: Path) -> Iterator[Finding]:
    if not path.is_dir():
        return
    size_gib = shutil.disk_usage(path).total / GIB
    if size_gib < SHM_GIB:
        text = f"{path} has {size_gib:.2f} GiB: NCCL between processes of a machine may fail"
        yield warning("shared memory", text, "start the container with --shm-size 8g, or --ipc host")
    else:
        yield ok("shared memory", f"{size_gib:.1f} GiB")


def _disk(directory: Path) -> Finding:
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK):
        return error("disk", f"{existing} cannot be written", "set run.directory to a place that can")
    free_gib = shutil.disk_usage(existing).free / GIB
    text = f"{free_gib:.1f} GiB free at {existing}"
    remedy = "make room, or set run.directory to a larger disk: checkpoints and logs go there"
    if free_gib < DISK_ERROR_GIB:
        return error("disk", text, remedy)
    return warning("disk", text, remedy) if free_gib < DISK_WARNING_GIB else ok("disk", text)


def _open_files(limit: int) -> Finding:
    if limit != resource.RLIM_INFINITY and limit < OPEN_FILES:
        return warning(
            "open files", f"at most {limit}", f"ulimit -n {OPEN_FILES} before starting runs with many actors"
        )
    return ok("open files", "unlimited" if limit == resource.RLIM_INFINITY else f"at most {limit}")


def _listen(address: str) -> Finding:
    """Whether the hub could listen where the configuration says."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("" if host == "*" else host, int(port)))
            probe.listen(1)
        except OSError as failure:
            remedy = "set hub.address to tcp://127.0.0.1:0 (any free port), or end what uses this one (ss -ltnp)"
            return error("ports", f"the hub cannot listen on {address}: {failure.strerror}", remedy)
    return ok("ports", f"{address} is free")


def _host_name() -> Finding:
    """gloo and torch look the machine's own name up when they form a group."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return error("network", f"this machine's name {name!r} has no address", f"add '127.0.1.1 {name}' to /etc/hosts")
    return ok("network", f"{name} is {address}")
