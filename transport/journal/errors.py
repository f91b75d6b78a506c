"""What can go wrong with a journal; every error names the file and the remedy::

JournalError               a write or read failed (``errno`` says how), or the journal lacks what the run needs
├── JournalCorrupt         bytes on disk are not what was written, or a file is missing
├── JournalInUse           another process has it open
└── JournalVersionError    it was written in another format
"""

from __future__ import annotations

import errno
from pathlib import Path

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class JournalError(RuntimeError):
    """``path``: the file or directory; ``errno``: the system's, or None where no system call failed."""

    def __init__(self, path: Path, problem: str, remedy: str, errno: int | None = None) -> None:
        super().__init__(f"{path}: {problem}: {remedy}")
        self.path = path
        self.problem = problem
        self.remedy = remedy
        self.errno = errno

    @classmethod
    def from_os(cls, path: Path, doing: str, error: OSError) -> JournalError:
        """For a system call that failed. The journal on disk is still whole: what failed was taken back."""
        if error.errno in _NO_SPACE:
            remedy = "make room on this disk (or raise the quota), then start the hub again; it resumes from here"
        else:
            remedy = (
                "see that the disk is mounted, writable and healthy, then start the hub again; it resumes from here"
            )
        return JournalError(path, f"{doing} failed ({error.strerror})", remedy, error.errno)


class JournalCorrupt(JournalError):
    """Never skipped: a run must not go on without something that it was told is safe."""

    def __init__(self, path: Path, problem: str, offset: int | None = None) -> None:
        where = problem if offset is None else f"at byte {offset}: {problem}"
        remedy = "restore the journal's directory from a copy, or start a new run from the last checkpoint"
        super().__init__(path, where, remedy)
        self.offset = offset


class JournalInUse(JournalError):
    """One hub at a time."""


class JournalVersionError(JournalError):
    """Formats are not converted: a run is carried on by the release that began it."""
