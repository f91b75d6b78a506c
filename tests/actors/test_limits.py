"""Deadlines and token budgets: what they end, what remains, and what it is counted as."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from slime_async.actors import single_turn
from slime_async.actors.embedded.engine import EmbeddedEngine
from slime_async.actors.engine import GenerateRequest, Generation, PauseMode
from slime_async.actors.environment import Episode, EpisodeBuilder, EpisodeTruncated, Policy, Task
from slime_async.actors.policy import EnginePolicy, EpisodeLimits
from slime_async.actors.rollout import Rollout, RolloutFailure, RolloutSettings
from slime_async.actors.shaping import Overlong
from slime_async.config import Config
from slime_async.demo.model import make_checkpoint
from slime_async.protocol import Reservation
from slime_async.trajectory import TaskRef, Trajectory, WeightId
from tests.actors.scripted import EOS_ID, SAMPLING, TOKENIZER, Answer, ScriptedEngine, answer, says


@dataclass
class SlowEngine:
    """Samples nothing more after ``partial``, until it is told to stop."""

    partial: list[int]
    requests: list[GenerateRequest] = field(default_factory=list)
    aborted: asyncio.Event = field(default_factory=asyncio.Event)

    async def generate(self, request: GenerateRequest) -> Generation:
        self.requests.append(request)
        await self.aborted.wait()
        return answer(self.partial, reason="abort")

    async def abort(self, request_id: str) -> None:
        assert request_id == self.requests[-1].request_id
        self.aborted.set()


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def make_policy(engine: Any, clock: Clock | None = None, **limits: Any) -> EnginePolicy:
    return EnginePolicy(engine, SAMPLING, EpisodeLimits(64, **limits), seed=0, clock=clock or Clock())


def test_a_turn_that_meets_its_deadline_keeps_what_it_has() -> None:
    async def play() -> None:
        turn = await make_policy(SlowEngine([1, 2]), turn_timeout_s=0.01).sample([5])
        assert (turn.output_ids, turn.finish_reason, len(turn.logprobs)) == ([1, 2], "deadline", 2)

    asyncio.run(play())


def test_a_turn_without_a_token_at_its_deadline_truncates_the_episode() -> None:
    async def play() -> None:
        with pytest.raises(EpisodeTruncated, match="no token was sampled") as truncation:
            await make_policy(SlowEngine([]), turn_timeout_s=0.01).sample([5])
        assert truncation.value.reason == "deadline"

    asyncio.run(play())


def test_an_episode_without_time_left_is_truncated_before_the_engine_is_asked() -> None:
    engine, clock = ScriptedEngine([says("1")]), Clock()
    policy = make_policy(engine, clock, truncate_after_s=10.0)
    clock.now = 4.0
    assert policy.time_left_s == 6.0
    asyncio.run(policy.sample([1]))
    clock.now = 10.0
    with pytest.raises(EpisodeTruncated, match=r"sampling.truncate_after_s = 10 s") as truncation:
        asyncio.run(policy.sample([1]))
    assert (truncation.value.reason, len(engine.requests)) == ("deadline", 1)


def test_the_token_budget_shortens_the_last_turn_and_ends_the_episode_after_it() -> None:
    engine = ScriptedEngine([answer([1, 2, EOS_ID]), answer([3], reason="length")])
    policy = make_policy(engine, max_episode_tokens=4)
    asyncio.run(policy.sample([9]))
    assert policy.room([9]) == 1
    asyncio.run(policy.sample([9]))
    assert [request.sampling.max_new_tokens for request in engine.requests] == [4, 1]
    with pytest.raises(EpisodeTruncated, match=r"max_episode_tokens = 4") as truncation:
        asyncio.run(policy.sample([9]))
    assert truncation.value.reason == "token_budget"


def test_turns_at_the_same_time_share_the_budget() -> None:
    async def play() -> None:
        engine = SlowEngine([1])
        policy = make_policy(engine, max_episode_tokens=9, turn_timeout_s=5.0)
        first = asyncio.create_task(policy.sample([1]))
        await asyncio.sleep(0)
        assert policy.room([1]) == 2
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert policy.room([1]) == 9

    asyncio.run(play())


def test_cancelling_a_turn_with_a_deadline_cancels_its_request() -> None:
    async def play() -> None:
        engine = SlowEngine([])
        sampling = asyncio.create_task(make_policy(engine, turn_timeout_s=60.0).sample([1]))
        while not engine.requests:
            await asyncio.sleep(0)
        sampling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sampling
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 1, "nothing of the request is left"

    asyncio.run(play())


# -------------------------------------------------------------------------------------------------- whole episodes

SETTINGS = RolloutSettings(SAMPLING, TOKENIZER, single_turn.generate, lambda *_: 1.0, 0, 64, 30.0)


async def talks_for_ever(task: Task, policy: Policy) -> Episode:
    prompt = [1]
    while True:
        turn = await policy.sample(prompt)
        prompt = [*turn.prompt_ids, *turn.output_ids, 2]


async def takes_what_there_is(task: Task, policy: Policy) -> Episode:
    episode, prompt = EpisodeBuilder(), [1]
    try:
        while True:
            episode.add(await policy.sample(prompt))
            prompt = [*episode.token_ids, 2]
    except EpisodeTruncated as truncation:
        return episode.finish(0.25, finish_reason=truncation.reason)


def play(settings: RolloutSettings, script: list[Answer], evaluation: str = "") -> tuple[Rollout, Any]:
    rollout = Rollout(settings, {"s": [{"prompt": "1"}]}, ScriptedEngine(script))
    return rollout, asyncio.run(rollout.run(Reservation(TaskRef(0, "s", 0), 0, 0, evaluation)))


def test_an_episode_that_does_not_look_at_limits_is_what_was_sampled_until_then() -> None:
    settings = replace(SETTINGS, generate=talks_for_ever, max_episode_tokens=4, truncated_reward=-0.5)
    rollout, trajectory = play(settings, [says("3")])
    assert isinstance(trajectory, Trajectory)
    assert trajectory.token_ids.tolist() == [1, 3, EOS_ID, 2, 3, EOS_ID]
    assert trajectory.loss_mask.tolist() == [0, 1, 1, 0, 1, 1]
    assert (trajectory.reward, trajectory.finish_reason, trajectory.truncated) == (-0.5, "token_budget", True)
    assert rollout.report()["rollout/truncated/token_budget"] == 1


def test_an_episode_may_judge_its_own_truncation() -> None:
    settings = replace(SETTINGS, generate=takes_what_there_is, max_context_tokens=7)
    rollout, trajectory = play(settings, [says("3")])
    assert (trajectory.reward, trajectory.finish_reason) == (0.25, "context_full")
    assert rollout.report()["rollout/truncated/context_full"] == 1


def test_an_episode_truncated_before_its_first_token_has_failed() -> None:
    rollout, failure = play(replace(SETTINGS, generate=talks_for_ever, max_context_tokens=1), [says("3")])
    assert isinstance(failure, RolloutFailure)
    assert rollout.report()["rollout/failed/ContextFullError:context_full"] == 1


@pytest.mark.parametrize(("tokens", "lost"), [(2, 0.0), (4, 0.0), (5, 0.25), (6, 0.5), (8, 1.0)])
def test_overlong_shaping_takes_more_the_closer_the_limit_is(tokens: int, lost: float) -> None:
    assert Overlong(limit=8, buffer=4, penalty=1.0).loss(tokens) == lost


def test_overlong_shaping_is_for_training_and_not_for_evaluation() -> None:
    settings = replace(SETTINGS, overlong=Overlong(limit=4, buffer=2, penalty=1.0))
    _, trained = play(settings, [answer([1, 2, EOS_ID])])
    _, evaluated = play(settings, [answer([1, 2, EOS_ID])], evaluation="before")
    assert (trained.reward, evaluated.reward) == (0.5, 1.0)
    assert trained.metrics == {"overlong_loss": 0.5}


def test_the_limit_of_overlong_shaping_is_the_episodes_before_the_turns() -> None:
    def overlong(**sampling: Any) -> Overlong | None:
        return Overlong.from_config(Config.model_validate({"task": {"overlong_tokens": 8}, "sampling": sampling}))

    assert overlong(max_new_tokens=100) == Overlong(100, 8, 1.0)
    assert overlong(max_new_tokens=100, max_episode_tokens=300) == Overlong(300, 8, 1.0)
    assert Overlong.from_config(Config()) is None


def test_the_embedded_engine_hands_over_what_it_has_when_a_turn_is_over(tmp_path: Path) -> None:
    """Against the real engine: one paused before its first token, and one that is told to stop while it samples."""

    async def play() -> None:
        make_checkpoint(tmp_path, 0)
        engine = EmbeddedEngine(tmp_path, slots=2, max_context=120, weights=WeightId(1, 0))
        await engine.start()
        try:
            await engine.pause(PauseMode.IN_PLACE)
            endless = replace(SAMPLING, max_new_tokens=100, stop_token_ids=())
            waits = EnginePolicy(engine, endless, EpisodeLimits(120, turn_timeout_s=0.05), seed=0)
            with pytest.raises(EpisodeTruncated, match="no token was sampled"):
                await waits.sample([1, 2])
            await engine.resume()
            samples = EnginePolicy(engine, endless, EpisodeLimits(120, turn_timeout_s=0.02), seed=0)
            turn = await samples.sample([1, 2])
            assert (turn.finish_reason == "deadline") == (len(turn.output_ids) < 100)
            assert (await engine.status()).running_requests == 0
        finally:
            await engine.close()

    asyncio.run(asyncio.wait_for(play(), 60))
