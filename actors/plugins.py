"""The functions and classes that a configuration names by import path, loaded and checked before anything is played."""

from __future__ import annotations

import functools
import inspect
from typing import Any, cast

from slime_async.actors.environment import Generate, Reward
from slime_async.config.errors import ConfigError
from slime_async.config.schema import TaskConfig
from slime_async.objects import load_callable


def load_generate(config: TaskConfig) -> Generate:
    """``task.generate`` with ``task.arguments``: a coroutine function, or a class with one as its method ``generate``.

    A class is instantiated once per actor, so it may hold what episodes share (connections, caches); its ``close``, if
    it has one, is awaited when the actor ends. Raises ``ConfigError`` for what is not ``async``, and for arguments
    that do not fit.
    """
    found = load_callable(config.generate, "task.generate")
    if inspect.isclass(found):
        try:
            instance = found(**config.arguments)
        except TypeError as error:
            raise ConfigError(f"task.generate {config.generate!r} with task.arguments: {error}") from error
        generate = getattr(instance, "generate", None)
        _require_coroutine(generate, config.generate, "its method generate")
        return cast("Generate", generate)
    _require_coroutine(found, config.generate, "it")
    if not config.arguments:
        return found
    try:
        inspect.signature(found).bind(None, None, **config.arguments)
    except TypeError as error:
        raise ConfigError(f"task.generate {config.generate!r} with task.arguments: {error}") from error
    return functools.partial(found, **config.arguments)


def load_reward(config: TaskConfig) -> Reward | None:
    """``task.reward``; None when none is named. Raises ``ConfigError`` for a coroutine that is to be isolated."""
    if not config.reward:
        return None
    reward: Any = load_callable(config.reward, "task.reward")
    if config.isolate_reward and inspect.iscoroutinefunction(reward):
        raise ConfigError(
            f"task.reward {config.reward!r} is async and task.isolate_reward = true: a function in a worker process "
            "is a plain one; leave out either"
        )
    return cast("Reward", reward)


def _require_coroutine(function: Any, path: str, what: str) -> None:
    if not inspect.iscoroutinefunction(function):
        raise ConfigError(
            f"task.generate {path!r}: {what} is no coroutine function; write async def (task, policy) → Episode"
        )
