"""``slime-async top``"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(parsed: argparse.Namespace) -> int:
    return 0
