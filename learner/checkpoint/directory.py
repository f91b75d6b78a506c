"""Where a run's checkpoints lie, and which of them counts.

::

    RUN/incarnation              counts the learner's starts
    RUN/checkpoints/latest       names the newest complete checkpoint
        version-00000120/        complete
        version-00000140.partial being written, or left behind by a learner that was killed
        version-00000080.old     being removed

A checkpoint is written under a name that does not count, brought to the disk, renamed, and only then named in
``latest``, which is replaced in one step itself: it never names anything half-written. What a killed learner left,
and whatever is newer than ``latest``, goes at the next start. Only rank 0 changes anything here.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

LATEST = "latest"
PARTIAL = ".partial"
OLD = ".old"
_PREFIX = "version-"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or cannot be gone on from. The text says which, why, and what to do."""


class CheckpointDirectory:
    """The checkpoints of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def of(self, version: int) -> Path:
        """Where the checkpoint of ``version`` lies once it is complete."""
        return self.path / f"{_PREFIX}{version:08d}"

    def partial(self, version: int) -> Path:
        """Where it is written."""
        return self.of(version).with_suffix(PARTIAL)

    def latest(self) -> int | None:
        """The version of the newest complete checkpoint. Raises ``CheckpointError`` when it was taken away."""
        try:
            name = (self.path / LATEST).read_text().strip()
        except FileNotFoundError:
            return None
        if not (self.path / name).is_dir() or not name.startswith(_PREFIX):
            raise CheckpointError(
                f"{self.path / LATEST} names {name!r}, which is not there: write the name of another checkpoint into it"
            )
        return int(name.removeprefix(_PREFIX))

    def versions(self) -> list[int]:
        """Those that are complete, ascending."""
        names = (path.name for path in self._entries() if path.is_dir() and not path.suffix)
        return sorted(int(name.removeprefix(_PREFIX)) for name in names)

    def clean(self) -> None:
        """Remove what a killed learner left behind; call it when no learner is running."""
        latest = self.latest()
        for path in list(self._entries()):
            if path.suffix in (PARTIAL, OLD):
                shutil.rmtree(path)
        for version in self.versions():
            if latest is None or version > latest:
                self._remove(version)

    def begin(self, version: int) -> None:
        """Make the empty directory in which the checkpoint of ``version`` is to be written."""
        partial = self.partial(version)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)

    def complete(self, version: int, keep: int) -> None:
        """What was written is a checkpoint from now on, the latest one; all but the last ``keep`` are removed."""
        partial, final = self.partial(version), self.of(version)
        for path in [*partial.rglob("*"), partial]:
            _sync(path)
        if final.exists():  # trained again from an older one, which somebody wrote into ``latest``
            self._remove(version)
        os.rename(partial, final)
        _sync(self.path)
        replace_text(self.path / LATEST, final.name + "\n")
        for superseded in self.versions()[:-keep]:
            self._remove(superseded)

    def _remove(self, version: int) -> None:
        """At no time is there a half of it under a name that counts."""
        old = self.of(version).with_suffix(OLD)
        os.rename(self.of(version), old)
        shutil.rmtree(old)

    def _entries(self) -> Iterator[Path]:
        return self.path.glob(f"{_PREFIX}*")


def next_incarnation(run: Path) -> int:
    """One more than ever before in this run: no two starts share a number, whichever checkpoint they begin with."""
    run.mkdir(parents=True, exist_ok=True)
    path = run / "incarnation"
    last = int(path.read_text()) if path.exists() else 0
    replace_text(path, f"{last + 1}\n")
    return last + 1


def replace_text(path: Path, text: str) -> None:
    """``path`` holds the old text or the new one, whatever happens meanwhile."""
    temporary = path.with_name(path.name + PARTIAL)
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Bring a file, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
