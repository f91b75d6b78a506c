"""The live view in a terminal: the whole window, redrawn every second, and as it was before when the run ends."""

from __future__ import annotations

import asyncio
import contextlib
import io
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live

from slime_async.cli.live_state import LiveState
from slime_async.cli.live_view import screen
from slime_async.config import Config
from slime_async.protocol import RunStatus

REFRESH_S = 1.0


def has_terminal() -> bool:
    """Whether somebody looks, and the terminal can move its cursor."""
    console = Console()
    return console.is_terminal and not console.is_dumb_terminal


class Screen:
    """A ``LiveState`` as rich draws it: asked for the window's size each time, so that it follows a resize."""

    def __init__(self, state: LiveState) -> None:
        self._state = state

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from screen(self._state, options.max_width, options.height or options.size.height)


async def watch_live(
    get_status: Callable[[], Awaitable[RunStatus]],
    config: Config,
    directory: Path,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Show the run until cancelled; ends with what ``get_status`` raises. What others print comes after it."""
    state = LiveState(config, directory, begun_s=clock())
    console = Console(file=sys.stdout, highlight=False)
    view = Live(
        Screen(state),
        console=console,
        screen=True,
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    with kept_until_the_end(), view as live:
        while True:
            state.update(await get_status(), clock())
            live.refresh()
            await asyncio.sleep(REFRESH_S)


@contextlib.contextmanager
def kept_until_the_end() -> Iterator[None]:
    """What is printed inside is printed afterwards: the view owns the window meanwhile."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            yield
    finally:
        print(printed.getvalue(), end="", flush=True)
