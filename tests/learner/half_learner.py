"""A learner that stops in the middle of a broadcast: says how to join on stdout, sends one tensor of three, and waits.

``half_learner.py WORLD_SIZE``; whoever started it kills it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from slime_async.transport.weight_group import WeightGroup, host_group

ELEMENTS = 1 << 20
TIMEOUT_S = 15.0


def tensors() -> Iterator[tuple[str, Tensor]]:
    yield "first", torch.ones(ELEMENTS)
    print("half", flush=True)
    time.sleep(TIMEOUT_S)


if __name__ == "__main__":
    spec, _store = host_group("weights", 1, int(sys.argv[1]), "gloo", TIMEOUT_S)
    print(json.dumps(dataclasses.asdict(spec)), flush=True)
    WeightGroup.create(spec, 0).send(tensors())
