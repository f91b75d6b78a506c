"""Every command of README and docs/ is run, as it stands there but for what makes it small.

What takes minutes runs with ``scripts/test --slow``. A command that no rule below knows is an error: say how it is run.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slime_async.bench.modes import modes_of
from slime_async.cli.common import add_config_argument, add_role_arguments, config_of
from slime_async.cli.flags import FlagParser
from slime_async.config import load_config
from slime_async.demo.model import make_checkpoint
from tests.bench.examples import bench_result
from tests.docs.pages import ROOT, Command, commands
from tests.e2e.runs import DEMO, TINY, flags, started
from tests.report.runs import write_run

TIMEOUT_S = 110
SMALL = {**TINY, "run.steps": "3"}
A_RUN = re.compile(r"runs/demo-[\d…-]+")
"""As the pages call a run's directory"""

TRAIN = re.compile(r"slime-async train \S+\.toml\b(?!.*--dry-run)")
DRY_RUN = re.compile(r"slime-async train \S+\.toml --dry-run$")
CHECK = re.compile(r"slime-async check-task \S+\.toml\b")
ROLE = re.compile(r"slime-async (hub|actor|learner) CONFIG --run-directory DIR\b")
REPORT = re.compile(r"slime-async report ")
EVALUATION = re.compile(r"slime-async eval ")
KEYGEN = re.compile(r"slime-async keygen \w+$")
AUDIT = re.compile(r"slime-async audit ")
RESUME = re.compile(r"slime-async train --resume ")
QUICK = re.compile(r"slime-async (doctor\b|\w+ --help)")
SCRIPT = re.compile(r"scripts/(demo|test)\b")
LAUNCH = re.compile(r"slime-async launch slurm .*--dry-run$")
AGAINST_A_RUN = re.compile(r"slime-async (top|scale) ")
"""Needs a job that goes on"""
JOIN = re.compile(r"slime-async actor config\.toml ")
SHELL_STATE = re.compile(r"\. \.venv/bin/activate$")
"""Changes the reader's shell; what it makes available is what everything here runs with"""
BENCH = re.compile(r"slime-async bench \S+\.toml$")
PLANNING = re.compile(r"slime-async (plan|simulate \S+\.toml)\b")
CHECKED = re.compile(r"slime-async simulate \S+\.json$")
BENCHMARK = re.compile(r"python -m (benchmarks\.\w+)$")
RULES = (
    BENCH,
    PLANNING,
    CHECKED,
    BENCHMARK,
    TRAIN,
    DRY_RUN,
    CHECK,
    ROLE,
    REPORT,
    EVALUATION,
    KEYGEN,
    AUDIT,
    RESUME,
    QUICK,
    SCRIPT,
    LAUNCH,
    AGAINST_A_RUN,
    JOIN,
    SHELL_STATE,
)

ALL = commands()
ROLE_ORDER = ("hub", "actor", "learner")


def of(rule: re.Pattern[str]) -> list[Command]:
    found = [command for command in ALL if rule.match(command.text)]
    assert found, f"no command matches {rule.pattern}"
    return found


def run(text: str, directory: Path, *more: str) -> subprocess.CompletedProcess[str]:
    argv = [*shlex.split(text.replace("slime-async", f"{sys.executable} -m slime_async.cli.main", 1)), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "WANDB_SILENT": "true"}
    return subprocess.run(argv, cwd=directory, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)


def test_every_command_has_exactly_one_rule() -> None:
    for command in ALL:
        matching = [rule.pattern for rule in RULES if rule.match(command.text)]
        assert len(matching) == 1, f"{command} is run by {matching or 'nobody'}: add a rule to {__name__}"


