"""``slime-async keygen DIR``: CURVE keys, with which every connection is authenticated and encrypted.

The hub's machine needs hub.key and authorized_keys; every other machine hub.pub and its own client's .key file. Take a
line out of authorized_keys and that key cannot connect again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from slime_async.config import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", type=Path, help="where the keys go, for hub.keys; made if missing")
    parser.add_argument(
        "--client", metavar="NAME", action="append", help="a pair for this name, for hub.key; again for more [client]"
    )


def run(parsed: argparse.Namespace) -> int:
    from slime_async.transport.security import make_keys

    directory: Path = parsed.directory
    for client in parsed.client or ["client"]:
        try:
            if make_keys(directory, client):
                print(f"{directory}/hub.key         the hub's secret: stays on the hub's machine")
                print(f"{directory}/hub.pub         the hub's public key: goes to every machine")
        except (ValueError, OSError) as error:
            raise ConfigError(str(error)) from error
        print(f'{directory}/{client}.key      may connect with hub.key = "{client}"; listed in authorized_keys')
    print(f"use them with --hub.keys {directory}")
    return 0
