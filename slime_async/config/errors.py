"""What the user got wrong, as opposed to what we got wrong."""

from __future__ import annotations


class ConfigError(ValueError):
    """The user's configuration cannot work. The text names the key, its value and the remedy, one problem per line.

    Commands print it without a traceback and exit with code 2; a role that finds out late may raise it too.
    """
