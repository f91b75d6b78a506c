"""The worker process: reads calls from its standard input, runs them, writes results to what was its standard output.

``python -m slime_async.actors.isolation.child``; ``worker.py`` is the other side. It ends when its input ends.
"""

from __future__ import annotations

import importlib
import os
import resource
import signal
import sys
import traceback
from typing import Any, BinaryIO

from slime_async.actors.isolation.frames import LENGTH, pack, unpack
from slime_async.guard import arm


def main() -> None:
    arm()  # user code that never returns would not notice that its input has ended
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the actor, which ends its workers
    calls, results = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what user code prints goes to the actor's log
    setup = _read(calls)
    if setup is None:
        return
    sys.path[:] = setup["path"]
    if setup["memory_bytes"]:
        resource.setrlimit(resource.RLIMIT_AS, (setup["memory_bytes"],) * 2)
    results.write(pack({"ok": os.getpid()}))
    results.flush()
    objects: dict[int, Any] = {}
    while (call := _read(calls)) is not None:
        results.write(_answer(call, objects))
        results.flush()


def _read(stream: BinaryIO) -> Any:
    """The next frame; None at the end."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    return unpack(stream.read(*LENGTH.unpack(head)))


def _answer(call: dict[str, Any], objects: dict[int, Any]) -> bytes:
    try:
        return pack({"ok": _run(call, objects)})
    except MemoryError:
        return pack({"error": "MemoryError", "text": "memory ran out", "trace": ""})
    except Exception as error:  # noqa: BLE001 - the border of a process: the caller is told
        return pack({"error": type(error).__name__, "text": str(error)[:2000], "trace": traceback.format_exc()[-8000:]})


def _run(call: dict[str, Any], objects: dict[int, Any]) -> Any:
    match call["op"]:
        case "call":
            return _find(call["target"])(*call["args"], **call["kwargs"])
        case "open":
            objects[call["id"]] = _find(call["target"])(*call["args"], **call["kwargs"])
            return None
        case "method":
            return getattr(objects[call["id"]], call["name"])(*call["args"], **call["kwargs"])
        case "close":
            closed = objects.pop(call["id"], None)
            if hasattr(closed, "close"):
                closed.close()
            return None
    raise ValueError(f"unknown operation {call['op']!r}")


def _find(target: str) -> Any:
    module, _, name = target.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


if __name__ == "__main__":
    main()
