"""The environments that come with the package: their rules, their tools, and that all of them keep the contract."""

from __future__ import annotations

import asyncio
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest

from slime_async.actors.check import check_task
from slime_async.actors.environment import Episode, Generate, Task
from slime_async.actors.environments import codes, gym_text, latency, reasoning, tool_use
from slime_async.actors.environments.calculator import calculate
from slime_async.actors.environments.sandbox import run_python
from slime_async.actors.isolation import WorkerPool
from slime_async.actors.policy import EnginePolicy, EpisodeLimits
from slime_async.config import Config
from slime_async.demo.chat import make_checkpoint, make_tokenizer
from slime_async.demo.codes import GUESSES, Author, demonstrations, held_out, is_guess, reveal
from slime_async.trajectory import TaskRef, Trajectory
from tests.actors import scripted
from tests.actors.scripted import ScriptedEngine, make_task
from tests.actors.test_chat import CHAT, SAMPLING, says

DEADLINE_S = 60.0
PLAIN = make_tokenizer()
PLAIN.chat_template = None


def play(generate: Generate, content: Any, *answers: str, chat: bool = True, **arguments: Any) -> Trajectory:
    async def once() -> Trajectory:
        pool = WorkerPool(1)
        task = Task(TaskRef(0, "s", 0), 0, content, SAMPLING, CHAT if chat else PLAIN, workers=pool)
        engine = ScriptedEngine([says(answer) for answer in answers])
        policy = EnginePolicy(engine, SAMPLING, EpisodeLimits(8192), seed=0)
        try:
            async with asyncio.timeout(DEADLINE_S):
                episode = await generate(task, policy, **arguments)  # type: ignore[call-arg]
        finally:
            await pool.close()
        assert len(engine.requests) == len(answers)
        return episode.to_trajectory(task.ref, 0, 0)

    return asyncio.run(once())


# ----------------------------------------------------------------------------------------------------------- tools


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("17 * 23", "391"),
        ("-(2 + 3) ** 2 / 5", "-5"),
        ("7 // 2 + 7 % 2", "4"),
        ("1 / 3", "0.3333333333333333"),
        ("2 ** 100", str(2**100)),
        ("1 / 0", "error: division by zero"),
        ("9 ** 9 ** 9", "error: the power is too large"),
        ("__import__('os')", "error: __import__('os') is no arithmetic"),
        ("(-8) ** 0.5", "error: the value is not real"),
        ("True + 1", "error: True is no arithmetic"),
        ("1 +", "error: invalid syntax"),
        ("(" * 400, "error: "),
        ("1" * 501, "error: an expression has at most"),
    ],
)
def test_the_calculator_knows_arithmetic_and_nothing_else(expression: str, value: str) -> None:
    assert calculate(expression).startswith(value)


