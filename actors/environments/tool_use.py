"""Word problems with two tools: a calculator, and Python in a process of its own.

    policy    <calc>17 * 23</calc>            environment   391
    policy    <python>print(sum(range(10)))</python>         45
    policy    <answer>436</answer>                           the end: reward 1 if it is right

A turn may hold one call, the last one counts; a turn with neither call nor answer is told so.
"""

from __future__ import annotations

import random
import re
from typing import Any

from slime_async.actors.environment import Episode, Policy, Task
from slime_async.actors.environments.calculator import calculate
from slime_async.actors.environments.dialogue import Dialogue
from slime_async.actors.environments.sandbox import run_python

CALL = re.compile(r"<(calc|python|answer)>(.*?)</\1>", re.DOTALL)
SHOWN_CHARACTERS = 500
"""Of a tool's output; the rest is cut"""
SYSTEM = (
    "Solve the problem. You may compute with <calc>an expression</calc> or <python>code that prints</python>, one call "
    "per turn, and are told the result. Give the final number as <answer>number</answer>."
)
THINGS = ("apples", "books", "coins", "stamps", "tickets", "pencils")


class WordProblems:
    """A sequence of problems, each made from the seed and its index alone."""

    def __init__(self, seed: int, size: int, largest: int) -> None:
        if size < 1 or largest < 2:
            raise ValueError(f"size = {size}, largest = {largest}: at least one problem, with numbers from 2 on")
        self._seed, self._size, self._largest = seed, size, largest

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self._size:
            raise IndexError(f"task {index} of {self._size}")
        draw = random.Random(f"{self._seed}:{index}")
        boxes, each, more = (draw.randint(2, self._largest) for _ in range(3))
        thing = draw.choice(THINGS)
        question = (
            f"There are {boxes} boxes with {each} {thing} each, and {more} {thing} more. How many {thing} are there?"
        )
        return {"question": question, "answer": boxes * each + more}


def source(*, seed: int = 0, size: int = 10_000, largest: int = 999) -> WordProblems:
    return WordProblems(seed, size, largest)


async def generate(task: Task, policy: Policy, *, max_turns: int = 6, timeout_s: float = 5.0) -> Episode:
    """Reward 1 for the right number; ``calls`` and ``tool_errors`` are counted."""
    dialogue = Dialogue(task, policy, SYSTEM)
    calls = errors = 0
    said = f"{task.content['question']}\n"
    for _ in range(max_turns):
        found = CALL.findall(await dialogue.ask(said))
        if not found:
            said = "There was no call and no answer.\n"
            continue
        kind, text = found[-1]
        if kind == "answer":
            correct = text.strip() == str(task.content["answer"])
            metrics = {"calls": calls, "tool_errors": errors}
            return dialogue.finish(float(correct), finish_reason="answered", metrics=metrics)
        calls += 1
        said, failed = await _use(kind, text, timeout_s)
        errors += failed
    return dialogue.finish(0.0, finish_reason="out_of_turns", metrics={"calls": calls, "tool_errors": errors})


async def _use(tool: str, text: str, timeout_s: float) -> tuple[str, bool]:
    """What the tool says, and whether it failed."""
    if tool == "calc":
        result = calculate(text)
        return f"{result}\n", result.startswith("error")
    execution = await run_python(text, timeout_s=timeout_s)
    output = execution.output[:SHOWN_CHARACTERS]
    return (output if execution.status == "ok" else f"{output}\n[{execution.status}]") + "\n", execution.status != "ok"
