"""Configuration: typed sections, the TOML file, and flags."""

from slime_async.config.dump import dump_toml
from slime_async.config.errors import ConfigError
from slime_async.config.load import load_config, make_config
from slime_async.config.schema import ClusterConfig, Config, HubConfig

__all__ = ["ClusterConfig", "Config", "ConfigError", "HubConfig", "dump_toml", "load_config", "make_config"]
