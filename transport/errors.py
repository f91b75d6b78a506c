"""What can go wrong between processes::

BadMessage        (ValueError)       the bytes, or the value to send, break the rules of the wire
ConnectionLost    (ConnectionError)  the other side is gone, silent, or never welcomed us
DeadlineExceeded  (TimeoutError)     a call had no reply in time; the connection may be fine
RemoteError       (RuntimeError)     the other side answered with an ``ErrorReply``
"""

from __future__ import annotations


class BadMessage(ValueError):
    """A message that breaks the rules of the wire; says where and why, so that its sender can read it.

    ``call_id``, ``reply`` and ``also`` are the envelope's where it was readable, to tell whoever waits; otherwise 0,
    ``False`` and nothing.
    """

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.path: list[str] = []
        self.call_id = 0
        self.reply = False
        self.also: tuple[int, ...] = ()

    def within(self, name: str) -> BadMessage:
        """The same, found inside ``name``."""
        self.path.insert(0, name)
        return self

    def __str__(self) -> str:
        where = "".join(p if p.startswith("[") else f".{p}" for p in self.path).removeprefix(".")
        return f"{where}: {self.args[0]}" if where else str(self.args[0])


class ConnectionLost(ConnectionError):
    """The other side left, fell silent or refused us. Says who and why."""


class DeadlineExceeded(TimeoutError):
    """A call was not answered in time. Names the call, the peer and the deadline."""


class RemoteError(RuntimeError):
    """The other side could not do what a call asked.

    ``code`` is the class of the exception there (``ValueError``: the call was wrong), ``message`` its text.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
