"""CURVE: who may connect, and which hub is the right one. Keys are files; one switch turns it on.

::

    hub.key            the hub's own pair, mode 600      hub.pub      goes to every client
    actor.key          a client's own pair, mode 600     actor.pub    goes into the hub's list of authorized keys
    authorized_keys    one public key per line, ``#`` starts a comment; read anew at every connection, so taking a
                       line out keeps that key from connecting again

Everything on an authenticated connection is encrypted, which costs rate: about 0.2 GB/s per connection.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from zmq.utils import z85

from slime_async.addresses import is_loopback
from slime_async.config.errors import ConfigError
from slime_async.config.schema import HubConfig
from slime_async.transport.buffers import Limits
from slime_async.transport.stream import Stream, new_socket

HUB_KEY = "hub.key"
AUTHORIZED_KEYS = "authorized_keys"
_KEY = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_ZAP_ADDRESS = "inproc://zeromq.zap.01"


@dataclass(frozen=True, slots=True)
class KeyPair:
    """Z85 text, 40 characters each."""

    public: str
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class ServerSecurity:
    """The hub's pair, and the file that lists who may connect."""

    keys: KeyPair
    authorized_keys: Path


@dataclass(frozen=True, slots=True)
class ClientSecurity:
    """A client's pair, and the public key of the one hub it trusts."""

    keys: KeyPair
    server_public: str


def server_security(config: HubConfig) -> ServerSecurity | None:
    """What ``hub.keys`` names; None without it. Raises ``ConfigError`` when a file is missing or holds no key."""
    if config.keys is None:
        return None
    with _explained(config.keys):
        security = ServerSecurity(load(config.keys / HUB_KEY), config.keys / AUTHORIZED_KEYS)
        authorized(security.authorized_keys)
    return security


def client_security(config: HubConfig) -> ClientSecurity | None:
    """What ``hub.keys`` and ``hub.key`` name; None without. Raises ``ConfigError`` as ``server_security`` does."""
    if config.keys is None:
        return None
    with _explained(config.keys):
        return ClientSecurity(
            load(config.keys / f"{config.key}.key"), load_public((config.keys / HUB_KEY).with_suffix(".pub"))
        )


def client_files(keys: Path, key: str) -> dict[str, bytes]:
    """By name, what a machine needs in its directory of keys to connect as ``key``: never the hub's secret.

    Raises ``ConfigError`` when a file is missing.
    """
    with _explained(keys):
        names = (f"{key}.key", f"{key}.pub", Path(HUB_KEY).with_suffix(".pub").name)
        return {name: (keys / name).read_bytes() for name in names}


@contextmanager
def _explained(keys: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"hub.keys = {keys}: {error.filename}: {error.strerror}; make keys with slime-async keygen {keys}, or "
            "copy the files that this role needs"
        ) from error
    except ValueError as error:
        raise ConfigError(f"hub.keys = {keys}: {error}") from error


def make_keys(directory: Path, client: str) -> bool:
    """A pair for ``client`` in the list of those who may connect; the hub's own pair too, where there is none.

    Returns whether the hub's was made. Raises ``ValueError`` when the client's exists or is no file name.
    """
    if not re.fullmatch(r"[\w.-]+", client) or client == Path(HUB_KEY).stem:
        raise ValueError(f"{client!r} cannot name a key: use letters, digits, '-', '_' and '.', and not 'hub'")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    is_new = not (directory / HUB_KEY).exists()
    if is_new:
        generate(directory / HUB_KEY)
    pair = generate(directory / f"{client}.key")
    with (directory / AUTHORIZED_KEYS).open("a") as authorized_keys:
        authorized_keys.write(f"{pair.public} # {client}\n")
    return is_new