@pytest.mark.parametrize(
    ("code", "limits", "status", "output"),
    [
        ("print(6 * 7)", {}, "ok", "42\n"),
        ("import sys; sys.exit(3)", {}, "error", ""),
        ("1 / 0", {}, "error", "ZeroDivisionError"),
        ("while True: pass", {"timeout_s": 0.5}, "timeout", ""),
        ("x = bytearray(1 << 30)", {"memory_bytes": 256 << 20}, "error", "MemoryError"),
        ("while True: print('x' * 1000)", {"output_bytes": 5000}, "too_much_output", "xxx"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", {}, "killed", ""),
        ("import numpy", {}, "error", "ModuleNotFoundError"),
        ("import os; print(sorted(os.environ), os.listdir('.'))", {}, "ok", "['HOME', 'LANG', 'PATH'"),
    ],
)
def test_python_runs_within_its_limits(code: str, limits: dict[str, Any], status: str, output: str) -> None:
    execution = asyncio.run(run_python(code, **{"timeout_s": DEADLINE_S, **limits}))
    assert execution.status == status, execution
    assert output in execution.output


def test_what_a_snippet_started_does_not_survive_it() -> None:
    code = (
        "import os, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid)"
    )
    pid = int(asyncio.run(run_python(code, timeout_s=DEADLINE_S)).output)
    deadline = time.monotonic() + DEADLINE_S
    while runs(pid):
        assert time.monotonic() < deadline, "it is killed with its group"


def runs(pid: int) -> bool:
    """Whether there is such a process, and not only what is left until somebody asks for its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_problem_is_solved_with_tools() -> None:
    content = {"question": "?", "answer": 436}
    trajectory = play(
        tool_use.generate,
        content,
        "I compute <calc>17 * 23</calc>",
        "and <python>print(391 + 45)</python>",
        "hm",
        "<calc>1/0</calc>",
        "<answer>436</answer>",
    )
    assert (trajectory.reward, trajectory.finish_reason) == (1.0, "answered")
    assert trajectory.metrics == {"calls": 3.0, "tool_errors": 1.0}
    given = CHAT.decode(trajectory.token_ids[trajectory.loss_mask == 0])
    for told in ("391", "436", "no call and no answer", "division by zero"):
        assert told in given


def test_without_a_chat_template_the_words_are_put_in_as_they_are() -> None:
    content = {"question": "How many?", "answer": 2}
    trajectory = play(tool_use.generate, content, "<calc>1 + 1</calc>", "<answer>2</answer>", chat=False)
    assert trajectory.reward == 1.0
    assert "How many?\n<calc>1 + 1</calc><|im_end|>2\n<answer>2" in CHAT.decode(trajectory.token_ids)


# ----------------------------------------------------------------------------------------------------------- games


def test_a_frozen_lake_is_crossed_in_a_worker_process() -> None:
    task = gym_text.source(game="FrozenLake-v1", options={"is_slippery": False})[0]
    way = ("down", "down", "right", "I go Right, then right: right", "down", "right")
    trajectory = play(gym_text.generate, task, *way)
    assert (trajectory.reward, trajectory.finish_reason, trajectory.metrics["turns"]) == (1.0, "game_over", 6.0)
    shown = CHAT.decode(trajectory.token_ids)
    assert "[S]FFF\nFHFH\nFFFH\nHFFG" in shown
    assert "SFFF\n[F]HFH" in shown
    assert trajectory.extras["token_rewards"].sum() == 1.0


def test_games_end_by_holes_by_silence_and_by_patience() -> None:
    task = gym_text.source(game="FrozenLake-v1", options={"is_slippery": False})[0]
    assert play(gym_text.generate, task, "right", "down").finish_reason == "game_over"
    silent = play(gym_text.generate, task, "hm", invalid_penalty=0.5)
    assert (silent.finish_reason, silent.reward) == ("no_move", -0.5)
    assert play(gym_text.generate, task, "left", "left", max_turns=2).finish_reason == "out_of_turns"


@pytest.mark.parametrize("game", ["CliffWalking-v1", "Blackjack-v1"])
def test_other_games_show_a_board_and_take_moves(game: str) -> None:
    task = gym_text.source(game=game)[3]
    first_move = gym_text.MOVES[game][0]
    trajectory = play(gym_text.generate, task, first_move, max_turns=1)
    assert trajectory.finish_reason in ("game_over", "out_of_turns")


def test_maps_differ_by_seed_and_are_the_same_again() -> None:
    games = gym_text.source(game="FrozenLake-v1", random_map=5, seed=2)
    boards = [gym_text.Game(**games[i]).board() for i in (0, 1, 0)]
    assert boards[0] == boards[2] != boards[1]
    with pytest.raises(ValueError, match="known are FrozenLake-v1"):
        gym_text.source(game="Pong")


def play_code(code: str, *guesses: str) -> tuple[Episode, str]:
    engine = ScriptedEngine([scripted.says(guess) for guess in guesses])
    task = make_task(code)
    episode = asyncio.run(codes.generate(task, scripted.make_policy(engine)))
    return episode, str(task.tokenizer.decode(episode.token_ids))


def test_a_code_is_broken_by_keeping_what_is_known() -> None:
    episode, shown = play_code("212", "012", "112", "212")
    assert shown == "=012<eos>-12=112<eos>-12=212<eos>"
    assert episode.metrics == {"guesses": 3.0, "forgotten": 0.0}
    assert episode.reward == pytest.approx(1.0 + 0.1 * 3)
    assert episode.extras["token_rewards"].nonzero()[0].tolist() == [4, 20], "two digits at once, and the last one"


def test_a_code_is_not_broken_by_forgetting_or_by_talking() -> None:
    lost, _ = play_code("212", "012", "201", "012", "201", "000")
    assert (lost.finish_reason, lost.metrics["forgotten"]) == ("out_of_guesses", 3.0)
    assert lost.reward == pytest.approx(0.3), "each digit earns once"
    assert play_code("212", "21")[0].finish_reason == "no_guess"


def test_demonstrations_use_half_of_what_they_are_told() -> None:
    def play_alone(attention: float, seed: int) -> bool:
        code, author, known = held_out()[seed], Author(random.Random(seed), attention), "---"
        for _ in range(GUESSES):
            guess = author.guess()
            if guess == code:
                return True
            known = reveal(code, guess, known)
            author.look(guess, known)
        return False

    def success(attention: float) -> float:
        return sum(play_alone(attention, seed) for seed in range(400)) / 400

    assert success(1.0) == 1.0
    assert 0.6 < success(0.5) < 0.75
    assert 0.1 < success(0.0) < 0.25
    prompts, answers = zip(*(demonstrations(0)[i] for i in range(100)), strict=True)
    assert all(re.fullmatch(r"=([0-2]{3}<eos>[0-2-]{3}=){0,4}", prompt) for prompt in prompts)
    assert all(is_guess(answer) for answer in answers)


def test_waiting_times_have_a_heavy_tail_and_are_the_same_in_every_run() -> None:
    def times() -> list[float]:
        return [latency.waiting_time_s(i, 0, 0, shortest_s=0.1, tail=1.5, longest_s=30.0) for i in range(2000)]

    drawn = sorted(times())
    assert times() == times()
    assert drawn[0] >= 0.1
    assert drawn[-1] > 50 * drawn[0]
    assert drawn[-1] <= 30.0
    trajectory = play(
        latency.generate, latency.source(reply="x")[0], "a", "b", turns=2, shortest_s=1e-4, longest_s=1e-3
    )
    assert (trajectory.reward, trajectory.finish_reason) == (1.0, "done")


# ------------------------------------------------------------------------------------------------------- reasoning


def test_a_reasoning_task_is_judged_by_its_verifier_and_strictly() -> None:
    tasks = reasoning.source(dataset="chain_sum", config={"min_terms": 2, "max_terms": 2}, size=50)
    content = tasks[7]
    where = content["reasoning_gym"]
    entry = reasoning._make(where["dataset"], where["seed"], where["size"], where["config"])[7]
    right = entry["answer"]
    assert entry["question"] in content["messages"][0]["content"]
    assert reasoning.reward(content, f"so <answer>{right}</answer>", "stop") == 1.0
    assert reasoning.reward(content, f"<answer>{right}</answer>", "length") == 0.0
    assert reasoning.reward(content, f"it is {right}", "stop") == 0.0
    assert reasoning.reward(content, f"<answer>1 2 3 {right}</answer>", "stop") == 0.0
    assert reasoning.source(dataset="chain_sum", seed=1)[7] != reasoning.source(dataset="chain_sum", seed=0)[7]


def test_datasets_that_do_not_exist_or_teach_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="'no_such'"):
        reasoning.source(dataset="no_such")
    with pytest.raises(ValueError, match="accepts almost any answer"):
        reasoning.source(dataset="coin_flip")


# -------------------------------------------------------------------------------------------------------- contract

ENVIRONMENTS = "slime_async.actors.environments"


@pytest.mark.parametrize(
    ("module", "arguments", "answers"),
    [
        ("tool_use", {}, ["<calc>1+1</calc>", "<answer>3</answer>"]),
        ("gym_text", {"game": "FrozenLake-v1"}, ["down", "right"]),
        ("latency", {"reply": "x"}, []),
    ],
)
def test_environments_keep_the_contract(
    module: str, arguments: dict[str, Any], answers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slime_async.actors import check_source

    monkeypatch.setattr(
        check_source, "_digest_in_another_process", lambda s: check_source.digest(check_source.load_source(s))
    )
    make_checkpoint(tmp_path, 0)
    table = {
        "model": {"path": str(tmp_path)},
        "sampling": {"max_new_tokens": 12, "max_context_tokens": 4096},
        "task": {
            "generate": f"{ENVIRONMENTS}.{module}:generate",
            "arguments": {"shortest_s": 1e-4, "longest_s": 1e-3} if module == "latency" else {"max_turns": 3},
            "train": {"s": {"factory": f"{ENVIRONMENTS}.{module}:source", "arguments": arguments}},
        },
    }
    check_task(Config.model_validate(table), tmp_path, answers=answers).raise_for_errors()
