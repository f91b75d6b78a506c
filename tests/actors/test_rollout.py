"""One reservation becomes one trajectory or one counted failure; single-turn episodes and their rewards."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from slime_async.actors import single_turn
from slime_async.actors.engine import EngineError, GenerateRequest, Generation
from slime_async.actors.environment import Episode, EpisodeBuilder, Generate, Policy, Reward, Task
from slime_async.actors.rollout import Rollout, RolloutFailure, RolloutSettings
from slime_async.demo.tokenizer import make_tokenizer
from slime_async.protocol import Reservation
from slime_async.trajectory import TaskRef, Trajectory
from tests.actors.scripted import EOS_ID, SAMPLING, TOKENIZER, ScriptedEngine, answer, make_task, says

TASKS: list[Any] = [{"prompt": "+21=", "wanted": "12"}, {"prompt": [10, 3, 1, 12], "wanted": "13"}, {"no": "prompt"}]


def exact(content: Any, text: str, finish_reason: str) -> float:
    return float(text == content["wanted"] and finish_reason == "stop")


def make_rollout(
    engine: ScriptedEngine,
    *,
    generate: Generate = single_turn.generate,
    reward: Reward | None = exact,
    timeout_s: float = 30.0,
) -> Rollout:
    settings = RolloutSettings(SAMPLING, TOKENIZER, generate, reward, 0, 64, timeout_s)
    return Rollout(settings, {"sums": TASKS}, engine)


def reservation(index: int = 0, *, serial: int = 7, source: str = "sums", **fields: Any) -> Reservation:
    return Reservation(TaskRef(serial, source, index), **{"sample": 2, "attempt": 1, **fields})


def play(rollout: Rollout, what: Reservation | None = None) -> Trajectory | RolloutFailure:
    return asyncio.run(rollout.run(what or reservation()))


@pytest.mark.parametrize(("index", "text", "reward"), [(0, "12", 1.0), (0, "21", 0.0), (1, "13", 1.0)])
def test_a_single_turn_is_sampled_once_and_judged(index: int, text: str, reward: float) -> None:
    engine = ScriptedEngine([says(text)])
    rollout = make_rollout(engine)
    trajectory = play(rollout, reservation(index))

    assert isinstance(trajectory, Trajectory)
    prompt = list(engine.requests[0].prompt_ids)
    assert TOKENIZER.decode(prompt) == ("+21=" if index == 0 else "+31=")
    assert trajectory.token_ids.tolist() == [*prompt, *TOKENIZER.encode(text), EOS_ID]
    assert trajectory.loss_mask.tolist() == [0] * 4 + [1] * 3
    assert (trajectory.reward, trajectory.finish_reason) == (reward, "stop")
    assert (trajectory.task.index, trajectory.sample, trajectory.attempt) == (index, 2, 1)
    assert rollout.report() | {"rollout/busy_s": 0.0} == {
        "rollout/finished": 1,
        "rollout/failed": 0,
        "rollout/sampled_tokens": 3,
        "rollout/resubmissions": 0,
        "rollout/busy_s": 0.0,
    }


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (answer([1, 2, EOS_ID]), "12"),
        (answer([1, 2], reason="length"), "12"),
        (answer([1, 13, 2, EOS_ID]), "1<pad>2"),
        (answer([EOS_ID]), ""),
        (answer([1, EOS_ID], reason="length"), "1<eos>"),
    ],
)
def test_the_text_of_an_answer_loses_its_end_and_nothing_else(given: Generation, text: str) -> None:
    seen: list[tuple[str, str]] = []

    def reward(content: Any, answer_text: str, finish_reason: str) -> float:
        seen.append((answer_text, finish_reason))
        return 0.0

    play(make_rollout(ScriptedEngine([given]), reward=reward))
    assert seen == [(text, given.finish_reason)]


def test_a_reward_may_be_a_coroutine() -> None:
    async def reward(content: Any, text: str, finish_reason: str) -> float:
        await asyncio.sleep(0)
        return 0.25

    trajectory = play(make_rollout(ScriptedEngine([says("12")]), reward=reward))
    assert isinstance(trajectory, Trajectory)
    assert trajectory.reward == 0.25


def test_messages_are_rendered_by_the_chat_template() -> None:
    chat = make_tokenizer()
    chat.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    task = replace(make_task({"messages": [{"role": "user", "content": "+21"}]}), tokenizer=chat)
    assert single_turn.encode_prompt(task) == TOKENIZER.encode("+21=")


async def never(task: Task, policy: Policy) -> Episode:
    await asyncio.Event().wait()
    raise AssertionError


async def raises_its_own_timeout(task: Task, policy: Policy) -> Episode:
    raise TimeoutError("the game server is silent")


async def returns_a_number(task: Task, policy: Policy) -> Any:
    return 1.0


async def forgets_what_came_before(task: Task, policy: Policy) -> Episode:
    episode = EpisodeBuilder()
    episode.add(await policy.sample([1, 2]))
    episode.add(await policy.sample([1, 3]))
    return episode.finish(0.0)


def dead(request: GenerateRequest) -> Generation:
    raise EngineError("engine e0 died")


def bad_reward(content: Any, text: str, finish_reason: str) -> float:
    return float("nan")


@pytest.mark.parametrize(
    ("changes", "where", "reason"),
    [
        ({"generate": never, "timeout_s": 0.01}, {}, "TimeoutError: no result within actor.episode_timeout_s = 0.01 s"),
        ({"generate": raises_its_own_timeout}, {}, "TimeoutError: the game server is silent"),
        ({"generate": returns_a_number}, {}, "TypeError: task.generate returned a float"),
        ({"generate": forgets_what_came_before}, {}, "ValueError: the prompt of this turn has token 3 at position 1"),
        ({"reward": None}, {}, "ValueError: this episode needs a reward function: set task.reward"),
        ({"reward": bad_reward}, {}, "ValueError: reward is nan"),
        ({}, {"index": 2}, "ValueError: task 2 of source 'sums' is {'no': 'prompt'}: the single-turn episode needs"),
        ({}, {"index": 3}, "IndexError"),
        ({}, {"source": "other"}, "ValueError: no source 'other' here, only"),
    ],
)
def test_a_failed_episode_is_counted_and_says_why(changes: dict[str, Any], where: dict[str, Any], reason: str) -> None:
    rollout = make_rollout(ScriptedEngine([says("12")]), **changes)
    failure = play(rollout, reservation(**where))
    assert isinstance(failure, RolloutFailure)
    assert failure.reason.startswith(reason)
    kind = reason.partition(":")[0]
    report = rollout.report()
    assert (report["rollout/finished"], report["rollout/failed"], report[f"rollout/failed/{kind}"]) == (0, 1, 1)


def test_a_dead_engine_fails_its_episodes_and_the_next_one_goes_on() -> None:
    rollout = make_rollout(ScriptedEngine([dead, says("12")]))
    assert play(rollout) == RolloutFailure("EngineError: engine e0 died", "EngineError")
    assert isinstance(play(rollout), Trajectory)


def test_cancelling_a_rollout_is_no_failure() -> None:
    async def cancel() -> None:
        task = asyncio.create_task(rollout.run(reservation()))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    rollout = make_rollout(ScriptedEngine([says("12")]), generate=never)
    asyncio.run(cancel())
    assert rollout.report()["rollout/failed"] == 0


def test_what_is_sampled_is_keyed_by_task_and_sample_and_not_by_the_attempt() -> None:
    def seed_of(what: Reservation) -> int | None:
        engine = ScriptedEngine([says("12")])
        play(make_rollout(engine), what)
        return engine.requests[0].sampling.seed

    again = seed_of(reservation(attempt=0))
    assert seed_of(reservation(attempt=3)) == again
    others: Sequence[Reservation] = [
        reservation(serial=8),
        reservation(sample=3),
        reservation(evaluation="before"),
        reservation(1, evaluation="before"),
    ]
    assert len({again, *(seed_of(other) for other in others)}) == 5
    assert seed_of(reservation(serial=1, evaluation="before")) == seed_of(reservation(serial=2, evaluation="after"))


def test_pieces_of_an_aborted_answer_are_counted() -> None:
    rollout = make_rollout(ScriptedEngine([answer([1], reason="abort"), answer([2, EOS_ID], versions={0: 1})]))
    trajectory = play(rollout)
    assert isinstance(trajectory, Trajectory)
    assert trajectory.token_versions().tolist() == [-1, -1, -1, -1, 0, 1, 1]
    assert trajectory.reward == 1.0
    assert rollout.report()["rollout/resubmissions"] == 1
