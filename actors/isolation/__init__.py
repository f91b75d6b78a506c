"""Slow or unreliable functions and environments in processes of their own, with limits of time and memory."""

from slime_async.actors.isolation.pool import Remote, WorkerPool
from slime_async.actors.isolation.worker import WorkerError

__all__ = ["Remote", "WorkerError", "WorkerPool"]
