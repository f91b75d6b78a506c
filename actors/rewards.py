"""Rewards for answers that are numbers or words, by the conventions of public data sets.

A row's ``answer`` may be the bare result, or end with ``#### result`` as in GSM8K. All give 1.0 or 0.0, and 0.0 to an
answer that was cut off. They are strict about where the result stands: a reward for a number anywhere in the text is
soon found out by the policy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

NUMBER = re.compile(r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
HASHES = re.compile(r"####\s*(.+?)\s*$", re.MULTILINE)
BOXED = "\\boxed{"


def exact(content: Mapping[str, Any], answer: str, finish_reason: str) -> float:
    """The answer is the row's, but for white space around it."""
    return float(finish_reason == "stop" and answer.strip() == result_of(str(content["answer"])))


def number(content: Mapping[str, Any], answer: str, finish_reason: str) -> float:
    """The result that the answer marks (``\\boxed{}``, ``<answer>``, ``####``), or else its last number, equals the
    row's as a number: 1,000 is 1000.0, and $5 is 5."""
    if finish_reason != "stop":
        return 0.0
    wanted, given = to_number(result_of(str(content["answer"]))), to_number(marked(answer) or last_number(answer))
    return float(wanted is not None and given == wanted)


def result_of(label: str) -> str:
    """What a row's answer gives as its result: what follows the last ``####``, or all of it."""
    found = HASHES.findall(label)
    return str(found[-1] if found else label).strip()


def marked(answer: str) -> str:
    """The last result that an answer marks as its own; empty where it marks none."""
    if BOXED in answer:
        return _braced(answer[answer.rindex(BOXED) + len(BOXED) :])
    for pattern in (ANSWER_TAG, HASHES):
        if found := pattern.findall(answer):
            return str(found[-1]).strip()
    return ""


def last_number(answer: str) -> str:
    found = NUMBER.findall(answer)
    return found[-1] if found else ""


def to_number(text: str) -> Decimal | None:
    """None for what is no number."""
    try:
        value = Decimal(text.replace(",", "").replace("$", "").strip().rstrip(".%"))
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


def _braced(text: str) -> str:
    """Up to the bracket that closes what was open; empty when none does."""
    depth = 1
    for position, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:position].strip()
    return ""
