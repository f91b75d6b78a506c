"""One answer of the policy, and the arithmetic of version spans."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from slime_async.routing import Routes
from slime_async.trajectory import VersionSpan


@dataclass(frozen=True, slots=True)
class Turn:
    """One answer of the policy; N tokens were sampled.

    Raises ``ValueError`` when log-probs, spans or routed experts do not fit the tokens.
    """

    prompt_ids: Sequence[int]
    """An ``array`` where a policy made the turn: four bytes per token, as all turns live as long as their episode"""
    output_ids: Sequence[int]
    """[N], the stop token included"""
    logprobs: Sequence[float]
    """[N], log μ"""
    spans: tuple[VersionSpan, ...]
    """Count from the first sampled token (0)"""
    finish_reason: str
    """``stop``, ``length`` (a token limit), or ``deadline`` (a time limit: the answer is what was sampled by then)"""
    routed_experts: Routes | None = None
    """Of the last tokens of prompt and answer together; those before are an earlier turn's, which this one extends"""

    def __post_init__(self) -> None:
        n = len(self.output_ids)
        if len(self.logprobs) != n:
            raise ValueError(f"{len(self.logprobs)} log-probabilities for {n} sampled tokens: there must be one each")
        starts = [span.first_token for span in self.spans]
        if n and (starts[:1] != [0] or starts != sorted(set(starts)) or starts[-1] >= n):
            raise ValueError(f"version spans start at {starts}: must start at 0, ascend and lie within {n} tokens")
        if self.routed_experts is not None and len(self.routed_experts) > len(self.prompt_ids) + n:
            raise ValueError(
                f"{len(self.routed_experts)} rows of routed experts for {len(self.prompt_ids)} + {n} tokens"
            )


def shift_spans(spans: Iterable[VersionSpan], offset: int) -> list[VersionSpan]:
    """The same spans, counted from ``offset`` tokens earlier."""
    return [VersionSpan(first + offset, weights) for first, weights in spans]


def merge_spans(spans: Iterable[VersionSpan]) -> tuple[VersionSpan, ...]:
    """Drop each span that only continues the weights of the one before it."""
    merged: list[VersionSpan] = []
    for span in spans:
        if not merged or merged[-1].weights != span.weights:
            merged.append(span)
    return tuple(merged)
