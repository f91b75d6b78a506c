"""Engines to hold against the contract, and the tiny checkpoints that they serve."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from slime_async.actors.embedded.engine import EmbeddedEngine
from slime_async.actors.engine import Engine
from tests.engine.reference import MakeEngine
from tests.learner.tiny_checkpoints import write_checkpoint

MAX_POSITIONS = 8192
"""Room for an answer that outlasts any wait of a test; no weight's shape depends on it"""


def _embedded(checkpoint: Path, **options: object) -> Engine:
    return EmbeddedEngine(checkpoint, **options)  # type: ignore[arg-type]


ENGINES: dict[str, MakeEngine] = {"embedded": _embedded}
"""Every implementation of ``Engine``, by name. All take a checkpoint, ``slots``, ``max_context`` and ``weights``."""


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=ENGINES)
def make_engine(request: pytest.FixtureRequest) -> MakeEngine:
    return ENGINES[request.param]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Architecture and seed → directory, written at first use."""
    root = tmp_path_factory.mktemp("checkpoints")

    def get(architecture: str = "qwen3", seed: int = 0) -> Path:
        directory = root / f"{architecture}-{seed}"
        if not directory.exists():
            write_checkpoint(directory, architecture, seed)
            config = directory / "config.json"
            config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": MAX_POSITIONS}))
        return directory

    return get
