"""What is wrong between nodes, though each may be sound by itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

from slime_async.addresses import split
from slime_async.config import Config
from slime_async.doctor.finding import Finding, error, ok, warning
from slime_async.doctor.node import Node

MUST_AGREE = (
    "slime-async",
    "torch",
    "megatron-core",
    "transformer-engine",
    "sglang",
    "pyzmq",
    "msgpack",
    "transformers",
)
"""Packages whose versions decide what a wire, a collective or a checkpoint looks like; others differ with a warning"""
GROUP_VARIABLES = ("NCCL_", "TORCH_NCCL_", "GLOO_", "UCX_")
MAY_DIFFER = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_TOPO_FILE", "NCCL_DEBUG_FILE")
"""They name what a machine has; all others are read by both ends of a connection"""
CLOCK_WARNING_S = 0.5
"""Spans are corrected by measured offsets; log lines and events of several machines are not"""


def check_cluster(config: Config, nodes: Sequence[Node], wanted: int) -> Iterator[Finding]:
    """Everything about several nodes; ``wanted`` should have reported."""
    yield from _missing(nodes, wanted)
    if not nodes:
        return
    yield from _own_findings(nodes)
    yield from _versions(nodes)
    yield from _variables(nodes)
    yield from _drivers(nodes)
    yield from _clocks(nodes)
    yield from _ports(config, nodes)
    yield from _shared(config, nodes)


def _missing(nodes: Sequence[Node], wanted: int) -> Iterator[Finding]:
    if len(nodes) < wanted:
        yield error(
            "nodes",
            f"only {len(nodes)} of {wanted} reported: {', '.join(sorted(node.host for node in nodes)) or 'none'}",
            "look at the output of the others: they could not start Python, import slime_async or reach this machine",
        )
    else:
        yield ok("nodes", f"all {wanted} reported")


def _own_findings(nodes: Sequence[Node]) -> Iterator[Finding]:
    """Each one's own, the same one of several nodes once."""
    by_finding: dict[Finding, list[str]] = defaultdict(list)
    for node in nodes:
        for finding in node.findings:
            if finding.level != "ok":
                by_finding[finding].append(node.host)
    for finding, hosts in by_finding.items():
        yield Finding(finding.level, f"{_some(hosts)}: {finding.subject}", finding.text, finding.remedy)


def _versions(nodes: Sequence[Node]) -> Iterator[Finding]:
    found = {"Python": _by_value(nodes, lambda node: node.python)}
    for name in sorted({name for node in nodes for name in node.packages}):
        found[name] = _by_value(nodes, lambda node, name=name: node.packages.get(name, "missing"))  # type: ignore[misc]
    different = {name: values for name, values in found.items() if len(values) > 1}
    for name, values in different.items():
        make = error if name in MUST_AGREE else warning
        yield make("versions", f"{name} differs: {_told(values)}", "install the same constraints file on every node")
    if not different:
        yield ok("versions", f"the same on all nodes ({len(found)} packages)")


def _variables(nodes: Sequence[Node]) -> Iterator[Finding]:
    names = sorted({name for node in nodes for name in node.variables if name.startswith(GROUP_VARIABLES)})
    bad = False
    for name in names:
        values = _by_value(nodes, lambda node, name=name: node.variables.get(name, "not set"))  # type: ignore[misc]
        if len(values) > 1:
            bad = True
            make = warning if name in MAY_DIFFER else error
            yield make(
                "variables",
                f"{name} differs: {_told(values)}; learner and engines are in one group, and must agree",
                f"set {name} alike everywhere: in cluster.setup (Slurm), the driver's environment (Ray), the pod's env",
            )
    if not bad:
        yield ok("variables", f"{', '.join(names) or 'no NCCL or gloo variable'}, the same on all nodes")


def _drivers(nodes: Sequence[Node]) -> Iterator[Finding]:
    values = _by_value([node for node in nodes if node.drivers], lambda node: node.drivers[0])
    if len(values) > 1:
        yield warning("driver", f"differs: {_told(values)}", "bring all nodes to one driver before blaming NCCL")
    elif values:
        yield ok("driver", f"{next(iter(values))} on all nodes with GPUs")


def _clocks(nodes: Sequence[Node]) -> Iterator[Finding]:
    offsets = {node.host: node.probe.clock_offset_s for node in nodes}
    spread = max(offsets.values()) - min(offsets.values())
    text = f"up to {spread:.3f} s apart (measured to {max(node.probe.clock_error_s for node in nodes):.3f} s)"
    if spread > CLOCK_WARNING_S:
        last = max(offsets, key=lambda host: abs(offsets[host]))
        yield warning("clocks", f"{text}; {last} is the furthest off", f"start chrony or another NTP client on {last}")
    else:
        yield ok("clocks", text)


def _ports(config: Config, nodes: Sequence[Node]) -> Iterator[Finding]:
    unreached = [node.host for node in nodes if not node.probe.reached_back]
    if not unreached:
        yield ok("ports", "every node reaches this one, and this one every node")
        return
    port = split(config.hub.address)[1]
    hub = f"port {port} of the hub" if port else "the hub's port (fix it with hub.address = tcp://HOST:7000)"
    yield error(
        "ports",
        f"{_some(unreached)} cannot be reached on a free port: weight groups would wait until their deadline",
        f"open between the nodes: {hub}, {config.cluster.rendezvous_port} of the learner's first, and ephemeral ports "
        "(net.ipv4.ip_local_port_range) of the learner's",
    )


def _shared(config: Config, nodes: Sequence[Node]) -> Iterator[Finding]:
    blind = [node.host for node in nodes if not node.probe.sees_shared]
    if blind:
        yield error(
            "shared directory",
            f"{config.run.directory.absolute()} is not the same directory on {_some(blind)}",
            "set run.directory to a file system that all nodes mount: configuration, checkpoints and logs are there",
        )
    else:
        least = min(nodes, key=lambda node: node.free_gib)
        yield ok("shared directory", f"seen by all nodes, {least.free_gib:.0f} GiB free")


def _by_value(nodes: Sequence[Node], value: Callable[[Node], str]) -> dict[str, list[str]]:
    """Hosts by what they have."""
    hosts: dict[str, list[str]] = defaultdict(list)
    for node in nodes:
        hosts[value(node)].append(node.host)
    return hosts


def _told(values: Mapping[str, Sequence[str]]) -> str:
    """The rarest first: it is the one to look at."""
    return "; ".join(f"{value} on {_some(hosts)}" for value, hosts in sorted(values.items(), key=lambda v: len(v[1])))


def _some(hosts: Sequence[str]) -> str:
    hosts = sorted(set(hosts))
    shown = hosts[:4]
    return ", ".join(shown) + (f" and {len(hosts) - len(shown)} more" if len(hosts) > len(shown) else "")
