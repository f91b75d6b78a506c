"""The ``slime-async`` command as users meet it: flags, help, errors and exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slime_async import __version__
from slime_async.cli.flags import FlagParser, add_config_flags, overrides
from slime_async.cli.main import COMMANDS, main
from slime_async.config import ConfigError
from slime_async.config.fields import PASS_THROUGH, fields
from slime_async.config.load import Key

HEAVY = ("torch", "megatron", "sglang", "transformers", "zmq", "rich")

WITHOUT_CONFIG = {"audit", "doctor", "keygen", "plan", "report", "scale", "simulate", "top"}
"""Commands that are given no configuration"""


def parse(*flags: str) -> dict[Key, Any]:
    parser = FlagParser(prog="slime-async train", allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG")
    add_config_flags(parser)
    return overrides(parser.parse_strictly(["demo.toml", *flags]))


FLAGS: list[tuple[list[str], dict[Key, Any]]] = [
    (["--learner.learning-rate", "1e-4"], {("learner", "learning_rate"): 1e-4}),
    (["--learner.learning_rate=1e-4"], {("learner", "learning_rate"): 1e-4}),
    (["--sampling.top-k", "-1"], {("sampling", "top_k"): -1}),
    (["--run.name", "12"], {("run", "name"): "12"}),
    (["--run.name='a b'"], {("run", "name"): "a b"}),
    (["--weights.pause", "abort"], {("weights", "pause"): "abort"}),
    (["--run.deterministic"], {("run", "deterministic"): True}),
    (["--task.shuffle", "false"], {("task", "shuffle"): False}),
    (["--model.path", "a_b:c-d"], {("model", "path"): "a_b:c-d"}),
    (["--task.train.my-sums.weight", "2"], {("task", "train", "my-sums", "weight"): 2}),
    (["--task.train", '{a = {factory = "x:y"}}'], {("task", "train"): {"a": {"factory": "x:y"}}}),
    (["--sglang-mem-fraction-static", "0.8"], {("sglang", "mem_fraction_static"): 0.8}),
    (["--sglang_attention_backend=fa3"], {("sglang", "attention_backend"): "fa3"}),
    (["--sglang-disable-overlap-schedule"], {("sglang", "disable_overlap_schedule"): True}),
    (["--megatron-tensor-model-parallel-size", "2"], {("megatron", "tensor_model_parallel_size"): 2}),
    (["--megatron-bf16", "True", "--megatron-x", "[1, 2]"], {("megatron", "bf16"): True, ("megatron", "x"): [1, 2]}),
]


@pytest.mark.parametrize(("flags", "wanted"), FLAGS, ids=[" ".join(flags) for flags, _ in FLAGS])
def test_a_flag_sets_its_key(flags: list[str], wanted: dict[Key, Any]) -> None:
    assert parse(*flags) == wanted


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "--staleness.max-stalenes=3",
            "unknown flag --staleness.max-stalenes: did you mean --staleness.max-staleness?",
        ),
        ("--seed=3", "unknown flag --seed: did you mean --run.seed?"),
        ("--qqq", "unknown flag --qqq: slime-async train --help lists all"),
        ("--run.steps", "argument --run.steps: expected one argument"),
        ("surplus", "unexpected argument 'surplus'"),
    ],
)
def test_a_wrong_flag_is_told_with_the_right_one(flag: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(flag)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - WITHOUT_CONFIG))
def test_every_command_with_a_configuration_has_a_help_with_every_field(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    text = capsys.readouterr().out
    for field in fields():
        assert f"--{field.key.replace('_', '-')}{'-' if field.name in PASS_THROUGH else ''}" in text
    assert "no token that is older than this many" in " ".join(text.split())


def test_help_and_errors_load_nothing_heavy() -> None:
    code = (
        "import sys; from slime_async.cli.main import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"slime-async {__version__}\n"


def test_user_errors_are_lines_on_stderr_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "demo.toml"
    path.write_text("[run]\nsteps = 0\n[stalness]\n")
    assert main(["train", str(path)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert all(line.startswith("slime-async: ") for line in errors)
    assert main(["trian"]) == 2
    assert "invalid choice: 'trian'" in capsys.readouterr().err


def test_a_missing_module_is_told_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "demo.toml"
    path.write_text(
        f"run.directory = '{tmp_path / 'runs'}'\nmodel.path = 'absent_package.x:y'\n"
        "task.train.a.factory = 'json:loads'\nevaluation = {before = false, after = false}\n"
    )
    assert main(["train", str(path)]) == 2
    assert "model.path = 'absent_package.x:y': there is no module absent_package" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_evaluating_something_else_than_a_checkpoint_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "demo.toml"
    path.write_text("model.path = 'a:b'\ntask.train.a.factory = 'a:b'\ntask.evaluation.b.factory = 'a:b'\n")
    assert main(["eval", str(tmp_path), "--config", str(path)]) == 2
    assert "is no checkpoint: it has no config.json" in capsys.readouterr().err
    assert main(["eval", str(tmp_path), "--config", str(path), "--source", "c"]) == 2
    assert "--source c:" in capsys.readouterr().err
