"""Routed experts as SGLang reports them: what is asked, what is taken, and what is refused."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from slime_async.actors.engine import EngineError
from slime_async.actors.engines import server_arguments
from slime_async.actors.sglang.arguments import check_arguments
from slime_async.actors.sglang.engine import SGLangEngine
from slime_async.config.errors import ConfigError
from slime_async.routing import NOT_RECORDED
from tests.sglang.scripted_server import OLD, ask, event, run, serving

LAYERS, EXPERTS_PER_TOKEN, EXPERTS = 3, 2, 16
RECORDING: dict[str, Any] = {"record_routing": True, "arguments": {"enable_return_routed_experts": True}}
WHOLE = {"weight_versions": [{"version": "1.3", "start": 0, "end": 4}]}
TOKENS = 3 + 4
"""Of ``ask()`` and its answer"""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """As much of a mixture of experts as these tests need."""
    import torch
    from safetensors.torch import save_file

    sizes = {"num_hidden_layers": LAYERS, "num_experts_per_tok": EXPERTS_PER_TOKEN, "num_experts": EXPERTS}
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 100, "max_position_embeddings": 64, **sizes}))
    save_file({"x": torch.zeros(2)}, tmp_path / "model.safetensors")
    return tmp_path


def experts(tokens: int) -> NDArray[np.int32]:
    return np.random.default_rng(tokens).integers(0, EXPERTS, (tokens, LAYERS, EXPERTS_PER_TOKEN), dtype=np.int32)


def encoded(record: NDArray[np.int32]) -> str:
    return base64.b64encode(record.tobytes()).decode()


def answer(reason: str = "stop", **meta: Any) -> list[dict[str, Any] | str]:
    """Four tokens in two chunks, the last with ``meta``."""
    return [event([7, 8, 9], 3), event([5], 4, reason, **WHOLE, **meta)]


def test_the_record_comes_with_the_last_chunk_and_the_last_token_has_none(checkpoint: Path) -> None:
    async def test() -> None:
        async with serving(checkpoint, **RECORDING) as (server, engine):
            record = experts(TOKENS - 1)
            server.events = answer(routed_experts=encoded(record))
            routes = (await engine.generate(ask())).routed_experts
            assert server.calls[-1][1]["return_routed_experts"] is True
            assert routes is not None
            assert (routes.dtype, routes.shape) == (np.int16, (TOKENS, LAYERS, EXPERTS_PER_TOKEN))
            assert (routes[:-1] == record).all()
            assert (routes[-1] == NOT_RECORDED).all()

    run(test())


def test_an_engine_that_is_not_told_to_record_asks_for_nothing_and_takes_nothing(checkpoint: Path) -> None:
    async def test() -> None:
        async with serving(checkpoint) as (server, engine):
            server.events = answer(routed_experts="of no use")
            assert (await engine.generate(ask())).routed_experts is None
            assert "return_routed_experts" not in server.calls[-1][1]

    run(test())


@pytest.mark.parametrize(
    ("meta", "complaint"),
    [
        ({}, r"finished an answer and reported no routed experts"),
        (
            {"routed_experts": encoded(experts(TOKENS))},
            r"reported 42 routed experts for 7 tokens: must be 6 tokens × 3",
        ),
        (
            {"routed_experts": encoded(experts(TOKENS - 1) + EXPERTS)},
            r"reported routed experts \d+ … \d+: must be below",
        ),
        ({"routed_experts": "no base64"}, r"are no int32 in base64"),
        ({"routed_experts": base64.b64encode(b"odd").decode()}, r"are no int32 in base64"),
        ({"routed_experts": [[1, 2]]}, r"are no int32 in base64"),
    ],
    ids=["missing", "size", "range", "text", "bytes", "list"],
)
def test_a_finished_answer_without_a_proper_record_is_an_error(
    meta: dict[str, Any], complaint: str, checkpoint: Path
) -> None:
    async def test() -> None:
        async with serving(checkpoint, **RECORDING) as (server, engine):
            server.events = answer(**meta)
            with pytest.raises(EngineError, match=rf"{complaint}.*--enable-return-routed-experts"):
                await engine.generate(ask())
            await engine.check_health()

    run(test())


def test_an_answer_that_was_aborted_or_broke_off_may_have_no_record(checkpoint: Path) -> None:
    async def test() -> None:
        async with serving(checkpoint, **RECORDING) as (server, engine):
            server.events = answer("abort")
            aborted = await engine.generate(ask())
            assert (aborted.finish_reason, aborted.routed_experts) == ("abort", None)
            server.events = answer("abort", routed_experts=encoded(experts(TOKENS - 1)))
            assert (await engine.generate(ask())).routed_experts is not None
            server.events = [event([7], 1)]
            with pytest.raises(EngineError, match="ended before its answer did") as broken:
                await engine.generate(ask())
            assert broken.value.partial is not None
            assert broken.value.partial.routed_experts is None

    run(test())


def test_a_server_that_does_not_record_is_refused_at_the_start(checkpoint: Path) -> None:
    async def test() -> None:
        with pytest.raises(EngineError, match=r"does not record routed experts: .*--enable-return-routed-experts"):
            async with serving(checkpoint, record_routing=True):
                pass

    run(test())


def test_an_old_release_that_overlaps_would_record_wrongly_and_is_refused(checkpoint: Path) -> None:
    async def test() -> None:
        arguments = {"enable_return_routed_experts": True, "disable_overlap_schedule": False}
        with pytest.raises(EngineError, match=r"0\.5\.16 records routed experts wrongly.*--disable-overlap-schedule"):
            async with serving(checkpoint, record_routing=True, arguments=arguments, version="0.5.16"):
                pass

    run(test())


def test_a_model_without_experts_has_nothing_to_record(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text(json.dumps({"vocab_size": 100, "max_position_embeddings": 64}))
    with pytest.raises(ValueError, match=r"is no mixture of experts: set actor\.record_routing = false"):
        SGLangEngine(checkpoint, engine_id="e", url="http://127.0.0.1:1", weights=OLD, record_routing=True)


def test_servers_are_started_with_the_argument_that_makes_them_record(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slime_async.actors.engines.installed_version", lambda: "0.5.23")
    flag = "--enable-return-routed-experts"
    assert flag in server_arguments(checkpoint, 32, {}, record_routing=True)
    assert flag not in server_arguments(checkpoint, 32, {})
    assert "--disable-overlap-schedule" not in server_arguments(checkpoint, 32, {}, record_routing=True)
    monkeypatch.setattr("slime_async.actors.engines.installed_version", lambda: "0.5.16")
    assert "--disable-overlap-schedule" in server_arguments(checkpoint, 32, {}, record_routing=True)
    with pytest.raises(ConfigError, match=r"enable_return_routed_experts cannot be set: set actor\.record_routing"):
        check_arguments({"enable_return_routed_experts": True})
