"""Which launcher a run has, and what a run that spans machines needs of its configuration."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from slime_async.addresses import is_loopback, own_address
from slime_async.cli.launch_local import LocalLauncher
from slime_async.cli.launcher import Launcher
from slime_async.config import Config, ConfigError

LauncherName = Literal["local", "slurm", "ray"]
LAUNCHERS: tuple[LauncherName, ...] = get_args(LauncherName)
KEYS = "keys"
"""In the run's directory"""

MakeLauncher = Callable[[Config, Path], Launcher]
"""(config, run directory)"""


def make_local(_config: Config, directory: Path) -> Launcher:
    """Processes of this machine."""
    return LocalLauncher(directory / "logs")


def make_slurm(config: Config, directory: Path) -> Launcher:
    """Steps of the Slurm job that this runs in."""
    from slime_async.cli.launch_slurm import SlurmLauncher

    return SlurmLauncher(config, directory / "logs")


def make_ray(config: Config, directory: Path) -> Launcher:
    """Ray actors of the cluster that RAY_ADDRESS names."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("--launcher ray, but ray is not installed: pip install 'slime-async[ray]'")
    from slime_async.cli.launch_ray import RayLauncher

    return RayLauncher.connect(config, directory / "logs")


def maker_of(name: LauncherName) -> MakeLauncher:
    makers: dict[LauncherName, MakeLauncher] = {"local": make_local, "slurm": make_slurm, "ray": make_ray}
    return makers[name]


def listening_address(config: Config) -> str:
    """Where the hub of a run that spans machines listens: not on loopback, but on this machine's own address."""
    return f"tcp://{own_address()}:0" if is_loopback(config.hub.address) else config.hub.address


def with_keys(config: Config, directory: Path) -> Config:
    """The same run, authenticated: without ``hub.keys`` or ``hub.insecure``, keys are made in the run's directory.

    They are readable by their owner alone.
    """
    hub = config.hub
    if hub.keys is not None:
        hub = hub.model_copy(update={"keys": hub.keys.resolve()})
    elif not hub.insecure:
        hub = hub.model_copy(update={"keys": own_keys(directory / KEYS, hub.key)})
    return config.model_copy(update={"hub": hub})


def own_keys(keys: Path, client: str) -> Path:
    """The run's keys, made at its first start."""
    from slime_async.transport.security import make_keys

    if not (keys / f"{client}.key").exists():
        make_keys(keys, client)
    return keys.resolve()
