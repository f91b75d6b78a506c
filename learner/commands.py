"""The learner's words to engines, through the hub and their actors; and what becomes of engines that don't answer.

Deadlines, for ``weights.timeout_s`` = 60 s: a weight group's own collectives 60 s; a command in the actor 90 s, after
which the actor gives its engine up; the reply 120 s, after which the learner gives the engine up, whatever its actor
says. Whoever knows more about a failure comes first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from slime_async.config.schema import WeightsConfig
from slime_async.protocol import Eject, EngineCommand, EngineInfo, Message, Relay
from slime_async.transport.blocking import BlockingClient
from slime_async.transport.errors import ConnectionLost, DeadlineExceeded, RemoteError

log = logging.getLogger(__name__)

Call = tuple[EngineInfo, Future[Message]]


class EngineCommands:
    """Sends one command to many engines at once. Belongs to the publisher's thread."""

    def __init__(self, client: BlockingClient, config: WeightsConfig) -> None:
        self._client = client
        self._config = config
        self._silent: dict[EngineInfo, str] = {}

    def begin(self, engine: EngineInfo, command: EngineCommand) -> Call:
        wait_s = self._config.reply_timeout_s
        return engine, self._client.begin(Relay(engine.actor, command, wait_s), wait_s * 1.25, retry=True)

    def begin_all(self, engines: Sequence[EngineInfo], command: Callable[[EngineInfo], EngineCommand]) -> list[Call]:
        return [self.begin(engine, command(engine)) for engine in engines]

    def finish(self, calls: Sequence[Call]) -> list[Message]:
        """Wait for every call, then raise the first error: no call is left running behind a new attempt."""
        if errors := self.errors(calls):
            raise errors[0]
        return [call.result() for _, call in calls]

    def tell(self, engines: Sequence[EngineInfo], command: Callable[[EngineInfo], EngineCommand]) -> None:
        self.finish(self.begin_all(engines, command))

    def errors(self, calls: Sequence[Call]) -> list[BaseException]:
        """What went wrong, once all calls have ended; who was silent is remembered."""
        errors = []
        for engine, call in calls:
            if (error := call.exception(2 * self._config.reply_timeout_s)) is not None:  # they have their own
                errors.append(error)
                if _is_silence(error):
                    self._silent[engine] = str(error)
        return errors

    def eject_silent(self) -> None:
        """Give up every engine that did not answer: the hub drops it, its actor restarts it under a new name."""
        silent, self._silent = self._silent, {}
        for engine, reason in silent.items():
            log.warning("engine %s is ejected: %s", engine.engine_id, reason)
            try:
                self._client.call(Eject(engine, reason), self._config.timeout_s, retry=True)
            except (ConnectionLost, RemoteError, DeadlineExceeded) as error:
                log.warning("the hub could not eject engine %s: %s", engine.engine_id, error)


def _is_silence(error: BaseException) -> bool:
    return isinstance(error, DeadlineExceeded) or (
        isinstance(error, RemoteError) and error.code == DeadlineExceeded.__name__
    )
