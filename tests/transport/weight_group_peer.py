"""An engine rank in a process of its own: one JSON spec per line in, one JSON outcome per line out."""

from __future__ import annotations

import json
import os
import sys
import time

from slime_async.protocol import TensorSpec, WeightGroupSpec, WeightManifest
from slime_async.transport.weight_group import WeightGroup, WeightGroupError

TENSORS = 20
ELEMENTS = 100_000
SETTLE_S = 5.0
MANIFEST = WeightManifest(tuple(TensorSpec(f"w{i}", "bfloat16", (ELEMENTS,)) for i in range(TENSORS)))


def open_resources() -> tuple[int, int]:
    """Threads and file descriptors of this process."""
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def settled(limit: tuple[int, int]) -> tuple[int, int]:
    """What is open once it is no more than ``limit``, or after ``SETTLE_S``: a thread that ended lingers a moment."""
    deadline = time.monotonic() + SETTLE_S
    while time.monotonic() < deadline:
        threads, files = open_resources()
        if threads <= limit[0] and files <= limit[1]:
            break
        time.sleep(0.01)
    return open_resources()


def main() -> None:
    before = open_resources()
    _say(before)
    for line in sys.stdin:
        fields = json.loads(line)
        rank = fields.pop("rank")
        group = WeightGroup.create(WeightGroupSpec(**fields), rank)
        _say("joined")
        try:
            received = group.receive(MANIFEST)
            _say([float(tensor[0]) for tensor in received.values()])
        except WeightGroupError as error:
            _say(str(error))
        group.close()
        _say(settled(before))


def _say(outcome: object) -> None:
    sys.stdout.write(json.dumps(outcome) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
