"""What Ray is asked for; ``scripts/test-ray`` asks a real cluster. Skipped where Ray is not installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from slime_async.cli.launcher import RoleCommand
from slime_async.cli.launchers import make_ray
from slime_async.config import ClusterConfig, Config, ConfigError

LEARNER = RoleCommand("learner", (), ranks=16)


def test_without_ray_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'slime-async\[ray\]'"):
        make_ray(Config(), Path("run"))


@pytest.mark.filterwarnings("ignore")
def test_each_role_reserves_machines_of_its_kind() -> None:
    pytest.importorskip("ray")
    from slime_async.cli.launch_ray import bundles_of, forwarded

    cluster = ClusterConfig(
        actor_gpus=2, actor_gpu_kind="H100", actor_cpus=8, learner_gpus=1, learner_cpus=4, learner_ranks_per_node=8
    )
    assert bundles_of(RoleCommand("actor-0", ()), cluster) == [{"CPU": 8, "GPU": 2, "accelerator_type:H100": 0.001}]
    assert bundles_of(LEARNER, cluster) == [{"CPU": 32, "GPU": 8}] * 2
    assert bundles_of(LEARNER, ClusterConfig()) == [{"CPU": 16}]
    assert forwarded({"NCCL_DEBUG": "WARN", "HOME": "/root"}) == {"NCCL_DEBUG": "WARN"}