@pytest.mark.parametrize("command", of(REPORT), ids=str)
def test_a_report(command: Command, tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "demo-1")
    done = run(A_RUN.sub("runs/demo-1", command.text), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("command", of(QUICK), ids=str)
def test_a_quick_command(command: Command) -> None:
    done = run(command.text, ROOT)
    expected = (0, 1) if "doctor" in command.text else (0,)  # what it finds is this machine's affair
    assert done.returncode in expected, done.stdout + done.stderr
    assert done.stdout


@pytest.mark.parametrize(
    "command", [*of(CHECK), *(pytest.param(c, marks=pytest.mark.slow) for c in of(DRY_RUN))], ids=str
)
def test_a_task_is_tried(command: Command, tmp_path: Path) -> None:
    shutil.copytree(DEMO.parent, tmp_path / "examples")
    done = run(command.text, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the task keeps its contract" in done.stdout or "the dry run went through" in done.stdout


@pytest.mark.parametrize("command", of(KEYGEN), ids=str)
def test_keys_are_made(command: Command, tmp_path: Path) -> None:
    done = run(command.text, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "keys" / "hub.key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("command", of(TRAIN), ids=str)
def test_flags_of_a_documented_run_are_understood(command: Command) -> None:
    parser = FlagParser(prog="slime-async train", allow_abbrev=False)
    add_config_argument(parser)
    words = shlex.split(command.text)[2:]
    config_of(parser.parse_strictly([str(ROOT / words[0]), *words[1:]]))


@pytest.mark.parametrize("command", of(BENCH), ids=str)
def test_the_configuration_of_a_documented_benchmark_is_sound(command: Command) -> None:
    modes_of(load_config(ROOT / shlex.split(command.text)[2]))


@pytest.mark.parametrize("command", of(PLANNING), ids=str)
def test_a_simulation(command: Command) -> None:
    more = ["--set", "steps=12"] if "simulate" in command.text else ["--staleness", "2", "--groups", "16"]
    done = run(command.text, ROOT, *more)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("command", of(CHECKED), ids=str)
def test_a_benchmarks_result_is_simulated(command: Command, tmp_path: Path) -> None:
    result = tmp_path / shlex.split(command.text)[2]
    result.parent.mkdir(parents=True)
    result.write_text(json.dumps(bench_result()))
    done = run(command.text, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| async-2 |" in done.stdout


@pytest.mark.parametrize("command", of(BENCHMARK), ids=str)
def test_a_benchmark_says_what_it_does(command: Command) -> None:
    done = run(command.text.replace("python", shlex.quote(sys.executable), 1), ROOT, "--help")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_benchmark_of_two_modes(tmp_path: Path) -> None:
    small = {
        "modes": '["colocated", "async-2"]',
        "warmup-s": "1",
        "window-s": "2",
        "windows": "2",
        "saturated-s": "0.5",
    }
    argv = [sys.executable, "-m", "slime_async.cli.main", "bench", "examples/bench/heavy_tailed.toml"]
    argv += ["--output", str(tmp_path), *flags({f"bench.{name}": value for name, value in small.items()})]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=500)
    result = json.loads((tmp_path / "bench.json").read_text())
    assert set(result["modes"]) == {"colocated", "async-2"}, done.stdout + done.stderr
    assert result["figures"]["async_over_best_sync"] > 0
    assert (tmp_path / "bench.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", of(TRAIN), ids=str)
def test_a_documented_run(command: Command, tmp_path: Path) -> None:
    """And, on what the first has left, what the pages do with a run."""
    shutil.copytree(DEMO.parent, tmp_path / "examples")
    done = run(command.text, tmp_path, *flags(SMALL))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "held-out accuracy after RL" in done.stdout
    [made] = (tmp_path / "runs").iterdir()
    for logger in ("tensorboard", "wandb"):
        assert (made / logger).is_dir() == (f"--loggers.{logger} " in command.text + " ")
    for further in (*of(AUDIT), *of(RESUME)) if command == of(TRAIN)[0] else ():
        more = flags({"run.steps": "5"}) if RESUME.match(further.text) else []
        done = run(A_RUN.sub(f"runs/{made.name}", further.text), tmp_path, *more)
        assert done.returncode == 0, done.stdout + done.stderr
    for further in of(EVALUATION) if command == of(TRAIN)[0] else []:
        done = run(A_RUN.sub(f"runs/{made.name}", further.text), tmp_path, *flags({"evaluation.tasks": "8"}))
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("command", of(LAUNCH), ids=str)
def test_a_job_script_is_written(command: Command, tmp_path: Path) -> None:
    shutil.copytree(DEMO.parent, tmp_path / "examples")
    (tmp_path / "runs" / "demo-1").mkdir(parents=True)
    shutil.copy(DEMO, tmp_path / "runs" / "demo-1" / "config.toml")
    done = run(A_RUN.sub("runs/demo-1", command.text), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    [script] = re.findall(r"^submit it with: sbatch (\S+)$", done.stdout, re.MULTILINE)
    subprocess.run(["bash", "-n", script], check=True, timeout=TIMEOUT_S)


@pytest.mark.parametrize("command", of(JOIN), ids=str)
def test_flags_of_an_actor_that_joins_are_understood(command: Command) -> None:
    parser = FlagParser(prog="slime-async actor", allow_abbrev=False)
    add_role_arguments(parser)
    parsed = parser.parse_strictly(shlex.split(command.text)[2:])
    assert parsed.hub == "tcp://HOST:7000"


@pytest.mark.slow
def test_commands_against_a_running_job(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    settings = {"run.steps": "100000", "hub.address": "tcp://0.0.0.0:0", "hub.keys": str(tmp_path / "client-keys")}
    assert run("slime-async keygen client-keys", tmp_path).returncode == 0
    with started(runs, settings) as running:
        running.wait_for("a step", lambda: len(running.steps()) > 0)
        port = (running.path / "hub.address").read_text().rpartition(":")[2]
        for command in of(AGAINST_A_RUN):
            text = A_RUN.sub(f"runs/{running.path.name}", command.text).replace("HOST:7000", f"127.0.0.1:{port}")
            done = run(text, tmp_path)
            assert done.returncode == 0, done.stdout + done.stderr
        running.wait_for("the second actor", lambda: any(e["event"] == "role_added" for e in running.events()))


@pytest.mark.slow
def test_roles_started_by_hand_find_each_other(tmp_path: Path) -> None:
    texts = {str(ROLE.match(command.text)[1]): command.text for command in of(ROLE)}  # type: ignore[index]
    config = tmp_path / "config.toml"
    model = tmp_path / "model"
    make_checkpoint(model, 0)
    shutil.copy(DEMO, config)
    small = flags({**SMALL, "model.path": str(model)})
    processes = []
    try:
        for role in ROLE_ORDER:
            address = (tmp_path / "hub.address").read_text() if role != "hub" else ""
            text = texts[role].replace("CONFIG", str(config)).replace("DIR", str(tmp_path))
            argv = shlex.split(text.replace("tcp://HOST:PORT", address or "none"))[1:]
            log = (tmp_path / f"{role}.log").open("w")
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "slime_async.cli.main", *argv, *small], cwd=ROOT, stdout=log, stderr=log
                )
            )
            log.close()
            _wait_for(tmp_path / "hub.address")
        for process, role in zip(reversed(processes), reversed(ROLE_ORDER), strict=True):
            assert process.wait(TIMEOUT_S) == 0, (tmp_path / f"{role}.log").read_text()
    finally:
        for process in processes:
            process.kill()
            process.wait(TIMEOUT_S)
    assert (tmp_path / "checkpoints" / "final" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("command", of(SCRIPT), ids=str)
def test_a_script(command: Command, tmp_path: Path) -> None:
    """In a copy of the tree; ``scripts/test`` with one small file of tests, as this is part of what it would run."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, files):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name, follow_symlinks=False)
    words = shlex.split(command.text)
    if words[0] == "scripts/demo":
        words += flags(SMALL)
    elif len(words) < 3:
        words += ["tests/test_layout.py"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path} within {TIMEOUT_S} s"
        time.sleep(0.05)
