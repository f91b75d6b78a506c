"""Task sources: sequences that every actor builds for itself, alike, from the configuration.

The hub hands out names and indices only, so a source must hold the same tasks in the same order in every process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from slime_async.config.schema import SourceConfig, TaskConfig
from slime_async.objects import load_callable


class Source(Protocol):
    """A sequence of tasks. Tasks may be made when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def load_source(config: SourceConfig) -> Source:
    """Build one source by calling its factory.

    Raises ``ValueError`` when the factory cannot be found, refuses its arguments, or returns something that is empty
    or is not a sequence.
    """
    factory = load_callable(config.factory, "task source")
    try:
        source = factory(**config.arguments)
    except TypeError as error:
        raise ValueError(f"task source {config.factory!r} with arguments {config.arguments}: {error}") from error
    if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")) or isinstance(source, Mapping):
        raise ValueError(
            f"task source {config.factory!r} returned a {type(source).__name__}: a source is a sequence, with len() "
            "and [index]; put what you generate into a list, or write a class with both"
        )
    if len(source) == 0:
        raise ValueError(f"task source {config.factory!r} with arguments {config.arguments} holds no task")
    return source  # type: ignore[no-any-return]  # checked above


def load_sources(config: TaskConfig) -> dict[str, Source]:
    """All sources of a run by name, those of training and those held out."""
    assert not config.train.keys() & config.evaluation.keys(), "the checks of the configuration refuse shared names"
    return {name: load_source(source) for name, source in (config.train | config.evaluation).items()}
