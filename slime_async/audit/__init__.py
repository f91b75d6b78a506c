"""Proof that nothing was lost and nothing trained twice: from what a run wrote down, not from what it believes.

``book`` folds the journal's events again, independently of the queue, and notes whatever cannot be; ``steps`` holds
its batches against the learner's metrics; ``report`` says it. Pure: events and metrics come in as iterables.
"""

from slime_async.audit.book import Book, Violation
from slime_async.audit.report import AuditReport, audit

__all__ = ["AuditReport", "Book", "Violation", "audit"]
