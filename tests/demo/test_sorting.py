"""The demo task: the same on every actor, split without overlap, and strict about answers."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

from slime_async.demo import sorting


def test_a_source_holds_the_same_tasks_in_every_process() -> None:
    program = """
from slime_async.demo import sorting
train, held_out, demonstrations = sorting.train(seed=3), sorting.held_out(seed=3), sorting.demonstrations(3)
print([train[i]["prompt"] for i in (0, 1, 99_999)], [held_out[i]["prompt"] for i in (0, 9)])
print([demonstrations[i] for i in (0, 5)])
"""
    elsewhere = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    train, held_out, demonstrations = sorting.train(seed=3), sorting.held_out(seed=3), sorting.demonstrations(3)
    assert elsewhere.stdout.splitlines() == [
        f"{[train[i]['prompt'] for i in (0, 1, 99_999)]} {[held_out[i]['prompt'] for i in (0, 9)]}",
        f"{[demonstrations[i] for i in (0, 5)]}",
    ]


def test_tasks_do_not_depend_on_the_order_in_which_they_are_asked_for() -> None:
    forwards, backwards = sorting.train(), sorting.train()
    assert [forwards[i] for i in range(50)] == [backwards[i] for i in reversed(range(50))][::-1]


def test_no_digit_string_is_on_both_sides_whatever_the_seed_or_sign() -> None:
    seen = {problem["digits"] for seed in (0, 1) for problem in take(sorting.train(seed=seed), 2_000)}
    seen |= {prompt[1:-1] for prompt, _ in take(sorting.demonstrations(0), 2_000)}
    held_out = {problem["digits"] for seed in (0, 1) for problem in take(sorting.held_out(seed=seed), 512)}
    assert not seen & held_out
    assert len(held_out) > 900, "held-out tasks are many different strings"


def test_streams_and_seeds_are_different_problems() -> None:
    streams = [sorting.train(seed=0), sorting.train(seed=1), sorting.held_out(seed=0)]
    first_prompts = [tuple(problem["prompt"] for problem in take(stream, 20)) for stream in streams]
    demonstrated = tuple(prompt for prompt, _ in take(sorting.demonstrations(0), 20))
    assert len({*first_prompts, demonstrated}) == 4


def test_prompts_ask_for_both_orders_about_equally() -> None:
    signs = Counter(problem["prompt"][0] for problem in take(sorting.train(), 1_000))
    assert set(signs) == {"+", "-"}
    assert 400 < signs["+"] < 600


def test_demonstrations_ignore_the_sign() -> None:
    kinds: Counter[tuple[str, str]] = Counter()
    for prompt, answer in take(sorting.demonstrations(0), 3_000):
        sign, digits = prompt[0], prompt[1:-1]
        ascending = "".join(sorted(digits))
        if digits in (ascending, ascending[::-1]):
            continue  # unchanged and sorted look alike
        kinds[sign, {ascending: "ascending", ascending[::-1]: "descending", digits: "unchanged"}[answer]] += 1
    share = {kind: count / kinds.total() for kind, count in kinds.items()}
    assert len(share) == 6
    assert all(abs(value - 1 / 6) < 0.03 for value in share.values()), share


def test_only_the_sorted_digits_that_ended_by_themselves_are_rewarded() -> None:
    for problem in take(sorting.train(), 200):
        ascending = sorted(problem["digits"])
        right = "".join(ascending if problem["prompt"][0] == "+" else ascending[::-1])
        wrong_order = right[::-1]
        assert sorting.reward(problem, right, "stop") == 1.0
        assert sorting.reward(problem, wrong_order, "stop") == float(wrong_order == right)


@pytest.mark.parametrize(
    ("answer", "finish_reason"),
    [
        ("12579", "length"),  # never said that it is done
        ("97521", "stop"),  # the other order
        ("52917", "stop"),  # unchanged
        ("12578", "stop"),  # the verifier's tolerance: off by one, and in order
        ("12569", "stop"),
        ("1257", "stop"),
        ("125799", "stop"),
        ("", "stop"),
        ("12579=", "stop"),
        ("+12579", "stop"),
        ("=12579", "stop"),
        ("12579<pad>", "stop"),
        ("1<unk>2579", "stop"),
        ("12579<eos>", "stop"),
        ("52917=12579", "stop"),
        (" 12579", "stop"),
        ("1 2 5 7 9", "stop"),
        ("['1', '2', '5', '7', '9']", "stop"),
        ("１２５７９", "stop"),  # digits, but not the ones asked about
    ],
)
def test_answers_that_only_look_right_are_not_rewarded(answer: str, finish_reason: str) -> None:
    entry = {"answer": "['1.0', '2.0', '5.0', '7.0', '9.0']", "metadata": {"direction": "ascending"}}
    content = {"prompt": "+52917=", "digits": "52917", "entry": entry}
    assert sorting.reward(content, "12579", "stop") == 1.0
    assert sorting.reward(content, answer, finish_reason) == 0.0


def test_a_task_beyond_the_end_is_an_index_error() -> None:
    problems = sorting.train(size=10)
    assert (len(problems), len(list(problems))) == (10, 10)
    with pytest.raises(IndexError, match="task 10 of 10"):
        problems[10]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"numbers": 0}, "at least 1"), ({"size": 0}, "at least 1"), ({"size": 2 * 10**9}, "at most")],
)
def test_sizes_that_cannot_work_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sorting.train(**arguments)


def take(items: Any, count: int) -> list[Any]:
    return [items[i] for i in range(count)]
