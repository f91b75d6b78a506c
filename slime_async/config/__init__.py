"""Configuration: typed sections, the TOML file, and flags."""

from slime_async.config.schema import Config

__all__ = ["Config"]
