"""The engines to hold against the contract, and the tiny checkpoints that they serve.

``pytest tests/contract`` takes the embedded engine. With ``--engine sglang`` it takes SGLang of this environment, which
``scripts/test-sglang`` makes: on the CPU, or with ``--gpu`` on the first GPU (and the learner on the second).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from slime_async.actors.embedded.engine import EmbeddedEngine
from slime_async.actors.engine import Engine
from tests.contract import reference
from tests.contract.reference import Bench
from tests.contract.servers import Servers, sglang_bench
from tests.learner.tiny_checkpoints import write_checkpoint

SGLANG_DEADLINE_S = 600.0
"""Of one test: on a busy machine, two cores carry a server of three processes beside the test"""
MAX_POSITIONS = 8192
"""Room for an answer that outlasts any wait of a test; no weight's shape depends on it"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--engine", choices=["embedded", "sglang"], default="embedded", help="which engine is tested")
    parser.addoption("--gpu", action="store_true", help="SGLang on a GPU, with NCCL")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--engine", "embedded") == "sglang":
        reference.DEADLINE_S = SGLANG_DEADLINE_S


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Servers]:
    """SGLang servers, started when a test first needs one and shared by all that need the same."""
    started = Servers(tmp_path_factory.mktemp("logs"), gpu=bool(pytestconfig.getoption("--gpu", False)))
    yield started
    started.stop()


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> Bench:
    """The engine under test."""
    if request.config.getoption("--engine", "embedded") == "sglang":
        bench: Bench = sglang_bench(request.getfixturevalue("servers"))
        return bench
    return Bench("embedded", _embedded)


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


def _embedded(checkpoint: Path, *, overlap: bool = True, **options: object) -> Engine:
    return EmbeddedEngine(checkpoint, **options)  # type: ignore[arg-type]
