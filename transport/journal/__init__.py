"""The journal: what makes a hub that was killed go on where it was. Start reading at ``journal``.

=============  ====================================================================================
``journal``    ``Journal``: append, read, release, compact; what each promises
``writer``     ``JournalWriter``: the same for asyncio, several appends in one write
``trail``      the events of a run, for ever; ``read_trail`` is the audit's way in
``payloads``   the trajectories' bytes, deleted when nobody needs them
``placement``  how a payload is a record
``recovery``   what is cut and what is refused after a crash
``segment``    one file; ``records`` is its bytes, without I/O
``lock``       one hub per journal
=============  ====================================================================================
"""

from slime_async.transport.journal.errors import JournalCorrupt, JournalError, JournalInUse, JournalVersionError
from slime_async.transport.journal.journal import Entry, Journal, JournalStatistics, Opened
from slime_async.transport.journal.trail import Position, read_trail
from slime_async.transport.journal.writer import JournalWriter

__all__ = [
    "Entry",
    "Journal",
    "JournalCorrupt",
    "JournalError",
    "JournalInUse",
    "JournalStatistics",
    "JournalVersionError",
    "JournalWriter",
    "Opened",
    "Position",
    "read_trail",
]
