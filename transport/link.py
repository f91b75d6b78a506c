"""A client's socket to the hub, with the monitor that tells when its connection comes and goes, and why it does not."""

from __future__ import annotations

from collections.abc import Callable

import zmq
from zmq.utils.monitor import parse_monitor_message

from slime_async.transport.codec import Limits
from slime_async.transport.security import ClientSecurity, secure_client
from slime_async.transport.stream import SILENCE_READ, Stream, new_socket, watch_connections

RETRY_INTERVAL_S = 0.1
"""Between attempts to reach a hub that is not there (yet)"""
PATIENCE_S = 10.0
"""Of the kernel with a hub that does not answer; the hub's own comes with its welcome"""
_EVENTS = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | (zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)
)


class Link:
    """One socket and its monitor: made anew for every attempt to connect."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        limits: Limits,
        security: ClientSecurity | None,
        on_frames: Callable[[list[memoryview]], None],
        on_room: Callable[[], None],
        on_broken: Callable[[Link, str], None],
        on_error: Callable[[Exception], None],
    ) -> None:
        socket = new_socket(context, zmq.DEALER, limits)
        socket.setsockopt(zmq.RECONNECT_IVL, int(RETRY_INTERVAL_S * 1000))
        watch_connections(socket, PATIENCE_S)
        if security is not None:
            secure_client(socket, security)
        self.trouble = "nobody listens there"
        self._up = False
        self._on_broken = on_broken
        self.monitor = Stream(socket.get_monitor_socket(_EVENTS), self._observe, lambda: None, on_error)
        self.stream = Stream(socket, on_frames, on_room, on_error)
        try:
            socket.setsockopt(zmq.IPV6, "[" in address)
            socket.connect(address)
        except zmq.ZMQError as error:
            self.close()
            raise ValueError(f"cannot connect to {address!r}: {error}; wanted tcp://<host>:<port>") from error

    def _observe(self, frames: list[memoryview]) -> None:
        event = parse_monitor_message([bytes(f) for f in frames])["event"]
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._up, self.trouble = True, "it accepted the connection but did not answer"
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self.trouble = "it refused our key: add the public key to the hub's authorized_keys"
            self._on_broken(self, self.trouble)
        elif event in (zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL):
            self.trouble = "the handshake failed: does one side use keys and the other not, or is the hub's key wrong?"
        elif self._up:
            self.stream.read(SILENCE_READ)  # what it said last
            self._on_broken(self, "it closed the connection")

    def close(self, linger_s: float = 0.0) -> None:
        """Idempotent. What ZeroMQ holds unsent is given up after ``linger_s``."""
        if not self.stream.closed:
            # before its receiving end goes: ZeroMQ's thread would wait in an event that nobody takes, under a lock, and
            # this process, interpreter and all, for that lock
            self.stream.socket.disable_monitor()
        self.monitor.close()
        self.stream.close(linger_s)
