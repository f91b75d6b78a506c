"""What all launchers share: keys, addresses, runs that go on in their directory, another number of actors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slime_async.addresses import connectable, is_loopback, own_address
from slime_async.cli.launchers import listening_address, with_keys
from slime_async.cli.main import main
from slime_async.cli.resume import resumed_config
from slime_async.cli.run_directory import owned
from slime_async.cli.scale import asked
from slime_async.config import Config, HubConfig, dump_toml
from slime_async.transport.security import client_files, client_security, server_security


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints, none of which is written yet."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    sections = {
        "model": {"path": str(tmp_path / "model")},
        "task": {"train": {"sort": {"factory": "slime_async.demo.sorting:train"}}},
        "evaluation": {"before": False, "after": False},
        "checkpoint": {"interval_steps": 5},
    }
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.toml").write_text(dump_toml(Config.model_validate(sections)))
    return path


def test_a_run_across_machines_gets_keys_that_only_its_owner_can_read(tmp_path: Path) -> None:
    config = with_keys(Config(), tmp_path)
    assert config.hub.keys == tmp_path / "keys"
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "keys").glob("*.key")} == {0o600}
    assert server_security(config.hub) is not None
    assert client_security(config.hub) is not None
    assert with_keys(Config(), tmp_path) == config  # a job that is requeued has the same


def test_whoever_trusts_the_network_gets_no_keys(tmp_path: Path) -> None:
    trusting = Config(hub=HubConfig(insecure=True))
    assert with_keys(trusting, tmp_path) == trusting
    assert list(tmp_path.iterdir()) == []


def test_the_hubs_secret_stays_with_the_hub(tmp_path: Path) -> None:
    config = with_keys(Config(), tmp_path)
    assert config.hub.keys is not None
    assert set(client_files(config.hub.keys, "client")) == {"client.key", "client.pub", "hub.pub"}


def test_a_hub_on_loopback_moves_to_where_others_reach_it() -> None:
    assert listening_address(Config()) == f"tcp://{own_address()}:0"
    given = Config(hub=HubConfig(address="tcp://10.1.2.3:7000", insecure=True))
    assert listening_address(given) == "tcp://10.1.2.3:7000"


def test_addresses_that_others_connect_to_name_a_machine() -> None:
    assert connectable("tcp://0.0.0.0:7000") == f"tcp://{own_address()}:7000"
    assert connectable("tcp://10.1.2.3:7000") == "tcp://10.1.2.3:7000"
    assert own_address("tcp://127.0.0.1:7000") == "127.0.0.1"
    assert is_loopback(f"tcp://{own_address('tcp://127.0.0.1:1')}:1")


def test_a_run_ended_before_its_first_checkpoint_begins_with_its_model_again(run: Path) -> None:
    assert resumed_config(run, {}).checkpoint.interval_steps == 5


def test_a_finished_run_is_not_begun_again_by_a_job_that_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "summary.json").write_text(json.dumps({"outcome": "finished"}))
    assert main(["train", str(run / "config.toml"), "--run-directory", str(run)]) == 0
    assert "has finished: nothing to do" in capsys.readouterr().out


def test_scaling_asks_the_launcher_that_runs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", str(run), "3"]) == 2
    assert "no launcher runs in" in capsys.readouterr().err
    with owned(run):
        assert main(["scale", str(run), "3"]) == 0
        assert main(["scale", str(run), "-1"]) == 2
    assert asked(run) == 3
