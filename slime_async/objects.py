"""Python objects named in the configuration as ``module:name``: task sources, rewards, episodes, model makers."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from typing import Any

from slime_async.config.errors import ConfigError


def load_callable(path: str, purpose: str) -> Callable[..., Any]:
    """Import the callable that ``path`` names (``module:name``; the name may have dots).

    ``purpose`` says in errors what it was for.

    Raises ``ConfigError`` when the path has another form, the module does not exist, it has no such name (the nearest
    one is suggested) or what it names cannot be called. What the module itself raises while it is imported passes
    through unchanged.
    """
    module_name, separator, name = path.partition(":")
    if not (separator and module_name and name):
        raise ConfigError(f"{purpose} {path!r} is not of the form module:name, for example my_package.my_task:reward")
    module = _import(module_name, purpose, path)
    found: Any = module
    for part in name.split("."):
        owner, found = found, getattr(found, part, None)
        if found is None:
            nearest = difflib.get_close_matches(part, dir(owner), n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise ConfigError(f"{purpose} {path!r}: {owner.__name__} has no {part}{hint}")
    if not callable(found):
        raise ConfigError(f"{purpose} {path!r} is a {type(found).__name__}, which cannot be called; name a function")
    return found  # type: ignore[no-any-return]  # whatever the user's module holds


def _import(module_name: str, purpose: str, path: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # Only the module that was asked for, or a package above it: a missing import *inside* it is its own error.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(
            f"{purpose} {path!r}: no module {error.name}; install it, or put the folder that holds it on PYTHONPATH"
        ) from error
