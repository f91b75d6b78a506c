"""Fixtures: checkpoints by architecture, and trainers of one rank on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoints import write_checkpoint

from slime_async.config.schema import Config
from slime_async.learner.trainer import Trainer


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Architecture name → directory, written at first use."""
    root = tmp_path_factory.mktemp("checkpoints")

    def get(architecture: str) -> Path:
        directory = root / architecture
        return directory if directory.exists() else write_checkpoint(directory, architecture)

    return get


@pytest.fixture
def make_trainer(checkpoints: Callable[[str], Path]) -> Iterator[Callable[..., Trainer]]:
    """(architecture, sections of the configuration) → a trainer of one rank; groups are left when the test ends."""
    built: list[Trainer] = []

    def make(architecture: str = "qwen3", **sections: Any) -> Trainer:
        close()
        built.append(Trainer.build(Config(**sections), checkpoints(architecture)))
        return built[0]

    def close() -> None:
        while built:
            built.pop().close()

    yield make
    close()
