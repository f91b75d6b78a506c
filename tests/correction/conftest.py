"""Batches for the tests of off-policy correction."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slime_async.correction import Denominators, PolicyBatch

REFERENCE = Path(__file__).parents[1] / "data" / "reference"

torch.set_num_threads(1)


class Packed:
    """A reference batch as the learner would pack it, with current log-probs that collect gradient."""

    def __init__(self, name: str) -> None:
        self.name = name
        content = json.loads((REFERENCE / "inputs.json").read_text())["batches"][name]
        rows = content["sequences"]

        def column(key: str) -> torch.Tensor:
            return torch.tensor([value for row in rows for value in row[key]], dtype=torch.float64)

        self.lengths = [len(row["loss_mask"]) for row in rows]
        self.current = column("cur_logp").requires_grad_()
        versions = column("versions").long()
        mask = column("loss_mask")
        self.batch = PolicyBatch(
            sequence_ids=torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(self.lengths)),
            num_sequences=len(rows),
            loss_mask=mask,
            weight_mask=torch.ones_like(mask),
            behavior_logprobs=column("behave_logp"),
            advantages=column("advantages"),
            staleness=content["current_version"] - versions,
            prox_logprobs=column("prox_logp"),
            ref_logprobs=column("ref_logp"),
        )
        self.denominators = Denominators(tokens=float(mask.sum()), sequences=len(rows))

    def gradient(self, loss: torch.Tensor) -> list[list[float]]:
        (gradient,) = torch.autograd.grad(loss, self.current, retain_graph=True)
        return [part.tolist() for part in gradient.split(self.lengths)]


@pytest.fixture(params=["mild3", "stale3"])
def packed(request: pytest.FixtureRequest) -> Packed:
    return Packed(request.param)


@pytest.fixture
def stale() -> Packed:
    return Packed("stale3")


@pytest.fixture
def reference_case() -> Callable[[str, str], dict[str, Any]]:
    """A case of a reference file, by its id."""

    def find(file: str, identity: str) -> dict[str, Any]:
        cases = json.loads((REFERENCE / f"{file}.json").read_text())["cases"]
        return next(case for case in cases if case["id"] == identity)

    return find
