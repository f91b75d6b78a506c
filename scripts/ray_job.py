"""``ray job submit`` for real: a head with Ray's job server on this machine, and three jobs on it.

A short demo that has to succeed with a clean audit, one with a misspelt key that has to fail with our words in its log,
and one that is stopped and must leave no process behind. Other clusters of this machine are left alone: the head is a
child of this script, which ends it by its id, as ``ray stop`` would end them all.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from slime_async.actors.sglang.server import free_port

ROOT = Path(__file__).resolve().parents[1]
START_S, JOB_S, STOP_S, CALL_S = 120.0, 600.0, 90.0, 120.0
RUNNER = "ray::RoleRunner"
"""What Ray calls the process of one of our actors"""
STEPS = 12
SHORT = ["--warm-start.steps=60", "--evaluation.tasks=64", "--actor.count=1"]


def main() -> int:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # nobody else reaches this cluster's loopback
    with tempfile.TemporaryDirectory(prefix="ray-job-") as directory, head(Path(directory)) as (pid, url):
        jobs = Jobs(url, Path(directory) / "submitted")
        succeeds(jobs, Path(directory) / "short")
        says_what_is_wrong(jobs, Path(directory) / "misspelt")
        leaves_nothing_behind(jobs, Path(directory) / "stopped", pid)
    print("ray job submit: one succeeded, one failed with its reason, one was stopped and left nothing")
    return 0


@contextlib.contextmanager
def head(directory: Path) -> Iterator[tuple[int, str]]:
    """A head of its own: its pid and its job server's address. None of its ports is that of another cluster."""
    port = free_port()
    ports = ["--port=0", f"--dashboard-port={port}", "--dashboard-agent-listen-port=0"]
    ports += [f"--ray-client-server-port={free_port()}"]  # which takes no 0
    log = directory / "head.log"
    with log.open("wb") as output:
        command = [program("ray"), "start", "--head", "--block", "--num-cpus=4", "--dashboard-host=127.0.0.1", *ports]
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: answers(url, process, log), START_S, "Ray's job server does not answer")
        yield process.pid, url
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Jobs:
    """Ray's own command line, towards one job server."""

    def __init__(self, url: str, working: Path) -> None:
        """``working`` is the directory that is submitted, with both configurations in it."""
        self._url, self._working = url, working
        working.mkdir()
        config = (ROOT / "examples" / "demo.toml").read_text()
        (working / "config.toml").write_text(config)
        (working / "misspelt.toml").write_text(config.replace("\ngroups =", "\ngruops ="))

    def submit(
        self, name: str, run: Path, *flags: str, config: str = "config.toml", wait: bool = True
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "slime_async.cli.main", "train", config, "--launcher", "ray"]
        command += ["--run-directory", str(run), *flags]
        options = [f"--submission-id={name}", "--working-dir=.", *([] if wait else ["--no-wait"])]
        return self._call("submit", *options, "--", *command, limit_s=JOB_S if wait else CALL_S)

    def of(self, what: str, name: str) -> str:
        """``logs``, ``status`` or ``stop`` of one job."""
        done = self._call(what, name, limit_s=CALL_S)
        assert done.returncode == 0, f"ray job {what} {name}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def _call(self, what: str, *arguments: str, limit_s: float) -> subprocess.CompletedProcess[str]:
        command = [program("ray"), "job", what, f"--address={self._url}", *arguments]
        return subprocess.run(command, cwd=self._working, capture_output=True, text=True, timeout=limit_s)


def succeeds(jobs: Jobs, run: Path) -> None:
    begun = time.monotonic()
    submitted = jobs.submit("short", run, *SHORT, f"--run.steps={STEPS}")
    print(submitted.stdout[-1500:])
    assert submitted.returncode == 0, f"the job failed:\n{submitted.stdout[-4000:]}{submitted.stderr[-2000:]}"
    assert "succeeded" in jobs.of("status", "short")
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["outcome"], summary["steps"]) == ("finished", STEPS), summary
    audit = [sys.executable, "-m", "slime_async.cli.main", "audit", str(run)]
    assert subprocess.run(audit, cwd=ROOT, timeout=CALL_S).returncode == 0, "the audit is not clean"
    print(f"a job of {STEPS} steps: {time.monotonic() - begun:.0f} s", flush=True)


def says_what_is_wrong(jobs: Jobs, run: Path) -> None:
    submitted = jobs.submit("misspelt", run, config="misspelt.toml")
    assert submitted.returncode != 0, "a misspelt key was accepted"
    status, logs = jobs.of("status", "misspelt"), jobs.of("logs", "misspelt")
    assert "failed" in status, status
    assert "exit code 2" in status, f"not our exit code:\n{status}"
    assert "gruops" in logs, f"its log does not name the key:\n{logs[-3000:]}"
    print(f"misspelt: {' '.join(status.split()[-25:])}\n{logs[-600:]}", flush=True)


def leaves_nothing_behind(jobs: Jobs, run: Path, head: int) -> None:
    submitted = jobs.submit("stopped", run, *SHORT, "--run.steps=100000", wait=False)
    assert submitted.returncode == 0, f"not submitted:\n{submitted.stdout}{submitted.stderr}"
    wait_until((run / "metrics.jsonl").exists, JOB_S, "the job to be stopped does not train")
    before = processes_of(run, head)
    for part in (" hub ", " actor ", " learner ", RUNNER):  # or that none of them is left would say nothing
        assert any(part in line for line in before), f"no process with {part!r} in:\n" + "\n".join(before)
    begun = time.monotonic()
    jobs.of("stop", "stopped")
    wait_until(lambda: not processes_of(run, head), STOP_S, "processes outlived their job")
    print(f"stopped: {len(before)} processes, none left after {time.monotonic() - begun:.1f} s")
    assert "stopped" in jobs.of("status", "stopped")
    print(jobs.of("logs", "stopped")[-600:], flush=True)


def wait_until(done: Callable[[], bool], limit_s: float, otherwise: str) -> None:
    deadline = time.monotonic() + limit_s
    while not done():
        assert time.monotonic() < deadline, f"{otherwise} within {limit_s:g} s"
        time.sleep(0.5)


def answers(url: str, process: subprocess.Popen[bytes], log: Path) -> bool:
    assert process.poll() is None, f"the head ended:\n{log.read_text()[-4000:]}"
    try:
        with urllib.request.urlopen(f"{url}/api/jobs/", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def program(name: str) -> str:
    """A command of this Python's environment."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or name


def processes_of(run: Path, head: int) -> list[str]:
    """Command lines of living processes that name this run, and of the head's runners, which don't."""
    processes = dict(living())
    return [
        f"{pid} {line[:400]}"
        for pid, (_, line) in processes.items()
        if str(run) in line or (RUNNER in line and head in ancestors(pid, processes))
    ]


def living() -> Iterator[tuple[int, tuple[int, str]]]:
    """pid, (parent, command line)"""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # gone since
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                yield int(entry.name), (int(parent), line)


def ancestors(pid: int, processes: dict[int, tuple[int, str]]) -> Iterator[int]:
    while pid in processes:
        pid = processes[pid][0]
        yield pid


if __name__ == "__main__":
    raise SystemExit(main())
