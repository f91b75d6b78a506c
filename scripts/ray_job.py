"""``ray job submit`` for real: a head with Ray's job server on this machine, and three jobs on it.

A short demo that has to succeed with a clean audit, one with a misspelt key that has to fail with our words in its log,
and one that is stopped and must leave no process behind.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
START_S, JOB_S, STOP_S, CALL_S = 120.0, 600.0, 90.0, 120.0
PORT = 8267
URL = f"http://127.0.0.1:{PORT}"
SHORT = ["--run.steps=12", "--warm-start.steps=60", "--evaluation.tasks=64", "--actor.count=1"]


def main() -> int:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # nobody else reaches this cluster's loopback
    with tempfile.TemporaryDirectory(prefix="ray-job-") as directory:
        dashboard = ("--dashboard-host=127.0.0.1", f"--dashboard-port={PORT}")
        ray("start", "--head", "--num-cpus=4", *dashboard, limit_s=START_S)
        try:
            succeeds(Path(directory) / "short")
            says_what_is_wrong(Path(directory) / "misspelt")
            leaves_nothing_behind(Path(directory) / "stopped")
        finally:
            ray("stop", "--force", limit_s=CALL_S)
    print("ray job submit: one succeeded, one failed with its reason, one was stopped and left nothing")
    return 0


def succeeds(run: Path) -> None:
    begun = time.monotonic()
    submitted = submit("short", run, *SHORT, limit_s=JOB_S)
    print(submitted.stdout[-1500:])
    assert submitted.returncode == 0, f"the job failed:\n{submitted.stdout[-4000:]}{submitted.stderr[-2000:]}"
    audit = [sys.executable, "-m", "slime_async.cli.main", "audit", str(run)]
    assert subprocess.run(audit, cwd=ROOT, timeout=CALL_S).returncode == 0, "the audit is not clean"
    print(f"a job of 12 steps: {time.monotonic() - begun:.0f} s")


def says_what_is_wrong(run: Path) -> None:
    submitted = submit("misspelt", run, "--batch.gruops=3", limit_s=JOB_S)
    assert submitted.returncode != 0, "a misspelt key was accepted"
    logs = ray("job", "logs", f"--address={URL}", "misspelt", limit_s=CALL_S).stdout
    assert "gruops" in logs, f"its log does not name the key:\n{logs[-3000:]}"


def leaves_nothing_behind(run: Path) -> None:
    submit("stopped", run, *SHORT, "--run.steps=100000", limit_s=CALL_S, wait=False)
    deadline = time.monotonic() + JOB_S
    while not (run / "metrics.jsonl").exists():
        assert time.monotonic() < deadline, "the job to be stopped does not train"
        time.sleep(1.0)
    ray("job", "stop", f"--address={URL}", "stopped", limit_s=CALL_S)
    deadline = time.monotonic() + STOP_S
    while left := processes_of(run):
        assert time.monotonic() < deadline, "these outlived their job:\n" + "\n".join(left)
        time.sleep(1.0)


def submit(name: str, run: Path, *flags: str, limit_s: float, wait: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "slime_async.cli.main", "train", str(ROOT / "examples" / "demo.toml")]
    command += ["--launcher", "ray", "--run-directory", str(run), *flags]
    options = [f"--address={URL}", f"--submission-id={name}", *([] if wait else ["--no-wait"])]
    return ray("job", "submit", *options, "--", *command, limit_s=limit_s, check=False)


def ray(*arguments: str, limit_s: float, check: bool = True) -> subprocess.CompletedProcess[str]:
    """The ``ray`` command of this Python's environment."""
    program = shutil.which("ray", path=str(Path(sys.executable).parent)) or "ray"
    done = subprocess.run([program, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=limit_s)
    assert not check or done.returncode == 0, f"ray {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}"
    return done


def processes_of(run: Path) -> list[str]:
    """Command lines of living processes that name this run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if str(run) in line:
                found.append(f"{entry.name} {line[:200]}")
    return found


if __name__ == "__main__":
    raise SystemExit(main())
