"""Who gets in when keys are asked for."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import pytest

from slime_async.protocol import Deliver, Delivered, GetStatus, Ok
from slime_async.transport.errors import ConnectionLost
from slime_async.transport.security import (
    ClientSecurity,
    ServerSecurity,
    authorized,
    check_address,
    generate,
    load,
    load_public,
)
from tests.transport.examples import same
from tests.transport.transport_kit import a_client, a_hub, run, trajectory


@dataclass
class Keys:
    server: ServerSecurity
    client: ClientSecurity
    authorized: Path


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    hub, actor = generate(tmp_path / "hub.key"), generate(tmp_path / "actor.key")
    listed = tmp_path / "authorized_keys"
    listed.write_text(f"# who may connect\n\n{actor.public} # the actor\n")
    return Keys(ServerSecurity(hub, listed), ClientSecurity(actor, hub.public), listed)


def test_an_authorized_client_gets_in(keys: Keys) -> None:
    async def scenario() -> None:
        async with (
            a_hub(security=keys.server) as hub,
            a_client(hub.server.address, security=keys.client) as (client, _),
        ):
            sent = trajectory(8192, extra_bytes=1 << 20)
            assert await client.call(Deliver(sent), 10) == Delivered("accepted")
            assert same(hub.calls[0].trajectory, sent)
            assert hub.server.statistics().refused == 0

    run(scenario())


@pytest.mark.parametrize("who", ["no key", "unknown key", "wrong hub key", "revoked key"])
def test_anyone_else_gets_nothing(keys: Keys, tmp_path: Path, who: str) -> None:
    stranger = generate(tmp_path / "stranger.key")
    security: ClientSecurity | None = keys.client
    problem = "the handshake failed|closed|did not answer|nobody listens"
    if who == "no key":
        security = None
    elif who == "unknown key":
        security, problem = ClientSecurity(stranger, keys.client.server_public), "it refused our key"
    elif who == "wrong hub key":
        security = ClientSecurity(keys.client.keys, stranger.public)
    else:
        keys.authorized.write_text("")
        problem = "it refused our key: add the public key to the hub's authorized_keys"

    async def scenario() -> None:
        async with a_hub(security=keys.server) as hub:
            with pytest.raises(ConnectionLost, match=problem):
                async with a_client(hub.server.address, security=security, timeout_s=0.5):
                    pass
            assert not hub.joined
            assert hub.server.statistics().messages_in == 0
            assert (hub.server.statistics().refused > 0) == (who in ("unknown key", "revoked key"))

    run(scenario())


def test_a_key_revoked_while_the_hub_runs_cannot_come_back(keys: Keys) -> None:
    async def scenario() -> None:
        async with a_hub(security=keys.server) as hub:
            async with a_client(hub.server.address, security=keys.client) as (client, _):
                assert await client.call(GetStatus(), 10) == Ok()
            keys.authorized.write_text("")
            with pytest.raises(ConnectionLost, match="it refused our key"):
                async with a_client(hub.server.address, "b", security=keys.client):
                    pass
            keys.authorized.unlink()
            with pytest.raises(ConnectionLost, match="it refused our key"):
                async with a_client(hub.server.address, "c", security=keys.client):
                    pass

    run(scenario())


def test_a_client_with_keys_does_not_talk_to_a_hub_without(keys: Keys) -> None:
    async def scenario() -> None:
        async with a_hub() as hub:
            with pytest.raises(ConnectionLost, match="no hub at"):
                async with a_client(hub.server.address, security=keys.client, timeout_s=0.5):
                    pass
            assert not hub.joined

    run(scenario())


def test_keys_come_back_from_their_files_and_are_never_overwritten(tmp_path: Path) -> None:
    pair = generate(tmp_path / "hub.key")
    assert load(tmp_path / "hub.key") == pair
    assert load_public(tmp_path / "hub.pub") == pair.public
    assert (tmp_path / "hub.key").stat().st_mode & 0o777 == 0o600
    assert pair.secret not in repr(pair)
    with pytest.raises(ValueError, match="exists already"):
        generate(tmp_path / "hub.key")


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    generate(tmp_path / "hub.key")
    (tmp_path / "hub.key").chmod(0o640)
    with pytest.raises(ValueError, match=r"has mode 640, others may read it: chmod 600"):
        load(tmp_path / "hub.key")


@pytest.mark.parametrize("text", ["", "public x\nsecret y\n", "public " + "a" * 40 + "\nsecret " + "b" * 40 + "\n"])
def test_a_file_without_a_pair_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.key"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(ValueError, match="holds no key pair"):
        load(path)
    with pytest.raises(ValueError, match="holds no public key"):
        load_public(path)


def test_a_list_with_something_else_in_it_is_refused_at_the_start(keys: Keys) -> None:
    keys.authorized.write_text("not a key\n")
    with pytest.raises(ValueError, match="'not a key' is no public key"):
        authorized(keys.authorized)

    async def scenario() -> None:
        with pytest.raises(ValueError, match="is no public key"):
            async with a_hub(security=keys.server):
                pass

    run(scenario())


def test_keys_allow_any_address(keys: Keys) -> None:
    async def scenario() -> None:
        async with a_hub("tcp://0.0.0.0:0", security=keys.server) as hub:
            address = hub.server.address.replace("0.0.0.0", "127.0.0.1")
            async with a_client(address, security=keys.client) as (client, _):
                assert await asyncio.wait_for(client.call(GetStatus(), 10), 10) == Ok()

    run(scenario())
    check_address("tcp://127.5.5.5:1", insecure=False)
    check_address("tcp://[::1]:1", insecure=False)
    check_address("ipc:///tmp/hub", insecure=False)
