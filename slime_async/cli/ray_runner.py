"""What Ray runs on a machine for a role: its processes, one life after the other."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from slime_async.addresses import own_address
from slime_async.cli.launch_local import LocalLauncher, LocalProcess
from slime_async.cli.launcher import RoleCommand, torchrun

KEYS_FLAG = "--hub.keys"


class RoleRunner:
    """A Ray actor in the place of one role; with it die the processes that it started."""

    def __init__(self, log_directory: str, directory: str) -> None:
        """``directory`` is the driver's, and the roles' too where this machine has it."""
        if Path(directory).is_dir():
            os.chdir(directory)
        self._launcher = LocalLauncher(Path(log_directory))
        self._process: LocalProcess | None = None

    async def address(self) -> str:
        """This machine's; also the answer to whether it is there."""
        return own_address()

    async def run(
        self, command: RoleCommand, rendezvous: tuple[str, ...], keys: Mapping[str, bytes] | None = None
    ) -> int:
        """One life, to its exit code. ``rendezvous`` are torchrun's options on several machines; ``keys`` files."""
        with tempfile.TemporaryDirectory(prefix="slime-async-keys-") as private:
            for name, content in (keys or {}).items():
                path = Path(private) / name
                path.touch(mode=0o600)
                path.write_bytes(content)
            flags = () if keys is None else (KEYS_FLAG, private)
            start = ("-m", "torch.distributed.run", *rendezvous) if rendezvous else torchrun(command.ranks)
            self._process = await self._launcher.run(command, (sys.executable, *start, *command.arguments, *flags))
            return await self._process.wait()

    async def leave(self) -> None:
        if self._process is not None and not self._process.ended:
            await self._process.leave()

    async def stop(self) -> None:
        await self._launcher.stop()
