"""What is written down before larger machines are measured, and how their faults are told from their deliveries."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import engine_killed, splits


def test_a_prediction_has_all_the_devices_and_a_batch_that_grows_with_them() -> None:
    from slime_async.simulate.measured import scenario_of

    base = scenario_of(json.loads(splits.SOURCE.read_text()), "async-2")
    scenario = splits.scaled(base, "async-2 2:6", 8, 2, 6)
    assert scenario.devices == 8
    assert scenario.batch == 4 * base.batch
    assert scenario.learner.token_s == base.learner.token_s / 2


def test_modes_of_another_number_of_devices_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "predicted.json"
    out.write_text(json.dumps({"devices": 8, "modes": {"colocated": {"samples_per_s": 11.0}}}))
    measured = tmp_path / "bench.json"
    result = {"config": {"bench.devices": 2}, "modes": {"colocated": {"samples_per_s": {"mean": 10.0}}}}
    measured.write_text(json.dumps(result))
    with pytest.raises(SystemExit):
        splits.main(["--measured", str(measured), "--out", str(out)])
    assert "predicted.json is of 8 devices, not 2" in capsys.readouterr().err
    measured.write_text(json.dumps({**result, "config": {"bench.devices": 8}}))
    assert splits.main(["--measured", str(measured), "--out", str(out)]) == 0
    assert "| colocated | 11.0 | 10.0 | 10.0% |" in capsys.readouterr().out


@pytest.mark.parametrize(("back_s", "expected_s"), [(30.0, 40.0), (None, None)])
def test_throughput_is_full_again_when_a_whole_window_is(back_s: float | None, expected_s: float | None) -> None:
    """Ten a second until the kill at 100, five after it, ten again from ``back_s`` later on."""
    times = [n / 10 for n in range(1000)]
    at = 100.0
    while at < 200:
        times.append(at)
        at += 0.1 if back_s is not None and at >= 100 + back_s else 0.2
    found = engine_killed.figures(times, 100.0, 60.0, 10.0)
    assert found["trajectories_per_s_before"] == pytest.approx(10, rel=0.02)
    assert found["trajectories_per_s_worst"] == pytest.approx(5, rel=0.05)
    assert found["seconds_to_full_throughput"] == (None if expected_s is None else pytest.approx(expected_s, abs=1.5))
