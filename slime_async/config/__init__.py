"""Configuration: typed sections, the TOML file, and flags."""

from slime_async.config.dump import dump_toml
from slime_async.config.errors import ConfigError
from slime_async.config.load import load_config, make_config
from slime_async.config.schema import ClusterConfig, Config, HubConfig, RunConfig

__all__ = [
    "ClusterConfig",
    "Config",
    "ConfigError",
    "HubConfig",
    "RunConfig",
    "dump_toml",
    "load_config",
    "make_config",
]
