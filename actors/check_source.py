"""Whether a source is the same sequence whoever builds it: only indices travel between processes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

from slime_async.actors.sources import Source, load_source
from slime_async.config.schema import SourceConfig, TaskConfig

PROBES = 32
"""Tasks compared per source, spread over all of it"""
TIMEOUT_S = 300.0
"""For another process to import and build the sources"""


def check_sources(config: TaskConfig, errors: list[str]) -> None:
    """Append what is wrong with each source. Raises ``ValueError`` for one that cannot be built at all."""
    for name, source in (config.train | config.evaluation).items():
        here = digest(load_source(source))
        if digest(load_source(source)) != here:
            errors.append(f"source {name!r} holds other tasks when it is built again: derive randomness from a seed")
            continue
        elsewhere = _digest_in_another_process(source)
        if elsewhere != here:
            errors.append(
                f"source {name!r} holds other tasks in another process ({elsewhere:.200}): it depends on the clock, on "
                "hash() of a string, on the order of a set or of a folder's files"
            )


def digest(source: Source) -> str:
    """Of the length and of tasks from its whole range."""
    size = len(source)
    picked = sorted({i * (size - 1) // max(1, PROBES - 1) for i in range(min(PROBES, size))})
    text = "\0".join([str(size), *(repr(source[i]) for i in picked)])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _digest_in_another_process(source: SourceConfig) -> str:
    """What ``digest`` gives where strings hash differently; the end of what it said if it failed."""
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    environment = {
        **os.environ,
        "PYTHONHASHSEED": seed,
        "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path),
    }
    command = [sys.executable, "-m", "slime_async.actors.check_source", source.model_dump_json()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"


if __name__ == "__main__":
    sys.stdout.write(digest(load_source(SourceConfig.model_validate_json(sys.argv[1]))) + "\n")