def generate(path: Path) -> KeyPair:
    """Make a pair: the secret goes to ``path`` (mode 600), the public key to ``path`` with suffix ``.pub``.

    Raises ``ValueError`` when ``path`` exists: a key is never overwritten.
    """
    public, secret = (key.decode() for key in zmq.curve_keypair())
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ValueError(f"{path} exists already: keys are not overwritten, choose another name") from None
    with os.fdopen(file, "w") as out:
        out.write(f"public {public}\nsecret {secret}\n")
    path.with_suffix(".pub").write_text(f"{public}\n")
    return KeyPair(public, secret)


def load(path: Path) -> KeyPair:
    """Raises ``ValueError`` for a file that others may read, or that holds no pair."""
    with open(path) as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        if mode & 0o077:
            raise ValueError(f"{path} has mode {mode:o}, others may read it: chmod 600 {path}, better a new key")
        entries = dict(line.split(None, 1) for line in file if len(line.split()) == 2)
    keys = [entries.get(name, "").strip() for name in ("public", "secret")]
    if not all(map(_KEY.fullmatch, keys)) or zmq.curve_public(keys[1].encode()).decode() != keys[0]:
        raise ValueError(f"{path} holds no key pair: make one with slime-async keygen")
    return KeyPair(*keys)


def load_public(path: Path) -> str:
    """The one public key in a ``.pub`` file. Raises ``ValueError`` when it holds none."""
    key = path.read_text().strip()
    if not _KEY.fullmatch(key):
        raise ValueError(f"{path} holds no public key of 40 characters: copy the .pub file that keygen wrote")
    return key


def authorized(path: Path) -> frozenset[str]:
    """The public keys that may connect. Raises ``ValueError`` for a line that is none."""
    lines = [line for line in (raw.split(" #")[0].strip() for raw in path.read_text().splitlines()) if line]
    keys = [line for line in lines if not line.startswith("# ") and line != "#"]
    for key in keys:
        if not _KEY.fullmatch(key):
            raise ValueError(f"{path}: {key!r} is no public key of 40 characters")
    return frozenset(keys)


def check_address(address: str, insecure: bool) -> None:
    """Raises ``ValueError`` for an address that others on the network can reach, unless ``insecure``."""
    if not insecure and not is_loopback(address):
        raise ValueError(
            f"{address} can be reached from the network and nothing authenticates who connects: bind "
            "tcp://127.0.0.1:<port>, or set hub.keys (slime-async keygen), or, where everybody on the network is "
            "trusted, hub.insecure = true"
        )


def secure_client(socket: zmq.Socket[bytes], security: ClientSecurity) -> None:
    socket.setsockopt(zmq.CURVE_PUBLICKEY, security.keys.public.encode())
    socket.setsockopt(zmq.CURVE_SECRETKEY, security.keys.secret.encode())
    socket.setsockopt(zmq.CURVE_SERVERKEY, security.server_public.encode())


class Doorkeeper:
    """Answers, for one ZeroMQ context, who may connect (ZeroMQ RFC 27, ZAP). Counts whom it turned away."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], security: ServerSecurity, on_error: Callable[[Exception], None]
    ) -> None:
        self._security = security
        self.refused = 0
        socket = new_socket(context, zmq.ROUTER, Limits())
        socket.bind(_ZAP_ADDRESS)
        self._stream = Stream(socket, self._decide, lambda: None, on_error)

    def secure_server(self, socket: zmq.Socket[bytes]) -> None:
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._security.keys.secret.encode())
        socket.setsockopt(zmq.ZAP_DOMAIN, b"slime_async")

    def _decide(self, frames: Sequence[memoryview]) -> None:
        sender, _, version, request, _domain, _address, _identity, mechanism, *credentials = map(bytes, frames)
        known = mechanism == b"CURVE" and z85.encode(credentials[0]).decode() in self._allowed()
        self.refused += not known
        status = (b"200", b"OK") if known else (b"400", b"key is not authorized")
        self._stream.try_send([sender, b"", version, request, *status, b"", b""])

    def _allowed(self) -> frozenset[str]:
        try:
            return authorized(self._security.authorized_keys)
        except (OSError, ValueError):
            return frozenset()  # broken while we run: nobody new comes in until it is mended

    def close(self) -> None:
        self._stream.close()
