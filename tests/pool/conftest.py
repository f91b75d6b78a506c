"""The checkpoints of the engines' tests."""

from tests.engine.conftest import checkpoints, one_thread

__all__ = ["checkpoints", "one_thread"]
