"""The SGLang engine against a scripted web server: what it asks, and what it makes of answers that go wrong."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from slime_async.actors.engine import EngineError, GenerateRequest, PauseMode, SamplingParams
from slime_async.actors.engines import server_arguments
from slime_async.actors.sglang.client import EngineRefused
from slime_async.actors.sglang.loader import LOADER, LoadOrder
from slime_async.protocol import TensorSpec, WeightGroupSpec, WeightManifest
from slime_async.trajectory import VersionSpan
from tests.sglang.scripted_server import NEW, OLD, ask, event, run, serving

SPEC = WeightGroupSpec("weights-1", 1, "127.0.0.1", 1, 2, "gloo", 0.2)
MANIFEST = WeightManifest((TensorSpec("x", "float32", (2,)),))


async def hang(_: web.Request) -> web.StreamResponse:
    """A server that never answers."""
    await asyncio.Event().wait()
    raise AssertionError


WHOLE = {"weight_versions": [{"version": "1.3", "start": 0, "end": 4}]}


@pytest.mark.parametrize(
    "events",
    [
        [event([7, 8], 2), event([9], 3), event([5], 4, "stop", **WHOLE), "data: [DONE]\n\n"],
        [event([7, 8], 2), event([7, 8, 9], 3), event([7, 8, 9, 5], 4, "stop", **WHOLE)],  # all so far, each time
        [event([7, 8, 9, 5], 4, "stop", **WHOLE, padding="x" * 300_000)],
    ],
    ids=["pieces", "cumulative", "large"],
)
def test_streams_of_both_kinds_give_the_same_answer(events: list[dict[str, Any] | str], checkpoint: Path) -> None:
    async def test() -> None:
        async with serving(checkpoint) as (server, engine):
            server.events = events
            answer = await engine.generate(ask(stop_token_ids=(5,), top_k=0))
            assert (answer.output_ids, answer.logprobs) == ([7, 8, 9, 5], [-7.0, -8.0, -9.0, -5.0])
            assert (answer.spans, answer.finish_reason) == ((VersionSpan(0, OLD),), "stop")
            body = server.calls[-1][1]
            assert (body["rid"], body["input_ids"], body["extra_key"]) == ("0123", [1, 2, 3], "weights-1.3")
            assert (body["sampling_params"]["stop_token_ids"], body["sampling_params"]["top_k"]) == ([5], -1)
            assert engine.num_ranks == 2

    run(test())


def test_a_connection_that_was_idle_is_not_used_again(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server may be closing it just then."""
    monkeypatch.setattr("slime_async.actors.sglang.client.IDLE_S", 0.2)

    async def test() -> None:
        async with serving(checkpoint) as (server, engine):
            for idle_s in (0.0, 0.6):
                await engine.resume()
                await asyncio.sleep(idle_s)
            await engine.resume()
            first, second, third = server.connections[-3:]
            assert first == second != third

    run(test())


