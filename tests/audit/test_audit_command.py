"""``slime-async audit RUN``, on directories as a run leaves them."""

from __future__ import annotations

from pathlib import Path

import pytest

from slime_async.cli.main import main
from slime_async.queue import Event
from slime_async.queue.events import GroupDropped
from slime_async.telemetry.events import EventLog
from slime_async.telemetry.metrics import MetricsWriter
from slime_async.transport.journal import Journal
from tests.audit.runs import honest_metrics, honest_run


def write_run(run: Path, events: list[Event], finished: bool) -> None:
    journal = Journal.open(run / "journal").journal
    for event in events:
        journal.append([event], {})
    journal.close()
    metrics = MetricsWriter(run / "metrics.jsonl")
    for line in honest_metrics():
        metrics.write(line.pop("step"), line)
    metrics.close()
    log = EventLog(run / "events.jsonl")
    log.write("run_started", staleness_bound=1)
    if finished:
        log.write("run_finished", outcome="finished", reason="")
    log.close()


def test_a_clean_run_exits_with_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, honest_run(), finished=True)
    assert main(["audit", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "clean: nothing lost, nothing twice"


def test_a_run_that_goes_on_can_be_audited_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, honest_run(), finished=False)
    journal = Journal.open(tmp_path / "journal").journal
    assert main(["audit", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("so far (the run has not finished)")
    journal.close()


def test_a_violation_exits_with_1_and_names_the_trajectories(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, [*honest_run(), GroupDropped(5, "failed")], finished=True)
    assert main(["audit", str(tmp_path)]) == 1
    assert "  dropped (failed) when already in batch 2: (5, 0), (5, 1)" in capsys.readouterr().out


def test_a_damaged_journal_exits_with_1_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, honest_run(), finished=True)
    path = tmp_path / "journal" / "events-00000001.journal"
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    assert main(["audit", str(tmp_path)]) == 1
    assert "events-00000001.journal: at byte" in capsys.readouterr().err


def test_a_run_without_a_journal_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(tmp_path)]) == 2
    assert "has no journal/: only a run with a journal can be audited" in capsys.readouterr().err
