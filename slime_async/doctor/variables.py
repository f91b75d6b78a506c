"""Environment variables that make runs fail, hang or crawl."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from slime_async.doctor.finding import Finding, Level, ok, warning

TRUE = ("1", "true", "yes", "on")


@dataclass(frozen=True, slots=True)
class Rule:
    """One variable, when it is bad, and why."""

    name: str
    bad: Callable[[str], bool]
    level: Level
    why: str
    remedy: str


def _is_set(value: str) -> bool:
    return value.lower() in TRUE


def _unset(name: str) -> str:
    return f"unset {name}"


RULES = (
    Rule(
        "NCCL_CUMEM_ENABLE",
        lambda value: value != "0",
        "error",
        "SGLang turns cuMem off in its processes; with it on in the learner the first broadcast dies or hangs",
        "export NCCL_CUMEM_ENABLE=0, as `slime-async train` does for the learner",
    ),
    Rule("NCCL_P2P_DISABLE", _is_set, "warning", "GPUs of one machine talk through host memory", ""),
    Rule("NCCL_SHM_DISABLE", _is_set, "warning", "processes of one machine talk through the network", ""),
    Rule("NCCL_IB_DISABLE", _is_set, "warning", "machines talk through TCP, even where there is InfiniBand", ""),
    Rule(
        "NCCL_DEBUG",
        lambda value: value.upper() in ("INFO", "TRACE"),
        "warning",
        "NCCL writes every call to the logs",
        "export NCCL_DEBUG=WARN",
    ),
    Rule(
        "TORCH_NCCL_ASYNC_ERROR_HANDLING",
        lambda value: value == "0",
        "error",
        "a rank that dies leaves the others waiting for ever",
        "",
    ),
    Rule("CUDA_LAUNCH_BLOCKING", _is_set, "warning", "every kernel is waited for: several times slower", ""),
    Rule(
        "TORCH_DISTRIBUTED_DEBUG", lambda v: v.upper() == "DETAIL", "warning", "every collective is checked twice", ""
    ),
    Rule("CUDA_VISIBLE_DEVICES", lambda value: not value.strip(), "warning", "it is empty: no GPU is seen", ""),
    Rule("PYTHONOPTIMIZE", lambda value: bool(value), "warning", "assertions are left out", ""),
)
INTERFACE_VARIABLES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


def check_variables(variables: Mapping[str, str], interfaces: Sequence[str]) -> Iterator[Finding]:
    """``interfaces`` are the names of this machine's network interfaces."""
    bad = [
        Finding(
            rule.level, "variables", f"{rule.name}={variables[rule.name]}: {rule.why}", rule.remedy or _unset(rule.name)
        )
        for rule in RULES
        if rule.name in variables and rule.bad(variables[rule.name])
    ]
    bad += [finding for name in INTERFACE_VARIABLES if (finding := _interface(name, variables, interfaces))]
    yield from bad
    if not bad:
        seen = [name for name in sorted(variables) if name.startswith(("NCCL_", "GLOO_"))]
        yield ok("variables", f"{', '.join(seen)} set, nothing wrong" if seen else "no NCCL or gloo variable is set")


def _interface(name: str, variables: Mapping[str, str], interfaces: Sequence[str]) -> Finding | None:
    """``=eth0``, ``^docker0`` and prefixes are NCCL's way of naming interfaces; gloo takes whole names."""
    value = variables.get(name, "")
    if not value or value.startswith("^"):
        return None
    exact = value.startswith("=") or name.startswith("GLOO")
    wanted = [part.partition(":")[0] for part in value.removeprefix("=").split(",")]
    found = [want for want in wanted if any(have == want if exact else have.startswith(want) for have in interfaces)]
    if found:
        return None
    text = f"{name}={value}: this machine has only {', '.join(interfaces) or 'no interface'}"
    return warning("variables", text, f"{_unset(name)}, or name one of these")
