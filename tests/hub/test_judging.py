"""Groups meet their judge in the hub: through a scripted one, and through the user's functions in a process."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slime_async.actors.isolation import WorkerError
from slime_async.actors.judging import Group, Sample, has_signal, judge_group, make_judge
from slime_async.config import Config, ConfigError
from slime_async.demo.tokenizer import EOS, VOCABULARY, make_tokenizer
from slime_async.learner.batch import filtered, judged
from slime_async.trajectory import Trajectory, VersionSpan, WeightId
from slime_async.transport.failures import MAX_GROUPS_IN_A_ROW
from tests.hub.players import make_config, run, stage
from tests.transport.examples import make_trajectory

EOS_ID = VOCABULARY.index(EOS)


class ScriptedJudge:
    """Keeps every other group; the samples' numbers are their rewards."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.seen: list[int] = []

    async def prepare(self) -> None:
        """Nothing is loaded."""

    async def __call__(self, trajectories: Sequence[Trajectory]) -> tuple[list[float], bool]:
        if self.error is not None:
            raise self.error
        assert [trajectory.sample for trajectory in trajectories] == [0, 1]
        self.seen.append(trajectories[0].task.serial)
        return [10.0 + trajectory.sample for trajectory in trajectories], self.seen[-1] % 2 == 0

    async def close(self) -> None:
        """Nothing is held."""


def judged_config(**batch: Any) -> Config:
    config = make_config(eta=0, **batch)
    return config.model_copy(update={"task": config.task.model_copy(update={"group_reward": "some:judge"})})


def test_a_batch_carries_the_judges_rewards_and_what_was_filtered_out() -> None:
    async def test() -> None:
        judge = ScriptedJudge()
        async with stage(judged_config(), judge) as hub:
            actor, learner = await hub.actor(), await hub.learner()
            await learner.publish(0)
            granted = await actor.granted(4)
            await actor.fail(granted[0], "a game that would not end", "WorkerError:timeout")
            granted[:1] = await actor.granted(1)
            await actor.deliver_all(granted)  # groups 0 and 1; the judge refuses 1
            await actor.deliver_all(await actor.granted(2))  # group 2 takes its place
            batch = await learner.leased(0)
        assert judge.seen == [0, 1, 2]
        assert [trajectory.task.serial for trajectory in batch.trajectories] == [0, 0, 2, 2]
        assert batch.rewards == (10.0, 11.0, 10.0, 11.0)
        assert [trajectory.reward for trajectory in judged(batch)] == [10.0, 11.0, 10.0, 11.0]
        sampled = int(batch.trajectories[0].loss_mask.sum())
        assert filtered(batch, groups=2) == {
            "groups_filtered": 1.0,
            "tokens_filtered": 2.0 * sampled,
            "over_sampling": 1.5,
            "failed/WorkerError:timeout": 1.0,
        }

    run(test())


def test_a_judge_that_always_fails_ends_the_run() -> None:
    async def test() -> None:
        async with stage(judged_config(), ScriptedJudge(ValueError("no opinion"))) as hub:
            actor, learner = await hub.actor(), await hub.learner()
            await learner.publish(0)
            for _ in range(MAX_GROUPS_IN_A_ROW // 2):
                await actor.deliver_all(await actor.granted(4))
            await actor.leaves()
            await learner.leaves()
            with pytest.raises(ConfigError, match=f"{MAX_GROUPS_IN_A_ROW} groups in a row .* no opinion"):
                await hub.running

    run(test())


# ------------------------------------------------------------------------------------------- the user's functions


def shortest_wins(group: Group) -> list[float]:
    best = min(sample.sampled_tokens for sample in group.samples)
    return [float(s.sampled_tokens == best) + (s.answer == group.content["wanted"]) for s in group.samples]


def one_for_all(group: Group) -> list[float]:
    return [1.0]


def make_tokenizer_at(directory: Path) -> Path:
    make_tokenizer().save_pretrained(directory)
    return directory


def user_config(checkpoint: Path | str = "x", **task: str) -> Config:
    return Config.model_validate(
        {
            "model": {"path": str(checkpoint)},
            "task": {"train": {"s": {"factory": "tests.actors.workhorse:source"}}, **task},
        }
    )


def episode(sample: int, *ids: int, reward: float = 0.0) -> Trajectory:
    """Prompt 1; the answer; an inserted 5; one more sampled token 2."""
    n = len(ids)
    return make_trajectory(
        0,
        sample,
        token_ids=np.array([1, *ids, 5, 2], dtype=np.int32),
        loss_mask=np.array([0, *[1] * n, 0, 1], dtype=np.uint8),
        behavior_logprobs=np.zeros(n + 3, dtype=np.float32),
        spans=(VersionSpan(1, WeightId(1, 0)),),
        reward=reward,
    )


def test_the_users_functions_see_answers_turn_by_turn(tmp_path: Path) -> None:
    config = user_config(
        make_tokenizer_at(tmp_path),
        group_reward=f"{__name__}:shortest_wins",
        filter=f"{has_signal.__module__}:has_signal",
    )
    raw = [
        {"token_ids": t.token_ids, "loss_mask": t.loss_mask, "reward": 0.0, "finish_reason": "stop", "metrics": {}}
        for t in (episode(0, 1, 2, EOS_ID), episode(1, 3))
    ]
    assert judge_group(config.model_dump_json(), "s", 0, raw) == ([0.0, 1.0], True)
    assert judge_group(config.model_dump_json(), "s", 0, raw[:1]) == ([1.0], False)
    wrong = user_config(tmp_path, group_reward=f"{__name__}:one_for_all")
    with pytest.raises(ValueError, match="gave 1 rewards for 2 samples"):
        judge_group(wrong.model_dump_json(), "s", 0, raw)


def test_a_sample_shows_its_answers_without_special_tokens_and_its_transcript_with_them() -> None:
    from slime_async.actors.judging import _sample

    raw = {"token_ids": [1, 3, EOS_ID, 5, 2], "loss_mask": [0, 1, 1, 0, 1], "reward": 0.5, "finish_reason": "stop"}
    assert _sample(make_tokenizer(), {**raw, "metrics": {}}) == Sample(("3", "2"), "13<eos>52", 0.5, "stop", 3, {})


def test_the_judge_is_a_process_of_its_own_and_its_failures_have_reasons(tmp_path: Path) -> None:
    async def test() -> None:
        judge = make_judge(user_config(group_reward="tests.actors.workhorse:hang"))
        misspelt = make_judge(user_config(make_tokenizer_at(tmp_path), filter="tests.actors.workhorse:hanf"))
        assert judge is not None
        assert misspelt is not None
        try:
            with pytest.raises(ConfigError, match=r"groups cannot be judged: .* did you mean hang"):
                await misspelt.prepare()
            with pytest.raises(WorkerError, match=r"judge_group raised KeyError: 'train'") as failure:
                await judge([episode(0, 3), episode(1, 3)])
            assert failure.value.reason == "KeyError", "the configuration has no such source"
        finally:
            await judge.close()
            await misspelt.close()

    asyncio.run(asyncio.wait_for(test(), 60))
    assert make_judge(user_config()) is None