def test_a_server_with_our_loader_gets_weights_in_buffers_and_says_what_went_wrong(checkpoint: Path) -> None:
    seen: list[LoadOrder] = []

    async def load(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        payloads = body["serialized_named_tensors"]
        assert (len(payloads), body["load_format"], body["weight_version"]) == (2, LOADER, "1.4")  # one for each rank
        [(text, nothing)] = pickle.loads(base64.b64decode(payloads[0]))
        assert nothing.numel() == 0
        seen.append(LoadOrder.read(text))
        if len(seen) == 2:
            Path(f"{seen[-1].failures}.17").write_text("RuntimeError: rank 1 heard nothing")
        return web.json_response({"success": True, "message": "Success"})

    async def test() -> None:
        async with serving(checkpoint, arguments={"custom_weight_loader": [LOADER]}) as (server, engine):
            assert engine.takes_buffers
            server.answers["/update_weights_from_tensor"] = load
            with pytest.raises(EngineError, match="no weight group"):
                await engine.receive_weights(MANIFEST, NEW, buffer_bytes=1024)
            await engine.join_weight_group(SPEC, 1)
            await engine.receive_weights(MANIFEST, NEW, buffer_bytes=1024)
            assert (seen[0].groups, seen[0].parts, seen[0].buffer_bytes) == (("weights-1",), (MANIFEST,), 1024)
            with pytest.raises(EngineRefused, match="not received whole: RuntimeError: rank 1 heard nothing"):
                await engine.receive_weights(MANIFEST, NEW, buffer_bytes=1024)
            assert (await engine.status()).weights is None
            await engine.receive_weights(MANIFEST, NEW, buffer_bytes=1024)  # the failure is forgotten
            assert (await engine.status()).weights == NEW

    run(test())


@pytest.mark.parametrize("theirs", ["package.load", ["package.load"]], ids=["one", "a list"])
def test_servers_get_our_loader_beside_those_of_others(
    theirs: str | list[str], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slime_async.actors.engines.installed_version", lambda: "0.5.23")
    argv = server_arguments(checkpoint, 32, {"custom_weight_loader": theirs})
    at = argv.index("--custom-weight-loader")
    assert argv[at + 1 : at + 3] == (LOADER, "package.load")
    assert argv.count("--custom-weight-loader") == 1


@pytest.mark.parametrize(
    "arguments", [{}, {"custom_weight_loader": ["theirs.load"]}, {"speculative_algorithm": "EAGLE"}]
)
def test_other_servers_get_weights_tensor_by_tensor(arguments: dict[str, Any], checkpoint: Path) -> None:
    arguments = {"custom_weight_loader": [LOADER], **arguments} if arguments else {}

    async def test() -> None:
        async with serving(checkpoint, arguments=arguments) as (_, engine):
            assert not engine.takes_buffers

    run(test())


def test_a_stream_that_breaks_off_raises_with_what_had_come(checkpoint: Path) -> None:
    async def test() -> None:
        async with serving(checkpoint) as (server, engine):
            server.events = [event([7], 1), event([8, 9], 3, weight_version="1.4")]
            with pytest.raises(EngineError, match="engine e: the stream of 0123 ended before its answer did") as broken:
                await engine.generate(ask())
            partial = broken.value.partial
            assert partial is not None
            assert (partial.output_ids, partial.finish_reason) == ([7, 8, 9], "abort")
            assert partial.spans == (VersionSpan(0, OLD), VersionSpan(2, NEW))  # in doubt a token is older

    run(test())


@pytest.mark.parametrize(
    ("status", "text", "message"),
    [
        (400, '{"error": {"message": "too long"}}', "HTTP 400: too long"),
        (500, "Internal Server Error", "HTTP 500: Internal"),
    ],
)
def test_a_refused_request_says_what_the_server_said(status: int, text: str, message: str, checkpoint: Path) -> None:
    async def refuse(_: web.Request) -> web.StreamResponse:
        return web.Response(status=status, text=text)

    async def test() -> None:
        async with serving(checkpoint) as (server, engine):
            server.answers["/generate"] = refuse
            with pytest.raises(EngineRefused, match=rf"engine e: /generate: {message}"):
                await engine.generate(ask())
            await engine.check_health()

    run(test())


def test_bad_token_ids_never_reach_the_server(checkpoint: Path) -> None:
    async def test() -> None:
        async with serving(checkpoint) as (server, engine):
            with pytest.raises(ValueError, match="token id 100 is outside the vocabulary of 100"):
                await engine.generate(GenerateRequest("0", [1, 100], SamplingParams(1)))
            assert server.paths() == []

    run(test())


@pytest.mark.parametrize("version", ["0.5.16", "0.5.23"])
def test_an_update_is_as_the_release_wants_it(version: str, checkpoint: Path) -> None:
    async def test() -> None:
        async with serving(checkpoint, version=version) as (server, engine):
            await engine.join_weight_group(SPEC, 1)
            await engine.pause(PauseMode.RETRACT)
            await engine.receive_weights(MANIFEST, NEW)
            await engine.resume()
            update = ["/update_weights_from_distributed"]
            if version == "0.5.23":
                update = ["/begin_weight_update", *update, "/end_weight_update"]
            assert server.paths() == [
                "/init_weights_update_group",
                "/pause_generation",
                *update,
                "/continue_generation",
            ]
            bodies = dict(server.calls)
            assert bodies["/pause_generation"]["mode"] == ("retract" if version == "0.5.23" else "in_place")
            assert bodies["/update_weights_from_distributed"]["flush_cache"] is (version == "0.5.23")
            assert bodies["/update_weights_from_distributed"]["weight_version"] == "1.4"
            assert (await engine.status()).weights == NEW

    run(test())


def test_weights_beyond_the_servers_buffer_come_in_several_calls_and_the_last_names_them(checkpoint: Path) -> None:
    manifest = WeightManifest(tuple(TensorSpec(name, "float32", (2,)) for name in "xyz"))

    async def test() -> None:
        async with serving(checkpoint, call_bytes=16) as (server, engine):
            await engine.join_weight_group(SPEC, 1)
            await engine.pause(PauseMode.RETRACT)
            await engine.receive_weights(manifest, NEW)
            calls = [body for path, body in server.calls if path == "/update_weights_from_distributed"]
            assert [body["names"] for body in calls] == [["x", "y"], ["z"]]
            assert [body.get("weight_version") for body in calls] == [None, "1.4"]
            assert [body["flush_cache"] for body in calls] == [False, True]
            assert server.paths().count("/begin_weight_update") == 1

    run(test())


def test_several_sources_are_several_groups_and_one_update(checkpoint: Path) -> None:
    manifest = WeightManifest(tuple(TensorSpec(name, "float32", (2,)) for name in "xyz"))
    other = dataclasses.replace(SPEC, name="other-1")

    async def test() -> None:
        async with serving(checkpoint) as (server, engine):
            await engine.join_weight_group(SPEC, 1, (other,))
            await engine.pause(PauseMode.RETRACT)
            await engine.receive_weights(manifest, NEW, shares=(1, 2))
            calls = [body for path, body in server.calls if path == "/update_weights_from_distributed"]
            assert [(b["group_name"], b["names"]) for b in calls] == [("weights-1", ["x"]), ("other-1", ["y", "z"])]
            assert [body.get("weight_version") for body in calls] == [None, "1.4"]
            assert server.paths().count("/begin_weight_update") == 1
            with pytest.raises(ValueError, match="do not divide 3 tensors over 2 weight groups"):
                await engine.receive_weights(manifest, NEW, shares=(3,))
            await engine.join_weight_group(SPEC, 1)
            left = [body["group_name"] for path, body in server.calls if path == "/destroy_weights_update_group"]
            assert left == ["weights-1", "other-1"]

    run(test())


def test_a_server_that_does_not_come_back_from_a_collective_is_given_up(checkpoint: Path) -> None:
    async def test() -> None:
        async with serving(checkpoint) as (server, engine):
            await engine.join_weight_group(SPEC, 1)
            server.answers["/update_weights_from_distributed"] = hang
            waiting = asyncio.ensure_future(engine.generate(ask()))
            with pytest.raises(EngineError, match="/update_weights_from_distributed: no answer within"):
                await engine.receive_weights(MANIFEST, NEW)
            for call in (engine.check_health(), engine.status(), waiting):
                with pytest.raises(EngineError, match="/update_weights_from_distributed: no answer within"):
                    await call

    run(test())


def test_what_a_pause_cut_is_submitted_under_another_name(checkpoint: Path) -> None:
    """SGLang aborts by name what was in a call, two seconds after it."""

    async def test() -> None:
        async with serving(checkpoint) as (server, engine):
            cut = server.answer_once_cut()
            server.events = [event([], 0, "abort")]
            answer = asyncio.create_task(engine.generate(ask()))
            while "/generate" not in server.paths():
                await asyncio.sleep(0.01)
            await engine.pause(PauseMode.ABORT)
            cut.clear()
            await engine.resume()
            while len(server.asked()) < 2:
                await asyncio.sleep(0.01)
            server.events = [event([7], 1, "abort")]
            await engine.abort("0123")
            assert (await answer).output_ids == [7]
            assert server.asked() == ["0123", "0123-2"]
            assert [body["rid"] for path, body in server.calls if path == "/abort_request"] == ["", "0123-2"]

    run(test())


def test_an_engine_that_failed_is_closed_while_its_requests_are_being_given_up(checkpoint: Path) -> None:
    """The pool closes at once what failed a command: the request's own deadline is then expiring already."""

    async def test() -> None:
        async with serving(checkpoint) as (server, engine):
            server.answers["/generate"] = hang
            waiting = asyncio.ensure_future(engine.generate(ask()))
            while "/generate" not in server.paths():
                await asyncio.sleep(0.01)
            await engine._fail(EngineError("broken"))
            await asyncio.sleep(0)
            await engine.close()
            with pytest.raises(EngineError, match="broken"):
                await waiting

    run(test())


def test_a_broadcast_that_the_server_could_not_take_leaves_it_alive_without_weights(checkpoint: Path) -> None:
    async def fail(_: web.Request) -> web.StreamResponse:
        return web.json_response({"success": False, "message": "Failed to receive weights: reset by peer"}, status=400)

    async def test() -> None:
        async with serving(checkpoint) as (server, engine):
            await engine.join_weight_group(SPEC, 1)
            server.answers["/update_weights_from_distributed"] = fail
            with pytest.raises(EngineRefused, match="Failed to receive weights: reset by peer"):
                await engine.receive_weights(MANIFEST, NEW)
            assert server.paths()[-1] == "/end_weight_update"
            assert (await engine.status()).weights is None
            await engine.check_health()

    run(test())


@pytest.mark.parametrize("keys", [{}, {"api_key": "a"}, {"admin_key": "b"}, {"api_key": "a", "admin_key": "b"}])
def test_each_call_carries_the_key_that_it_needs(keys: dict[str, str], checkpoint: Path) -> None:
    async def test() -> None:
        async with serving(checkpoint, **keys) as (server, engine):
            server.events = [event([7], 1, "length", weight_versions=[{"version": "1.3", "start": 0, "end": 1}])]
            await engine.generate(ask())
            await engine.pause(PauseMode.IN_PLACE)
            for path, key in {
                "/generate": keys.get("api_key") or keys.get("admin_key"),
                "/pause_generation": keys.get("admin_key") or keys.get("api_key"),
            }.items():
                assert server.keys[path] == (f"Bearer {key}" if key else "")

    run(test())


def test_a_server_that_is_not_ready_without_a_pause_is_ill(checkpoint: Path) -> None:
    async def unready(_: web.Request) -> web.StreamResponse:
        return web.Response(status=503)

    async def test() -> None:
        async with serving(checkpoint) as (server, engine):
            server.answers["/ready"] = unready
            await engine.pause(PauseMode.IN_PLACE)
            await engine.check_health()
            await engine.resume()
            with pytest.raises(EngineError, match="not ready, though nobody paused it"):
                await engine.check_health()

    run(test())


def test_an_older_server_without_ready_is_asked_otherwise(checkpoint: Path) -> None:
    async def unknown(_: web.Request) -> web.StreamResponse:
        raise web.HTTPNotFound

    async def test() -> None:
        async with serving(checkpoint, version="0.5.16") as (server, engine):
            server.answers["/ready"] = unknown
            server.calls.clear()
            await engine.check_health()
            await engine.check_health()
            assert [path for path, _ in server.calls] == ["/ready", "/model_info", "/model_info"]

    run(test())


def test_a_server_that_samples_nothing_is_ill(checkpoint: Path) -> None:
    async def silent(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        asked.set()
        await asyncio.Event().wait()
        return response

    asked = asyncio.Event()

    async def test() -> None:
        async with serving(checkpoint, stall_timeout_s=0.0) as (server, engine):
            server.answers["/generate"] = silent
            await engine.check_health()
            waiting = asyncio.ensure_future(engine.generate(ask()))
            await asked.wait()
            with pytest.raises(EngineError, match="has 1 requests and sampled nothing"):
                await engine.check_health()
            waiting.cancel()

    run(test())


def test_a_server_of_an_old_release_is_refused_at_the_start(checkpoint: Path) -> None:
    async def test() -> None:
        with pytest.raises(EngineError, match=r"engine e could not start: SGLang 0\.5\.10 is too old"):
            async with serving(checkpoint, version="0.5.10"):
                pass

    run(test())
