from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from slime_async.bench.measure import Measurement
from slime_async.bench.modes import Mode
from slime_async.cli.bench import Bench
from slime_async.cli.supervise import RunError
from slime_async.config import Config
from tests.bench.examples import measurement, modes

MODES = modes("colocated", "disaggregated", "async-2")


class Scripted(Bench):
    """Its modes find cores of given speeds, one after the other; ``None`` fails. Without any process."""

    def __init__(self, directory: Path, speeds: Mapping[str, Sequence[float | None]]) -> None:
        super().__init__(Config(), MODES, directory, [])
        self._left = {mode: list(given) for mode, given in speeds.items()}

    async def _measure(self, mode: Mode) -> Measurement:
        speed = self._left[mode.name].pop(0)
        if speed is None:
            raise RunError("no actor is left")
        return measurement(mode, 1.0, core_speeds={"0": speed, "1": speed})

    def speeds(self) -> tuple[dict[str, float], list[str]]:
        """Of the measurements that count in the end, and which modes failed."""

        async def last() -> tuple[list[Measurement], list[str]]:
            return [known async for known in self._measurements()][-1]

        known, failed = asyncio.run(last())
        assert not any(self._left.values())
        return {one.mode: one.speed([0, 1]) for one in known}, failed


@pytest.mark.parametrize(
    ("again", "kept"),
    [(4.2, 4.2), (8.0, 5.0), (None, 5.0)],
    ids=["more usual", "less usual", "failed"],
)
def test_a_mode_with_unusual_cores_is_measured_once_more(tmp_path: Path, again: float | None, kept: float) -> None:
    first = Scripted(tmp_path, {"colocated": [4.0], "disaggregated": [4.1], "async-2": [5.0, again]})
    expected = {"colocated": 4.0, "disaggregated": 4.1, "async-2": kept}
    assert first.speeds() == (expected, [])
    taken_over = Measurement.from_plain(json.loads((tmp_path / "async-2.json").read_text()))
    assert taken_over.speed([0, 1]) == kept


def test_a_mode_that_fails_is_not_tried_again(tmp_path: Path) -> None:
    scripted = Scripted(tmp_path, {"colocated": [4.0], "disaggregated": [None], "async-2": [4.0]})
    assert scripted.speeds() == ({"colocated": 4.0, "async-2": 4.0}, ["disaggregated"])
