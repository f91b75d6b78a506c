"""Admission traces and the closed form of staleness: no log-probs, so no batch of inputs."""

from __future__ import annotations

import re
from typing import Any

from reference_formats.compare import Rounded
from reference_formats.inputs import Inputs
from slime_async.queue.admission import capacity
from slime_async.queue.prediction import predict_staleness

TRACE = "trace_event_then_capacity"
"""AReaL's own name: [[event, capacity after it], …]"""
ROUNDING = 0.5e-4
"""Values of the closed form are given to four decimals."""


def admission_expected(case: dict[str, Any]) -> dict[str, Any]:
    """The capacities of the trace, and the bound on pending inputs where the case has it."""
    expected: dict[str, Any] = {"capacity": [after for _, after in case[TRACE]]}
    return expected | {name: case[name] for name in ("pending_limit",) if name in case}


def admission(case: dict[str, Any], inputs: Inputs, defaults: dict[str, Any]) -> dict[str, Any]:
    """Replays the trace from an idle manager at version 0 (or the case's ``version``)."""
    batch, eta = case["consumer_batch_size"], case["max_staleness"]
    version, accepted, running = case.get("version", 0), 0, 0
    capacities = []
    for event, _ in case[TRACE]:
        if event == "submit":
            running += 1
        elif event in ("accept", "reject"):
            running -= 1
            accepted += event == "accept"
        elif (step := re.fullmatch(r"version\+(\d+)", event)) is not None:
            version += int(step[1])
        elif event != "noop":
            raise ValueError(f"unknown event {event!r}: known are submit, accept, reject, version+N and noop")
        capacities.append(
            capacity(
                version=version,
                batch=batch,
                max_staleness=eta,
                accepted=accepted,
                running=running,
                max_concurrent=case["max_concurrent_rollouts"],
            )
        )
    return {"capacity": capacities, "pending_limit": (eta + 1) * batch}


def closed_form(case: dict[str, Any], inputs: Inputs, defaults: dict[str, Any]) -> dict[str, Any]:
    """Within what rounding M and the results to four decimals leaves; ``sim`` is a simulation's, and not computed."""
    slots, batch, rho = case["concurrency_C"], case["batch_samples_B"], case["rho"]
    predicted = predict_staleness(
        slots=slots,
        batch=batch,
        queue_batches=case["queue_factor_q"],
        rate_ratio=rho,
        tail_factor=case["M_tail"],
    )
    from_tail = ROUNDING * slots / (batch * max(1.0, rho))
    return {
        "pqs": Rounded(predicted.before_queue, ROUNDING + from_tail),
        "iqs": Rounded(predicted.in_queue, ROUNDING),
        "total": Rounded(predicted.total, ROUNDING + from_tail),
    }
