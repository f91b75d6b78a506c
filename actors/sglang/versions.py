"""All that differs between the SGLang releases this package works with; nothing else here asks for a version.

=======  ==========================================================================================
release  what changed
=======  ==========================================================================================
0.5.16   the oldest supported
0.5.20   ``meta_info.weight_versions``: which output tokens came from which weights; ``/ready``
0.5.21   updates need ``/begin_weight_update`` … ``/end_weight_update``; the cache can be flushed while requests are
         retracted (before, that ends the engine)
0.5.23   the newest tested; routed experts are right under overlap scheduling (in 0.5.16 the next step overwrites them)
=======  ==========================================================================================

Weights are named to SGLang, and in its answers, as ``INCARNATION.VERSION``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from slime_async.actors.engine import EngineError
from slime_async.config.errors import ConfigError
from slime_async.trajectory import VersionSpan, WeightId

log = logging.getLogger(__name__)

READY_PATHS_OWN = ("/ready", "/health")
"""Of a server that was started with ``OWN_ENVIRONMENT``"""
READY_PATHS_EXTERNAL = ("/ready", "/model_info")
"""Of any other, whose ``/health`` may generate a token, and take 20 s for it while it is paused"""
OWN_ENVIRONMENT = {"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "false"}

OLDEST = (0, 5, 16)
NEWEST = (0, 5, 23)
SPANS_SINCE = (0, 5, 20)
SESSIONS_SINCE = (0, 5, 21)
RECORDS_OVERLAPPED_SINCE = (0, 5, 23)


@dataclass(frozen=True, slots=True)
class Features:
    """What one release can do."""

    version: str
    spans: bool
    """Answers say which weights produced which tokens; else the stamps of streamed chunks have to do"""
    sessions: bool
    """Updates stand between ``/begin_weight_update`` and ``/end_weight_update``"""
    flushes_retracted: bool
    """``retract`` gives up prefix-cache entries as well; else requests are resubmitted by the client"""
    records_overlapped: bool
    """Routed experts are recorded rightly under overlap scheduling; else it has to be off for that"""

    @property
    def stream_interval(self) -> int:
        """Tokens per streamed chunk: one where boundaries are read off the chunks, else few enough to lose."""
        return 16 if self.spans else 1


def features_of(version: str) -> Features:
    """Raises ``ConfigError`` for a release that is too old or no release; warns of one that is newer than tested."""
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    if match is None:
        raise ConfigError(
            f"SGLang calls its version {version!r}: install a release, {_text(OLDEST)} to {_text(NEWEST)}"
        )
    release = (int(match[1]), int(match[2]), int(match[3]))
    if release < OLDEST:
        raise ConfigError(f"SGLang {version} is too old: install {_text(OLDEST)} to {_text(NEWEST)}")
    if release > NEWEST:
        log.warning("SGLang %s is newer than %s, the newest that was tested: expect surprises", version, _text(NEWEST))
    return Features(
        version=version,
        spans=release >= SPANS_SINCE,
        sessions=release >= SESSIONS_SINCE,
        flushes_retracted=release >= SESSIONS_SINCE,
        records_overlapped=release >= RECORDS_OVERLAPPED_SINCE,
    )


def installed_version() -> str:
    """Of the SGLang in this environment, without importing it; empty where there is none."""
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return ""


def weight_label(weights: WeightId) -> str:
    """``WeightId(1, 7)`` → ``1.7``."""
    return f"{weights.incarnation}.{weights.version}"


def parse_label(label: str) -> WeightId | None:
    """The reverse; None for labels that others gave (``default``)."""
    match = re.fullmatch(r"(\d+)\.(\d+)", label)
    return WeightId(int(match[1]), int(match[2])) if match else None


def cache_key(weights: WeightId) -> str:
    """The ``extra_key`` of requests: prefixes cached under other weights are not found."""
    return f"weights-{weight_label(weights)}"


def reported_spans(meta: Mapping[str, Any]) -> list[tuple[int, str]] | None:
    """(first token, label) of each span that a finished answer reports; None where it reports none."""
    spans = meta.get("weight_versions")
    return None if spans is None else [(int(span["start"]), str(span["version"])) for span in spans]


class ChunkStamps:
    """Spans read off streamed chunks, whose ``weight_version`` is that of the moment they were sent.

    With chunks of one token the boundary is exact. In a longer chunk that brings a new stamp, all tokens but the last
    count as the old weights': a token may be taken for older than it is, never for younger.
    """

    def __init__(self) -> None:
        self.spans: list[tuple[int, str]] = []

    def add(self, first: int, count: int, label: str) -> None:
        """A chunk of ``count`` tokens, the first of which is token ``first`` of the answer."""
        if count and (not self.spans or self.spans[-1][1] != label):
            self.spans.append((first + count - 1 if self.spans else first, label))


def exact_spans(
    spans: Sequence[tuple[int, str]], sent_under: WeightId, late: frozenset[WeightId], tokens: int
) -> tuple[VersionSpan, ...]:
    """Spans of an answer with ``tokens`` tokens, as weights.

    With overlap scheduling one step is computed ahead: a token in the making at a pause with ``in_place`` is labelled
    as the new weights', though the old ones made it. Spans of weights that arrived so (``late``) begin one token later.
    Raises ``EngineError`` for labels that this package did not give.
    """
    result: list[VersionSpan] = []
    for first, label in spans:
        weights = parse_label(label)
        if weights is None:
            raise EngineError(
                f"SGLang sampled with weights called {label!r}, which no learner published: does someone else update "
                "this server?"
            )
        if weights in late and (result or weights != sent_under):
            if not result:
                result.append(VersionSpan(first, sent_under))
            first += 1
        if result and result[-1].first_token == first:
            result.pop()
        if first < tokens:
            result.append(VersionSpan(first, weights))
    return tuple(result)


def _text(release: tuple[int, int, int]) -> str:
    return ".".join(map(str, release))
