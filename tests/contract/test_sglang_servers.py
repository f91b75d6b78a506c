"""SGLang servers of our own: launched, killed, hung, restarted. Needs SGLang: ``scripts/test-sglang`` runs these."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch

from slime_async.actors.engine import Engine, EngineError, SamplingParams
from slime_async.actors.engines import server_arguments
from slime_async.actors.policy import EnginePolicy, EpisodeLimits
from slime_async.actors.pool import EnginePool
from slime_async.actors.sglang.arguments import known_arguments
from slime_async.actors.sglang.engine import SGLangEngine
from slime_async.actors.sglang.server import LaunchSpec
from slime_async.trajectory import VersionSpan, WeightId
from tests.contract.reference import (
    NEW,
    OLD,
    SMALL_BUFFER_BYTES,
    Bench,
    Checkpoints,
    Learner,
    answer_logprobs,
    ask,
    load_model,
    prompt,
    run,
    serving,
    tensors_of,
)
from tests.contract.servers import CONTEXT, CPU, GPU

STARTUP_TIMEOUT_S = 280.0
TOKENS = 2000
"""Long enough to be killed in"""


@pytest.fixture(autouse=True)
def sglang_only(bench: Bench) -> None:
    if bench.name != "sglang":
        pytest.skip("scripts/test-sglang runs this")


class Ward:
    """Makes the pool's engines, each a server of its own, and remembers them."""

    def __init__(self, checkpoint: Path, logs: Path, bench: Bench, weights: WeightId | None = OLD) -> None:
        self.engines: dict[str, SGLangEngine] = {}
        self._checkpoint, self._logs, self._weights = checkpoint, logs, weights
        self._options = {**(GPU if bench.backend == "nccl" else CPU), "max_running_requests": 4}
        self._stall_timeout_s = 30.0 if bench.backend == "nccl" else 5.0  # kernels are compiled when first needed
        self._devices = (0,) if bench.backend == "nccl" else ()

    def make(self, engine_id: str) -> Engine:
        weights = self._weights if "." not in engine_id else None  # a second life waits for the learner
        arguments = server_arguments(self._checkpoint, CONTEXT, self._options, weights)
        log = self._logs / f"{engine_id.replace('/', '-')}.log"
        launch = LaunchSpec(arguments, log, self._devices, {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
        engine = SGLangEngine(
            self._checkpoint,
            engine_id=engine_id,
            launch=launch,
            weights=weights,
            max_context=CONTEXT,
            startup_timeout_s=STARTUP_TIMEOUT_S,
            stall_timeout_s=self._stall_timeout_s,
        )
        self.engines[engine_id] = engine
        return engine

    def pid(self, engine_id: str) -> int:
        server = self.engines[engine_id]._server
        assert server is not None
        return server.pid


@asynccontextmanager
async def running(ward: Ward) -> AsyncIterator[EnginePool]:
    pool = EnginePool("a", [ward.make], health_interval_s=0.5, startup_timeout_s=STARTUP_TIMEOUT_S)
    await pool.start()
    keeping = asyncio.create_task(pool.run())
    try:
        yield pool
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        await pool.close()


def alive(pid: int) -> bool:
    """Whether any process of the server's group lives; the dead that nobody has buried yet do not count."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(group) == pid and state != "Z":
                return True
    return False


def test_requests_beyond_what_a_server_decodes_at_once_wait_outside(
    bench: Bench, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    async def test() -> None:
        ward = Ward(checkpoints(), tmp_path, bench)
        async with running(ward) as pool:
            answers = await asyncio.gather(*(pool.generate(ask(prompt(5), 40)) for _ in range(10)))
        assert [len(answer.output_ids) for answer in answers] == [40] * 10
        queued = re.findall(r"#queue-req: (\d+)", (tmp_path / "a-0.log").read_text())
        assert queued
        assert set(queued) == {"0"}

    run(test())


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
def test_a_server_that_ends_is_restarted_and_its_answer_goes_on_with_the_learners_weights(
    end: signal.Signals, bench: Bench, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """The learner waits for data all the while: it only hears of a new engine, and gives it what is current."""

    async def test() -> None:
        ward, told = Ward(checkpoints(), tmp_path, bench), asyncio.Event()
        async with running(ward) as pool:
            pool.on_change = lambda engines: told.set() if "a/0.1" in [e.engine_id for e in engines] else None
            policy = EnginePolicy(pool, SamplingParams(TOKENS), EpisodeLimits(CONTEXT), seed=0)
            turn = asyncio.ensure_future(policy.sample(prompt(9)))
            while (await pool.status()).generated_tokens < 40:
                await asyncio.sleep(0.01)
            pid = ward.pid("a/0")
            os.killpg(pid, end)
            await told.wait()
            assert not alive(pid)
            async with Learner.joined_by(ward.engines["a/0.1"], backend=bench.backend) as learner:
                tensors = tensors_of(checkpoints(seed=1), bench.device)
                receiving = pool.command(
                    "a/0.1", lambda engine: engine.receive_weights(learner.manifest(tensors), NEW), 60.0
                )
                await asyncio.gather(receiving, asyncio.to_thread(learner.group.send, tensors.items()))
            got = await turn
        boundary = got.spans[1].first_token
        assert got.spans == (VersionSpan(0, OLD), VersionSpan(boundary, NEW))
        assert boundary >= 40
        assert (len(got.output_ids), pool.deaths) == (TOKENS, 1)
        for checkpoint, part in ((checkpoints(), slice(0, boundary)), (checkpoints(seed=1), slice(boundary, None))):
            expected = answer_logprobs(load_model(checkpoint), prompt(9), got.output_ids)
            torch.testing.assert_close(torch.tensor(got.logprobs)[part], expected[part], atol=bench.tolerance, rtol=0)

    run(test())


def test_a_server_that_cannot_start_says_why(bench: Bench, checkpoints: Checkpoints, tmp_path: Path) -> None:
    async def test() -> None:
        ward = Ward(checkpoints(), tmp_path, bench)
        ward._options["attention_backend"] = "none_such"
        with pytest.raises(EngineError, match=r"(?s)engine a/0 could not start: its server ended .*none_such"):
            await ward.make("a/0").start()

    run(test())


def test_the_installed_sglangs_arguments_are_known() -> None:
    assert {"tp_size", "mem_fraction_static", "disable_overlap_schedule", "attention_backend"} <= known_arguments()
    assert len(known_arguments()) > 300


def test_a_server_of_two_ranks_gets_weights_on_both(
    bench: Bench, checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if bench.backend == "nccl":
        pytest.skip("takes two GPUs beside the learner's")
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1")  # a core for each rank; there are but two

    async def test() -> None:
        ward = Ward(checkpoints(), tmp_path, bench)
        ward._options["tp_size"] = 2
        async with serving(ward.make("a/0")) as engine:
            assert (engine.num_ranks, engine.takes_buffers) == (2, True)
            for epoch, buffer_bytes in enumerate((0, SMALL_BUFFER_BYTES), 1):
                seed = epoch % 2
                async with Learner.joined_by(engine, epoch) as learner:
                    weights = NEW._replace(version=3 + epoch)
                    await learner.broadcast(engine, tensors_of(checkpoints(seed=seed)), weights, buffer_bytes)
                answer = await engine.generate(ask(prompt(9), 12))
                expected = answer_logprobs(load_model(checkpoints(seed=seed)), prompt(9), answer.output_ids)
                torch.testing.assert_close(torch.tensor(answer.logprobs), expected, atol=bench.tolerance, rtol=0)

    run(test())
