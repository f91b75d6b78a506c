"""The checkpoints of the engines' tests."""

from tests.contract.conftest import checkpoints, one_thread

__all__ = ["checkpoints", "one_thread"]
